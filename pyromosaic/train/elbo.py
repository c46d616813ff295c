"""The evidence lower bound of a mosaic: mean-field, on the device throughout, with each site's part kept apart."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence


class MosaicELBO(TraceMeanField_ELBO):
    """`pyro.infer.TraceMeanField_ELBO` with the parts of the loss, and without what costs time.

    That is copies from device to host, and log densities of latent variables where their divergence has a formula.

    The loss is that of `TraceMeanField_ELBO`: minus the log-likelihood of observed sites, plus the Kullback-Leibler
    divergence of latent sites (analytic where there is a formula), plus the factors of the guide. After each call
    `terms` maps every site to its part, detached, and `latent` those that are divergences to their weight
    (`pyromosaic.program.weighted`); penalties are the
    sites whose name begins with ``"penalty/"``.

    As a latent site's analytic divergence takes scale and mask from the guide alone, scales that differ between model
    and guide are refused while Pyro's validation is on.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0])
    >>> model, elbo = MultiVI(mosaic), MosaicELBO()
    >>> loss = elbo.loss(model.model, model.guide, measured(mosaic, mosaic.find(None)))
    >>> list(elbo.terms), list(elbo.latent)
    (['z', 'rna', 'adt_background', 'adt', 'penalty/jeffreys', 'penalty/mmd'], ['z', 'adt_background'])
    >>> round(loss / float(sum(elbo.terms.values())), 3)
    1.0
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
        model_trace.compute_log_prob(lambda name, site: site["is_observed"])
        guide_trace.compute_log_prob(lambda name, site: name not in model_trace.nodes)
        terms = {}
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and not site["fn"].has_rsample:
                raise NotImplementedError(f"site {name!r} of the guide has no reparametrised samples")
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                self._check(site)
                terms[name] = -site["log_prob_sum"]
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
            self._check({**site, "log_prob": divergence})
            terms[name] = scale_and_mask(divergence, guide_site["scale"], guide_site["mask"]).sum()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                self._check(site)
                terms[name] = site["log_prob_sum"]
                # of an automatic guide, not a penalty: the other part of a divergence
                if site["infer"].get("is_auxiliary") and not isinstance(site["fn"], Unit):
                    self.latent[name] = 1.0
        return terms

    def _check(self, site: Any) -> None:
        if is_validation_enabled():
            check_site_shape(site, self.max_plate_nesting)


def _analytic_divergence(posterior: Any, prior: Any) -> Tensor | None:
    """The Kullback-Leibler divergence where there is a formula for it."""
    if isinstance(posterior, Delta):  # Pyro's formula leaves out the density that it may carry
        return None
    try:
        divergence: Tensor = kl_divergence(posterior, prior)
    except NotImplementedError:
        return None
    return divergence
