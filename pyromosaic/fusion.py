"""Fusion: combine the posteriors of a cell's modalities into one posterior of the cell."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.types import _size

from pyromosaic.data import Mosaic, Schema
from pyromosaic.posterior import Posterior, alone, leave_out, placed, presence

__all__ = [
    "CellFusion",
    "ExpertMixture",
    "FUSIONS",
    "Fusion",
    "GlobalFusion",
    "MeanFusion",
    "MixtureFusion",
    "Posterior",
    "ProductFusion",
    "FusedWidth",
    "agreement_weights",
    "alone",
    "fusion_of",
    "leave_out",
    "placed",
    "presence",
]


class FusedWidth(nn.Module):
    """How much wider the fused posterior is than the fusion rule says, for each number of modalities of a cell.

    A fusion treats the posteriors of a cell's modalities as independent, and the same posteriors serve cells with one
    modality. A learnt factor, 1 at the start and for cells with one modality, makes up for what this gets wrong.

    Parameters
    ----------
    n_modalities
        Number of modalities of the model.

    Examples
    --------
    >>> FusedWidth(2)(torch.ones(2, 3), used=torch.tensor([[1.0, 0.0], [1.0, 1.0]])).shape
    torch.Size([2, 3])
    """

    def __init__(self, n_modalities: int) -> None:
        super().__init__()
        self.tenth_of_log = nn.Parameter(torch.zeros(n_modalities - 1)) if n_modalities > 1 else None

    def forward(self, scale: Tensor, used: Tensor) -> Tensor:
        """Standard deviation of every cell of the minibatch, or Cholesky factor, in the shape of `scale`.

        Parameters
        ----------
        scale
            Standard deviation by the rule of the fusion, shape (B, latent), or a Cholesky factor of the covariance,
            shape (B, latent, latent).
        used
            Whether a modality is used in a cell, shape (B, modalities), 0 or 1.
        """
        if self.tenth_of_log is None:
            return scale
        # Adam's steps have one size; a single number has further to go than a weight of a network.
        factors = torch.cat([self.tenth_of_log.new_ones(1), (10 * self.tenth_of_log).exp()])
        return scale * factors[(used > 0).sum(-1) - 1].reshape(-1, *[1] * (scale.dim() - 1))


class Fusion(nn.Module):
    """Base class of fusions.

    A subclass defines `forward`, `correlated` if it takes posteriors whose dimensions are correlated, and `posterior`
    if it is not normal.

    Parameters
    ----------
    modalities
        Names of the model's modalities.
    """

    def __init__(self, modalities: Sequence[str] = ()) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.width = FusedWidth(len(self.modalities))

    def forward(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every cell of the minibatch, each of shape (B, latent).

        Parameters
        ----------
        posteriors
            Posteriors by modality.
        used
            Whether a modality is used in a cell, shape (B, modalities), 0 or 1; at least one in each cell.
        index
            Positions of the cells in their mosaic, shape (B,).
        """
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def correlated(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean, shape (B, latent), and covariance, shape (B, latent, latent); arguments as in `forward`."""
        raise TypeError(f"{type(self).__name__} takes posteriors with independent dimensions only; see correlated()")

    def posterior(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> dist.TorchDistribution:
        """Posterior of every cell of the minibatch, batch shape (B, 1), event shape (latent,)."""
        return self.normal(posteriors, used, index)

    def normal(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> dist.TorchDistribution:
        """The normal distribution with the mean and the (co)variance of the fusion, and the learnt width."""
        if all(q.factor is None for q in posteriors.values()):
            loc, scale = self.moments(posteriors, used, index, self.width)
            return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)
        loc, covariance = self.correlated(posteriors, used, index)
        scale_tril = self.width(torch.linalg.cholesky(covariance), used)
        return dist.MultivariateNormal(loc.unsqueeze(-2), scale_tril=scale_tril.unsqueeze(-3))

    def moments(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None, width: FusedWidth
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation with a learnt width; see `forward`."""
        loc, scale = self(posteriors, used, index)
        return loc, width(scale, used)

    def start(self, mosaic: Mosaic) -> None:
        """Prepare parameters of each training cell, if the fusion has any."""

    def meet(self, mosaic: Mosaic) -> None:
        """Tell the fusion to which cells the positions in the next minibatches refer, if it needs this."""


class MeanFusion(Fusion):
    """Mean of the representations of the modalities that a cell has (MultiVI, Methods: "equal").

    The weights w are 1, or 0 for a modality that is left out. The mean of independent normals then has mean ``sum(w mu)
    / sum(w)`` and variance ``sum(w^2 sigma^2) / sum(w)^2``.
    """

    def weights(self, names: Iterable[str], used: Tensor, index: Tensor | None) -> Tensor:
        """Weights of these modalities in every cell, shape (B, modalities), up to a factor."""
        return used

    def forward(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation; see `Fusion.forward`."""
        weights = self.weights(posteriors, used, index)
        qs = list(zip(weights.unbind(-1), posteriors.values(), strict=True))
        loc = placed([(q.rows, w[q.rows].unsqueeze(-1) * q.loc) for w, q in qs], len(used))
        variance = placed([(q.rows, (w[q.rows].unsqueeze(-1) * q.scale).square()) for w, q in qs], len(used))
        total = weights.sum(-1, keepdim=True)
        return loc / total, variance.sqrt() / total

    def correlated(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance, ``sum(w^2 S) / sum(w)^2`` of covariances S; see `Fusion.correlated`."""
        weights = self.weights(posteriors, used, index)
        total = weights.sum(-1, keepdim=True)
        qs = list(zip((weights / total).unbind(-1), posteriors.values(), strict=True))
        loc = placed([(q.rows, w[q.rows].unsqueeze(-1) * q.loc) for w, q in qs], len(used))
        return loc, _placed([(q.rows, w[q.rows].square(), q.covariance) for w, q in qs], len(used))


class GlobalFusion(MeanFusion):
    """Weighted mean, with weights that are learnt per modality (MultiVI, Methods).

    Within each cell, the weights are a softmax over the modalities of the cell.

    Parameters
    ----------
    modalities
        Names of the model's modalities.
    """

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__(modalities)
        self.log_weights = nn.Parameter(torch.zeros(len(modalities)))

    def logits(self, index: Tensor | None) -> Tensor:
        """Weights of all modalities as logits, in a shape that broadcasts with (B, modalities)."""
        return self.log_weights

    def weights(self, names: Iterable[str], used: Tensor, index: Tensor | None) -> Tensor:
        """Weights of these modalities in every cell, shape (B, modalities), with sum 1."""
        logits = self.logits(index)[..., [self.modalities.index(name) for name in names]]
        return logits.expand_as(used).masked_fill(used == 0, -torch.inf).softmax(-1)


class CellFusion(GlobalFusion):
    """Weighted mean, with weights that are learnt per training cell and modality (MultiVI, Methods).

    The logits of a cell's weights are global logits plus logits of the cell, which start at 0. Cells outside the
    training data get the global weights, with one warning. Cells are identified by their names.

    Parameters
    ----------
    modalities
        Names of the model's modalities.
    """

    cells: Tensor
    rows: Tensor

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__(modalities)
        self.register_buffer("cells", torch.zeros(0, dtype=torch.long))  # hashes of the training cells' names
        self.own = nn.Parameter(torch.zeros(0, len(modalities)))
        self.register_buffer("rows", torch.zeros(0, dtype=torch.long), persistent=False)

    def start(self, mosaic: Mosaic) -> None:
        """Allocate the weights of the training cells."""
        self.cells = torch.from_numpy(_hashes(mosaic.obs_names))
        self.own = nn.Parameter(torch.zeros(mosaic.n_cells, len(self.modalities)))
        self.meet(mosaic)

    def meet(self, mosaic: Mosaic) -> None:
        """Find the cells of a mosaic among the training cells."""
        rows = pd.Index(self.cells.cpu().numpy()).get_indexer(pd.Index(_hashes(mosaic.obs_names)))
        self.rows = torch.from_numpy(rows.astype(np.int64)).to(self.own.device)
        if (rows < 0).any():
            warnings.warn(
                "some cells were not among the training cells; their modalities get the global weights",
                stacklevel=4,
            )

    def logits(self, index: Tensor | None) -> Tensor:
        """Weights of all modalities in every cell as logits, shape (B, modalities)."""
        if index is None or len(self.own) == 0:
            return self.log_weights
        rows = self.rows[index]
        return self.log_weights + self.own[rows.clamp_min(0)] * (rows >= 0).unsqueeze(-1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: object) -> None:
        n = len(state_dict.get(f"{prefix}cells", ()))
        if n != len(self.cells):  # created without the training cells
            self.cells = self.cells.new_zeros(n)
            self.own = nn.Parameter(self.own.new_zeros(n, len(self.modalities)))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ProductFusion(Fusion):
    """Product of experts: the modalities' normal posteriors times the standard normal prior (Wu & Goodman 2018).

    The precision is ``1 + sum(1 / sigma^2)``, and the mean is ``sum(mu / sigma^2)`` divided by it. The prior expert is
    standard normal, whatever the prior of the model.
    """

    def forward(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation; see `Fusion.forward`."""
        qs = [
            (q, w[q.rows].unsqueeze(-1) / q.scale.square())
            for w, q in zip(used.unbind(-1), posteriors.values(), strict=True)
        ]
        precision = 1 + placed([(q.rows, p) for q, p in qs], len(used))
        return placed([(q.rows, p * q.loc) for q, p in qs], len(used)) / precision, precision.rsqrt()

    def correlated(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance, where precision matrices take the place of precisions; see `Fusion.correlated`."""
        qs = [
            (q, w[q.rows], torch.cholesky_inverse(q.scale_tril))
            for w, q in zip(used.unbind(-1), posteriors.values(), strict=True)
        ]
        precision = _placed([(q.rows, w, p) for q, w, p in qs], len(used))
        covariance = torch.linalg.inv(precision + torch.eye(precision.shape[-1]).to(precision))
        shift = placed([(q.rows, w.unsqueeze(-1) * (p @ q.loc.unsqueeze(-1)).squeeze(-1)) for q, w, p in qs], len(used))
        return (covariance @ shift.unsqueeze(-1)).squeeze(-1), covariance


class MixtureFusion(Fusion):
    """Mixture of experts: the modalities' normal posteriors with equal weights (Shi et al. 2019).

    A draw comes from one of a cell's modalities, chosen at random. Its log density is that of the whole mixture.
    Therefore the objective is the ELBO of the mixture. The mixture weights are fixed, so that gradients through the
    draw are unbiased.
    """

    def __init__(self, modalities: Sequence[str] = ()) -> None:
        super().__init__(modalities)
        self.width = FusedWidth(1)  # the mixture stays as wide as it is

    def forward(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the mixture; see `Fusion.forward`."""
        q = self.posterior(posteriors, used, index)
        return q.mean.squeeze(-2), q.stddev.squeeze(-2)

    def correlated(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the mixture; see `Fusion.correlated`."""
        qs = list(zip((used / used.sum(-1, keepdim=True)).unbind(-1), posteriors.values(), strict=True))
        loc = placed([(q.rows, w[q.rows].unsqueeze(-1) * q.loc) for w, q in qs], len(used))
        away = [q.loc - loc[q.rows] for _, q in qs]
        parts = [(q.rows, w[q.rows], q.covariance + _outer(a)) for (w, q), a in zip(qs, away, strict=True)]
        return loc, _placed(parts, len(used))

    def posterior(
        self, posteriors: Mapping[str, Posterior], used: Tensor, index: Tensor | None = None
    ) -> dist.TorchDistribution:
        """Mixture of every cell; see `Fusion.posterior`."""
        n = len(used)
        loc = torch.stack([placed([(q.rows, q.loc)], n) for q in posteriors.values()], dim=-2).unsqueeze(1)
        experts: dist.TorchDistribution  # absent modalities have weight 0
        if all(q.factor is None for q in posteriors.values()):
            scale = torch.stack([placed([(q.rows, q.scale - 1)], n) + 1 for q in posteriors.values()], dim=-2)
            experts = dist.Normal(loc, scale.unsqueeze(1)).to_event(1)
        else:
            one = torch.eye(loc.shape[-1]).to(loc)
            each = [placed([(q.rows, (q.scale_tril - one).flatten(1))], n) for q in posteriors.values()]
            factors = torch.stack(each, dim=-2).unflatten(-1, one.shape) + one
            experts = dist.MultivariateNormal(loc, scale_tril=factors.unsqueeze(1))
        return ExpertMixture(dist.Categorical(logits=used.log().unsqueeze(1)), experts)


class ExpertMixture(dist.MixtureSameFamily):
    """A mixture with fixed weights, whose draws have gradients with respect to the parameters of the components.

    Parameters
    ----------
    mixture_distribution
        Weights of the components, a categorical distribution.
    component_distribution
        The components, along the last dimension of its batch shape; they must be reparametrised.
    """

    has_rsample = True

    def rsample(self, sample_shape: _size = ()) -> Tensor:
        """Draw the component, then a value from it."""
        chosen = self.mixture_distribution.sample(sample_shape)[..., None, None]
        draws = self.component_distribution.rsample(sample_shape)
        return draws.gather(-2, chosen.expand(*draws.shape[:-2], 1, draws.shape[-1])).squeeze(-2)


#: The fusion for each name that a model accepts.
FUSIONS: Mapping[str, type[Fusion]] = {
    "mean": MeanFusion,
    "equal": MeanFusion,
    "global": GlobalFusion,
    "universal": GlobalFusion,
    "cell": CellFusion,
    "product": ProductFusion,
    "mixture": MixtureFusion,
}


def fusion_of(fusion: str | Fusion, modalities: Sequence[str]) -> Fusion:
    """The fusion with the given name, or the given object.

    Parameters
    ----------
    fusion
        A name in `FUSIONS`, or a `Fusion`.
    modalities
        Names of the model's modalities.

    Returns
    -------
    Fusion
        A new one, or the one given.

    Raises
    ------
    ValueError
        If there is no fusion with that name.

    Examples
    --------
    >>> fusion_of("product", ["rna", "adt"])
    ProductFusion(
      (width): FusedWidth()
    )
    """
    if isinstance(fusion, Fusion):
        return fusion
    if not isinstance(fusion, str) or fusion not in FUSIONS:
        raise ValueError(f"fusion must be a Fusion or one of {', '.join(map(repr, FUSIONS))}; found {fusion!r}")
    return FUSIONS[fusion](modalities)


def _placed(parts: Iterable[tuple[Tensor, Tensor, Tensor]], n_cells: int) -> Tensor:
    """Weighted sum of matrices over parts (rows, weights, matrices), as in `placed`; shape (n_cells, width, width)."""
    parts = list(parts)
    total = placed([(rows, (w[:, None, None] * matrices).flatten(1)) for rows, w, matrices in parts], n_cells)
    return total.unflatten(-1, parts[0][2].shape[1:])


def _outer(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) * x.unsqueeze(-2)


def _hashes(names: pd.Index) -> np.ndarray:
    return pd.util.hash_array(np.asarray(names, dtype=object)).view(np.int64)


def agreement_weights(schema: Schema, jeffreys: Any, left_out: float | None) -> tuple[Any, float]:
    """Weights of terms that make the posteriors of a cell's modalities agree; defaults by number of features.

    By default, both are the number of features divided by 10,000, `jeffreys` at most 0.2 and `left_out` at most 0.1.
    With few features, the likelihood is weak compared with fixed weights, which would then make the posterior, and
    therefore intervals of imputed values, too narrow.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> schema = Mosaic.from_mudata(simulate(60, {"rna": 80, "adt": 20})[0]).schema
    >>> agreement_weights(schema, None, 0.0)
    (0.01, 0.0)
    """
    share = sum(modality.n_features for modality in schema.modalities.values()) / 10_000
    return min(0.2, share) if jeffreys is None else jeffreys, min(0.1, share) if left_out is None else left_out
