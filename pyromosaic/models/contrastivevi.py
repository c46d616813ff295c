"""ContrastiveVI: what treated cells have that controls do not, in RNA, chromatin, surface protein or any mix of them.

Weinberger, Lin and Lee, Isolating salient variations of interest in single-cell data with contrastiveVI, Nature
Methods 2023; extended to mosaics of modalities and to several target groups.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyromosaic.data import Cohorts, Minibatch, Mosaic, Schema, View, contrastive_loader, measured
from pyromosaic.fusion import Fusion, Posterior, agreement_weights, fusion_of, leave_out, presence
from pyromosaic.likelihoods import likelihoods_of
from pyromosaic.measurement import Measurement, MeasurementGuide, Plates, cells, encoded, encoded_once
from pyromosaic.models.mosaic_model import Cells, MosaicModel, Preset
from pyromosaic.nn import Decoder, Encoder, unit_columns
from pyromosaic.penalties import MMD, CohortMMD, Dependence, Jeffreys, Penalty, Wasserstein, apply, attached, with_given
from pyromosaic.priors import ARD, StandardNormal
from pyromosaic.program import Program, Slots, own
from pyromosaic.sizes import LatentSize, Size, latent_sizes
from pyromosaic.tasks import inference_mode
from pyromosaic.tasks.differential import DELTAS, PORTION, Delta, Mode, check, decide, effect, effect_scale

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
        "gradient_clip": 0.0,
        "replay": True,
    },
)

Parts = tuple[tuple[str, tuple[int, ...]], ...]  # salient sites, each with the numbers of the groups that have it


def _cohorts(schema: Schema) -> Cohorts:
    if schema.cohorts is None:
        raise ValueError("the data have no cohorts; mosaic.with_cohorts says which cells are background and target")
    return schema.cohorts


def belongs(minibatch: Minibatch, groups: Sequence[int]) -> Tensor:
    """Which cells are in one of the groups, shape (B, 1), boolean."""
    assert minibatch.groups is not None
    return torch.stack([minibatch.groups == group for group in groups]).any(0).unsqueeze(-1)


def salient(parts: Parts, minibatch: Minibatch, distributions: Iterable[dist.TorchDistribution]) -> list[Tensor]:
    """Draws of the salient variables, inside the plate of cells; 0 in cells that do not have them."""
    drawn = []
    for (site, groups), distribution in zip(parts, distributions, strict=True):
        has = belongs(minibatch, groups)
        with poutine.mask(mask=has):
            drawn.append(pyro.sample(site, distribution) * has.unsqueeze(-1))
    return drawn


class ContrastiveModel(Program):
    """The generative story.

    Every cell has a background variable z. A target cell also has a salient variable s, which is 0 in background cells.
    One decoder a modality, shared by both cohorts, turns [z, s] into what the likelihood needs.

    Examples
    --------
    >>> from pyro import poutine
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mdata, _ = simulate(60, {"rna": 50}, treated=0.5)
    >>> mosaic = Mosaic.from_mudata(mdata).with_cohorts("condition", background="control")
    >>> model, minibatch = ContrastiveVI(mosaic, n_latent=3, n_salient=2), measured(mosaic, mosaic.find(None))
    >>> trace = poutine.trace(model.model).get_trace(minibatch)
    >>> trace.nodes["z"]["fn"].event_shape, trace.nodes["s"]["fn"].event_shape
    (torch.Size([3]), torch.Size([2]))
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

        Sites: ``z``, ``s`` (or one a target group), one of each modality's name, and its latent size if it has.
        """
        with cells(minibatch, kl_weight):
            z = pyro.sample("z", self.prior(minibatch))
            s = salient(self.parts, minibatch, (self.salient_prior(minibatch) for _ in self.parts))
        latent = torch.cat([z, *s], dim=-1)
        for name, view in minibatch.decoded.items():
            self.modalities[name](latent, view, minibatch, kl_weight)
        return latent


class PairEncoder(nn.Module):
    """Encoders of z and of s, which see the same of a modality.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50})[0])
    >>> view = measured(mosaic, mosaic.find(None)).observed["rna"]
    >>> loc, scale = PairEncoder(*(Encoder(mosaic.schema["rna"], n) for n in (10, 5)))(view)
    >>> loc.shape, scale.shape
    (torch.Size([40, 15]), torch.Size([40, 15]))
    """

    z: Any
    s: Any

    def __init__(self, z: nn.Module, s: nn.Module) -> None:
        super().__init__()
        self.z, self.s = z, s

    @property
    def scaling(self) -> nn.Module:
        """What prepares the measurements."""
        scaling: nn.Module = self.z.scaling
        return scaling

    def start(self, view: View) -> None:
        """Learn the input scaling from the cells of a view."""
        self.z.start(view)
        self.s.start(view)

    def forward(self, view: View) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z and s side by side, each of shape (b, latent + salient)."""
        x = self.z.seen(view)
        (z, of_z), (s, of_s) = self.z.posterior(x, view), self.s.posterior(x, view)
        return torch.cat([z, s], dim=-1), torch.cat([of_z, of_s], dim=-1)


