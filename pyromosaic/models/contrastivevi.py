"""ContrastiveVI: what treated cells have and controls do not, in RNA, chromatin, surface protein or any mix of them.

Weinberger, Lin and Lee, Isolating salient variations of interest in single-cell data with contrastiveVI, Nature
Methods 2023; extended to mosaics of modalities and to several target groups.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyromosaic.accepted import Count, Layers, Positive, Rate, Seed, Share, Weight, Whole, Width, checked
from pyromosaic.data import Minibatch, Mosaic, Schema, View, contrastive_loader
from pyromosaic.described import complete
from pyromosaic.fusion import FusedWidth, Fusion, Posterior, agreement_weights, fusion_of, leave_out, presence
from pyromosaic.likelihoods import likelihoods_of, posterior_decoders
from pyromosaic.measurement import Measurement, MeasurementGuide, Plates, cells, encoded
from pyromosaic.models.mosaic_model import Preset
from pyromosaic.models.salient import Contrasting, Parts, cohorts_of
from pyromosaic.nn import Covariance, Decoder, Encoder, encoder_of, unit_columns
from pyromosaic.penalties import (
    MMD,
    CohortMMD,
    Dependence,
    Jeffreys,
    Penalty,
    Wasserstein,
    apply,
    attached,
    chosen,
    with_given,
)
from pyromosaic.priors import ARD, StandardNormal
from pyromosaic.program import Program, Slots, own
from pyromosaic.sizes import LatentSize, Size, latent_sizes

REFERENCE = Preset(
    options={
        "n_encoder_layers": 1,
        "input_dropout": 0.0,
        "cohort_mmd": 0.0,
        "dependence": 0.0,
        "wasserstein": 0.0,
    },
    training={
        "n_epochs": 400,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "weight_decay": 1e-6,
        "kl_warmup_epochs": 400,
        "schedule": "constant",
        "likelihood_rate": 1.0,
        "sleep_steps": 0,
        "gradient_clip": 0.0,
        "replay": True,
    },
)


def belongs(minibatch: Minibatch, groups: Sequence[int]) -> Tensor:
    """Which cells are in one of the groups, shape (B, 1), boolean."""
    assert minibatch.groups is not None
    return torch.stack([minibatch.groups == group for group in groups]).any(0).unsqueeze(-1)


def salient(parts: Parts, minibatch: Minibatch, distributions: Iterable[dist.TorchDistribution]) -> list[Tensor]:
    """Draws of the salient variables, inside the plate of cells; 0 in cells without salient variables."""
    drawn = []
    for (site, groups), distribution in zip(parts, distributions, strict=True):
        has = belongs(minibatch, groups)
        with poutine.mask(mask=has):
            drawn.append(pyro.sample(site, distribution) * has.unsqueeze(-1))
    return drawn


class ContrastiveModel(Program):
    """The generative model.

    Every cell has a background variable z. A target cell also has a salient variable s, which is 0 in background cells.
    Each modality has one decoder for both cohorts, which maps [z, s] to the parameters of the likelihood.
    """

    def __init__(
        self, parts: Parts, prior: nn.Module, salient_prior: nn.Module, modalities: Mapping[str, Measurement]
    ) -> None:
        super().__init__()
        self.parts = parts
        self.prior = own(prior)
        self.salient_prior = own(salient_prior)
        self.modalities = Slots(modalities)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> Tensor:
        """``z, s ~ Normal(0, I)``, ``x_m ~ likelihood_m(decoder_m(z, s, batch))``, s = 0 in the background (Methods).

        Sites: ``z``, ``s`` (or one per target group), one named after each modality, and its latent size if it has one.
        """
        with cells(minibatch, kl_weight):
            z = pyro.sample("z", self.prior(minibatch))
            s = salient(self.parts, minibatch, (self.salient_prior(minibatch) for _ in self.parts))
        latent = torch.cat([z, *s], dim=-1)
        for name, view in minibatch.decoded.items():
            self.modalities[name](latent, view, minibatch, kl_weight)
        return latent


class PairEncoder(nn.Module):
    """Encoders of z and of s, which see the same input."""

    z: Any
    s: Any

    def __init__(self, z: nn.Module, s: nn.Module) -> None:
        super().__init__()
        self.z, self.s = z, s

    @property
    def scaling(self) -> nn.Module:
        """The scaling of the measurements."""
        scaling: nn.Module = self.z.scaling
        return scaling

    def start(self, view: View) -> None:
        """Learn the input scaling from the cells of a view."""
        self.z.start(view)
        self.s.start(view)

    def forward(self, view: View) -> tuple[Tensor, ...]:
        """Mean and standard deviation of z and s side by side, each of shape (b, latent + salient).

        With full covariance also the Cholesky factor of the correlation matrix of z.
        """
        x = self.z.seen(view)
        (z, of_z, *factor), (s, of_s) = self.z.posterior(x, view), self.s.posterior(x, view)
        return torch.cat([z, s], dim=-1), torch.cat([of_z, of_s], dim=-1), *factor


class ContrastiveGuide(Program):
    """The variational posterior.

    Each modality has one encoder for z and one for s. The normal posteriors of a cell's modalities are fused to one.
    Penalties compare posteriors between modalities, between cohorts, and between z and s.
    """

    def __init__(
        self,
        parts: Parts,
        modalities: Mapping[str, MeasurementGuide],
        fusion: Fusion,
        penalties: Mapping[str, Sequence[nn.Module]],
        left_out: float,
    ) -> None:
        super().__init__("guide")
        self.parts = parts
        self.modalities = Slots(modalities)
        self.fusion = own(fusion)
        self.width_of_s = FusedWidth(len(fusion.modalities))
        self.penalties: Any = nn.ModuleDict({what: attached(p, self.modalities) for what, p in penalties.items()})
        self.left_out = left_out

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """``q(z | x) q(s | x)``, each from separate encoders; s is ignored in the background (Methods).

        Sites: ``z``, ``s`` (or one per target group), ``penalty/...``, and those of likelihoods and latent sizes.
        """
        by_modality, of_s = encoded(self.modalities, minibatch)
        used = presence(by_modality, len(minibatch))
        if self.training and self.left_out:
            used = leave_out(used, self.left_out)
        joint = self.fusion.normal(by_modality, used, minibatch.index)
        z = joint.mean[:, 0], joint.stddev[:, 0]
        s = self.fusion.moments(of_s, used, minibatch.index, self.width_of_s)
        for what, penalties in self.penalties.items():
            if any(penalty.weight for penalty in penalties):
                apply(penalties, self.compare(what, by_modality, z, s, minibatch), minibatch, kl_weight)
        each = zip(*(moment.chunk(len(self.parts), dim=-1) for moment in s), strict=True)
        with cells(minibatch, kl_weight):
            drawn = pyro.sample("z", joint)
            salients = salient(self.parts, minibatch, (normal(*moments) for moments in each))
        latent = torch.cat([drawn, *salients], dim=-1)
        for name, view in minibatch.decoded.items():
            self.modalities[name](latent, view, minibatch, kl_weight)

    def compare(self, what: str, by_modality: Any, z: Any, s: Any, minibatch: Minibatch) -> dict[str, Posterior]:
        """The posteriors that a set of penalties compares; z and s are the posterior moments of every cell."""
        assert minibatch.groups is not None

        def within(cells: Tensor, moments: Any) -> Posterior:
            rows = torch.nonzero(cells).squeeze(-1)
            return Posterior(rows, *(m[rows] for m in moments))

        if what == "modalities":
            return dict(by_modality)
        if what == "cohorts":
            groups = [0, *(g for _, part in self.parts for g in part)]
            return {str(g): within(minibatch.groups == g, z) for g in groups}
        if what == "background":
            return {"s": within(minibatch.groups == 0, s)}
        return {"z": within(minibatch.groups > 0, z), "s": within(minibatch.groups > 0, s)}


def normal(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """Independent normals, one per cell, batch shape (B, 1)."""
    return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)


class ContrastiveVI(Contrasting):
    """Find what a target cohort (treated, diseased) has and a background cohort (controls) does not.

    Parameters
    ----------
    data
        The registered data with their cohorts, see `Mosaic.with_cohorts`, or only their `Schema`.
    n_latent
        Dimension of the background variable z, which all cells have.
    n_salient
        Dimension of the salient variable s, which only target cells have.
    salient
        ``"shared"``: all target groups have the same salient variable s; ``"own"``: each group has a separate one,
        ``s_<group>``.
    n_hidden, n_encoder_layers, n_decoder_layers
        Shape of the networks.
    dropout
        Dropout rate of the hidden layers of the encoders.
    input_dropout
        Dropout rate on encoder inputs in training, scaled by ``1 - 250 / n_features``. It keeps encoders from
        memorising single cells.
    encode_covariates
        Whether encoders see batch and covariates.
    library
        Size of a cell in RNA: ``"observed"`` is its total count; ``"latent"`` infers it, with a normal prior on its
        logarithm that depends on the cell's batch. To choose it for other modalities, give a dictionary, e.g.
        ``{"rna": "latent", "adt": "latent"}``.
    cohort_mmd
        Weight of the discrepancy between the background variables of the cohorts; 0 in the paper. Lower it if the
        treatment removes or adds cell types.
    dependence
        Weight of the dependence between the posterior means of z and s in target cells; 0 in the paper.
    wasserstein
        Weight of the Wasserstein distance between the posterior of s and 0 in background cells, where the model does
        not use s; 0 in the paper by default.
    jeffreys, mmd, left_out
        Weights of the penalties between modalities, and share of cells, as in `MultiVI`; no effect with a single
        modality.
    prior, salient_prior
        Modules that map a minibatch to the prior of z and of s (of one group, if each has a separate one); by default
        standard normals. ``salient_prior="ard"`` learns the scale of each salient dimension (`pyromosaic.priors.ARD`).
    fusion
        How to combine the posteriors of a cell's modalities, as in `MultiVI`; a mixture is replaced by a normal with
        its moments.
    covariance
        Covariance of the posterior of z: ``"diagonal"``, or ``"full"``, as in `MultiVI`.
    encoder, decoder
        Class or function that makes the network of each modality; it takes the arguments of `pyromosaic.nn.Encoder` or
        `pyromosaic.nn.Decoder`, which are the defaults.
    penalties
        Additional penalties, see `pyromosaic.penalties`: a sequence of penalties on the posteriors of z by cohort, or a
        dictionary of sequences by what they compare, ``"cohorts"``, ``"modalities"`` (z by modality), ``"background"``
        (s of background cells) or ``"target"`` (z and s of target cells). A penalty replaces the default penalty of the
        same name.
    seed
        Seed for the initial weights of the networks.

    Attributes
    ----------
    presets
        Named sets of options. ``"reference"`` has the objective, minibatches and training of the paper, on networks
        with LayerNorm: ``ContrastiveVI(mosaic, **preset.options)``, then ``model.train(**preset.training)``. Choose the
        likelihood of the paper when you register the data, ``{"rna": "zinb"}``.

    Examples
    --------
    >>> from pyromosaic import ContrastiveVI, Mosaic, simulate
    >>> mdata, truth = simulate(400, {"rna": 100}, treated=0.5)
    >>> mosaic = Mosaic.from_mudata(mdata).with_cohorts("condition", background="control")
    >>> model = ContrastiveVI(mosaic, n_salient=5)
    >>> model.train(n_epochs=1, progress_bar=False)
    >>> model.get_latent_representation().shape
    (400, 5)
    """

    presets: ClassVar[Mapping[str, Preset]] = MappingProxyType({"reference": REFERENCE})
    model: ContrastiveModel
    guide: ContrastiveGuide
    Model: ClassVar[type[ContrastiveModel]] = ContrastiveModel
    Guide: ClassVar[type[ContrastiveGuide]] = ContrastiveGuide
    _replay = False

    @checked
    def __init__(
        self,
        data: Mosaic | Schema,
        *,
        n_latent: Width = 10,
        n_salient: Width = 10,
        salient: Literal["shared", "own"] = "shared",
        n_hidden: Width = 128,
        n_encoder_layers: Layers = 2,
        n_decoder_layers: Layers = 1,
        dropout: Rate = 0.1,
        input_dropout: Rate = 0.95,
        encode_covariates: bool = True,
        library: Literal["observed", "latent"] | Mapping[str, Literal["observed", "latent"]] = "observed",
        cohort_mmd: Weight | CohortMMD = 100.0,
        dependence: Weight | Dependence = 20.0,
        wasserstein: Weight | Wasserstein = 1.0,
        jeffreys: Weight | Jeffreys | None = None,
        mmd: Weight | MMD = 50.0,
        left_out: Share | None = None,
        prior: nn.Module | None = None,
        salient_prior: nn.Module | Literal["ard"] | None = None,
        fusion: str | Fusion = "mean",
        covariance: Covariance = "diagonal",
        encoder: Callable[..., nn.Module] | None = None,
        decoder: Callable[..., nn.Module] | None = None,
        penalties: Sequence[Penalty] | Mapping[str, Sequence[Penalty]] = (),
        seed: Seed = 0,
    ) -> None:
        with self.construction(data, seed) as schema:
            targets = tuple(range(1, len(cohorts_of(schema).names)))
            own = tuple((f"s_{cohorts_of(schema).names[code]}", (code,)) for code in targets)
            parts: Parts = (("s", targets),) if salient == "shared" else own
            modalities = schema.modalities.items()
            jeffreys, left_out = agreement_weights(schema, jeffreys, left_out)
            likelihoods = likelihoods_of(schema)
            width = n_latent + n_salient * len(parts)

            def encoders(n: int, covariance: Covariance) -> dict[str, nn.Module]:
                shape = (n_hidden, n_encoder_layers, dropout, encode_covariates)
                network = encoder_of(encoder, covariance, input_dropout=input_dropout)
                return {name: network(m, n, *shape) for name, m in modalities}

            decoders: dict[str, Any] = {
                name: (decoder or Decoder)(m, likelihoods[name].predictors, width, n_hidden, n_decoder_layers)
                for name, m in modalities
            }
            of_s = ARD() if isinstance(salient_prior, str) else salient_prior or StandardNormal()
            of_s = complete(of_s, n_latent=n_salient)
            if isinstance(of_s, ARD):
                for network in decoders.values():
                    unit_columns(network.hidden[0], n_latent, width)
            latent = latent_sizes(library, schema)
            of_z, of_salient = encoders(n_latent, covariance), encoders(n_salient * len(parts), "diagonal")
            size_encoders = {name: Encoder(schema[name], 1, n_hidden, 1, dropout, encode_covariates) for name in latent}
            inferring = posterior_decoders(
                schema, likelihoods, dict.fromkeys(schema.modalities, width), n_hidden, n_decoder_layers
            )
            explains, infers = {}, {}
            for name, m in modalities:
                plates, size = Plates(name, m.n_features), (LatentSize if name in latent else Size)(name, m, width)
                explains[name] = Measurement(plates, size, decoders[name], likelihoods[name])
                infers[name] = MeasurementGuide(
                    plates,
                    PairEncoder(of_z[name], of_salient[name]),
                    n_latent,
                    decoder=inferring.get(name),
                    likelihood=likelihoods[name],
                    size_encoder=size_encoders.get(name),
                )
            self.model = self.Model(parts, complete(prior or StandardNormal(), n_latent=n_latent), of_s, explains)
            given = penalties if isinstance(penalties, Mapping) else {"cohorts": penalties}
            between = [chosen("jeffreys", jeffreys, Jeffreys), chosen("mmd", mmd, MMD)]
            own_penalties: dict[str, list[Penalty]] = {
                "modalities": between if len(modalities) > 1 else [],
                "cohorts": [chosen("cohort_mmd", cohort_mmd, CohortMMD, n_cells=128)],
                "background": [chosen("wasserstein", wasserstein, Wasserstein)],
                "target": [chosen("dependence", dependence, Dependence, n_cells=128)],
            }
            if not set(given) <= set(own_penalties):
                raise ValueError(
                    f"the keys of penalties must be among {', '.join(map(repr, own_penalties))}; found "
                    f"{', '.join(map(repr, given))}"
                )
            used = {what: with_given(mine, given.get(what, ())) for what, mine in own_penalties.items()}
            self.guide = self.Guide(parts, infers, fusion_of(fusion, tuple(schema.modalities)), used, left_out)

    def check_data(self, mosaic: Mosaic) -> None:
        """Refuse cohorts that cannot be distinguished from batches."""
        for name in mosaic.modalities:
            self._check_batches(name, mosaic)

    def _check_batches(self, name: str, mosaic: Mosaic) -> None:
        """Refuse a modality in which cohorts cannot be distinguished from batches."""
        modality = mosaic.modalities[name]
        assert mosaic.groups is not None
        groups = np.where(modality.present, mosaic.groups, -1)
        cohorts = cohorts_of(self.schema)
        if not (groups == 0).any() or not (groups > 0).any():
            raise ValueError(f"modality {name!r} was not measured in both cohorts; leave it out of the mosaic")
        if not modality.spec.batch_key:
            return
        controls = np.unique(modality.codes[groups == 0, 0])
        for code, group in enumerate(cohorts.names):
            batches = np.unique(modality.codes[groups == code, 0])
            if len(batches) and not np.isin(batches, controls).any():
                key = modality.spec.batch_key
                raise ValueError(
                    f"modality {name!r}: no background cell is in a batch of group {group!r} "
                    f"({key} {', '.join(modality.schema.categories[key][b] for b in batches)}), so salient variation "
                    "cannot be distinguished from the batch; leave batch_key out, or add background cells of these "
                    "batches"
                )

    def explaining_size(self, mosaic: Mosaic, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cells of the cohorts, and draws of their latent variables."""
        assert mosaic.groups is not None
        cells = cells[mosaic.groups[cells] >= 0]
        latent = [self._latent(mosaic, cells, site, sample=True) for site in self._variables]
        return cells, np.concatenate(latent, axis=1)

    @checked
    def train(
        self,
        n_epochs: Count | None = None,
        *,
        batch_size: Count | None = None,
        learning_rate: Positive | None = None,
        replay: bool = False,
        **options: Any,
    ) -> None:
        """Fit the parameters by stochastic variational inference.

        Every minibatch holds as many background cells as target cells, so that both cohorts have the same weight.

        Parameters
        ----------
        n_epochs
            Number of passes over the larger cohort; None chooses it as in `MosaicModel.train`.
        batch_size
            Largest number of cells in a minibatch, half of them from each cohort; 640 if None. With only a few hundred
            cells, an epoch has a single step; then lower it, or train for more epochs.
        learning_rate
            See `pyromosaic.train.Optimisation`; 0.004 if None.
        replay
            Within an epoch, repeat the minibatches of the smaller cohort instead of drawing it again, as the reference
            implementation does; see `pyromosaic.data.contrastive_loader`.
        **options
            As in `MosaicModel.train`.
        """
        self._replay = replay
        super().train(n_epochs, batch_size=batch_size or 640, learning_rate=learning_rate or 4e-3, **options)

    @checked
    def loader(
        self, mosaic: Mosaic, cells: np.ndarray, batch_size: Count, seed: Seed | None = None, n_workers: Whole = 0
    ) -> DataLoader[Minibatch]:
        """Minibatches with as many background as target cells, `batch_size` in total."""
        return contrastive_loader(mosaic, cells, -(-batch_size // 2), seed, n_workers, replay=self._replay)
