"""Sizes of cells (their counts in a modality) if the modality was not measured, or if the size is inferred."""

from collections.abc import Mapping
from dataclasses import replace

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyromosaic.data import ModalitySchema, Schema, View


class Size(nn.Module):
    """Size of a cell for a modality that was not measured in it: ``log l ~ Normal(m, residual)``.

    m is linear in the latent variable and the covariates; `residual` is the standard deviation that they do not
    explain. Both come from a ridge regression after training; before that, the size is the median size. Draws of
    measurements include a draw of the size; expected measurements are at the expected size.

    Parameters
    ----------
    name, schema
        The modality.
    n_latent
        Dimension of the latent space.
    """

    weight: Tensor
    bias: Tensor
    residual: Tensor

    def __init__(self, name: str, schema: ModalitySchema, n_latent: int) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", torch.zeros(n_latent + schema.n_covariates, 1))
        self.register_buffer("bias", torch.full((1,), schema.library).log())
        self.register_buffer("residual", torch.full((1,), 1e-6))

    @staticmethod
    def _inputs(z: Tensor, view: View) -> Tensor:
        return torch.cat([z, view.design().expand(*z.shape[:-1], -1)], dim=-1)

    def fit(self, z: Tensor, view: View) -> None:
        """Fit to cells with the modality: z of shape (b, latent), and the view of the cells."""
        x, y = self._inputs(z, view).double(), view.library.clamp_min(1.0).log().double()
        centred = x - x.mean(0)
        ridge = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y.mean(0)))
        self.weight.copy_(weight)
        self.bias.copy_(y.mean(0) - x.mean(0) @ weight)
        n_free = max(1, len(x) - x.shape[1] - 1)
        self.residual.copy_(((y - x @ weight - self.bias).square().sum() / n_free).sqrt().clamp_min(1e-6))

    def forward(self, z: Tensor, view: View) -> View:
        """The view with missing sizes filled in by the site ``<name>_size``, for z of shape (..., b, latent)."""
        missing = view.library.isnan()
        if not missing.any():
            return view
        loc = self._inputs(z, view) @ self.weight + self.bias
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
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, name: str, schema: ModalitySchema, n_latent: int) -> None:
        super().__init__(name, schema, n_latent)
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

    def forward(self, z: Tensor, view: View) -> View:
        """The view with drawn sizes, if its measurements are explained."""
        if view.counts is None:
            return super().forward(z, view)
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