class ContrastiveGuide(Program):
    """The inference story.

    Each modality has one encoder for z and one for s; the normal posteriors of a cell's modalities are fused to one.
    Penalties compare what is inferred from different modalities, in different cohorts, and of z and s.

    Examples
    --------
    >>> from pyro import poutine
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mdata, _ = simulate(60, {"rna": 50}, treated=0.5)
    >>> mosaic = Mosaic.from_mudata(mdata).with_cohorts("condition", background="control")
    >>> model, minibatch = ContrastiveVI(mosaic, n_latent=3, n_salient=2), measured(mosaic, mosaic.find(None))
    >>> trace = poutine.trace(model.guide).get_trace(minibatch)
    >>> int(trace.nodes["s"]["mask"].sum())  # target cells alone have s
    30
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
        self.penalties: Any = nn.ModuleDict({what: attached(p, self.modalities) for what, p in penalties.items()})
        self.left_out = left_out

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """``q(z | x) q(s | x)``, each of encoders of its own; in the background s is left alone (Methods).

        Sites: ``z``, ``s`` (or one a target group), ``penalty/...``, and those of likelihoods and latent sizes.
        """
        by_modality, of_s = encoded(self.modalities, minibatch)
        used = presence(by_modality, len(minibatch))
        if self.training and self.left_out:
            used = leave_out(used, self.left_out)
        z, s = (self.fusion(q, used, minibatch.index) for q in (by_modality, of_s))
        for what, penalties in self.penalties.items():
            if any(penalty.weight for penalty in penalties):
                apply(penalties, self.compare(what, by_modality, z, s, minibatch), minibatch, kl_weight)
        each = zip(*(moment.chunk(len(self.parts), dim=-1) for moment in s), strict=True)
        with cells(minibatch, kl_weight):
            latent = [pyro.sample("z", normal(*z))]
            latent += salient(self.parts, minibatch, (normal(*moments) for moments in each))
        for name, view in minibatch.decoded.items():
            self.modalities[name](torch.cat(latent, dim=-1), view, minibatch, kl_weight)

    def compare(self, what: str, by_modality: Any, z: Any, s: Any, minibatch: Minibatch) -> dict[str, Posterior]:
        """The posteriors that a set of penalties compares; z and s are the moments of every cell."""
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
    """Independent normals, one a cell, batch shape (B, 1)."""
    return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)


class ContrastiveVI(MosaicModel):
    """Tell what a target cohort (treated, diseased) has beyond a background cohort (controls).

    Parameters
    ----------
    data
        The registered data with their cohorts, see `Mosaic.with_cohorts`, or the `Schema` of such data.
    n_latent
        Width of the background variable z, which all cells have.
    n_salient
        Width of the salient variable s, which only target cells have.
    salient
        ``"shared"``: all target groups have the same salient variable s; ``"own"``: each group has one of its own,
        ``s_<group>``.
    n_hidden, n_encoder_layers, n_decoder_layers
        Shape of the networks.
    dropout
        Dropout of the encoders.
    input_dropout
        How many of a modality's features beyond 250 its encoder does not see in training, as a share; others in every
        cell and step. It keeps encoders from learning single cells by heart.
    encode_covariates
        Whether encoders see batch and covariates.
    library
        Size of a cell in RNA: ``"observed"`` is what was counted; ``"latent"`` infers it, with a normal prior on its
        logarithm from the cell's batch. Of some modalities by name, e.g. ``{"rna": "latent", "adt": "latent"}``.
    cohort_mmd
        Weight of the discrepancy between the cohorts' background variables; 0 in the paper, and better lowered where
        treatment removes or adds cell types.
    dependence
        Weight of the dependence between what is inferred of z and of s in target cells; 0 in the paper.
    wasserstein
        Weight that keeps what is inferred of s in background cells, where the model does not use it, near 0; 0 in the
        paper by default.
    jeffreys, mmd, left_out
        Between modalities, as in `MultiVI`; without effect on a single modality.
    prior, salient_prior
        Callable modules from a minibatch to the prior of z and of s (of one group, if each has its own); by default
        standard normals. ``salient_prior="ard"`` learns the scale of each salient dimension (`pyromosaic.priors.ARD`).
    fusion
        How the posteriors of a cell's modalities become one, as in `MultiVI`; of a mixture the moments are taken.
    encoder, decoder
        What makes the networks of each modality, with the arguments of `pyromosaic.nn.Encoder` and `Decoder`, which
        they are by default.
    penalties
        Further penalties, see `pyromosaic.penalties`: on the posteriors of z by cohort; or lists of them by what they
        compare, ``"cohorts"``, ``"modalities"`` (z by modality), ``"background"`` (s of background cells) or
        ``"target"`` (z and s of target cells). One takes the place of the model's own of the same name.
    seed
        Seed of the networks' start values.

    Attributes
    ----------
    presets
        Named choices, of which ``"reference"`` has the paper's objective, minibatches and training, on networks with
        LayerNorm: ``ContrastiveVI(mosaic, **preset.options)``, then ``model.train(**preset.training)``. The paper's
        likelihood is given with the data, ``{"rna": "zinb"}``.

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

    def __init__(
        self,
        data: Mosaic | Schema,
        *,
        n_latent: int = 10,
        n_salient: int = 10,
        salient: str = "shared",
        n_hidden: int = 128,
        n_encoder_layers: int = 2,
        n_decoder_layers: int = 1,
        dropout: float = 0.1,
        input_dropout: float = 0.95,
        encode_covariates: bool = True,
        library: str | Mapping[str, str] = "observed",
        cohort_mmd: float = 100.0,
        dependence: float = 20.0,
        wasserstein: float = 1.0,
        jeffreys: float | None = None,
        mmd: float = 50.0,
        left_out: float | None = None,
        prior: nn.Module | None = None,
        salient_prior: nn.Module | str | None = None,
        fusion: str | Fusion = "mean",
        encoder: Callable[..., nn.Module] | None = None,
        decoder: Callable[..., nn.Module] | None = None,
        penalties: Sequence[Penalty] | Mapping[str, Sequence[Penalty]] = (),
        seed: int = 0,
    ) -> None:
        if salient not in ("shared", "own"):
            raise ValueError(f'salient is "shared" or "own"; found {salient!r}')
        if isinstance(salient_prior, str) and salient_prior != "ard":
            raise ValueError(f'salient_prior is "ard" or a module; found {salient_prior!r}')
        with self._construction(data, seed) as schema:
            targets = tuple(range(1, len(_cohorts(schema).names)))
            own = tuple((f"s_{_cohorts(schema).names[code]}", (code,)) for code in targets)
            parts: Parts = (("s", targets),) if salient == "shared" else own
            modalities = schema.modalities.items()
            jeffreys, left_out = agreement_weights(schema, jeffreys, left_out)
            likelihoods = likelihoods_of(schema)
            width = n_latent + n_salient * len(parts)

            def encoders(n: int) -> dict[str, nn.Module]:
                shape = (n_hidden, n_encoder_layers, dropout, encode_covariates)
                network = encoder or partial(Encoder, input_dropout=input_dropout)
                return {name: network(m, n, *shape) for name, m in modalities}

            def decoders(heads: str, network: Callable[..., nn.Module] = Decoder) -> dict[str, Any]:
                wanted = {name: getattr(likelihood, heads) for name, likelihood in likelihoods.items()}
                return {
                    name: network(schema[name], predictors, width, n_hidden, n_decoder_layers)
                    for name, predictors in wanted.items()
                    if predictors
                }

            explaining = decoders("predictors", decoder or Decoder)
            of_s = ARD(n_salient) if isinstance(salient_prior, str) else salient_prior or StandardNormal(n_salient)
            if isinstance(of_s, ARD):
                for network in explaining.values():
                    unit_columns(network.hidden[0], n_latent, width)
            latent = latent_sizes(library, schema)
            of_z, of_salient = encoders(n_latent), encoders(n_salient * len(parts))
            size_encoders = {name: Encoder(schema[name], 1, n_hidden, 1, dropout, encode_covariates) for name in latent}
            inferring = decoders("posterior_predictors")
            plates = {name: Plates(name, m.n_features) for name, m in modalities}
            self.model = self.Model(
                parts,
                prior or StandardNormal(n_latent),
                of_s,
                {
                    name: Measurement(
                        plates[name],
                        (LatentSize if name in latent else Size)(name, m, width),
                        explaining[name],
                        likelihoods[name],
                    )
                    for name, m in modalities
                },
            )
            given = penalties if isinstance(penalties, Mapping) else {"cohorts": penalties}
            own_penalties: dict[str, list[Penalty]] = {
                "modalities": [Jeffreys(jeffreys), MMD(mmd)] if len(modalities) > 1 else [],
                "cohorts": [CohortMMD(cohort_mmd, n_cells=128)],
                "background": [Wasserstein(wasserstein)],
                "target": [Dependence(dependence, n_cells=128)],
            }
            if not set(given) <= set(own_penalties):
                raise ValueError(
                    f"penalties compare {', '.join(map(repr, own_penalties))}; found {', '.join(map(repr, given))}"
                )
            self.guide = self.Guide(
                parts,
                {
                    name: MeasurementGuide(
                        plates[name],
                        PairEncoder(of_z[name], of_salient[name]),
                        n_latent,
                        decoder=inferring.get(name),
                        likelihood=likelihoods[name],
                        size_encoder=size_encoders.get(name),
                    )
                    for name, _ in modalities
                },
                fusion_of(fusion, tuple(schema.modalities)),
                {what: with_given(mine, given.get(what, ())) for what, mine in own_penalties.items()},
                left_out,
            )

    def check_data(self, mosaic: Mosaic) -> None:
        """Refuse cohorts that cannot be told from batches."""
        for name in mosaic.modalities:
            self._check_batches(name, mosaic)

    def _check_batches(self, name: str, mosaic: Mosaic) -> None:
        """Refuse a modality by which cohorts cannot be told from batches."""
        modality = mosaic.modalities[name]
        assert mosaic.groups is not None
        groups = np.where(modality.present, mosaic.groups, -1)
        cohorts = _cohorts(self.schema)
        if not (groups == 0).any() or not (groups > 0).any():
            raise ValueError(f"modality {name!r} is not measured in both cohorts; leave it out")
        if not modality.spec.batch_key:
            return
        controls = np.unique(modality.codes[groups == 0, 0])
        for code, group in enumerate(cohorts.names):
            batches = np.unique(modality.codes[groups == code, 0])
            if len(batches) and not np.isin(batches, controls).any():
                key = modality.spec.batch_key
                raise ValueError(
                    f"modality {name!r}: no background cell is in a batch of group {group!r} "
                    f"({key} {', '.join(modality.schema.categories[key][b] for b in batches)}), so what is salient "
                    "cannot be told from the batch; leave batch_key out, or add background cells of these batches"
                )

    def explaining_size(self, mosaic: Mosaic, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cells of the cohorts, and draws of their latent variables."""
        assert mosaic.groups is not None
        cells = cells[mosaic.groups[cells] >= 0]
        latent = [self._latent(mosaic, cells, site, sample=True) for site in self._variables]
        return cells, np.concatenate(latent, axis=1)

    def train(
        self,
        n_epochs: int = 150,
        *,
        batch_size: int = 640,
        learning_rate: float = 4e-3,
        replay: bool = False,
        **options: Any,
    ) -> None:
        """Fit the parameters by stochastic variational inference.

        Every minibatch holds as many background as target cells, so that both cohorts have the same weight.

        Parameters
        ----------
        n_epochs
            Passes over the larger cohort.
        batch_size
            Largest number of cells in a minibatch, half of them of either cohort. With some hundred cells in all an
            epoch has a single step: lower it then, or take more epochs.
        learning_rate
            See `pyromosaic.train.Optimisation`.
        replay
            Within an epoch repeat the smaller cohort's minibatches instead of drawing it anew, as the reference
            implementation does; see `pyromosaic.data.contrastive_loader`.
        **options
            As in `MosaicModel.train`.
        """
        self._replay = replay
        super().train(n_epochs, batch_size=batch_size, learning_rate=learning_rate, **options)

    def loader(
        self, mosaic: Mosaic, cells: np.ndarray, batch_size: int, seed: int | None = None, n_workers: int = 0
    ) -> DataLoader[Minibatch]:
        """Minibatches of as many background as target cells, `batch_size` in all."""
        return contrastive_loader(mosaic, cells, -(-batch_size // 2), seed, n_workers, replay=self._replay)

    # Asking

    @property
    def _variables(self) -> list[str]:
        return ["z", *(site for site, _ in self.model.parts)]

    def _seen(self, mosaic: Mosaic, index: np.ndarray, salient: bool | None) -> Mosaic:
        """The mosaic with cells taken as they are (None), all as background (False), or background as target (True)."""
        assert mosaic.groups is not None
        if salient is None:
            unknown = index[mosaic.groups[index] < 0]
            if len(unknown):
                raise ValueError(
                    f"cell {mosaic.obs_names[unknown[0]]!r} belongs to no cohort, so the model does not say whether it "
                    "has salient variables; leave it out, or say how to take it"
                )
            return mosaic
        if not salient:
            return replace(mosaic, groups=np.zeros(mosaic.n_cells, dtype=np.int64))
        if len(self.model.parts) > 1 and (mosaic.groups[index] <= 0).any():
            raise ValueError("each target group has salient variables of its own; a background cell has none of them")
        return replace(mosaic, groups=np.where(mosaic.groups > 0, mosaic.groups, 1))

    def _latent(
        self,
        mosaic: Mosaic,
        index: np.ndarray,
        site: str,
        modality: str | None = None,
        sample: bool = False,
        seed: int = 0,
    ) -> np.ndarray:
        """A latent variable; salient variables are 0 in cells of groups that do not have them."""
        values = super()._latent(mosaic, index, site, modality, sample, seed)
        groups = dict(self.model.parts).get(site)
        if groups is not None:
            assert mosaic.groups is not None
            values = values * np.isin(mosaic.groups[index], groups)[:, None]
        return values

    def get_latent_representation(
        self,
        cells: Cells = None,
        *,
        representation: str = "salient",
        as_target: bool = False,
        modality: str | None = None,
        sample: bool = False,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Salient or background variables of each cell.

        Parameters
        ----------
        cells
            Names, numbers or a mask; None for all.
        representation
            ``"salient"`` or ``"background"``.
        as_target
            Infer salient variables of background cells as if they were target cells: an extrapolation, as nothing but
            the Wasserstein penalty trains it. Under the model, and by default, they are 0.
        modality
            Look at this modality alone, in the cells that have it; None for all that a cell has.
        sample
            Draw from the posterior instead of giving its mean.
        data
            Other cells than the training data.
        seed
            Seed of the draw.

        Returns
        -------
        pandas.DataFrame
            Cells × latent dimensions ``z_0``, ``z_1``, … or ``s_0``, ``s_1``, …

        Raises
        ------
        ValueError
            If the representation or a cell is not there.
        """
        if representation not in ("salient", "background"):
            raise ValueError(f'the representation is "salient" or "background"; found {representation!r}')
        mosaic = self._data(data)
        index = self._having(mosaic, mosaic.find(cells), modality)
        if representation == "background":
            values = {"z": self._latent(mosaic, index, "z", modality, sample, seed)}
        else:
            mosaic = self._seen(mosaic, index, True if as_target else None)
            values = {site: self._latent(mosaic, index, site, modality, sample, seed) for site in self._variables[1:]}
        columns = [f"{site}_{i}" for site, v in values.items() for i in range(v.shape[1])]
        return pd.DataFrame(np.concatenate(list(values.values()), axis=1), mosaic.obs_names[index], columns)

    def salient_information(self, cells: Cells = None, *, data: Mosaic | None = None) -> pd.Series:
        """How much each salient dimension says of a target cell: mean divergence from prior to posterior, in nats.

        One that the data do not need has little, by overfitting: 0.1 to 0.3 nats under the ARD prior in 2,000 simulated
        cells, where those that they need have more than 1.

        Parameters
        ----------
        cells
            Names, numbers or a mask; None for all. Cells of other groups are passed over.
        data
            Other cells than the training data.

        Returns
        -------
        pandas.Series
            By dimension ``s_0``, ``s_1``, …
        """
        mosaic = self._data(data)
        index = mosaic.find(cells)
        found: dict[str, float] = {}
        assert mosaic.groups is not None
        for site, groups in self.model.parts:
            chosen = index[np.isin(mosaic.groups[index], groups)]
            if len(chosen) == 0:
                raise ValueError(f"none of the cells asked for is in the target groups of {site!r}")
            sums = []
            with inference_mode(self.model, self.guide):
                for minibatch in self._minibatches(mosaic, chosen, ()):
                    q = poutine.trace(self.guide).get_trace(minibatch).nodes[site]["fn"].base_dist
                    p = self.model.salient_prior(minibatch).base_dist
                    sums.append(torch.distributions.kl_divergence(q, p)[..., 0, :].sum(0))
            information = (torch.stack(sums).sum(0) / len(chosen)).cpu().numpy()
            found |= {f"{site}_{i}": value for i, value in enumerate(information)}
        return pd.Series(found, name="information")

    def get_normalized_expression(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        salient: bool | None = None,
        data: Mosaic | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Denoised expression, with or without what is salient.

        Parameters
        ----------
        modality, cells, data, **options
            As in `MosaicModel.get_normalized_expression`.
        salient
            None decodes each cell as the model has it, target cells with their salient variables and background cells
            without. False decodes all without: what target cells would express, were they background. True decodes
            background cells too with what is inferred as if they were target cells.

        Returns
        -------
        pandas.DataFrame
            Cells × features.
        """
        mosaic = self._data(data)
        mosaic = self._seen(mosaic, mosaic.find(cells), salient)
        return super().get_normalized_expression(modality, cells, data=mosaic, **options)

    def salient_effect(
        self,
        cells: Cells = None,
        *,
        modality: str | None = None,
        mode: Mode = "change",
        delta: Delta = "default",
        fdr: float = 0.05,
        n_samples: int = 5000,
        features: Sequence[str] | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Which features the salient variables change: the same cells decoded with and without them.

        Unlike a comparison of treated with control cells (`differential`), this compares each cell with itself, so
        that a different mixture of cell types in the two cohorts does not count.

        Parameters
        ----------
        cells
            Names, numbers or a mask of target cells; None for all of them.
        modality, mode, delta, fdr, features, data, seed
            As in `differential`.
        n_samples
            Number of cells drawn, with replacement, from each target group.

        Returns
        -------
        pandas.DataFrame
            A block for each target ``group`` with a row a feature, the surest first; the columns of
            `pyromosaic.tasks.compare`.

        Raises
        ------
        ValueError
            If there are no target cells among those asked for, or an argument is out of range.
        """
        check(mode, delta, fdr)
        if n_samples < 1:
            raise ValueError(f"n_samples is at least 1; found {n_samples}")
        mosaic = self._data(data)
        name = next(iter(self.schema.modalities)) if modality is None else modality
        scale, pseudocount = effect_scale(self.schema[name])
        names = np.asarray(self.schema[name].features, dtype=object)[self._features(name, features)]
        tables = []
        for group, chosen in self._targets(mosaic, cells).items():
            rng, effects = np.random.default_rng(seed), []
            for start in range(0, n_samples, PORTION):
                drawn = rng.choice(chosen, min(PORTION, n_samples - start))
                one, other = self._with_and_without(name, mosaic, drawn, features, int(rng.integers(2**31)))
                effects.append(effect(one, other, scale, pseudocount).astype(np.float32))
            table = decide(np.concatenate(effects), names, mode, delta, scale, fdr)
            table.insert(0, "group", group)
            tables.append(table)
        return pd.concat(tables)

    def salient_effect_per_cell(
        self,
        cells: Cells = None,
        *,
        modality: str | None = None,
        delta: float | Literal["default"] = "default",
        fdr: float = 0.05,
        n_samples: int = 50,
        features: Sequence[str] | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> "CellEffects":
        """What the salient variables change in each target cell, and how surely.

        Parameters
        ----------
        cells, modality, features, data, seed
            As in `salient_effect`.
        delta
            Smallest effect that counts; by default a log2 fold change of 0.25 or a difference of 0.05.
        fdr
            Share of false discoveries accepted among the pairs of cell and feature called.
        n_samples
            Number of posterior draws of each cell.

        Returns
        -------
        CellEffects
            Tables of cells × features.
        """
        check("change", delta, fdr)
        mosaic = self._data(data)
        name = next(iter(self.schema.modalities)) if modality is None else modality
        scale, pseudocount = effect_scale(self.schema[name])
        least = DELTAS[scale] if delta == "default" else float(delta)
        chosen = np.concatenate(list(self._targets(mosaic, cells).values()))
        rng = np.random.default_rng(seed)
        up = down = mean = square = np.zeros(())
        for _ in range(n_samples):
            one, other = self._with_and_without(name, mosaic, chosen, features, int(rng.integers(2**31)))
            e = effect(one, other, scale, pseudocount)
            up, down, mean, square = up + (e >= least), down + (e <= -least), mean + e, square + e**2
        mean = mean / n_samples
        probability = np.maximum(up, down) / n_samples
        doubts, n = np.unique(1 - probability, return_counts=True)  # equal doubts are called together or not at all
        accepted = doubts[np.cumsum(doubts * n) / np.cumsum(n) <= fdr]
        tables = {
            "mean": mean,
            "sd": np.sqrt(np.maximum(square / n_samples - mean**2, 0)),
            "probability": probability,
            "bayes_factor": np.log(probability + 1e-8) - np.log(1 - probability + 1e-8),
            "is_significant": 1 - probability <= accepted.max(initial=-1.0),
        }
        columns = np.asarray(self.schema[name].features, dtype=object)[self._features(name, features)]
        frames = {k: pd.DataFrame(v, mosaic.obs_names[chosen], columns) for k, v in tables.items()}
        return CellEffects(**frames)

    def contrast_scores(
        self, cells: Cells = None, *, n_samples: int = 10, data: Mosaic | None = None, seed: int = 0
    ) -> pd.DataFrame:
        """How much each cell needs salient variables.

        Parameters
        ----------
        cells
            Names, numbers or a mask; None for all. Background cells are scored as if they were target cells.
        n_samples
            Number of posterior draws.
        data
            Other cells than the training data.
        seed
            Seed of the draws.

        Returns
        -------
        pandas.DataFrame
            ``evidence``, by how many nats the measurements are likelier with the inferred salient variables than
            without, averaged over draws; ``magnitude``, the norm of their posterior mean.
        """
        mosaic = self._data(data)
        index = mosaic.find(cells)
        treated, untreated = self._seen(mosaic, index, True), self._seen(mosaic, index, False)
        evidence = []
        with inference_mode(self.model, self.guide, seed=seed):
            for start in range(0, len(index), 1024):
                part = index[start : start + 1024]
                one = measured(treated, part).to(self._device)
                other = measured(untreated, part).to(self._device)
                gain = torch.zeros(len(part), device=self._device)
                with encoded_once(self.guide):
                    for _ in range(n_samples):
                        guide_trace = poutine.trace(self.guide).get_trace(one)
                        for minibatch, sign in ((one, 1.0), (other, -1.0)):
                            trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(minibatch)
                            for name, view in minibatch.decoded.items():
                                site = trace.nodes[name]
                                log_prob = site["fn"].log_prob(site["value"]).sum(-1)
                                gain = gain.index_add(0, view.rows, sign * log_prob / n_samples)
                evidence.append(gain.cpu().numpy())
        s = np.concatenate([self._latent(treated, index, site) for site in self._variables[1:]], axis=1)
        scores = {"evidence": np.concatenate(evidence), "magnitude": np.linalg.norm(s, axis=1)}
        return pd.DataFrame(scores, mosaic.obs_names[index])

    def _targets(self, mosaic: Mosaic, cells: Cells) -> dict[str, np.ndarray]:
        """Numbers of the target cells among those asked for, by group."""
        assert mosaic.groups is not None
        index = mosaic.find(cells)
        names = _cohorts(self.schema).names
        found = {names[c]: index[mosaic.groups[index] == c] for c in range(1, len(names))}
        found = {name: chosen for name, chosen in found.items() if len(chosen)}
        if not found:
            raise ValueError(f"none of the cells asked for is a target cell; targets are {', '.join(names[1:])}")
        return found

    def _with_and_without(
        self, modality: str, mosaic: Mosaic, cells: np.ndarray, features: Sequence[str] | None, seed: int
    ) -> list[np.ndarray]:
        """One posterior draw of each cell, decoded with and without its salient variables: the same z in both."""
        size, value = self._unit_size(modality), self._compared(modality)
        values = []
        for taken in (mosaic, self._seen(mosaic, cells, False)):
            chunks = self._draws(modality, cells, features, None, size, 1, taken, None, seed, value)
            values.append(np.concatenate([chunk[0].cpu().numpy() for chunk in chunks]))
        return values


class CellEffects(NamedTuple):
    """What salient variables change in each cell, all tables cells × features.

    Parameters
    ----------
    mean, sd
        Posterior mean and standard deviation of the effect: a log2 fold change, or a difference for accessibility.
    probability
        That the effect is at least delta on the side it more often is.
    bayes_factor
        Natural log odds of the probability.
    is_significant
        Called, at the share of false discoveries that is accepted over the whole table.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mdata, _ = simulate(60, {"rna": 50}, treated=0.5)
    >>> mosaic = Mosaic.from_mudata(mdata).with_cohorts("condition", background="control")
    >>> effects = ContrastiveVI(mosaic).salient_effect_per_cell(n_samples=5, features=["rna_0"])
    >>> effects.mean.shape, effects.is_significant.shape
    ((30, 1), (30, 1))
    """

    mean: pd.DataFrame
    sd: pd.DataFrame
    probability: pd.DataFrame
    bayes_factor: pd.DataFrame
    is_significant: pd.DataFrame
