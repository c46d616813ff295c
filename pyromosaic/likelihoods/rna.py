"""RNA counts, and other counts modelled as proportions of a cell's total."""

import torch
from pyro import distributions as dist
from torch import Tensor

from pyromosaic.data import TRAITS, ModalitySchema, View
from pyromosaic.distributions import (
    Multinomial,
    NegativeBinomial,
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
        total = view.dense_counts().sum(0)
        return {"rate": torch.log((total + 0.5) / (total + 0.5).sum())}

    def mean(self, predictors: Predictors, view: View) -> Tensor:
        """Expected counts."""
        return view.library * torch.softmax(predictors["rate"], dim=-1)

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
        """Multinomial of every cell."""
        return Multinomial(view.library, predictors["rate"])
