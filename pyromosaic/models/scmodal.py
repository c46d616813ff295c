"""scMODAL: modalities measured in different cells, aligned by adversaries, anchors, a latent cycle and geometry.

After Wang et al., scMODAL: a general deep learning framework for comprehensive single-cell multi-omics data alignment
with feature links (2025). The original is an adversarial autoencoder; here its terms are parts of a Pyro program. This
version adds posteriors, likelihoods of the measurements, private latent variables, anchors by canonical correlation,
and a geometry term that does not saturate.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import lightning.pytorch as lightning
import pandas as pd
import pyro
import torch
from lightning.pytorch.callbacks import Callback
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from pyromosaic.accepted import Count, Dimensions, Layers, Rate, Seed, Weight, Whole, Width, checked
from pyromosaic.attention import AttentionEncoder
from pyromosaic.data import Minibatch, Mosaic, Schema, separate
from pyromosaic.described import complete
from pyromosaic.fusion import MeanFusion, presence
from pyromosaic.guidance import linked_scores
from pyromosaic.likelihoods import Likelihood, likelihoods_of, posterior_decoders
from pyromosaic.linkage import Linkage
from pyromosaic.links import GuidanceGraph
from pyromosaic.measurement import Measurement, MeasurementGuide, Plates, cells, encoded
from pyromosaic.models.linking import Linking
from pyromosaic.models.mosaic_model import Preset
from pyromosaic.models.plain import Flat, MeanSquare, PlainDecoder, PlainEncoder
from pyromosaic.nn import Covariance, Decoder, Encoder, encoder_of
from pyromosaic.penalties import (
    Anchors,
    Cycle,
    Discriminator,
    Geometry,
    Pairs,
    Penalty,
    Pull,
    Scores,
    apply,
    attached,
    chosen,
    with_given,
)
from pyromosaic.priors import StandardNormal
from pyromosaic.program import Program, Slots, own
from pyromosaic.sizes import Size

REFERENCE = Preset(
    options={
        "n_latent": 20,
        "n_private": 0,
        "n_hidden": 512,
        "deterministic": True,
        "pairs": "chain",
        "linkage": "features",
        "likelihood_weight": 10.0,
        "adversary": 1.0,
        "cycle": 10.0,
        "anchors": Anchors(1.0, n_neighbors=30),
        "pull": 0.0,
        "geometry": Geometry(10.0, likeness="cosine"),
    },
    training={
        "n_epochs": 10_000,
        "max_steps": 10_000,
        "batch_size": 1000,  # about 500 cells of each of two modalities
        "learning_rate": 1e-3,
        "weight_decay": 1e-3,
        "kl_warmup_epochs": 0,
        "schedule": "constant",
        "likelihood_rate": 1.0,
        "sleep_steps": 0,
        "gradient_clip": 5.0,
        "validation": 0.0,
    },
)

PAIRS: Mapping[str, Callable[[Iterable[str]], Iterable[tuple[str, str]]]] = {
    "chain": pairwise,
    "all": partial(combinations, r=2),
}
ENCODERS: Mapping[str, type[Encoder]] = {"layers": Encoder, "attention": AttentionEncoder}


class ScModalModel(Program):
    """The generative model.

    Each cell has a latent variable z and a private one, z_<modality>, for variation that only its modality measures.
    The modality is decoded from both and the cell's batch and covariates, and its likelihood generates the
    measurements.
    """

    def __init__(self, prior: nn.Module, modalities: Mapping[str, Measurement]) -> None:
        super().__init__()
        self.prior = own(prior)
        self.modalities = Slots(modalities)
        # Every modality has the same total weight, regardless of its number of cells.
        self.balanced = dict.fromkeys(modalities, 1.0)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> Tensor:
        """``z, z_m ~ Normal(0, I)``, ``x_m ~ likelihood_m(decoder_m(z, z_m, batch))`` for each modality m.

        The paper's decoders (Methods), with likelihoods. Sites: ``z``, ``z_<modality>``, and one named after each
        modality.
        """
        with cells(minibatch, kl_weight, self.balanced):
            z = pyro.sample("z", self.prior(minibatch))
        for name, view in minibatch.decoded.items():
            self.modalities[name](z, view, minibatch, kl_weight)
        return z


class ScModalGuide(Program):
    """The variational posterior.

    Each modality is encoded to a normal posterior of z and of the private variable, or to a point. Penalties align the
    modalities in z. If a likelihood has latent variables, a separate decoder gives their posteriors.
    """

    def __init__(
        self, modalities: Mapping[str, MeasurementGuide], deterministic: bool, penalties: Sequence[nn.Module]
    ) -> None:
        super().__init__("guide")
        self.modalities = Slots(modalities)
        self.balanced = dict.fromkeys(modalities, 1.0)
        self.fusion = MeanFusion()
        self.deterministic = deterministic
        self.penalties = attached(penalties, self.modalities)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """``q(z, z_m | x_m)``, and the paper's losses of alignment (Methods) as penalties.

        Sites: those of the model that are not observed, and ``penalty/...``.
        """
        shared, private = encoded(self.modalities, minibatch)
        apply(self.penalties, shared, minibatch, kl_weight)
        used = presence(shared, len(minibatch))
        if self.deterministic:
            joint: Any = dist.Delta(self.fusion(shared, used)[0].unsqueeze(-2), event_dim=1)
        else:
            joint = self.fusion.posterior(shared, used)
        with cells(minibatch, kl_weight, self.balanced):
            z = pyro.sample("z", joint)
        for name, view in minibatch.decoded.items():
            self.modalities[name](z, view, minibatch, kl_weight, private.get(name))


class ScModal(Linking):
    """Integrate modalities that were measured in different cells, by adversarial alignment.

    Parameters
    ----------
    data
        The registered data, or only their `Schema`, with at least two modalities. Cells with several modalities are
        split: each measurement becomes a separate cell, named ``"modality:cell"``.
    graph
        Linked features, for `linkage`: a `pyromosaic.guidance.GuidanceGraph`, a table of links (one column per
        modality), or None to link features with equal names.
    n_latent
        Dimension of the shared latent space, in which modalities are aligned and which is returned.
    n_private
        Dimension of the private latent space of each modality. With 0, as in the reference, all variation is shared.
    private_kl
        Weight of the divergences of the private variables. The ELBO in the history counts them once.
    n_hidden, n_encoder_layers, dropout, encode_covariates
        Shape of the encoders, and whether they see batch and covariates.
    encoder
        ``"layers"`` has fully connected layers; ``"attention"`` is an `AttentionEncoder`; or a class or function that
        makes the network of each modality and takes the arguments of `pyromosaic.nn.Encoder`.
    covariance
        Covariance of the posterior of z: ``"diagonal"``, or ``"full"``, as in `MultiVI`.
    decoder
        Class or function that makes the network of each modality; it takes the arguments of `pyromosaic.nn.Decoder`,
        which is the default.
    prior
        Module that maps a minibatch to the prior of z; by default a standard normal.
    deterministic
        Use the program of the reference instead of a probabilistic one: plain networks with one hidden layer of
        `n_hidden` units; z is a point under a flat prior; mean squares of log-normalised, standardised measurements
        replace the likelihoods.
    pairs
        Pairs of modalities to align: ``"chain"`` aligns each with the next in the order of the data; ``"all"`` aligns
        all pairs.
    linkage
        What is compared to find anchors: ``"cca"``, scores in one space for all modalities, computed from the links of
        the graph before training; ``"features"``, the linked features, as in the reference; a `Linkage`,
        for example one without links; a table of your scores with one row per cell; or None for no anchors.
    refresh_every
        Number of epochs after which anchors are found again, from the mean of two cosine similarities: of the scores of
        the linkage, and of the current posterior means. 0 always uses the linkage alone.
    likelihood_weight
        Weight of the likelihoods.
    adversary, cycle, anchors, pull, geometry
        Weights of `Discriminator`, `Cycle`, `Anchors`, `Pull` (to shared scores) and `Geometry` of
        `pyromosaic.penalties`; or, except for the cycle, these penalties with more arguments, e.g.
        ``Discriminator(n_steps=...)`` for the number of steps of the discriminators in each step of training, and
        ``Anchors(2.0, n_neighbors=...)`` for the number of nearest cells in the minibatch that may be anchors.
    penalties
        Additional penalties, see `pyromosaic.penalties`.
    seed
        Seed for the initial weights of the networks.

    Attributes
    ----------
    presets
        Named sets of options. ``"reference"`` has the options of scMODAL. These things still differ: minibatches (there
        500 cells of each data set, drawn with replacement; here parts of all cells), scaling (there linked features of
        two modalities have one target size, and values are clipped at 10), weight decay (there added to the gradient),
        and the discriminators, which here have one optimiser each. This preset is deterministic: imputed values have no
        spread.

    Raises
    ------
    ValueError
        If an option is out of range, a modality has a single cell, or the features that are needed to find anchors are
        missing.

    Examples
    --------
    >>> from pyromosaic import Mosaic, ScModal, pbmc_mosaic, protein_gene_links
    >>> from pyromosaic.guidance import GuidanceGraph
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    >>> table = protein_gene_links().rename(columns={"gene": "rna", "protein": "adt"})
    >>> graph = GuidanceGraph.from_table(mosaic, table, drop_absent=True)
    >>> model = ScModal(mosaic, graph)
    >>> model.train(n_epochs=1, progress_bar=False)
    >>> model.get_latent_representation(modality="adt").shape
    (1200, 15)

    As in the reference, but for fewer steps:

    >>> options, training = ScModal.presets["reference"]
    >>> model = ScModal(mosaic, graph, **options)
    >>> model.train(**training | {"max_steps": 2}, progress_bar=False)
    """

    model: ScModalModel
    guide: ScModalGuide
    Model: ClassVar[type[ScModalModel]] = ScModalModel
    Guide: ClassVar[type[ScModalGuide]] = ScModalGuide
    presets: ClassVar[Mapping[str, Preset]] = MappingProxyType({"reference": REFERENCE})

    @checked
    def __init__(
        self,
        data: Mosaic | Schema,
        graph: Any = None,
        *,
        n_latent: Width = 15,
        n_private: Dimensions = 8,
        private_kl: Weight = 2.0,
        n_hidden: Width = 128,
        n_encoder_layers: Layers = 2,
        dropout: Rate = 0.1,
        encode_covariates: bool = True,
        encoder: Literal["layers", "attention"] | Callable[..., nn.Module] = "layers",
        covariance: Covariance = "diagonal",
        decoder: Callable[..., nn.Module] | None = None,
        prior: nn.Module | None = None,
        deterministic: bool = False,
        pairs: Literal["chain", "all"] = "chain",
        linkage: Literal["cca", "features"] | pd.DataFrame | Linkage | None = "cca",
        refresh_every: Whole = 0,
        likelihood_weight: Weight = 1.0,
        adversary: Weight | Discriminator = 1.0,
        cycle: Weight = 1.0,
        anchors: Weight | Anchors = 2.0,
        pull: Weight | Pull = 30.0,
        geometry: Weight | Geometry = 1.0,
        penalties: Sequence[Penalty] = (),
        seed: Seed = 0,
    ) -> None:
        if deterministic and n_private:
            raise ValueError(f"a deterministic program has no private variables: set n_private=0; found {n_private}")
        with self.construction(data, seed) as schema:
            modalities, width = schema.modalities, n_latent + n_private
            if len(modalities) < 2:
                raise ValueError(f"alignment needs at least 2 modalities; found {', '.join(map(repr, modalities))}")
            self.linkage, self.n_private, self.n_latent = linkage, n_private, n_latent
            self.by_features = isinstance(linkage, str) and linkage == "features"
            self.graph = GuidanceGraph.of(graph, schema) if isinstance(linkage, str) else None
            self._keep(
                graph=None if self.graph is None else self.graph.to_json(),
                linkage=linkage if isinstance(linkage, str) else None,
            )
            self.scores = Scores()
            aligned = list(PAIRS[pairs](modalities))
            self.matches = {pair: Scores() for pair in aligned}
            self.refresh_every = refresh_every
            encoders: dict[str, nn.Module]
            decoders: dict[str, nn.Module]
            likelihoods: dict[str, Likelihood]
            if deterministic:
                likelihoods = {name: MeanSquare(m) for name, m in modalities.items()}
                encoders = {name: PlainEncoder(m, n_latent, n_hidden) for name, m in modalities.items()}
                decoders = {name: PlainDecoder(m, n_latent, n_hidden) for name, m in modalities.items()}
            else:
                likelihoods = likelihoods_of(schema)
                known = ENCODERS[encoder] if isinstance(encoder, str) else Encoder
                encode = encoder_of(None if isinstance(encoder, str) else encoder, covariance, known)
                encoders = {
                    name: encode(m, width, n_hidden, n_encoder_layers, dropout, encode_covariates)
                    for name, m in modalities.items()
                }
                decoders = {
                    name: (decoder or Decoder)(m, likelihoods[name].predictors, width, n_hidden)
                    for name, m in modalities.items()
                }
            inferring = posterior_decoders(schema, likelihoods, dict.fromkeys(modalities, width), n_hidden)
            sizes = {"n_latent": n_latent, "n_hidden": n_hidden}
            discriminators = {pair: chosen("adversary", adversary, Discriminator, **sizes) for pair in aligned}
            matched = {pair: chosen("anchors", anchors, Anchors, scores=own) for pair, own in self.matches.items()}
            self.cycle = Cycle(1.0, modalities, encoders, decoders, likelihoods, n_private)
            if deterministic:
                for network in (*encoders.values(), *decoders.values(), *discriminators.values()):
                    for parameter in network.parameters():
                        nn.init.normal_(parameter, std=0.1)
            terms = [
                Pairs(discriminators[aligned[0]].weight, discriminators, warms_up=not deterministic),
                Pairs(cycle, dict.fromkeys(aligned, self.cycle)),
                Pairs(matched[aligned[0]].weight, matched),
                chosen("pull", pull, Pull, scores=self.scores),
                chosen("geometry", geometry, Geometry),
            ]
            explains, infers = {}, {}
            for name, m in modalities.items():
                plates = Plates(name, m.n_features, likelihood_weight, private_kl, balanced=True)
                size, likelihood = Size(name, m, n_latent), likelihoods[name]
                explains[name] = Measurement(plates, size, decoders[name], likelihood, n_private)
                infers[name] = MeasurementGuide(
                    plates, encoders[name], n_latent, n_private, inferring.get(name), likelihood
                )
            of_z = complete(prior or (Flat() if deterministic else StandardNormal()), n_latent=n_latent)
            self.model = self.Model(of_z, explains)
            self.guide = self.Guide(infers, deterministic, with_given(terms, penalties))

    def arranged(self, mosaic: Mosaic) -> Mosaic:
        """Make every measurement a separate cell."""
        return separate(mosaic)

    def check_data(self, mosaic: Mosaic) -> None:
        """Refuse a modality with fewer than two cells."""
        for name, modality in mosaic.modalities.items():
            n = int(modality.present.sum())
            if n < 2:
                raise ValueError(f"modality {name!r} must have at least 2 cells to be aligned; found {n}")

    @checked
    def train(self, n_epochs: Count | None = None, *, callbacks: Sequence[Callback] = (), **options: Any) -> None:
        """Find the scores by which cells are matched, then fit the parameters; see `MosaicModel.train`."""
        super().train(n_epochs, callbacks=[*callbacks, _Refresh(self)], **options)

    def prepare(self, mosaic: Mosaic) -> None:
        """Find the scores by which cells are matched."""
        if self.linkage is not None:
            if not self.by_features and not self.scores:
                scores = linked_scores(self.linkage, mosaic, self.graph, self.n_latent)
                self.scores.set(torch.tensor(scores).to(self._device))
            for pair, own in self.matches.items():
                features = torch.tensor(self.linked_features(mosaic, *pair)) if self.by_features else None
                own.set(self.scores.values if features is None else features)


class _Refresh(Callback):
    """Finds anchors again after `refresh_every` epochs, from the scores and z; checkpoints contain the result."""

    def __init__(self, model: ScModal) -> None:
        self.model = model

    def setup(self, trainer: lightning.Trainer, plan: lightning.LightningModule, stage: str) -> None:
        """Remember the scores by which cells are matched at the start."""
        self.fixed = {pair: scores.values for pair, scores in self.model.matches.items()}

    def on_train_epoch_start(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Match cells by the scores and z, every `refresh_every` epochs."""
        every = self.model.refresh_every
        if every and trainer.current_epoch and trainer.current_epoch % every == 0:
            first = trainer.is_global_zero
            found = trainer.strategy.broadcast(self.model.get_latent_representation().to_numpy() if first else None)
            z = torch.tensor(found).to(plan.device)
            for pair, scores in self.model.matches.items():
                scores.set(torch.cat([normalize(self.fixed[pair]), normalize(z)], dim=1))

    def state_dict(self) -> dict[str, Any]:
        """The scores by which cells are matched, for a checkpoint."""
        return {"values": [scores.values for scores in self.model.matches.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the scores from a checkpoint."""
        for scores, values in zip(self.model.matches.values(), state_dict["values"], strict=True):
            if len(values) != len(scores.values):
                raise ValueError(f"the checkpoint must have scores of {len(scores.values)} cells; found {len(values)}")
            scores.set(values)
