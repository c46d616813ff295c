"""Likelihoods of single-cell data as Pyro distributions: exact ``log_prob``, ``sample``, ``mean`` and ``variance``."""

from pyro.distributions import Normal

from pyromosaic.distributions.accessibility import AccessibilityBernoulli
from pyromosaic.distributions.background import MarginalNegativeBinomialMixture
from pyromosaic.distributions.continuous import Log1pNormal, ZeroInflatedGamma, ZeroInflatedLogNormal
from pyromosaic.distributions.counts import (
    NegativeBinomial,
    NegativeBinomialMixture,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from pyromosaic.distributions.multinomial import Multinomial

__all__ = [
    "AccessibilityBernoulli",
    "Log1pNormal",
    "MarginalNegativeBinomialMixture",
    "Multinomial",
    "NegativeBinomial",
    "NegativeBinomialMixture",
    "Normal",
    "Poisson",
    "ZeroInflatedGamma",
    "ZeroInflatedLogNormal",
    "ZeroInflatedNegativeBinomial",
]
