"""Antibody counts: background or foreground."""

from collections.abc import Mapping

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroSample
from torch import Tensor, nn

from pyromosaic.data import TRAITS, ModalitySchema, View
from pyromosaic.distributions import MarginalNegativeBinomialMixture, NegativeBinomialMixture
from pyromosaic.likelihoods.likelihood import CountLikelihood, Predictors, logit
from pyromosaic.program import weighted


class NBMixture(CountLikelihood):
    """Antibody counts: background or foreground (totalVI; MultiVI, Methods).

    Every cell and protein has a log background level, ``b ~ Normal(m, s)``, with m and s learnt per protein and batch.
    With probability ``sigmoid(mixing)`` the count is background, ``NB(l * exp(b), theta)``. Otherwise it is foreground,
    ``NB(l * exp(b) * (1 + exp(foreground)), theta)``. l is the cell's antibody count divided by that of the median
    cell.

    By default b is summed out by adaptive Gauss-Hermite quadrature. Then s and theta are known less well than the
    overdispersion that both describe, ``exp(s**2) * (1 + 1 / theta) - 1``. With ``ModalitySpec(background="latent")``,
    as in totalVI, b is a latent variable. Its posterior given the cell's latent variable is normal and comes from a
    decoder of the guide. This posterior does not see the counts. Therefore the cell's latent variable has to account
    for the background of each protein, and its posterior is too narrow.

    With ``ModalitySpec(empty_droplets=...)``, the means m have a prior: ``m = level + ambient + offset`` with a level
    per batch, the log share of each antibody in empty droplets, and ``offset ~ Normal(0, 0.5)``, a global latent
    variable. s starts at the spread between droplets. (dsb, Mulè et al. 2022, subtracts the mean of empty droplets and
    divides by their standard deviation.)

    Parameters
    ----------
    schema
        The modality.

    Attributes
    ----------
    n_nodes
        Number of nodes of the quadrature; see `pyromosaic.distributions.MarginalNegativeBinomialMixture`.
    """

    family = "nb_mixture"
    traits = TRAITS["nb_mixture"]
    predictors = ("foreground", "mixing")
    n_nodes = 5
    ambient: Tensor

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.latent = schema.spec.background == "latent"
        if self.latent:
            self.posterior_predictors = ("loc", "log_scale")
        n_batches = len(next(iter(schema.categories.values()))) if schema.spec.batch_key else 1
        droplets = schema.spec.empty_droplets
        if droplets is None:
            self.background_loc = nn.Parameter(torch.zeros(n_batches, schema.n_features))
        else:
            ambient = torch.tensor([droplet_levels(droplets, name) for name in schema.features])
            self.register_buffer("ambient", ambient.T, persistent=False)  # log share and spread, by protein
            self.background_level = nn.Parameter(torch.zeros(n_batches, 1))
            offset = dist.Normal(0.0, 0.5).expand([n_batches, schema.n_features]).to_event(2)
            self.background_offset = PyroSample(offset)
        self.background_log_scale = nn.Parameter(torch.zeros(n_batches, schema.n_features))

    def start(self, view: View) -> dict[str, Tensor]:
        """Initialise from a mixture of two normals fitted to log1p counts, per batch and protein.

        theta starts at 10, because antibodies are far less dispersed than genes, and log theta can move only a limited
        distance during training. If it is still too small, predictive intervals of held-out counts are too wide.
        """
        counts, size = view.dense_counts(), self.cell_factor(view)
        x = torch.log1p(counts / size).numpy()
        batches = view.one_hot().argmax(-1).numpy() if self.schema.spec.batch_key else np.zeros(len(x), dtype=int)
        found = torch.zeros_like(self.background_log_scale)  # log background, by batch and protein
        seen = torch.ones_like(found, dtype=torch.bool)
        with torch.no_grad():
            self.log_theta.fill_(np.log(10.0))
            for batch in np.unique(batches):
                cells = batches == batch
                loc, scale = two_normals(x[cells])[:2]
                # A protein that was hardly ever seen in the batch starts at its mean; other backgrounds start higher.
                mean = torch.log1p((counts[cells].sum(0) + 0.5) / size[cells].sum()).numpy()
                seen[batch] = torch.from_numpy(mean >= 0.1)
                if view.measured is not None:
                    seen[batch] &= view.measured[torch.from_numpy(cells)].any(0)
                # x is log1p, the parameter is a log mean.
                found[batch] = torch.from_numpy(np.log(np.expm1(np.where(mean < 0.1, mean, np.maximum(loc[0], 0.1)))))
                self.background_log_scale[batch] = torch.from_numpy(np.log(np.clip(scale[0], 0.1, 1.0)))
            if self.schema.spec.empty_droplets is None:
                self.background_loc.copy_(found)
            else:
                self.background_level.copy_((found - self.ambient[0]).median(1, keepdim=True).values)
                self.background_log_scale.copy_(self.ambient[1].clamp(0.1, 1.0).log().expand_as(found))
        # The posterior starts at one level for all batches: that of the batches which have the protein.
        level = found.where(seen | ~seen.any(0), torch.nan).nanmean(0)
        loc, background = _of_all(x, view)
        gap = torch.from_numpy(np.maximum(loc[1] - loc[0], 0.1))
        return {
            "foreground": torch.log(torch.expm1(gap)),
            "mixing": logit(torch.from_numpy(background)).clamp(-3.0, 3.0),
            "loc": level,
            "log_scale": self.background_log_scale.detach().mean(0),
        }

    def background(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the log background, shape (b, proteins)."""
        if self.schema.spec.empty_droplets is None:
            loc = self.background_loc
        else:
            loc = self.background_level + self.ambient[0] + self.background_offset
        if not self.schema.spec.batch_key:
            return loc[0], self.background_log_scale[0].exp()
        return view.by_batch(loc), view.by_batch(self.background_log_scale).exp()

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Mixture of every cell and protein, with the background summed out."""
        loc, scale = self.background(view)
        loc, ratio = loc + self.cell_factor(view).log(), 1 + predictors["foreground"].exp()
        return MarginalNegativeBinomialMixture(loc, scale, ratio, self.theta(view), predictors["mixing"], self.n_nodes)

    def forward(self, name: str, predictors: Predictors, view: View, kl_weight: float = 1.0) -> None:
        """Draw the background level if it is latent, then the count."""
        if not self.latent:
            return super().forward(name, predictors, view, kl_weight)
        with weighted(kl_weight):
            background = pyro.sample(f"{name}_background", dist.Normal(*self.background(view)))
        mu_background = self.cell_factor(view) * background.exp()
        mu_foreground = mu_background * (1 + predictors["foreground"].exp())
        mixture = NegativeBinomialMixture(
            mu_background, mu_foreground, self.theta(view), mixture_logits=predictors["mixing"]
        )
        pyro.sample(name, mixture, obs=view.counts)

    def posterior(self, name: str, predictors: Predictors, kl_weight: float = 1.0) -> None:
        """Posterior of a latent log background given the cell's latent variable; part of the guide."""
        with weighted(kl_weight):
            scale = predictors["log_scale"].clamp(-10.0, 3.0).exp()
            pyro.sample(f"{name}_background", dist.Normal(predictors["loc"], scale))

    def cell_factor(self, view: View) -> Tensor:
        """Size of each cell divided by that of the median cell, shape (b, 1)."""
        return view.library / self.schema.library

    def normalized(self, distribution: dist.TorchDistribution) -> Tensor:
        """Expected foreground: the probability of foreground times its mean."""
        return (1 - distribution.mixing_probability) * distribution.mu_foreground


def _of_all(x: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """`two_normals` of each feature in the cells in which it was measured: means, and weight of the lower component."""
    if view.measured is None:
        loc, _, weight = two_normals(x)
        return loc, weight
    masks, number = np.unique(view.measured.numpy(), axis=1, return_inverse=True)
    loc, weight = np.zeros((2, x.shape[1]), dtype=np.float32), np.zeros(x.shape[1], dtype=np.float32)
    for i, cells in enumerate(masks.T):
        features = np.flatnonzero(number.ravel() == i)
        if cells.any():
            loc[:, features], _, weight[features] = two_normals(x[np.ix_(cells, features)])
    return loc, weight


def droplet_levels(droplets: Mapping[str, tuple[float, float]], name: str) -> tuple[float, float]:
    """Log share of an antibody in empty droplets, and its spread between them."""
    if name not in droplets:
        raise ValueError(
            f"the empty droplets lack the antibody {name!r}; give them the names of the modality's antibodies"
        )
    return droplets[name]


def two_normals(x: np.ndarray, n_cells: int = 500, n_steps: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mixture of two normals fitted to every column by expectation maximisation.

    Parameters
    ----------
    x
        Values, shape (cells, features).
    n_cells
        Number of cells to use, evenly spaced; a sample is enough for initial values.
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
    scale = np.stack([x.std(0), x.std(0)]) + 1e-2  # here and below, so that no component shrinks to one value
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
