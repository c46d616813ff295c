"""An adversary that predicts from the latent variable which modalities a cell has, or its batch."""

from collections.abc import Mapping
from typing import Literal

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from pyromosaic.accepted import Positive, Weight, Width, checked
from pyromosaic.data import Minibatch, Schema
from pyromosaic.nn import layers
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Adversary(Penalty):
    """Cross-entropy between a classifier's prediction and a uniform distribution over the wrong classes of a cell.

    A two-layer classifier learns to predict from a draw of z which modalities a cell has, or its batch. The penalty
    trains the encoders to mislead it (MultiVI, Methods: domain adaptation). No gradient of the penalty reaches the
    classifier, and no gradient of the classifier's loss reaches anything else. Both are factors of the guide,
    ``penalty/adversary`` and ``penalty/adversary_classifier``. The second is the cross-entropy of the prediction with
    the true class. It shows how well the classes can be distinguished; if they cannot, it is the entropy of the class
    proportions.

    Parameters
    ----------
    schema, n_latent
        The model's modalities, and the width of its latent space; leave both out in an option of a model.
    target
        ``"pattern"``: which modalities the cell has; ``"batch"``: its batch, matched by name across modalities.
    weight
        Factor of the penalty in the loss; 1 in the paper.
    warms_up
        Whether it is also multiplied by the weight of the divergences, which increases during training.
    n_hidden
        Width of the two layers of the classifier.
    learning_rate
        Learning rate of the classifier's optimiser, Adam.
    """

    name = "adversary"
    needed = ("schema", "n_latent")
    batches: Tensor
    seen: Tensor

    @checked
    def __init__(
        self,
        schema: Schema | None = None,
        n_latent: Width | None = None,
        target: Literal["pattern", "batch"] = "pattern",
        weight: Weight = 1.0,
        *,
        warms_up: bool = False,
        n_hidden: Width = 32,
        learning_rate: Positive = 1e-3,
    ) -> None:
        super().__init__(weight)
        self.target, self.warms_up, self.learning_rate = target, warms_up, learning_rate
        self.complete = schema is not None and n_latent is not None
        if schema is None or n_latent is None:
            return
        self.modalities = tuple(schema.modalities)
        own = [m.categories[m.spec.batch_key] if m.spec.batch_key else ("",) for m in schema.modalities.values()]
        names = sorted(set().union(*own))
        batches = torch.zeros(len(own), max(map(len, own)), dtype=torch.long)  # from a modality's codes to classes
        for row, categories in zip(batches, own, strict=True):
            row[: len(categories)] = torch.tensor([names.index(c) for c in categories])
        self.register_buffer("batches", batches, persistent=False)
        n_classes = len(names) if target == "batch" else 2 ** len(own)
        self.register_buffer("seen", torch.zeros(n_classes, dtype=torch.bool))
        self.classifier = nn.Sequential(layers(n_latent, n_hidden, 2, 0.0), nn.Linear(n_hidden, n_classes))

    def optimiser(self) -> torch.optim.Optimizer:
        """The optimiser of the classifier."""
        return torch.optim.Adam(self.classifier.parameters(), lr=self.learning_rate, eps=0.01)

    def classes(self, minibatch: Minibatch) -> Tensor:
        """Class of each cell, shape (B,)."""
        classes = torch.zeros_like(minibatch.index)
        for name, view in minibatch.observed.items():
            i = self.modalities.index(name)
            if self.target == "pattern":
                classes = classes.index_add(0, view.rows, torch.full_like(view.rows, 2**i))
            else:
                codes = view.codes[:, 0].clamp_min(0) if view.n_categories else torch.zeros_like(view.rows)
                classes = classes.index_copy(0, view.rows, self.batches[i][codes])
        return classes

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar, for draws from the posteriors; 0 if all cells seen so far are of one class.

        Parameters
        ----------
        posteriors
            The posterior of the cells, ``{"z": ...}``; or several posteriors, each of which is used.
        minibatch
            The cells.
        """
        classes = self.classes(minibatch)
        seen = self.seen.index_fill(0, classes, True)
        if self.training:
            self.seen.copy_(seen)
        parameters = {name: p.detach() for name, p in self.classifier.named_parameters()}
        misled, told = [], []
        for q in posteriors.values():
            z = q.loc + q.scale * torch.randn_like(q.scale)
            own = classes[q.rows]
            guess = self._guess(functional_call(self.classifier, parameters, (z,)), seen)
            others = seen.expand_as(guess).scatter(-1, own.unsqueeze(-1), False)
            entropies = -guess.masked_fill(~others, 0.0).sum(-1) / others.sum(-1).clamp_min(1)
            misled.append(entropies.sum() / len(minibatch))
            told.append(cross_entropy(self._guess(self.classifier(z.detach()), seen), own))
        # In a guide, a factor enters the ELBO with a minus sign.
        pyro.factor("penalty/adversary_classifier", minibatch.n_cells * torch.stack(told).mean(), has_rsample=True)
        return torch.stack(misled).sum()

    @staticmethod
    def _guess(logits: Tensor, seen: Tensor) -> Tensor:
        """Log probabilities of the classes that occur."""
        return logits.masked_fill(~seen, -torch.inf).log_softmax(-1)
