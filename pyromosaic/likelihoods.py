"""Likelihoods: from a decoder's predictors to the observed site of a modality.

A likelihood names the predictors it needs (the decoder has one head each), owns the feature-level parameters, and says
where training should start given the data. `Likelihood.forward` stands in the model, inside the plates of the
modality's cells (dim -2) and features (dim -1); a likelihood with latent variables of its own also has
`Likelihood.posterior`, which stands in the guide.

A likelihood of your own is a subclass of `Likelihood`, or of one of those below; `pyromosaic.ModalitySpec` takes the
class in place of a name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyromosaic.data import TRAITS, DataKind, ModalitySchema, Schema, Traits, View
from pyromosaic.distributions import (
    AccessibilityBernoulli,
    Log1pNormal,
    Multinomial,
    NegativeBinomial,
    NegativeBinomialMixture,
    ZeroInflatedGamma,
    ZeroInflatedLogNormal,
    ZeroInflatedNegativeBinomial,
)
from pyromosaic.program import weighted

Predictors = Mapping[str, Tensor]


def logit(p: Tensor) -> Tensor:
    """Log odds of a probability, kept away from 0 and 1.

    Parameters
    ----------
    p
        Probabilities, of any shape.

    Returns
    -------
    Tensor
        Log odds in nats, of the same shape.

    Examples
    --------
    >>> logit(torch.tensor([0.5, 0.9]))
    tensor([0.0000, 2.1972])
    """
    return torch.logit(p, eps=1e-6)


class Likelihood(PyroModule):
    """What all likelihoods share; a subclass defines `distribution` and names its `predictors`.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    Methylation: methylated counts out of a coverage, which is another layer of the data.

    >>> from pyro import distributions as dist
    >>> from pyromosaic import ModalitySpec
    >>> class Binomial(Likelihood):
    ...     data_kind = "count"
    ...     predictors = ("level",)
    ...
    ...     def distribution(self, predictors, view):
    ...         return dist.Binomial(view.exposure, logits=predictors["level"])
    >>> spec = ModalitySpec(Binomial, exposure_layer="coverage")
    """

    family: ClassVar[str] = ""  # the name that `pyromosaic.ModalitySpec` takes; empty for a likelihood of one's own
    traits: ClassVar[Traits] = Traits()  # what kind of measurement it describes
    data_kind: ClassVar[DataKind]  # all that most likelihoods of one's own need to say of their traits
    predictors: tuple[str, ...] = ()  # heads of the model's decoder
    posterior_predictors: tuple[str, ...] = ()  # heads of the guide's decoder, for latent variables of its own

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "data_kind" in vars(cls) and "traits" not in vars(cls):
            cls.traits = replace(cls.traits, kind=cls.data_kind)

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__()
        self.schema = schema

    def start(self, view: View) -> dict[str, Tensor]:
        """Set feature-level parameters from data and return start values of the decoders' biases by predictor."""
        return {}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Distribution of the measurements, batch shape (..., b, features)."""
        raise TypeError(f"{type(self).__name__} does not define distribution()")

    def forward(self, name: str, predictors: Predictors, view: View, kl_weight: float = 1.0) -> None:
        """The generative story of the modality: its observed site, named after the modality."""
        pyro.sample(name, self.distribution(predictors, view), obs=view.counts)

    def normalized(self, distribution: dist.TorchDistribution) -> Tensor:
        """The biological signal in a distribution that was made for a cell of size 1."""
        return distribution.mean

    def cell_factor(self, view: View) -> Tensor:
        """What the signal of each cell is multiplied by, shape (b, 1)."""
        return torch.ones_like(view.library)


class CountLikelihood(Likelihood):
    """What negative binomial likelihoods share: sizes of cells, and the inverse dispersion theta.

    theta is one number a feature, or one a feature and batch or label; where a cell's batch or label is not known, the
    geometric mean over them.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, ModalitySpec, simulate
    >>> from pyromosaic.data import measured
    >>> spec = ModalitySpec("nb", batch_key="batch", dispersion="gene-batch")
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0], {"rna": spec})
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> likelihood = CountLikelihood(mosaic.schema["rna"])
    >>> likelihood.log_theta.shape, likelihood.theta(view).shape
    (torch.Size([2, 50]), torch.Size([40, 50]))
    """

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_theta = nn.Parameter(torch.zeros(*schema.dispersion_shape))

    def theta(self, view: View) -> Tensor:
        """Inverse dispersion, of a shape that broadcasts with (b, features)."""
        if self.schema.spec.dispersion == "gene":
            return self.log_theta.exp()
        if self.schema.spec.dispersion == "gene-batch":
            return (view.one_hot() @ self.log_theta).exp()
        return (view.one_hot_label(len(self.schema.labels)) @ self.log_theta).exp()

    def cell_factor(self, view: View) -> Tensor:
        """Size of each cell, shape (b, 1)."""
        return view.library


class NB(CountLikelihood):
    """RNA counts: ``x ~ NB(mean = l * softmax(rate), theta)``, l the cell's size, theta per gene (MultiVI, Methods).

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0], {"rna": "nb"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> likelihood = NB(mosaic.schema["rna"])
    >>> distribution = likelihood.distribution(likelihood.start(view), view)
    >>> torch.allclose(distribution.mean.sum(-1, keepdim=True), view.library)  # the cell's size
    True
    """

    family = "nb"
    traits = TRAITS["nb"]
    predictors: tuple[str, ...] = ("rate",)

    def start(self, view: View) -> dict[str, Tensor]:
        """Mean profile of the cells; theta stays at 1."""
        total = view.dense_counts().sum(0)
        return {"rate": torch.log((total + 0.5) / (total + 0.5).sum())}

    def mean(self, predictors: Predictors, view: View) -> Tensor:
        """Expected counts."""
        return view.library * torch.softmax(predictors["rate"], dim=-1)

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Negative binomial of every cell and gene."""
        return NegativeBinomial(self.mean(predictors, view), self.theta(view))


class ZINB(NB):
    """RNA counts with structural zeros, of probability ``sigmoid(gate)``; else as `NB`.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50}, likelihoods={"rna": "zinb"})[0], {"rna": "zinb"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> likelihood = ZINB(mosaic.schema["rna"])
    >>> start = likelihood.start(view)
    >>> sorted(start), likelihood.distribution(start, view).batch_shape
    (['gate', 'rate'], torch.Size([40, 50]))
    """

    family = "zinb"
    traits = TRAITS["zinb"]
    predictors = ("rate", "gate")

    def start(self, view: View) -> dict[str, Tensor]:
        """Mean profile of the cells, and few structural zeros."""
        return {**super().start(view), "gate": torch.full((self.schema.n_features,), -3.0)}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Zero-inflated negative binomial of every cell and gene."""
        return ZeroInflatedNegativeBinomial(
            self.mean(predictors, view), self.theta(view), gate_logits=predictors["gate"]
        )


class MultinomialLikelihood(NB):
    """Counts given a cell's total: ``x ~ Multinomial(l, softmax(rate))`` (Cobolt; Gong et al. 2021).

    Nothing but the shares is modelled: no dispersion, and no chance in the total.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0], {"rna": "multinomial"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> likelihood = MultinomialLikelihood(mosaic.schema["rna"])
    >>> distribution = likelihood.distribution(likelihood.start(view), view)
    >>> distribution.batch_shape, distribution.log_prob(view.dense_counts()).shape
    (torch.Size([40, 50]), torch.Size([40, 50]))
    """

    family = "multinomial"
    traits = TRAITS["multinomial"]

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        del self.log_theta

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Multinomial of every cell."""
        return Multinomial(view.library, predictors["rate"])


class NBMixture(CountLikelihood):
    """Antibody counts: background or foreground (totalVI; MultiVI, Methods).

    A log background level is drawn for every cell and protein, ``b ~ Normal(m, s)`` with m and s learnt per protein
    and batch. With probability ``sigmoid(mixing)`` the count is background, ``NB(l * exp(b), theta)``, else it is
    foreground, ``NB(l * exp(b) * (1 + exp(foreground)), theta)``; l is the cell's antibody count over the median
    cell's. The posterior of b given the latent variable is normal, by a decoder of the guide.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"adt": 5})[0], {"adt": "nb_mixture"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["adt"]
    >>> likelihood = NBMixture(mosaic.schema["adt"])
    >>> {name: bias.shape for name, bias in likelihood.start(view).items()}
    {'foreground': torch.Size([5]), 'mixing': torch.Size([5]), 'loc': torch.Size([5]), 'log_scale': torch.Size([5])}
    >>> bool(likelihood.theta(view).isclose(torch.tensor(10.0)).all())
    True
    """

    family = "nb_mixture"
    traits = TRAITS["nb_mixture"]
    predictors = ("foreground", "mixing")
    posterior_predictors = ("loc", "log_scale")

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        n_batches = len(next(iter(schema.categories.values()))) if schema.spec.batch_key else 1
        self.background_loc = nn.Parameter(torch.zeros(n_batches, schema.n_features))
        self.background_log_scale = nn.Parameter(torch.zeros(n_batches, schema.n_features))

    def start(self, view: View) -> dict[str, Tensor]:
        """Background, foreground and mixing as in a two-component normal fit of log1p counts, per batch and protein.

        theta starts at 10: antibodies are far less dispersed than genes, and as a logarithm theta goes no further than
        its number of steps takes it. Predictive intervals of held-out counts are too wide where it lags behind.
        """
        x = torch.log1p(view.dense_counts() * self.schema.library / view.library).numpy()
        batches = view.one_hot().argmax(-1).numpy() if self.schema.spec.batch_key else np.zeros(len(x), dtype=int)
        with torch.no_grad():
            self.log_theta.fill_(np.log(10.0))
            for batch in np.unique(batches):
                loc, scale = two_normals(x[batches == batch])[:2]
                # x is log1p, the parameter is a log mean.
                self.background_loc[batch] = torch.from_numpy(np.log(np.expm1(np.maximum(loc[0], 0.1))))
                self.background_log_scale[batch] = torch.from_numpy(np.log(np.clip(scale[0], 0.1, 1.0)))
        loc, _, background = two_normals(x)
        gap = torch.from_numpy(np.maximum(loc[1] - loc[0], 0.1))
        return {
            "foreground": torch.log(torch.expm1(gap)),
            "mixing": logit(torch.from_numpy(background)).clamp(-3.0, 3.0),
            "loc": self.background_loc.detach().mean(0),
            "log_scale": self.background_log_scale.detach().mean(0),
        }

    def background(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the log background, shape (b, proteins)."""
        if not self.schema.spec.batch_key:
            return self.background_loc[0], self.background_log_scale[0].exp()
        batch = view.one_hot()
        return batch @ self.background_loc, (batch @ self.background_log_scale).exp()

    def forward(self, name: str, predictors: Predictors, view: View, kl_weight: float = 1.0) -> None:
        """Background level, then the count."""
        with weighted(kl_weight):
            background = pyro.sample(f"{name}_background", dist.Normal(*self.background(view)))
        mu_background = self.cell_factor(view) * background.exp()
        mu_foreground = mu_background * (1 + predictors["foreground"].exp())
        mixture = NegativeBinomialMixture(
            mu_background, mu_foreground, self.theta(view), mixture_logits=predictors["mixing"]
        )
        pyro.sample(name, mixture, obs=view.counts)

    def posterior(self, name: str, predictors: Predictors, kl_weight: float = 1.0) -> None:
        """Posterior of the log background given the latent variable; stands in the guide."""
        with weighted(kl_weight):
            scale = predictors["log_scale"].clamp(-10.0, 3.0).exp()
            pyro.sample(f"{name}_background", dist.Normal(predictors["loc"], scale))

    def cell_factor(self, view: View) -> Tensor:
        """Size of each cell over the median cell's, shape (b, 1)."""
        return view.library / self.schema.library

    def normalized(self, distribution: dist.TorchDistribution) -> Tensor:
        """Expected foreground: its probability times its mean."""
        return (1 - distribution.mixing_probability) * distribution.mu_foreground


def two_normals(x: np.ndarray, n_cells: int = 500, n_steps: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mixture of two normals fitted to every column by expectation maximisation.

    Parameters
    ----------
    x
        Values, shape (cells, features).
    n_cells
        Number of cells, evenly spaced, that are enough for start values.
    n_steps
        Number of steps.

    Returns
    -------
    loc, scale : numpy.ndarray
        Lower component first, shape (2, features).
    weight : numpy.ndarray
        Share of the lower component, shape (features,).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = np.concatenate([rng.normal(1.0, 0.3, (700, 1)), rng.normal(4.0, 0.5, (300, 1))])
    >>> loc, scale, weight = two_normals(x, n_cells=1000)
    >>> loc[:, 0].round(), weight.round(1)
    (array([1., 4.], dtype=float32), array([0.7], dtype=float32))
    """
    x = x[:: max(1, len(x) // n_cells)]
    loc = np.quantile(x, [0.25, 0.9], axis=0)
    scale = np.stack([x.std(0), x.std(0)]) + 1e-2
    weight = np.full((2, x.shape[1]), 0.5)
    for _ in range(n_steps):
        log_density = np.log(weight) - np.log(scale) - 0.5 * ((x[:, None] - loc) / scale) ** 2
        share = np.exp(log_density - np.logaddexp(log_density[:, :1], log_density[:, 1:]))
        total = share.sum(0) + 1e-3
        weight = np.clip(total / len(x), 1e-3, 1 - 1e-3)
        loc = (share * x[:, None]).sum(0) / total
        scale = np.sqrt((share * (x[:, None] - loc) ** 2).sum(0) / total) + 1e-2
    order = np.argsort(loc, axis=0)
    ordered = [np.take_along_axis(a, order, axis=0).astype(np.float32) for a in (loc, scale, weight)]
    return ordered[0], ordered[1], ordered[2][0]


class Bernoulli(Likelihood):
    """Accessibility: ``P(x > 0) = d * r * sigmoid(accessibility)``, cell factor d, region factor r (PeakVI; MultiVI).

    The region factor is ``sigmoid`` of a free parameter; the cell factor is ``sigmoid`` of a small network of the
    cell's depth, the log of its fragment count relative to the median cell's.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"atac": 50})[0], {"atac": "bernoulli"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["atac"]
    >>> likelihood = Bernoulli(mosaic.schema["atac"])
    >>> distribution = likelihood.distribution(likelihood.start(view), view)
    >>> bool((distribution.mean < likelihood.normalized(distribution)).all())  # as the factors are below 1
    True
    """

    family = "bernoulli"
    traits = TRAITS["bernoulli"]
    predictors = ("accessibility",)

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.region_logits = nn.Parameter(torch.zeros(schema.n_features))
        self.depth = nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(), nn.Linear(16, 1))

    def start(self, view: View) -> dict[str, Tensor]:
        """Share of cells in which each region is open, given cell and region factors of one half."""
        share = (view.dense_counts() > 0).to(torch.float32).mean(0)
        return {"accessibility": logit((4 * share).clamp(1e-4, 0.9))}

    def cell_logits(self, view: View) -> Tensor:
        """Log odds of the cell factor, shape (b, 1)."""
        return self.depth(torch.log1p(view.library) - np.log1p(self.schema.library))

    def cell_factor(self, view: View) -> Tensor:
        """The cell factor, between 0 and 1, shape (b, 1)."""
        return self.cell_logits(view).sigmoid()

    def region_factor(self) -> Tensor:
        """The region factors, between 0 and 1, shape (regions,)."""
        return self.region_logits.sigmoid()

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Bernoulli of every cell and region."""
        return AccessibilityBernoulli(
            predictors["accessibility"], region_logits=self.region_logits, cell_logits=self.cell_logits(view)
        )

    def normalized(self, distribution: dist.TorchDistribution) -> Tensor:
        """Accessibility without cell and region factors."""
        return logsigmoid(distribution.logits).exp()


class Normal(Likelihood):
    """Real values: ``x ~ Normal(loc, sigma)``, sigma per feature.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"x": 50}, likelihoods={"x": "normal"})[0], {"x": "normal"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["x"]
    >>> likelihood = Normal(mosaic.schema["x"])
    >>> distribution = likelihood.distribution(likelihood.start(view), view)
    >>> torch.allclose(distribution.mean, view.counts.mean(0), atol=1e-5)
    True
    """

    family = "normal"
    traits = TRAITS["normal"]
    predictors = ("loc",)

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_sigma = nn.Parameter(torch.zeros(schema.n_features))

    def transform(self, x: Tensor) -> Tensor:
        """The scale on which the values are normal."""
        return x

    def start(self, view: View) -> dict[str, Tensor]:
        """Mean and standard deviation of each feature."""
        x = self.transform(view.dense_counts())
        with torch.no_grad():
            self.log_sigma.copy_(x.std(0).clamp_min(1e-3).log())
        return {"loc": x.mean(0)}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Normal of every cell and feature."""
        return dist.Normal(predictors["loc"], self.log_sigma.exp())


class Log1pNormalLikelihood(Normal):
    """Non-negative values: ``log(1 + x) ~ Normal(loc, sigma)``.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0], {"rna": "log1p_normal"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> likelihood = Log1pNormalLikelihood(mosaic.schema["rna"])
    >>> distribution = likelihood.distribution(likelihood.start(view), view)
    >>> distribution.log_prob(view.dense_counts()).shape
    torch.Size([40, 50])
    """

    family = "log1p_normal"
    traits = TRAITS["log1p_normal"]

    def transform(self, x: Tensor) -> Tensor:
        """``log(1 + x)``."""
        return torch.log1p(x)

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Log1p-normal of every cell and feature."""
        return Log1pNormal(predictors["loc"], self.log_sigma.exp())


class ZILN(Likelihood):
    """Non-negative values with exact zeros: 0 with probability ``sigmoid(gate)``, else ``LogNormal(loc, sigma)``.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0], {"rna": "ziln"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> likelihood = ZILN(mosaic.schema["rna"])
    >>> distribution = likelihood.distribution(likelihood.start(view), view)
    >>> zeros = distribution.log_prob(torch.zeros(())).exp()  # as many as in the data
    >>> torch.allclose(zeros, (view.dense_counts() == 0).float().mean(0), atol=0.02)
    True
    """

    family = "ziln"
    traits = TRAITS["ziln"]
    predictors = ("loc", "gate")

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_sigma = nn.Parameter(torch.zeros(schema.n_features))

    def start(self, view: View) -> dict[str, Tensor]:
        """Share of zeros, and mean and standard deviation of the logarithm of the rest, per feature."""
        x = view.dense_counts()
        positive = (x > 0).to(x.dtype)
        n = positive.sum(0).clamp_min(1.0)
        log_x = torch.where(x > 0, x.clamp_min(1e-30).log(), torch.zeros_like(x))
        loc = log_x.sum(0) / n
        sd = ((positive * (log_x - loc)).square().sum(0) / n).sqrt()
        with torch.no_grad():
            self.log_sigma.copy_(sd.clamp_min(1e-2).log())
        return {"loc": loc, "gate": logit(1 - positive.mean(0)).clamp(-5.0, 5.0)}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Zero-inflated log-normal of every cell and feature."""
        return ZeroInflatedLogNormal(predictors["loc"], self.log_sigma.exp(), gate_logits=predictors["gate"])


class ZIG(Likelihood):
    """Non-negative values with exact zeros: of probability ``sigmoid(gate)``, else ``Gamma(softplus(shape), rate)``.

    Parameters
    ----------
    schema
        The modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0], {"rna": "zig"})
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> likelihood = ZIG(mosaic.schema["rna"])
    >>> distribution = likelihood.distribution(likelihood.start(view), view)
    >>> zeros = distribution.log_prob(torch.zeros(())).exp()  # as many as in the data
    >>> torch.allclose(zeros, (view.dense_counts() == 0).float().mean(0), atol=0.02)
    True
    """

    family = "zig"
    traits = TRAITS["zig"]
    predictors = ("shape", "gate")

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_rate = nn.Parameter(torch.zeros(schema.n_features))

    def start(self, view: View) -> dict[str, Tensor]:
        """Share of zeros, and shape and rate of the rest by moments, per feature."""
        x = view.dense_counts()
        positive = (x > 0).to(x.dtype)
        n = positive.sum(0).clamp_min(1.0)
        mean = (x.sum(0) / n).clamp_min(1e-6)
        variance = ((positive * (x - mean)).square().sum(0) / n).clamp_min(1e-6)
        shape = (mean.square() / variance).clamp(0.1, 100.0)
        with torch.no_grad():
            self.log_rate.copy_((shape / mean).log())
        return {"shape": shape + torch.log(-torch.expm1(-shape)), "gate": logit(1 - positive.mean(0)).clamp(-5.0, 5.0)}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Zero-inflated gamma of every cell and feature."""
        concentration = softplus(predictors["shape"]) + 1e-8
        return ZeroInflatedGamma(concentration, self.log_rate.exp(), gate_logits=predictors["gate"])


#: The likelihood behind each name that a `ModalitySpec` accepts.
LIKELIHOODS: Mapping[str, type[Likelihood]] = {
    likelihood.family: likelihood
    for likelihood in (NB, ZINB, MultinomialLikelihood, NBMixture, Bernoulli, Normal, Log1pNormalLikelihood, ZILN, ZIG)
}


def likelihoods_of(schema: Schema) -> dict[str, Any]:
    """The likelihood of each modality, by its name or of the user's class.

    Parameters
    ----------
    schema
        The modalities.

    Returns
    -------
    dict
        By modality.

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
