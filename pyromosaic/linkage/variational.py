"""Variational canonical correlation analysis: the linkage as a Pyro program, linear or deep, with uncertainty."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyromosaic.accepted import Count, Dimensions, Positive, Seed, checked
from pyromosaic.data import Mosaic
from pyromosaic.fusion import Posterior, ProductFusion, presence
from pyromosaic.linkage.alignment import Linkage, cca, scores_table
from pyromosaic.linkage.canonical import Canonical, canonical_variables
from pyromosaic.linkage.matching import Correspondence
from pyromosaic.links import GuidanceGraph, Links
from pyromosaic.program import Program
from pyromosaic.threads import one_thread

#: For each modality, the positions of its cells in the minibatch, shape (b,), and their values, shape (b, variables).
Views = Mapping[str, tuple[Tensor, Tensor]]


class Curve(nn.Module):
    """A linear map plus a network with one hidden layer whose output starts at zero (no network if `n_hidden` is 0)."""

    def __init__(self, n_in: int, n_out: int, n_hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.bend: nn.Module | None = None
        if n_hidden:
            last = nn.Linear(n_hidden, n_out)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.bend = nn.Sequential(nn.Linear(n_in, n_hidden), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """Values of shape (..., n_out)."""
        return self.linear(x) if self.bend is None else self.linear(x) + self.bend(x)


class VariationalCCAModel(Program):
    r"""The generative model.

    A cell has a shared variable :math:`z \sim N(0, I)` and, in each modality, a private one :math:`h \sim N(0, I)`. The
    modality measures :math:`x = f(z) + B h + e` with :math:`e \sim N(0, \mathrm{diag}(\sigma^2))`. Because h enters
    linearly, it is integrated out: :math:`x \mid z \sim N(f(z), B B^T + \mathrm{diag}(\sigma^2))`. It has the dimension
    of x, so that z does not have to explain variation that only one modality measures. With linear f this is
    probabilistic canonical correlation analysis (Bach and Jordan, "A probabilistic interpretation of canonical
    correlation analysis", 2005); with networks it is deep (Wang et al., "Deep variational canonical correlation
    analysis", 2016, where private variables also pass through the networks).

    Parameters
    ----------
    widths
        Number of variables of each modality.
    n_latent
        Dimension of z.
    n_hidden
        Number of hidden units of the decoders f; 0 for linear decoders.
    """

    def __init__(self, widths: Mapping[str, int], n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.made_with = dict(widths), n_latent, n_hidden
        self.n_latent = n_latent
        self.decoders: Any = nn.ModuleDict({name: Curve(n_latent, p, n_hidden) for name, p in widths.items()})
        self.private: Any = nn.ParameterDict({name: 0.1 * torch.randn(p, p) for name, p in widths.items()})
        self.log_noise: Any = nn.ParameterDict({name: torch.zeros(p) for name, p in widths.items()})

    def forward(self, views: Views, n_cells: int) -> None:
        """Sites: ``z``, and one named after each modality; log densities are divided by the number of cells."""
        zero = next(self.parameters()).new_zeros(())
        with poutine.scale(scale=1 / n_cells):
            with pyro.plate("cells", n_cells):
                z = pyro.sample("z", dist.Normal(zero, 1.0).expand([self.n_latent]).to_event(1))
            for name, (rows, values) in views.items():
                with pyro.plate(f"{name}_cells", len(rows)):
                    pyro.sample(name, self.measured(name, z[..., rows, :]), obs=values)

    def measured(self, name: str, z: Tensor) -> dist.TorchDistribution:
        """A modality's measurements given the shared variable, event shape (variables,)."""
        noise = (2 * self.log_noise[name]).exp()
        return dist.LowRankMultivariateNormal(self.decoders[name](z), self.private[name], noise)


class VariationalCCAGuide(Program):
    """The variational posterior: a product of the prior and of one expert on z per modality.

    Therefore a cell with both modalities has a narrower posterior than a cell with one. The family contains the exact
    posterior of the linear model in canonical coordinates, where the bound is tightest. Therefore the axes of z are the
    canonical axes.

    Parameters
    ----------
    widths, n_latent, n_hidden
        As in `VariationalCCAModel`.
    """

    def __init__(self, widths: Mapping[str, int], n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.made_with = dict(widths), n_latent, n_hidden
        encoders = {name: Curve(p, 2 * n_latent, n_hidden) for name, p in widths.items()}
        with torch.no_grad():
            for encoder in encoders.values():  # wide experts would let the decoders learn to ignore z
                encoder.linear.weight[n_latent:] = 0
                encoder.linear.bias[n_latent:] = -1
        self.encoders: Any = nn.ModuleDict(encoders)
        self.fusion = ProductFusion()

    def forward(self, views: Views, n_cells: int) -> None:
        """Site: ``z``."""
        loc, scale = self.posterior(views, n_cells)
        with poutine.scale(scale=1 / n_cells), pyro.plate("cells", n_cells):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def posterior(self, views: Views, n_cells: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z given all modalities of a cell, each of shape (n_cells, latent)."""
        experts = {}
        for name, (rows, values) in views.items():
            loc, log_scale = self.encoders[name](values).chunk(2, dim=-1)
            experts[name] = Posterior(rows, loc, log_scale.clamp(-10, 10).exp())
        return self.fusion(experts, presence(experts, n_cells))


def start(
    model: VariationalCCAModel, guide: VariationalCCAGuide, canonical: Canonical, covariances: Mapping[str, np.ndarray]
) -> None:
    r"""Initialise at the maximum likelihood of the linear model, which has a closed form (Bach and Jordan 2005).

    With canonical coefficients A, correlations :math:`\rho` and a covariance C, the decoder is
    :math:`W = C A \,\mathrm{diag}(\sqrt\rho)`. The remaining covariance :math:`C - W W^T` is private variation and
    noise. The expert has mean :math:`\mathrm{diag}(1 / \sqrt\rho) A^T x` and variances :math:`(1 - \rho) / \rho`.

    Parameters
    ----------
    model, guide
        The programs to initialise.
    canonical
        Canonical variables, one for each dimension of z.
    covariances
        Covariance within each modality.
    """
    rho = canonical.correlations.clip(0.01, 0.99)
    for (name, covariance), coefficients in zip(covariances.items(), canonical.coefficients, strict=True):
        weight = covariance @ coefficients * np.sqrt(rho)
        size, directions = np.linalg.eigh(covariance - weight @ weight.T)
        noise = 0.5 * max(size[0], 1e-3)
        private = directions * np.sqrt((size - noise).clip(1e-6))
        _set(model.decoders[name].linear, weight, np.zeros(len(weight)))
        expert = np.vstack([(coefficients / np.sqrt(rho)).T, np.zeros_like(coefficients.T)])
        _set(guide.encoders[name].linear, expert, np.concatenate([0 * rho, 0.5 * np.log((1 - rho) / rho)]))
        with torch.no_grad():
            model.private[name].copy_(torch.from_numpy(private))
            model.log_noise[name].fill_(0.5 * np.log(noise))


def _set(linear: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))


def minibatches(
    data: Mapping[str, Tensor], pi: Correspondence, noise: Mapping[str, Tensor], n: int, size: int, seed: int
) -> Iterator[tuple[Views, int]]:
    """Minibatches: half of the cells are corresponding pairs, and a quarter comes from each modality alone.

    Parameters
    ----------
    data
        Variables of all cells of both modalities.
    pi
        Correspondence of the cells.
    noise
        Standard deviation of the noise that is added to each variable.
    n, size
        Number of minibatches, and of cells in each (a multiple of 4).
    seed
        Seed of the draws.

    Yields
    ------
    tuple
        Arguments of `VariationalCCAModel` and `VariationalCCAGuide`.
    """
    rng = np.random.default_rng(seed)
    pairs = np.stack(pi.draw(n * size // 2, rng)).reshape(2, n, size // 2)
    both, *alone = torch.arange(size).split([size // 2, size // 4, size // 4])
    for step in range(n):
        views = {}
        for k, (name, values) in enumerate(data.items()):
            x = values[np.concatenate([pairs[k, step], rng.integers(len(values), size=size // 4)])]
            views[name] = torch.cat([both, alone[k]]), x + noise[name] * torch.randn_like(x)
        yield views, size


@dataclass
class VariationalLinkage(Linkage):
    """Two modalities in the latent space of a generative model.

    All other attributes are as in `Linkage`: the correspondence (`correspondence`), how it was found (`agreement`,
    `links`), and `crossfit` of the classical analysis.

    Parameters
    ----------
    scores
        Cells × components for each modality: posterior means of the shared variable z given that modality alone,
        weighted by `shares`, each cell scaled to length one.
    correlations
        Canonical correlations under the model.
    model, guide
        The programs.
    elbo
        Evidence lower bound in nats per cell of the minibatch, after each training step.
    shares
        Standard deviation over cells of the posterior mean of each component of z: near 1 if one modality determines
        the component, near 0 if it does not.

    Examples
    --------
    >>> from pyromosaic import Mosaic, linkage, simulate
    >>> mdata, truth = simulate(300, {"rna": 60, "adt": 20}, patterns=["rna", "adt"], links={"adt": 1.0})
    >>> mosaic, links = Mosaic.from_mudata(mdata, batch_key="batch"), truth.links[["gene", "feature"]]
    >>> link = linkage.variational_cca(mosaic, ("rna", "adt"), links, n_pcs=10, n_steps=10)
    >>> mean, sd = link.posterior(mosaic)
    >>> mean.shape == sd.shape == (300, link.model.n_latent)
    True
    """

    parts: ClassVar[tuple[type, ...]] = (*Linkage.parts, VariationalCCAModel, VariationalCCAGuide)

    model: VariationalCCAModel = field(repr=False)
    guide: VariationalCCAGuide = field(repr=False)
    elbo: np.ndarray = field(repr=False)
    shares: np.ndarray
    _scale: dict[str, np.ndarray] = field(repr=False)

    def transform(self, mosaic: Mosaic) -> dict[str, pd.DataFrame]:
        """Scores of new cells; see `Linkage.transform`."""
        scores = {}
        for name, (cells, x) in self.components(mosaic).items():
            mean, _ = encoded(self.guide, {name: (np.arange(len(cells)), x / self._scale[name])}, len(cells))
            scores[name] = scores_table(mean * self.shares, mosaic.obs_names[cells])
        return scores

    @checked
    def posterior(self, mosaic: Mosaic) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Posterior of the shared variable z of each cell, given all of its modalities.

        Parameters
        ----------
        mosaic
            Cells with one or both of the modalities, with the same features.

        Returns
        -------
        mean, sd : pandas.DataFrame
            Posterior means and standard deviations, cells × components.

        Raises
        ------
        ValueError
            As `transform` does.
        """
        found = self.components(mosaic)
        cells = np.unique(np.concatenate([rows for rows, _ in found.values()]))
        views = {name: (np.searchsorted(cells, rows), x / self._scale[name]) for name, (rows, x) in found.items()}
        columns = [f"z{i + 1}" for i in range(self.model.n_latent)]
        mean, sd = (
            pd.DataFrame(values, mosaic.obs_names[cells], columns) for values in encoded(self.guide, views, len(cells))
        )
        return mean, sd


def encoded(
    guide: VariationalCCAGuide, views: Mapping[str, tuple[np.ndarray, np.ndarray]], n_cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and standard deviations of z, as arrays; see `VariationalCCAGuide.posterior`."""
    tensors = {
        name: (torch.from_numpy(rows), torch.from_numpy(values).float()) for name, (rows, values) in views.items()
    }
    with torch.no_grad():
        loc, scale = guide.posterior(tensors, n_cells)
    return loc.numpy(), scale.numpy()


def implied_covariance(model: VariationalCCAModel, n_draws: int = 20_000) -> np.ndarray:
    """Covariance between the two modalities under the model, from draws of z, shape (variables, variables)."""
    with one_thread, torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        z = torch.randn(n_draws, model.n_latent)
        first, second = (decoder(z).double() for decoder in model.decoders.values())
    return ((first - first.mean(0)).T @ (second - second.mean(0)) / n_draws).numpy()


@checked
def variational_cca(
    mosaic: Mosaic,
    modalities: tuple[str, str],
    links: pd.DataFrame | Links | GuidanceGraph | None = None,
    *,
    n_hidden: Dimensions = 0,
    ridge: Positive = 0.2,
    n_steps: Count = 300,
    batch_size: Count = 512,
    learning_rate: Positive = 2e-3,
    seed: Seed = 0,
    **matching: Any,
) -> VariationalLinkage:
    r"""Link two modalities by probabilistic canonical correlation analysis, linear or deep.

    The correspondence of cells comes from `cca`, unless it is given. The programs `VariationalCCAModel` and
    `VariationalCCAGuide` describe principal components, each divided by its standard deviation. They start from the
    closed form of the linear model. Training then maximises the evidence lower bound over pairs of cells drawn from the
    correspondence (half of each minibatch), and over all cells of each modality alone, regardless of pairs. Therefore
    the posterior given one modality is learnt too.

    Parameters
    ----------
    mosaic, modalities, links
        As in `cca`.
    n_hidden
        Number of hidden units of the networks that decoders and encoders have in addition to their linear maps; 0 for
        the linear model. Networks help if pairs are known. A correspondence found without pairs has errors, which
        networks also learn.
    ridge
        Variance of the noise that is added to the principal components in training, as a share of their mean variance.
        With linear decoders it acts like the ridge in `cca`.
    n_steps, batch_size, learning_rate
        Number of Adam steps, number of cells in a minibatch (a multiple of 4), and learning rate, which falls to 0
        along a cosine.
    seed
        Seed of `cca`, initial values and minibatches. Minibatches depend on the order of the cells.
    **matching
        Further arguments of `cca`: ``correspondence`` (the result is an upper bound with true pairs, and supervised
        with labels), ``n_components`` (dimension of z), ``n_pcs``, and the options of matching.

    Returns
    -------
    VariationalLinkage
        Scores of the cells of both modalities, the trained programs, and the training curve.

    Raises
    ------
    ValueError
        As `cca` does, and if an argument is out of range.

    References
    ----------
    Bach and Jordan 2005 and Wang et al. 2016, see `VariationalCCAModel`; product of experts: Wu and Goodman,
    "Multimodal generative models for scalable weakly-supervised learning", 2018; noise in the inputs as a ridge:
    Bishop, "Training with noise is equivalent to Tikhonov regularization", 1995.

    Examples
    --------
    >>> from pyromosaic import Mosaic, linkage, pbmc_mosaic, protein_gene_links
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    >>> link = linkage.variational_cca(mosaic, ("rna", "adt"), protein_gene_links(), n_steps=20)
    >>> mean, sd = link.posterior(mosaic)  # a cell with both modalities is known better than one with one
    >>> both = mosaic.presence.all(axis=1)
    >>> bool((sd[both].max() < sd[~both].max()).all())
    True
    """
    if batch_size % 4:
        raise ValueError(f"batch_size must be a multiple of 4; found {batch_size}")
    link = cca(mosaic, modalities, links, ridge=ridge, seed=seed, **matching)
    n_latent = len(link.correlations)
    data, scale, noise, covariances = {}, {}, {}, {}
    for name, (_, x) in link.components(mosaic).items():
        variance, added = x.var(axis=0), ridge * x.var(axis=0).mean()
        scale[name] = np.sqrt(variance + added)
        noise[name] = np.sqrt(added) / scale[name]
        data[name] = x / scale[name]
        covariances[name] = np.cov(data[name], rowvar=False, bias=True) + np.diag(noise[name] ** 2)
    between = link.correspondence.cross_covariance(*data.values())
    with one_thread, torch.random.fork_rng():
        torch.manual_seed(seed)
        widths = {name: x.shape[1] for name, x in data.items()}
        model, guide = VariationalCCAModel(widths, n_latent, n_hidden), VariationalCCAGuide(widths, n_latent, n_hidden)
        start(model, guide, canonical_variables(list(covariances.values()), between).keep(n_latent), covariances)
        tensors, sd = ({name: torch.from_numpy(x).float() for name, x in each.items()} for each in (data, noise))
        elbo = train(
            model,
            guide,
            minibatches(tensors, link.correspondence, sd, n_steps, batch_size, seed),
            learning_rate,
            n_steps,
        )
    means = {n: encoded(guide, {n: (np.arange(len(x)), x)}, len(x))[0] for n, x in data.items()}
    shares = np.sqrt(np.mean([m.var(axis=0) for m in means.values()], axis=0))
    implied = canonical_variables(list(covariances.values()), implied_covariance(model)).keep(n_latent)
    first, second = (c / s[:, None] for c, s in zip(implied.coefficients, scale.values(), strict=True))
    return VariationalLinkage(
        {name: scores_table(mean * shares, link.scores[name].index) for name, mean in means.items()},
        implied.correlations,
        link.crossfit,
        link.correspondence,
        link.agreement,
        link.links,
        link.by_shape,
        link.schema,
        link._null,
        Canonical((first, second), implied.correlations),
        link._reduced,
        model,
        guide,
        elbo,
        shares,
        scale,
    )


def train(
    model: VariationalCCAModel,
    guide: VariationalCCAGuide,
    minibatches: Iterator[tuple[Views, int]],
    learning_rate: float,
    n_steps: int,
) -> np.ndarray:
    """Maximise the evidence lower bound by Adam, with a learning rate that falls to 0 along a cosine.

    Returns
    -------
    numpy.ndarray
        The bound at each step, in nats per cell.
    """
    from pyromosaic.train import minimise  # imports Lightning, which is slow

    bound = TraceMeanField_ELBO()
    losses = (bound.differentiable_loss(model, guide, *minibatch) for minibatch in minibatches)
    return -minimise(losses, [*model.parameters(), *guide.parameters()], learning_rate, n_steps)
