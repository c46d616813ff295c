"""Sizes: how many counts a cell has in a modality, where it was not measured or is not taken for granted."""

from dataclasses import replace

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyromosaic.data import ModalitySchema, View


class Size(nn.Module):
    """Size of a cell in which a modality was not measured: log-linear in the latent variable and the covariates.

    Fitted by ridge regression once the model is trained; before, it is the median size.

    Parameters
    ----------
    schema
        The modality.
    n_latent
        Width of the latent space.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, schema: ModalitySchema, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_latent + schema.n_covariates, 1))
        self.register_buffer("bias", torch.full((1,), schema.library).log())

    @staticmethod
    def _inputs(z: Tensor, view: View) -> Tensor:
        return torch.cat([z, view.design().expand(*z.shape[:-1], -1)], dim=-1)

    def fit(self, z: Tensor, view: View) -> None:
        """Learn from cells in which the modality was measured: z of shape (b, latent) and their view."""
        x, y = self._inputs(z, view).double(), view.library.clamp_min(1.0).log().double()
        centred = x - x.mean(0)
        ridge = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y.mean(0)))
        self.weight.copy_(weight)
        self.bias.copy_(y.mean(0) - x.mean(0) @ weight)

    def forward(self, z: Tensor, view: View) -> View:
        """The view with missing sizes filled in, for z of shape (..., b, latent)."""
        missing = view.library.isnan()
        if not missing.any():
            return view
        predicted = (self._inputs(z, view) @ self.weight + self.bias).exp()
        return replace(view, library=torch.where(missing, predicted, view.library))


class LatentSize(Size):
    """Size of a cell as a latent variable: ``log l ~ Normal(m_b, s_b)``, with moments of the data's batch b.

    Where the model is to predict, a size that is given is used, and a missing one expected as in `Size`.

    Parameters
    ----------
    schema
        The modality.
    n_latent
        Width of the latent space.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, name: str, schema: ModalitySchema, n_latent: int) -> None:
        super().__init__(schema, n_latent)
        self.name = name
        n_batches = len(next(iter(schema.categories.values()))) if schema.spec.batch_key else 1
        self.register_buffer("loc", torch.zeros(n_batches, 1))
        self.register_buffer("scale", torch.ones(n_batches, 1))

    @staticmethod
    def batches(view: View, n: int) -> Tensor:
        """Indicators of the batch, shape (b, batches)."""
        return view.one_hot() if view.n_categories and n > 1 else view.library.new_ones(len(view.library), 1)

    def start(self, view: View) -> None:
        """Moments of the log size in each batch."""
        batches = self.batches(view, len(self.loc))
        logs, n = view.library.log(), batches.sum(0).clamp_min(1.0).unsqueeze(-1)
        self.loc.copy_(batches.T @ logs / n)
        self.scale.copy_((batches.T @ (logs - batches @ self.loc).square() / n).sqrt().clamp_min(1e-2))

    def forward(self, z: Tensor, view: View) -> View:
        """The view with drawn sizes, where there is something to explain."""
        if view.counts is None:
            return super().forward(z, view)
        batches = self.batches(view, len(self.loc))
        log_size = pyro.sample(f"{self.name}_library", dist.Normal(batches @ self.loc, batches @ self.scale))
        return replace(view, library=log_size.exp())
