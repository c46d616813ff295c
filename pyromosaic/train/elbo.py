"""The evidence lower bound of a mosaic: mean-field, on the device throughout, with each site's part kept apart."""

from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import check_fully_reparametrized, is_validation_enabled
from torch import Tensor
from torch.distributions import kl_divergence


class MosaicELBO(TraceMeanField_ELBO):
    """`pyro.infer.TraceMeanField_ELBO` without its copies from device to host, and with the parts of the loss.

    The loss is that of `TraceMeanField_ELBO`: minus the log-likelihood of observed sites, plus the Kullback-Leibler
    divergence of latent sites (analytic where there is a formula), plus the factors of the guide. After each call
    `terms` maps every site to its part, detached, and `latent` those that are divergences to their weight
    (`pyromosaic.program.weighted`); penalties are the
    sites whose name begins with ``"penalty/"``.

    As a latent site's analytic divergence takes scale and mask from the guide alone, scales that differ between model
    and guide are refused while Pyro's validation is on.
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
        return float(loss)

    def _terms(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> dict[str, Tensor]:
        terms = {}
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                terms[name] = -site["log_prob_sum"]
                continue
            if name not in guide_trace.nodes:
                raise ValueError(
                    f"the model's latent site {name!r} (shape {tuple(site['value'].shape)}) is missing from the guide"
                )
            guide_site = guide_trace.nodes[name]
            self.latent[name] = guide_site["infer"].get("weight", 1.0)
            if is_validation_enabled():
                check_fully_reparametrized(guide_site)
                if not torch.equal(torch.as_tensor(site["scale"]), torch.as_tensor(guide_site["scale"])):
                    raise ValueError(
                        f"site {name!r} is scaled by {site['scale']} in the model and by {guide_site['scale']} in the "
                        "guide; both must be the same"
                    )
            try:
                divergence = kl_divergence(guide_site["fn"], site["fn"])
            except NotImplementedError:
                terms[name] = guide_site["score_parts"].entropy_term.sum() - site["log_prob_sum"]
            else:
                terms[name] = scale_and_mask(divergence, guide_site["scale"], guide_site["mask"]).sum()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                terms[name] = site["score_parts"].entropy_term.sum()
        return terms
