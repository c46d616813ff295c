"""Likelihoods: from the predictors of a decoder to the observed site of a modality.

A likelihood names its predictors (the decoder has one head for each), owns the feature-level parameters, and computes
initial values from the data. `Likelihood.forward` is part of the model, inside the plates of the modality's cells (dim
-2) and features (dim -1). A likelihood with latent variables also has `Likelihood.posterior`, which is part of the
guide.

To write a likelihood, subclass `Likelihood` or one of the classes below, and pass the class to
`pyromosaic.ModalitySpec` in place of a name.
"""

from collections.abc import Mapping
from typing import Any

from pyromosaic.data import Schema
from pyromosaic.likelihoods.accessibility import Bernoulli
from pyromosaic.likelihoods.continuous import ZIG, ZILN, Log1pNormalLikelihood, Normal
from pyromosaic.likelihoods.likelihood import CountLikelihood, Likelihood, Predictors, logit
from pyromosaic.likelihoods.protein import NBMixture, two_normals
from pyromosaic.likelihoods.rna import NB, ZINB, MultinomialLikelihood, PoissonLikelihood
from pyromosaic.nn import Decoder

__all__ = [
    "Bernoulli",
    "CountLikelihood",
    "LIKELIHOODS",
    "Likelihood",
    "Log1pNormalLikelihood",
    "MultinomialLikelihood",
    "NB",
    "NBMixture",
    "Normal",
    "PoissonLikelihood",
    "Predictors",
    "ZIG",
    "ZILN",
    "ZINB",
    "likelihoods_of",
    "logit",
    "posterior_decoders",
    "two_normals",
]

#: The likelihood behind each name that a `ModalitySpec` accepts.
LIKELIHOODS: Mapping[str, type[Likelihood]] = {
    likelihood.family: likelihood
    for likelihood in (
        *(NB, ZINB, MultinomialLikelihood, PoissonLikelihood, NBMixture, Bernoulli),
        *(Normal, Log1pNormalLikelihood, ZILN, ZIG),
    )
}


def likelihoods_of(schema: Schema) -> dict[str, Any]:
    """The likelihood of each modality, by name or from the user's class.

    Parameters
    ----------
    schema
        The modalities.

    Returns
    -------
    dict
        Likelihoods by modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50, "adt": 5})[0])
    >>> {name: type(likelihood).__name__ for name, likelihood in likelihoods_of(mosaic.schema).items()}
    {'rna': 'NB', 'adt': 'NBMixture'}
    """
    made: dict[str, Any] = {}
    for name, modality in schema.modalities.items():
        likelihood: Any = modality.spec.likelihood
        made[name] = LIKELIHOODS[likelihood](modality) if isinstance(likelihood, str) else likelihood(modality)
    return made


def posterior_decoders(
    schema: Schema,
    likelihoods: Mapping[str, Any],
    width: Mapping[str, int],
    n_hidden: int,
    n_layers: int = 1,
    embedding: int = 0,
) -> dict[str, Decoder]:
    """Decoders in the guide, for the posteriors of the latent variables of likelihoods.

    Parameters
    ----------
    schema
        The modalities.
    likelihoods
        Likelihoods by modality.
    width
        By modality, the dimension of the latent variables that the decoder receives.
    n_hidden, n_layers, embedding
        See `pyromosaic.nn.Decoder`.

    Returns
    -------
    dict
        Decoders by modality, for likelihoods with `Likelihood.posterior_predictors`.
    """
    heads = {name: likelihood.posterior_predictors for name, likelihood in likelihoods.items()}
    return {
        name: Decoder(schema[name], predictors, width[name], n_hidden, n_layers, embedding=embedding)
        for name, predictors in heads.items()
        if predictors
    }
