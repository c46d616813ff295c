"""Penalties between two modalities, summed over pairs of modalities; and an adversary for each pair."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from pyromosaic.data import Minibatch
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Pairs(Penalty):
    """Sum of a penalty over pairs of modalities: a chain, or all.

    Parameters
    ----------
    weight
        What the sum is multiplied by.
    penalties
        The penalty of each pair of modalities, all of one kind; their own weights are not used.
    warms_up
        Whether it is also multiplied by the weight of the divergences, which rises during training.

    Examples
    --------
    >>> from pyromosaic.penalties import MMD
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> minibatch = measured(Mosaic.from_mudata(simulate(20, {"rna": 50})[0]), np.arange(20))
    >>> rna, adt = (Posterior(torch.arange(20), torch.randn(20, 2), torch.ones(20, 2)) for _ in range(2))
    >>> chain = Pairs(1.0, {("rna", "adt"): MMD(), ("adt", "atac"): MMD()})
    >>> total = chain({"rna": rna, "adt": adt}, minibatch)  # there is no ATAC in this minibatch
    >>> torch.allclose(total, MMD()({"rna": rna, "adt": adt}, minibatch))
    True
    """

    def __init__(self, weight: float, penalties: Mapping[tuple[str, str], Penalty], *, warms_up: bool = False) -> None:
        super().__init__(weight)
        self.pairs, self.penalties, self.warms_up = list(penalties), nn.ModuleList(penalties.values()), warms_up
        self.name = next(iter(penalties.values())).name

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The sum, a scalar, over the pairs of which both modalities are in the minibatch."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for pair, penalty in zip(self.pairs, self.penalties, strict=True):
            if all(name in posteriors for name in pair):
                total = total + penalty({name: posteriors[name] for name in pair}, minibatch)
        return total


class Discriminator(Penalty):
    """Adversary of two modalities: a network scores from a draw of z how surely the cell is of the first.

    Its loss is the cross-entropy ``mean softplus(-D(z_1)) + mean softplus(D(z_2))``, ``2 log 2`` where nothing can be
    told; the penalty is minus that (the minimax form), by which only the encoders learn (scMODAL; Wang et al. 2025).
    At every training step the network first takes `n_steps` steps of its own on the minibatch.

    Parameters
    ----------
    weight
        What it is multiplied by.
    n_latent
        Width of the latent space; left out where this is the option of a model.
    n_hidden
        Width of the two hidden layers; as the option of a model by default the model's.
    n_steps
        Steps of the network for each of the encoders'.
    learning_rate, weight_decay
        Of its own optimiser, Adam.

    Examples
    --------
    >>> from math import log
    >>> discriminator = Discriminator(1.0, n_latent=2, n_hidden=16, n_steps=200)
    >>> x = torch.zeros(50, 2)
    >>> discriminator.learn(x, x + 3)
    >>> bool(discriminator.loss(x, x + 3) < 2 * log(2))  # it can tell them apart
    True
    """

    name = "adversary"
    needed = ("n_latent",)

    def __init__(
        self,
        weight: float = 1.0,
        n_latent: int | None = None,
        n_hidden: int = 512,
        n_steps: int = 5,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(weight)
        self.n_steps, self.learning_rate, self.weight_decay = n_steps, learning_rate, weight_decay
        self._own: torch.optim.Optimizer | None = None
        self.complete = n_latent is not None
        if n_latent is None:
            return
        self.network = nn.Sequential(
            nn.Linear(n_latent, n_hidden),
            nn.ReLU(),
            nn.Linear(n_hidden, n_hidden),
            nn.ReLU(),
            nn.Linear(n_hidden, 1),
        )

    def optimiser(self) -> torch.optim.Optimizer:
        """The network's own optimiser, anew; its steps are taken by `forward`, where gradients are left to no other."""
        self._own = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return self._own

    def loss(self, first: Tensor, second: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Cross-entropy of the scores, which are cut off at ±50, of two samples (n, latent) and (m, latent)."""
        own: dict[str, Tensor] = dict(self.network.named_parameters() if parameters is None else parameters)
        one, two = (functional_call(self.network, own, (z,)).clamp(-50.0, 50.0) for z in (first, second))
        return softplus(-one).mean() + softplus(two).mean()

    def learn(self, first: Tensor, second: Tensor) -> None:
        """Take the network's own steps."""
        own = self.optimiser() if self._own is None else self._own
        parameters = list(self.network.parameters())
        for _ in range(self.n_steps):
            gradients = torch.autograd.grad(self.loss(first, second), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            own.step()
        own.zero_grad()

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar, of draws from the posteriors of two modalities."""
        first, second = (q.loc + q.scale * torch.randn_like(q.scale) for q in posteriors.values())
        if self.training and torch.is_grad_enabled():
            self.learn(first.detach(), second.detach())
        frozen = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        return -self.loss(first, second, frozen)
