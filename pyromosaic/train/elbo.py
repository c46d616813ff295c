"""The evidence lower bound of a mosaic: mean-field, always on the device, with the part of each site kept apart."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor
from torch.distributions import kl_divergence


class MosaicELBO(TraceMeanField_ELBO):
    """`pyro.infer.TraceMeanField_ELBO` with the parts of the loss, and without what costs time.

    It avoids copies from device to host, and log densities of latent variables whose divergence has a formula.

    The loss is that of `TraceMeanField_ELBO`: minus the log-likelihood of observed sites, plus the Kullback-Leibler
    divergence of latent sites (analytic where there is a formula), plus the factors of the guide. After each call
    `terms` maps every site to its part, detached, and `latent` those that are divergences to their weight
    (`pyromosaic.program.weighted`); penalties are the sites whose name begins with ``"penalty/"``.

    The analytic divergence of a latent site takes scale and mask from the guide alone. Therefore scales that differ
    between model and guide are refused while Pyro's validation is on.
    """

    terms: dict[str, Tensor]
    latent: dict[str, float]

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a scalar with gradient."""
        self.terms, self.latent = {}, {}
        loss = torch.zeros(())
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            for name, term in self._terms(model_trace, guide_trace).items():
                loss = loss.to(term.device) + term / self.num_particles
                self.terms[name] = self.terms.get(name, 0.0) + term.detach() / self.num_particles
        return loss

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradient."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, after adding its gradient to the parameters; this is what `pyro.infer.SVI` calls."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[poutine.Trace, poutine.Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)

    def _terms(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> dict[str, Tensor]:
        terms = {}
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and not site["fn"].has_rsample:
                raise NotImplementedError(f"site {name!r} of the guide has no reparametrised samples")
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                terms[name] = -self._log_prob(site)
                continue
            if name not in guide_trace.nodes:
                raise ValueError(
                    f"the model's latent site {name!r} (shape {tuple(site['value'].shape)}) is missing from the guide"
                )
            guide_site = guide_trace.nodes[name]
            self.latent[name] = guide_site["infer"].get("weight", 1.0)
            if is_validation_enabled():
                if not torch.equal(torch.as_tensor(site["scale"]), torch.as_tensor(guide_site["scale"])):
                    raise ValueError(
                        f"site {name!r} is scaled by {site['scale']} in the model and by {guide_site['scale']} in the "
                        "guide; both must be the same"
                    )
            divergence = _analytic_divergence(guide_site["fn"], site["fn"])
            if divergence is None:
                divergence = guide_site["fn"].log_prob(guide_site["value"]) - site["fn"].log_prob(site["value"])
            terms[name] = self._sum(divergence, guide_site)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                terms[name] = self._log_prob(site)
                # of an automatic guide, not a penalty: the other part of a divergence
                if site["infer"].get("is_auxiliary") and not isinstance(site["fn"], Unit):
                    self.latent[name] = 1.0
        return terms

    def _log_prob(self, site: Any) -> Tensor:
        try:
            values = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except ValueError as error:
            raise ValueError(f"site {site['name']!r} cannot be evaluated: {error}") from error
        return self._sum(values, site)

    def _sum(self, values: Tensor, site: Any) -> Tensor:
        """Sum of a site's values over its plates, scaled and masked."""
        if is_validation_enabled():
            check_site_shape({**site, "log_prob": values}, self.max_plate_nesting)
            warn_if_nan(values, f"a term of site {site['name']!r}")
        if site["mask"] is None and torch.as_tensor(site["scale"]).dim() == 0:  # once instead of for every value
            return values.sum() * site["scale"]
        return scale_and_mask(values, site["scale"], site["mask"]).sum()


def _analytic_divergence(posterior: Any, prior: Any) -> Tensor | None:
    """The Kullback-Leibler divergence if there is a formula for it."""
    if isinstance(posterior, Delta):  # Pyro's formula leaves out the density that it may carry
        return None
    try:
        divergence: Tensor = kl_divergence(posterior, prior)
    except NotImplementedError:
        return None
    return divergence
