"""Supervision by labels: a classifier on the latent space."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyromosaic.accepted import Weight, Width, checked
from pyromosaic.data import Minibatch
from pyromosaic.labels import Labels
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Classifier(Penalty):
    """Cross-entropy of a linear classifier on posterior means (DiagVI).

    It is the mean over the labelled cells of a modality (or cohort), summed over modalities; cells without a label are
    ignored.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    labels, n_latent
        The labels, and the width of the latent space; leave both out in an option of a model.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50}, types=3)[0], label_key="celltype")
    >>> classifier = Classifier(1.0, Labels(mosaic.schema), n_latent=5)
    >>> q = Posterior(torch.arange(60), torch.zeros(60, 5), torch.ones(60, 5))
    >>> bool(classifier({"rna": q}, measured(mosaic, mosaic.find(None))) > 0)
    True
    >>> classifier.probabilities(torch.zeros(60, 5)).shape
    torch.Size([60, 3])
    """

    name = "classifier"
    temperature: Tensor

    needed = ("labels", "n_latent")

    @checked
    def __init__(self, weight: Weight = 1.0, labels: Labels | None = None, n_latent: Width | None = None) -> None:
        super().__init__(weight)
        self.complete = labels is not None and n_latent is not None
        if labels is None or n_latent is None:
            return
        self.labels = labels
        self.logits = nn.Linear(n_latent, len(labels))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 if no label is known."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        labels = self.labels(minibatch)
        for q in posteriors.values():
            known = labels[q.rows]
            entropy = cross_entropy(self.logits(q.loc), known, ignore_index=-1, reduction="sum")
            total = total + entropy / (known >= 0).sum().clamp_min(1)
        return total

    def probabilities(self, z: Tensor) -> Tensor:
        """Probability of each label, shape (n, labels), for latent variables of shape (n, latent)."""
        return torch.softmax(self.logits(z) / self.temperature, dim=-1)

    def calibrate(self, z: Tensor, known: Tensor) -> None:
        """Choose the temperature on cells with known labels that were not used in training.

        It is the temperature between 1/4 and 4 that maximises the likelihood of their labels (Guo et al., On
        calibration of modern neural networks, ICML 2017).
        """
        temperatures = torch.logspace(-2, 2, 41, base=2.0, device=z.device)
        entropies = [cross_entropy(self.logits(z) / t, known) for t in temperatures]
        self.temperature = temperatures[torch.stack(entropies).argmin()]
