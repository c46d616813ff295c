"""Sizes of cells (their counts in a modality) if the modality was not measured, or if the size is inferred."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyromosaic.data import Minibatch, ModalitySchema, Mosaic, Schema, View


class Size(nn.Module):
    """Size of a cell for a modality that was not measured in it: ``log l ~ Normal(m, residual)``.

    m is linear in the latent variable, the covariates and the log sizes of the cell in other modalities, relative to
    their median (0 where they were not measured); `residual` is the standard deviation that these do not explain. Both
    come from a ridge regression after training; before that, the size is the median size. Draws of measurements include
    a draw of the size; expected measurements are at the expected size.

    Parameters
    ----------
    name, schema
        The modality.
    n_latent
        Dimension of the latent space.
    others
        Names and median sizes of the other modalities whose sizes are used.
    """

    weight: Tensor
    of_depths: Tensor
    bias: Tensor
    residual: Tensor

    def __init__(
        self, name: str, schema: ModalitySchema, n_latent: int, others: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.name, self.others = name, dict(others or {})
        self.register_buffer("of_depths", torch.zeros(len(self.others), 1) if self.others else None)
        self.register_buffer("weight", torch.zeros(n_latent + schema.n_covariates, 1))
        self.register_buffer("bias", torch.full((1,), schema.library).log())
        self.register_buffer("residual", torch.full((1,), 1e-6))

    @staticmethod
    def _inputs(z: Tensor, view: View) -> Tensor:
        return torch.cat([z, view.design().expand(*z.shape[:-1], -1)], dim=-1)

    def depths_in(self, mosaic: Mosaic, cells: np.ndarray) -> Tensor:
        """Log sizes of cells in the other modalities relative to their median, shape (b, others); 0 if not measured."""
        libraries = [torch.from_numpy(mosaic.modalities[name].library[cells]) for name in self.others]
        return self._depths(libraries, len(cells))

    def _depths(self, libraries: Sequence[Tensor], n: int) -> Tensor:
        if not self.others:
            return self.bias.new_zeros(n, 0)
        medians = self.bias.new_tensor(list(self.others.values()))
        return (torch.stack(list(libraries), dim=-1).to(medians).clamp_min(1.0) / medians).log().nan_to_num()

    def fit(self, z: Tensor, view: View, depths: Tensor | None = None) -> None:
        """Fit to cells with the modality: z of shape (b, latent), the view of the cells, and their `depths_in`."""
        own, y = self._inputs(z, view), view.library.clamp_min(1.0).log().double()
        depths = own.new_zeros(len(own), len(self.others)) if depths is None else depths.to(own)
        x = torch.cat([own, depths], dim=-1).double()
        centred = x - x.mean(0)
        ridge = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y.mean(0)))
        self.weight.copy_(weight[: own.shape[1]])
        if self.others:
            self.of_depths.copy_(weight[own.shape[1] :])
        self.bias.copy_(y.mean(0) - x.mean(0) @ weight)
        n_free = max(1, len(x) - x.shape[1] - 1)
        self.residual.copy_(((y - x @ weight - self.bias).square().sum() / n_free).sqrt().clamp_min(1e-6))

    def forward(self, z: Tensor, view: View, minibatch: Minibatch | None = None) -> View:
        """The view with missing sizes filled in by the site ``<name>_size``, for z of shape (..., b, latent)."""
        missing = view.library.isnan()
        if not missing.any():
            return view
        loc = self._inputs(z, view) @ self.weight + self.bias
        if minibatch is not None and self.others:
            libraries = []
            for name in self.others:
                library = z.new_full((len(minibatch),), float("nan"))
                if name in minibatch.observed:
                    seen = minibatch.observed[name]
                    library = library.index_copy(0, seen.rows, seen.library[:, 0])
                libraries.append(library[view.rows])
            loc = loc + self._depths(libraries, len(view.rows)) @ self.of_depths
        size = pyro.sample(f"{self.name}_size", dist.LogNormal(loc, self.residual))
        return replace(view, library=torch.where(missing, size, view.library))


class LatentSize(Size):
    """Size of a cell as a latent variable: ``log l ~ Normal(m_b, s_b)``, with the moments of batch b in the data.

    In prediction, a given size is used, and a missing one is drawn as in `Size`.

    Parameters
    ----------
    name, schema
        The modality.
    n_latent
        Dimension of the latent space.
    others
        As in `Size`.
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, name: str, schema: ModalitySchema, n_latent: int, others: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(name, schema, n_latent, others)
        n_batches = len(next(iter(schema.categories.values()))) if schema.spec.batch_key else 1
        self.register_buffer("loc", torch.zeros(n_batches, 1))
        self.register_buffer("scale", torch.ones(n_batches, 1))

    @staticmethod
    def batches(view: View, n: int) -> Tensor:
        """Indicators of the batches, shape (b, batches)."""
        return view.one_hot() if view.n_categories and n > 1 else view.library.new_ones(len(view.library), 1)

    def start(self, view: View) -> None:
        """Moments of the log size in each batch."""
        batches = self.batches(view, len(self.loc))
        logs, n = view.library.log(), batches.sum(0).clamp_min(1.0).unsqueeze(-1)
        self.loc.copy_(batches.T @ logs / n)
        self.scale.copy_((batches.T @ (logs - batches @ self.loc).square() / n).sqrt().clamp_min(1e-2))

    def forward(self, z: Tensor, view: View, minibatch: Minibatch | None = None) -> View:
        """The view with drawn sizes, if its measurements are explained."""
        if view.counts is None:
            return super().forward(z, view, minibatch)
        batches = self.batches(view, len(self.loc))
        log_size = pyro.sample(f"{self.name}_library", dist.Normal(batches @ self.loc, batches @ self.scale))
        return replace(view, library=log_size.exp())


def latent_sizes(library: str | Mapping[str, str], schema: Schema) -> list[str]:
    """The modalities whose sizes a model infers: RNA for ``"latent"``, or those in a dictionary.

    Raises
    ------
    ValueError
        If a choice is neither ``"observed"`` nor ``"latent"``, or the likelihood does not depend on a size to be
        inferred.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> schema = Mosaic.from_mudata(simulate(40, {"rna": 50, "adt": 5})[0]).schema
    >>> latent_sizes("latent", schema), latent_sizes({"adt": "latent"}, schema)
    (['rna'], ['adt'])
    """
    if isinstance(library, str):
        rna = [name for name, m in schema.modalities.items() if m.spec.traits.latent_size]
        chosen: Mapping[str, str] = {"": library} | dict.fromkeys(rna, library)
    else:
        chosen = library
        for name in library:
            if library[name] == "latent" and not schema[name].spec.traits.sized:
                raise ValueError(f"modality {name!r} has no size to infer: its likelihood does not depend on the size")
    for choice in chosen.values():
        if choice not in ("observed", "latent"):
            raise ValueError(f'library must be "observed" or "latent"; found {choice!r}')
    return [name for name in schema.modalities if chosen.get(name) == "latent"]


def other_sizes(schema: Schema, name: str) -> dict[str, float]:
    """Names and median sizes of the other modalities that are counts.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> schema = Mosaic.from_mudata(simulate(40, {"rna": 50, "adt": 5})[0]).schema
    >>> list(other_sizes(schema, "adt"))
    ['rna']
    """
    counted = {key: m.library for key, m in schema.modalities.items() if m.spec.traits.kind == "count"}
    return {key: library for key, library in counted.items() if key != name}
