"""Penalties between two modalities, summed over pairs of modalities, and an adversary for each pair."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from pyromosaic.accepted import Count, Positive, Weight, Width, checked
from pyromosaic.data import Minibatch
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Pairs(Penalty):
    """Sum of a penalty over consecutive or all pairs of modalities.

    Parameters
    ----------
    weight
        Factor of the sum in the loss.
    penalties
        The penalty of each pair of modalities, all of one class; their weights are ignored.
    warms_up
        Whether it is also multiplied by the weight of the divergences, which increases during training.
    """

    @checked
    def __init__(self, weight: Weight, penalties: Mapping[tuple[str, str], Penalty], *, warms_up: bool = False) -> None:
        super().__init__(weight)
        self.pairs, self.penalties, self.warms_up = list(penalties), nn.ModuleList(penalties.values()), warms_up
        self.name = next(iter(penalties.values())).name

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The sum, a scalar, over the pairs whose modalities are both in the minibatch."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for pair, penalty in zip(self.pairs, self.penalties, strict=True):
            if all(name in posteriors for name in pair):
                total = total + penalty({name: posteriors[name] for name in pair}, minibatch)
        return total


class Discriminator(Penalty):
    """Adversary of two modalities: a network predicts from a draw of z whether the cell has the first modality.

    Its loss is the cross-entropy ``mean softplus(-D(z_1)) + mean softplus(D(z_2))``, which is ``2 log 2`` if it cannot
    distinguish the modalities. The penalty is minus this loss (the minimax form) and trains only the encoders (scMODAL;
    Wang et al. 2025). At every training step, the network first takes `n_steps` steps on the minibatch.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    n_latent
        Width of the latent space; leave it out in an option of a model.
    n_hidden
        Width of the two hidden layers; in an option of a model, the width of the model by default.
    n_steps
        Number of steps of the network for each step of the encoders.
    learning_rate, weight_decay
        Settings of the network's optimiser, Adam.
    """

    name = "adversary"
    needed = ("n_latent",)

    @checked
    def __init__(
        self,
        weight: Weight = 1.0,
        n_latent: Width | None = None,
        n_hidden: Width = 512,
        n_steps: Count = 5,
        learning_rate: Positive = 1e-3,
        weight_decay: Weight = 1e-3,
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
        """A new optimiser of the network; `forward` takes its steps, and no other optimiser uses these gradients."""
        self._own = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return self._own

    def loss(self, first: Tensor, second: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Cross-entropy of the scores, which are clipped at ±50, of two samples (n, latent) and (m, latent)."""
        own: dict[str, Tensor] = dict(self.network.named_parameters() if parameters is None else parameters)
        one, two = (functional_call(self.network, own, (z,)).clamp(-50.0, 50.0) for z in (first, second))
        return softplus(-one).mean() + softplus(two).mean()

    def learn(self, first: Tensor, second: Tensor) -> None:
        """Take the steps of the network."""
        own = self.optimiser() if self._own is None else self._own
        parameters = list(self.network.parameters())
        for _ in range(self.n_steps):
            gradients = torch.autograd.grad(self.loss(first, second), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            own.step()
        own.zero_grad()

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar, for draws from the posteriors of two modalities."""
        first, second = (q.loc + q.scale * torch.randn_like(q.scale) for q in posteriors.values())
        if self.training and torch.is_grad_enabled():
            self.learn(first.detach(), second.detach())
        frozen = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        return -self.loss(first, second, frozen)
