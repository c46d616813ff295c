"""DiagVI: one latent space for modalities measured in different cells, connected by known links between features.

After DiagVI of scvi-tools, which follows GLUE (Cao and Gao, Multi-omics single-cell data integration and regulatory
inference with graph-linked embedding, Nature Biotechnology 2022). It extends both to any number of modalities, and to a
latent space with a shared part for all modalities and a private part for each.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn

from pyromosaic.accepted import Count, Dimensions, Layers, Positive, Rate, Seed, Weight, Width, checked
from pyromosaic.data import Minibatch, Mosaic, Schema, measured, separate
from pyromosaic.described import complete
from pyromosaic.fusion import Fusion, fusion_of, presence
from pyromosaic.guidance import linked_scores
from pyromosaic.labels import Labels, check_labels
from pyromosaic.likelihoods import likelihoods_of, posterior_decoders
from pyromosaic.linkage import Linkage
from pyromosaic.links import GuidanceGraph
from pyromosaic.measurement import MeasurementGuide, Plates, cells, encoded
from pyromosaic.models.embedded import Embedded, LinkedMeasurement, Weights, directed
from pyromosaic.models.mosaic_model import Cells, Preset
from pyromosaic.nn import Covariance, GraphEncoder, InnerProductDecoder, encoder_of
from pyromosaic.penalties import (
    Anchors,
    Classifier,
    Penalty,
    Pull,
    Scores,
    Sinkhorn,
    apply,
    attached,
    chosen,
    with_given,
)
from pyromosaic.priors import GaussianMixture, StandardNormal
from pyromosaic.program import Program, Slots, own
from pyromosaic.sizes import Size
from pyromosaic.tasks import inference_mode

#: The loss and the training of scvi-tools' DIAGVI with its default weights (except for the epsilon of Adam).
REFERENCE = Preset(
    options={
        "n_latent": 50,
        "n_private": 0,
        "n_hidden": 256,
        "encode_covariates": False,
        "likelihood_weight": 0.1,
        "shared_kl": 1.0,
        "kl_per_feature": True,
        "graph_weight": 15.0,
        "alignment": Sinkhorn(85.0, sampled=True),
        "anchors": 0.0,
        "pull": 0.0,
        "classifier": 5.0,
        "linkage": None,
    },
    training={
        "n_epochs": 400,
        "batch_size": 512,
        "learning_rate": 1e-3,
        "weight_decay": 1e-6,
        "kl_warmup_epochs": 0,
        "schedule": "constant",
        "likelihood_rate": 1.0,
        "sleep_steps": 0,
        "gradient_clip": 0.0,
    },
)


class DiagVIModel(Program):
    """The generative model.

    Each feature has an embedding v. The embeddings of linked features have a large inner product, with the sign of the
    link. Each cell has a latent variable z and a private one, z_<modality>, for variation that only this modality
    measures. The signal of a feature in a cell is the inner product of z and v plus a private part. The likelihood of
    the modality turns signals into measurements.
    """

    edges: Tensor
    neighbours: Tensor
    sign: Tensor
    weight: Tensor

    def __init__(
        self,
        graph: GuidanceGraph,
        prior: nn.Module,
        modalities: Mapping[str, LinkedMeasurement],
        weights: Weights,
        n_latent: int,
    ) -> None:
        super().__init__()
        self.prior = own(prior)
        self.modalities = Slots(modalities)
        self.weights, self.n_latent = weights, n_latent
        self.nodes, self.n_features = graph.nodes, graph.n_features
        edges, weight, sign = directed(graph)
        for name, value in (("edges", edges), ("weight", weight), ("sign", sign)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("neighbours", torch.sort(edges[0] * graph.n_features + edges[1]).values, persistent=False)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> Tensor:
        """``v, z ~ Normal(0, I)``, edges from ``<v_i, v_j>``, and ``x_m ~ likelihood_m(<z, v>)`` for each modality m.

        The model of GLUE (its Methods, graph-linked embeddings), with z_<modality> added. Sites: ``v``, ``edges``,
        ``z``, ``z_<modality>``, and one named after each modality.
        """
        with self.weights.features(minibatch, self.n_features):
            v = pyro.sample("v", dist.Normal(self.sign.new_zeros(()), 1.0).expand([self.n_latent]).to_event(1))
        self.graph(v, minibatch)
        v = v.reshape(*v.shape[:-3], *v.shape[-2:])  # if drawn several times, without the dimension of the cells' plate
        with cells(minibatch, kl_weight, self.weights.cells):
            z = pyro.sample("z", self.prior(minibatch))
        for name, view in minibatch.decoded.items():
            self.modalities[name](z, view, minibatch, kl_weight, v[..., self.nodes[name], :])
        return z

    def graph(self, v: Tensor, minibatch: Minibatch) -> None:
        """Site ``edges``: whether two features are linked, for every edge and for as many unlinked pairs."""
        first, second = self.edges
        other, found = self.unlinked()
        linked = self.sign * (v[..., first, :] * v[..., second, :]).sum(-1)
        unlinked = (v[..., first, :] * v[..., other, :]).sum(-1)
        answer = torch.cat([torch.ones_like(self.sign), torch.zeros_like(self.sign)])
        share = minibatch.n_cells * self.weights.graph / len(answer)
        with pyro.plate("pairs", len(answer), dim=-1), poutine.scale(scale=share * torch.cat([self.weight, found])):
            pyro.sample("edges", dist.Bernoulli(logits=torch.cat([linked, unlinked], dim=-1)), obs=answer)

    def unlinked(self, n_tries: int = 5) -> tuple[Tensor, Tensor]:
        """A random partner for the first node of every edge, and 1 if no edge links the two, otherwise 0."""
        first = self.edges[0]
        candidates = torch.randint(self.n_features, (n_tries, len(first)), device=first.device)
        pairs = first * self.n_features + candidates
        place = torch.searchsorted(self.neighbours, pairs).clamp_max(len(self.neighbours) - 1)
        free = self.neighbours[place] != pairs
        choice = free.to(torch.uint8).argmax(0, keepdim=True)  # the first try that is no neighbour
        return candidates.gather(0, choice)[0], free.gather(0, choice)[0].to(self.weight.dtype)


class DiagVIGuide(Program):
    """The variational posterior.

    A graph encoder gives the posterior of the embeddings of features. Each modality is encoded to a normal posterior of
    z and of the private variable. Penalties align the cells of the modalities in z only. In cells without the modality,
    the private variable is drawn from its prior. If a likelihood has latent variables, a separate decoder gives their
    posteriors.
    """

    def __init__(
        self,
        graph_encoder: nn.Module,
        modalities: Mapping[str, MeasurementGuide],
        fusion: Fusion,
        penalties: Sequence[nn.Module],
        weights: Weights,
        n_features: int,
    ) -> None:
        super().__init__("guide")
        self.graph_encoder = graph_encoder
        self.modalities = Slots(modalities)
        self.fusion = own(fusion)
        self.penalties = attached(penalties, self.modalities)
        self.weights, self.n_features = weights, n_features

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """``q(v)`` by the graph encoder, ``q(z | x_m)`` by the encoder of the modality m that was measured.

        Sites: ``v``, ``z``, ``penalty/...``, ``z_<modality>``, and the ``<protein>_background`` of antibodies.
        """
        with self.weights.features(minibatch, self.n_features):
            pyro.sample("v", dist.Normal(*self.graph_encoder()).to_event(1))
        shared, private = encoded(self.modalities, minibatch)
        apply(self.penalties, shared, minibatch, kl_weight)
        used = presence(shared, len(minibatch))
        with cells(minibatch, kl_weight, self.weights.cells):
            z = pyro.sample("z", self.fusion.posterior(shared, used, minibatch.index))
        for name, view in minibatch.decoded.items():
            self.modalities[name](z, view, minibatch, kl_weight, private.get(name))


class DiagVI(Embedded):
    """Integrate modalities that were measured in different cells, by a graph of linked features.

    Parameters
    ----------
    data
        The registered data, or only their `Schema`. Cells with several modalities are split, see `pairing`.
    graph
        The guidance graph: a `pyromosaic.guidance.GuidanceGraph`, a table of links (one column per modality), a
        `torch_geometric.data.Data`, or None to link features with equal names.
    n_latent
        Dimension of the shared latent space, in which modalities are aligned and which is returned.
    n_private
        Dimension of the private latent space of each modality. With 0, as in the reference, all variation is shared.
    n_hidden, n_encoder_layers, dropout
        Shape of the encoders.
    encode_covariates
        Whether encoders see batch and covariates.
    pairing
        Whether a cell with several modalities stays one cell. By default each of its measurements becomes a separate
        cell, named ``"modality:cell"``.
    prior
        Prior of z: ``"normal"``, a standard normal; ``"mixture"``, a mixture of Gaussians with one component per label
        (without labels, set their number by ``GaussianMixture(n_components=...)``); or a module that maps a minibatch
        to a distribution.
    fusion
        How to combine the posteriors of a cell's modalities, as in `MultiVI`; it has an effect only with `pairing`.
    covariance
        Covariance of the posterior of z: ``"diagonal"``, or ``"full"``, as in `MultiVI`.
    encoder, decoder
        Class or function that makes the network of each modality; it takes the arguments of `pyromosaic.nn.Encoder` or
        `pyromosaic.nn.InnerProductDecoder`, which are the defaults.
    private_kl
        Weight of the private variables' divergences. The ELBO in the history counts them once.
    likelihood_weight, shared_kl, graph_weight
        Weights of the likelihoods, of the divergence of the shared variable, and of the graph (its likelihood and its
        divergence).
    alignment
        Weight of the Sinkhorn divergence between modalities; or a penalty, e.g. ``Sinkhorn(3.0, reach=...)`` of
        `pyromosaic.penalties`, which also takes a reference modality.
    anchors, pull, classifier
        Weights of `Anchors` and `Pull` to the linkage's scores, and of the classifier of labels; or these penalties.
        The pull is 20 by default, or 2 with a mixture, because its components must be free to move.
    kl_per_feature
        Whether to divide the divergences of the cells of a modality by its number of features, as the reference does.
    linkage
        Scores of cells in one space for all modalities, used for anchors and pull: ``"cca"`` computes them before
        training from the links of the graph; or give a `Linkage`, for example one without links, or a table of scores
        with one row per cell; None uses no scores.
    penalties
        Additional penalties, see `pyromosaic.penalties`.
    seed
        Seed for the initial weights of the networks.

    Attributes
    ----------
    presets
        Named sets of options. ``"reference"`` has the loss of scvi-tools' DIAGVI:
        ``DiagVI(mosaic, graph, **preset.options)``, then ``model.train(**preset.training)``.

    Examples
    --------
    >>> from pyromosaic import DiagVI, Mosaic, pbmc_mosaic, protein_gene_links
    >>> from pyromosaic.guidance import GuidanceGraph, shared_scores
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    >>> table = protein_gene_links().rename(columns={"gene": "rna", "protein": "adt"})
    >>> graph = GuidanceGraph.from_table(mosaic, table, drop_absent=True)
    >>> model = DiagVI(mosaic, graph)
    >>> model.train(n_epochs=1, progress_bar=False)
    >>> model.get_latent_representation(modality="adt").shape
    (1200, 12)
    """

    presets: ClassVar[Mapping[str, Preset]] = MappingProxyType({"reference": REFERENCE})
    model: DiagVIModel
    guide: DiagVIGuide
    Model: ClassVar[type[DiagVIModel]] = DiagVIModel
    Guide: ClassVar[type[DiagVIGuide]] = DiagVIGuide

    @checked
    def __init__(
        self,
        data: Mosaic | Schema,
        graph: Any = None,
        *,
        n_latent: Width = 12,
        n_private: Dimensions = 8,
        n_hidden: Width = 128,
        n_encoder_layers: Layers = 2,
        dropout: Rate = 0.1,
        encode_covariates: bool = True,
        pairing: bool = False,
        prior: Literal["normal", "mixture"] | nn.Module = "normal",
        fusion: str | Fusion = "mean",
        covariance: Covariance = "diagonal",
        encoder: Callable[..., nn.Module] | None = None,
        decoder: Callable[..., nn.Module] | None = None,
        likelihood_weight: Weight = 1.0,
        shared_kl: Weight = 1.0,
        kl_per_feature: bool = False,
        private_kl: Weight = 2.0,
        graph_weight: Weight = 15.0,
        alignment: Weight | Penalty = 3.0,
        anchors: Weight | Anchors = 2.0,
        pull: Weight | Pull | None = None,
        classifier: Weight | Classifier = 5.0,
        linkage: Literal["cca"] | pd.DataFrame | Linkage | None = "cca",
        penalties: Sequence[Penalty] = (),
        seed: Seed = 0,
    ) -> None:
        self.pairing = pairing
        with self.construction(data, seed) as schema:
            self.graph = GuidanceGraph.of(graph, schema)
            self._keep(graph=self.graph.to_json(), linkage=linkage if isinstance(linkage, str) else None)
            self.linkage = linkage
            self.scores = Scores()
            labels = Labels(schema)
            modalities = schema.modalities
            if not isinstance(alignment, Penalty):
                alignment = chosen("alignment", alignment, Sinkhorn)
            reference = getattr(alignment, "reference", None)
            if reference not in (None, *modalities):
                raise ValueError(f"reference must be one of {', '.join(modalities)}, or None; found {reference!r}")
            likelihoods = likelihoods_of(schema)
            width = n_latent + n_private
            encoder = encoder_of(encoder, covariance)
            encoders = {
                name: encoder(m, width, n_hidden, n_encoder_layers, dropout, encode_covariates)
                for name, m in modalities.items()
            }
            decoders = {
                name: (decoder or InnerProductDecoder)(m, likelihoods[name].predictors, n_private)
                for name, m in modalities.items()
            }
            inferring = posterior_decoders(schema, likelihoods, dict.fromkeys(modalities, width), n_hidden)
            if isinstance(prior, str):
                prior = GaussianMixture() if prior == "mixture" else StandardNormal()
            of_z: nn.Module = complete(prior, n_latent=n_latent, labels=labels)
            if pull is None:
                pull = 2.0 if isinstance(of_z, GaussianMixture) else 20.0
            per_feature = {name: m.n_features if kl_per_feature else 1 for name, m in modalities.items()}
            weights = Weights(graph_weight, {name: shared_kl / n for name, n in per_feature.items()})
            edges, strength, sign = directed(self.graph)
            known = {"labels": labels, "n_latent": n_latent}
            self.classifier = chosen("classifier", classifier, Classifier, **known) if len(labels) else None
            aligned = [
                alignment,
                chosen("anchors", anchors, Anchors, scores=self.scores),
                chosen("pull", pull, Pull, scores=self.scores),
                *([] if self.classifier is None else [self.classifier]),
            ]
            explains, infers = {}, {}
            for name, m in modalities.items():
                plates = Plates(name, m.n_features, likelihood_weight, private_kl / per_feature[name], balanced=True)
                size, likelihood = Size(name, m, n_latent), likelihoods[name]
                explains[name] = LinkedMeasurement(plates, size, decoders[name], likelihood, n_private)
                infers[name] = MeasurementGuide(
                    plates, encoders[name], n_latent, n_private, inferring.get(name), likelihood
                )
            self.model = self.Model(self.graph, of_z, explains, weights, n_latent)
            self.guide = self.Guide(
                GraphEncoder(self.graph.n_features, edges, strength * sign, n_latent),
                infers,
                fusion_of(fusion, tuple(modalities)),
                with_given(aligned, penalties),
                weights,
                self.graph.n_features,
            )

    def arranged(self, mosaic: Mosaic) -> Mosaic:
        """Make every measurement a separate cell, unless the model takes pairs."""
        return mosaic if self.pairing else separate(mosaic)

    def check_data(self, mosaic: Mosaic) -> None:
        """Refuse modalities without cells, counts under a likelihood of real values, and labels of two vocabularies."""
        check_labels(mosaic)
        for name, modality in mosaic.modalities.items():
            if not modality.present.any():
                raise ValueError(f"modality {name!r} has no cell to learn from; load a trained model for such data")
            named_real = modality.spec.traits.kind == "real" and isinstance(modality.spec.likelihood, str)
            if named_real and (modality.tensor(modality.sample()).to_dense() % 1 == 0).all():
                raise ValueError(
                    f"modality {name!r}: all values are integers, like counts, but likelihood "
                    f"{modality.spec.likelihood!r} is for transformed values; transform the values, or use a "
                    "likelihood for counts, e.g. 'nb'"
                )

    @checked
    def train(
        self,
        n_epochs: Count | None = None,
        *,
        batch_size: Count | None = None,
        learning_rate: Positive | None = None,
        **options: Any,
    ) -> None:
        """Link the cells of different modalities, then fit the parameters.

        Parameters
        ----------
        n_epochs
            Number of passes over the training cells; None chooses it as in `MosaicModel.train`.
        batch_size
            Number of cells in a minibatch, of all modalities together; 2,048 if None. Only the cells in a minibatch are
            aligned with each other.
        learning_rate
            See `pyromosaic.train.Optimisation`; 0.01 if None, which is large because training takes few steps.
        **options
            As in `MosaicModel.train`.
        """
        super().train(n_epochs, batch_size=batch_size or 2048, learning_rate=learning_rate or 1e-2, **options)

    def prepare(self, mosaic: Mosaic) -> None:
        """Find the scores by which cells are linked."""
        if not self.scores and self.linkage is not None:
            scores = linked_scores(self.linkage, mosaic, self.graph, self.model.n_latent)
            self.scores.set(torch.tensor(scores).to(self._device))

    def finish(self, mosaic: Mosaic) -> None:
        """Fit the sizes of cells given their latent variables; calibrate the classifier."""
        super().finish(mosaic)
        if self.classifier is not None and self.split is not None and len(self.split.validation):
            cells = self.split.validation
            z = torch.tensor(self.get_latent_representation(cells).to_numpy()).to(self._device)
            known = self.classifier.labels(measured(mosaic, cells).to(self._device))
            if (known >= 0).any():
                self.classifier.calibrate(z[known >= 0], known[known >= 0])

    # Asking

    @checked
    def predict_celltype(
        self, cells: Cells = None, *, modality: str | None = None, data: Mosaic | None = None
    ) -> pd.DataFrame:
        """Predict labels with the classifier on the shared latent space, for cells of any modality, labelled or not.

        Parameters
        ----------
        cells, modality, data
            As in `get_latent_representation`.

        Returns
        -------
        pandas.DataFrame
            Cells × ``prediction`` and ``confidence``, the probability of the predicted label, then the probability of
            each label.

        Raises
        ------
        ValueError
            If the model was made without labels.
        """
        if self.classifier is None:
            raise ValueError("the model has no classifier: register the data with label_key for at least one modality")
        latent = self.get_latent_representation(cells, modality=modality, data=data)
        with inference_mode(self.guide):
            values = self.classifier.probabilities(torch.tensor(latent.to_numpy()).to(self._device))
        names = np.array(self.classifier.labels.names, dtype=object)
        probability = pd.DataFrame(values.cpu().numpy(), latent.index, names)
        best = probability.to_numpy().argmax(axis=1)
        summary = pd.DataFrame(
            {"prediction": names[best], "confidence": probability.to_numpy().max(axis=1)}, index=latent.index
        )
        return summary.join(probability)
