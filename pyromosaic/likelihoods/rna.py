"""RNA counts, and other counts modelled as proportions of a cell's total, e.g. chromatin fragments."""

import torch
from pyro import distributions as dist
from torch import Tensor

from pyromosaic.data import TRAITS, ModalitySchema, View
from pyromosaic.distributions import (
    Multinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from pyromosaic.likelihoods.likelihood import CountLikelihood, Predictors


class NB(CountLikelihood):
    """RNA counts: ``x ~ NB(mean = l * softmax(rate), theta)`` with cell size l and theta per gene (MultiVI, Methods).

    Parameters
    ----------
    schema
        The modality.
    """

    family = "nb"
    traits = TRAITS["nb"]
    predictors: tuple[str, ...] = ("rate",)

    def start(self, view: View) -> dict[str, Tensor]:
        """Initialise at the mean profile of the cells; theta stays at 1."""
        counts = view.dense_counts()
        total = counts.sum(0)
        if view.measured is not None:  # as if the cells that lack a feature had it at the same rate
            total = total * view.library.sum() / (view.measured * view.library).sum(0).clamp_min(1e-8)
        return {"rate": torch.log((total + 0.5) / (total + 0.5).sum())}

    def mean(self, predictors: Predictors, view: View) -> Tensor:
        """Expected counts.

        The size of a cell is known from its measured features only. Therefore it is the counts of these that the
        program shares out among them.
        """
        rate = predictors["rate"]
        if view.measured is None or view.share is None:
            return view.library * torch.softmax(rate, dim=-1)
        rate = rate - self.level(predictors, view.measured, view.share)["rate"]
        if view.counts is not None:
            rate = rate.masked_fill(~view.measured, -torch.inf)
        return view.library * rate.exp()

    def level(self, predictors: Predictors, features: Tensor, share: Tensor) -> dict[str, Tensor]:
        """Logarithm of the sum over some features divided by their expected share."""
        total = predictors["rate"].masked_fill(~features, -torch.inf).logsumexp(-1, keepdim=True)
        return {"rate": total - share.log()}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Negative binomial of every cell and gene."""
        return NegativeBinomial(self.mean(predictors, view), self.theta(view))


class ZINB(NB):
    """RNA counts with structural zeros: 0 with probability ``sigmoid(gate)``, else as `NB`.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "zinb"
    traits = TRAITS["zinb"]
    predictors = ("rate", "gate")

    def start(self, view: View) -> dict[str, Tensor]:
        """Initialise at the mean profile of the cells, with few structural zeros."""
        return {**super().start(view), "gate": torch.full((self.schema.n_features,), -3.0)}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Zero-inflated negative binomial of every cell and gene."""
        return ZeroInflatedNegativeBinomial(
            self.mean(predictors, view), self.theta(view), gate_logits=predictors["gate"]
        )


class MultinomialLikelihood(NB):
    """Counts given a cell's total: ``x ~ Multinomial(l, softmax(rate))`` (Cobolt; Gong et al. 2021).

    It models only the proportions: there is no dispersion, and the total is not random.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "multinomial"
    traits = TRAITS["multinomial"]

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        del self.log_theta  # a multinomial has no inverse dispersion

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Multinomial of every cell; its total is that of the measured features."""
        rate, library = predictors["rate"], view.library
        if view.measured is not None and view.share is not None:
            if view.counts is not None:
                rate, library = rate.masked_fill(~view.measured, -1e4), library * view.share
            else:
                level = self.level(predictors, view.measured, view.share)["rate"]
                library = library * (rate.logsumexp(-1, keepdim=True) - level).exp()
        return Multinomial(library, rate)


class PoissonLikelihood(NB):
    """Chromatin fragments: ``x ~ Poisson(l * softmax(rate))`` with the cell's fragments l (Martens et al. 2024).

    The bias of the decoder describes the width and accessibility of each region. For `NB`, fragments have an inverse
    dispersion theta per region besides. If the data are cut sites, set ``cut_sites=True`` in the
    `pyromosaic.ModalitySpec`.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "poisson"
    traits = TRAITS["poisson"]

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        del self.log_theta  # a Poisson distribution has no inverse dispersion

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Poisson of every cell and region."""
        return Poisson(self.mean(predictors, view))
