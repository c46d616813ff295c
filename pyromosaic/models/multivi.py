"""MultiVI: one latent space for cells measured by RNA, chromatin, surface protein, or any mix of them.

Ashuach et al., MultiVI: deep generative model for the integration of multimodal data, Nature Methods 2023.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import pandas as pd
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn

from pyromosaic.data import Minibatch, Mosaic, Schema, measured
from pyromosaic.fusion import Fusion, Posterior, agreement_weights, alone, fusion_of, leave_out, presence
from pyromosaic.likelihoods import likelihoods_of
from pyromosaic.models.mosaic_model import Cells, MosaicModel, Preset
from pyromosaic.nn import Decoder, Encoder
from pyromosaic.penalties import MMD, Adversary, Jeffreys, Penalty, apply
from pyromosaic.priors import StandardNormal
from pyromosaic.program import AtMean, Program, weighted
from pyromosaic.sizes import LatentSize, Size
from pyromosaic.tasks import inference_mode

COLLAPSED = 0.2  # share below which the shared latent space is said to have collapsed


PAPER = Preset(
    options={
        "n_latent": None,  # follow from the number of regions
        "n_hidden": None,
        "n_decoder_layers": 2,
        "input_dropout": 0.0,
        "encode_covariates": False,
        "library": "latent",
        "fusion": "mean",
        "jeffreys": 1.0,
        "mmd": 0.0,
        "left_out": 0.0,
        "adversary": 1.0,
        "adversary_target": "batch",
    },
    training={
        "n_epochs": 500,
        "batch_size": 128,
        "learning_rate": 1e-4,
        "weight_decay": 1e-3,
        "kl_warmup_epochs": 50,
        "schedule": "constant",
        "gradient_clip": 0.0,
        "validation": 0.1,
        "early_stopping": 50,
        "monitor": "reconstruction",
    },
)
CALIBRATED = Preset(
    options={"input_dropout": 0.0, "fusion": "product", "jeffreys": 0.0, "mmd": 0.0, "left_out": 0.0}, training={}
)


class MultiVIModel(Program):
    """The generative story.

    Each cell has a latent variable z, and perhaps for each modality a latent variable of its own. Each modality that is
    measured in it is decoded from these and the cell's batch and covariates, and its likelihood gives the measurements.

    Examples
    --------
    >>> from pyro import poutine
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50, "adt": 5})[0])
    >>> model, minibatch = MultiVI(mosaic, n_latent=3), measured(mosaic, mosaic.find(None))
    >>> trace = poutine.trace(model.model).get_trace(minibatch)
    >>> trace.nodes["z"]["fn"].event_shape, trace.observation_nodes
    (torch.Size([3]), ['rna', 'adt'])
    """

    def __init__(
        self,
        prior: nn.Module,
        private: Mapping[str, int],
        private_kl: float,
        sizes: Mapping[str, nn.Module],
        decoders: Mapping[str, nn.Module],
        likelihoods: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.prior = prior
        self.private = private
        self.private_kl = private_kl
        self.sizes = self.container(sizes)
        self.decoders = self.container(decoders)
        self.likelihoods = self.container(likelihoods)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> Tensor:
        """``z ~ Normal(0, I)``, then ``x_m ~ likelihood_m(decoder_m(z, batch))`` for each modality m (Methods).

        Sites: ``z``, and one of each modality's name; beside it ``z_<modality>`` if it has private dimensions,
        ``<modality>_library`` if its size is latent, ``<modality>_background`` if its likelihood is an NB mixture.
        """
        with pyro.plate("cells", minibatch.n_cells, subsample=minibatch.index, dim=-2), weighted(kl_weight):
            z = pyro.sample("z", self.prior(minibatch))
        for name, view in minibatch.decoded.items():
            own, likelihood = z[..., view.rows, 0, :], self.likelihoods[name]
            with self.cells(name, minibatch):
                view = self.sizes[name](own, view)
                if name in self.private:
                    prior = dist.Normal(own.new_zeros(len(view.rows), 1, self.private[name]), 1.0).to_event(1)
                    with weighted(kl_weight * self.private_kl):
                        own = torch.cat([own, pyro.sample(f"z_{name}", prior)[..., 0, :]], dim=-1)
                predictors = self.decoders[name](own, view)
                with pyro.plate(f"{name}_features", likelihood.schema.n_features, dim=-1):
                    likelihood(name, predictors, view, kl_weight)
        return z


class MultiVIGuide(Program):
    """The inference story.

    Each measured modality is encoded to a normal posterior of z, and of its private variable; the posteriors of a
    cell's z are fused to one. Penalties compare the posteriors, an adversary looks at the fused one. Likelihoods with
    latent variables of their own have a decoder for their posteriors.

    Examples
    --------
    >>> from pyro import poutine
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(40, {"rna": 50, "adt": 5})[0])
    >>> model, minibatch = MultiVI(mosaic, n_latent=3), measured(mosaic, mosaic.find(None))
    >>> trace = poutine.trace(model.guide).get_trace(minibatch)
    >>> trace.nodes["z"]["fn"].event_shape, trace.nodes["adt_background"]["fn"].batch_shape
    (torch.Size([3]), torch.Size([26, 5]))
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        private: Mapping[str, int],
        private_kl: float,
        fusion: Fusion,
        left_out: float,
        penalties: Sequence[nn.Module],
        adversaries: Sequence[nn.Module],
        size_encoders: Mapping[str, nn.Module],
        decoders: Mapping[str, nn.Module],
        likelihoods: Mapping[str, nn.Module],
    ) -> None:
        super().__init__("guide")
        self.encoders = self.container(encoders)
        self.private = private
        self.private_kl = private_kl
        self.fusion = fusion
        self.left_out = left_out
        self.penalties = nn.ModuleList(penalties)
        self.adversaries = nn.ModuleList(adversaries)
        self.size_encoders = self.container(size_encoders)
        self.decoders = self.container(decoders)
        self.likelihoods: dict[str, Any] = dict(likelihoods)  # the model owns their parameters

    def posteriors(self, minibatch: Minibatch) -> tuple[dict[str, Posterior], dict[str, Posterior]]:
        """Posteriors given each modality alone: of z, and of the modality's private variable."""
        shared, private = {}, {}
        for name, view in minibatch.observed.items():
            q, n = Posterior(view.rows, *self.encoders[name](view)), self.private.get(name, 0)
            shared[name] = q.dimensions(slice(q.loc.shape[-1] - n))
            private[name] = q.dimensions(slice(q.loc.shape[-1] - n, None))
        return shared, private

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """``q(z | x) = fusion of q_m(z | x_m)`` over the modalities m that a cell has (Methods).

        Sites: those of the model that are not observed, and ``penalty/...``.
        """
        shared, private = self.posteriors(minibatch)
        apply(self.penalties, shared, minibatch, kl_weight)
        used = presence(shared, len(minibatch))
        if self.training and self.left_out:
            used = leave_out(used, self.left_out)
        joint, seen = self.fusion.posterior(shared, used, minibatch.index), dict(zip(shared, used.T, strict=True))
        if self.adversaries:
            whole = Posterior(torch.arange(len(minibatch), device=used.device), joint.mean[:, 0], joint.stddev[:, 0])
            apply(self.adversaries, {"z": whole}, minibatch, kl_weight)
        with pyro.plate("cells", minibatch.n_cells, subsample=minibatch.index, dim=-2), weighted(kl_weight):
            z = pyro.sample("z", joint)
        for name, view in minibatch.decoded.items():
            own = z[..., view.rows, 0, :]
            with self.cells(name, minibatch):
                if name in self.size_encoders and view.counts is not None:
                    loc, scale = self.size_encoders[name](view)
                    pyro.sample(f"{name}_library", dist.Normal(view.library.log() + loc, scale))
                if name in self.private:
                    posterior = alone(private.get(name), seen.get(name, used[:, 0]), self.private[name], view.rows)
                    with weighted(kl_weight * self.private_kl):
                        own = torch.cat([own, pyro.sample(f"z_{name}", posterior)[..., 0, :]], dim=-1)
                if name in self.decoders:
                    with pyro.plate(f"{name}_features", self.likelihoods[name].schema.n_features, dim=-1):
                        self.likelihoods[name].posterior(name, self.decoders[name](own, view), kl_weight)


class MultiVI(MosaicModel):
    """Integrate a mosaic of cells measured by one or several modalities.

    On RNA alone this is scVI, on chromatin alone PeakVI, on RNA and protein totalVI.

    Parameters
    ----------
    data
        The registered data, or the `Schema` of data to come.
    n_latent
        Width of the latent space; None for the paper's rule, the square root of `n_hidden`.
    n_hidden, n_encoder_layers, n_decoder_layers
        Shape of the networks; `n_hidden` None for the paper's rule, the square root of the number of regions (without
        regions, of the most features), at most 128.
    dropout
        Dropout of the encoders.
    input_dropout
        How many of a modality's features beyond 250 its encoder does not see in training, as a share; others in every
        cell and step. It keeps encoders from learning single cells by heart.
    encode_covariates
        Whether encoders see batch and covariates.
    covariate_embedding
        Width of a learnt embedding of batch and covariates, which networks see in their place; 0 for indicators. Of use
        with many batches.
    library
        Cell factor of RNA: ``"observed"`` is its total count; ``"latent"`` infers it by a network, with a normal prior
        on its logarithm from the cell's batch.
    fusion
        How the posteriors of a cell's modalities become one: ``"mean"`` (also ``"equal"``), with weights that are
        learnt per modality ``"global"`` (also ``"universal"``) or per cell ``"cell"``, as a ``"product"`` or a
        ``"mixture"`` of experts; or a `pyromosaic.fusion.Fusion`.
    n_private
        Number of latent dimensions that each modality has for itself, or of some modalities by name; 0 as in the
        paper. See `get_shared_share`.
    private_kl
        Weight of their divergence, relative to that of z. At 1, and with `left_out` 0, the private variables tend to
        swallow what should be shared. The ELBO in the history counts their divergence so many times; above 1 it is
        still a lower bound of the evidence.
    jeffreys
        Weight of the symmetric divergence between the posteriors of a cell's modalities; 1 in the paper. None for a
        ten-thousandth of the number of features of all modalities, at most 0.2.
    mmd
        Weight of the discrepancy between the modalities' representations over all cells that have them; 0 as in the
        paper, and better lowered where modalities were measured in different kinds of cells.
    adversary, adversary_target
        Weight and target, ``"pattern"`` or ``"batch"``, of an adversary; see `pyromosaic.penalties.Adversary`.
    left_out
        Share of the cells with several modalities in which, at each training step, the posterior sees only one of them
        while the model explains all; 0 as in the paper. None for as much as `jeffreys` by default, at most 0.1.
    prior
        Callable module from a minibatch to the prior of z; by default a standard normal.
    encoder, decoder
        What makes the networks of each modality, with the arguments of `pyromosaic.nn.Encoder` and `Decoder`, which
        they are by default: a subclass, or a function that chooses by the schema it is given.
    penalties
        Further penalties on the posteriors of z by modality, see `pyromosaic.penalties`.
    seed
        Seed of the networks' start values.

    Attributes
    ----------
    presets
        Other choices by name. ``"paper"``: those of the paper and its reference implementation, except for what the
        encoders see (there raw counts, here log counts on a common scale), the start values of the decoders' biases
        (here the data's mean profile), and the variance of the fused posterior (there the sum of ``sqrt(w) var``, here
        that of a mean of independent variables, the sum of ``w^2 var``). ``"calibrated"``: no penalties, and a product
        of experts, as probability has it; intervals of what is imputed are somewhat wider, modalities mix less.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, pbmc_mosaic
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    >>> model = MultiVI(mosaic, n_latent=10)
    >>> model.train(n_epochs=1, progress_bar=False)
    >>> model.get_latent_representation().shape
    (1600, 10)

    As in the paper, but for fewer epochs:

    >>> options, training = MultiVI.presets["paper"]
    >>> model = MultiVI(mosaic, **options)
    >>> model.train(**training | {"n_epochs": 1}, progress_bar=False)
    """

    model: MultiVIModel
    guide: MultiVIGuide
    Model: ClassVar[type[MultiVIModel]] = MultiVIModel
    Guide: ClassVar[type[MultiVIGuide]] = MultiVIGuide
    presets: ClassVar[Mapping[str, Preset]] = MappingProxyType({"paper": PAPER, "calibrated": CALIBRATED})

    def __init__(
        self,
        data: Mosaic | Schema,
        *,
        n_latent: int | None = 15,
        n_hidden: int | None = 128,
        n_encoder_layers: int = 2,
        n_decoder_layers: int = 1,
        dropout: float = 0.1,
        input_dropout: float = 0.5,
        encode_covariates: bool = True,
        covariate_embedding: int = 0,
        library: str = "observed",
        fusion: str | Fusion = "mean",
        n_private: int | Mapping[str, int] = 0,
        private_kl: float = 2.0,
        jeffreys: float | None = None,
        mmd: float = 50.0,
        adversary: float = 0.0,
        adversary_target: str = "pattern",
        left_out: float | None = None,
        prior: nn.Module | None = None,
        encoder: Callable[..., nn.Module] | None = None,
        decoder: Callable[..., nn.Module] | None = None,
        penalties: Sequence[Penalty] = (),
        seed: int = 0,
    ) -> None:
        with self._construction(data, locals(), seed) as schema:
            modalities = schema.modalities
            jeffreys, left_out = agreement_weights(schema, jeffreys, left_out)
            if library not in ("observed", "latent"):
                raise ValueError(f'library is "observed" or "latent"; found {library!r}')
            if covariate_embedding < 0:
                raise ValueError(f"covariate_embedding is at least 0; found {covariate_embedding}")
            if n_hidden is None:
                regions = [m.n_features for m in modalities.values() if m.spec.traits.binary]
                n_hidden = min(128, int(max(regions or [m.n_features for m in modalities.values()]) ** 0.5))
            n_latent = int(n_hidden**0.5) if n_latent is None else n_latent
            private = _private(n_private, schema)
            width = {name: n_latent + private.get(name, 0) for name in modalities}
            likelihoods = likelihoods_of(schema)
            encode: Callable[..., nn.Module] = partial(Encoder, embedding=covariate_embedding)
            decode: Callable[..., nn.Module] = partial(Decoder, embedding=covariate_embedding)
            encoders = {
                name: (encoder or partial(encode, input_dropout=input_dropout))(
                    m, width[name], n_hidden, n_encoder_layers, dropout, encode_covariates
                )
                for name, m in modalities.items()
            }

            def decoders(heads: str, network: Callable[..., nn.Module]) -> dict[str, nn.Module]:
                wanted = {name: getattr(likelihood, heads) for name, likelihood in likelihoods.items()}
                return {
                    name: network(schema[name], predictors, width[name], n_hidden, n_decoder_layers)
                    for name, predictors in wanted.items()
                    if predictors
                }

            inferred = [n for n, m in modalities.items() if library == "latent" and m.spec.traits.latent_size]
            self.model = self.Model(
                prior or StandardNormal(n_latent),
                private,
                private_kl,
                {n: (LatentSize if n in inferred else Size)(n, m, n_latent) for n, m in modalities.items()},
                decoders("predictors", decoder or decode),
                likelihoods,
            )
            self.guide = self.Guide(
                encoders,
                private,
                private_kl,
                fusion_of(fusion, tuple(modalities)),
                left_out,
                [Jeffreys(jeffreys), MMD(mmd), *penalties],
                [Adversary(schema, n_latent, adversary_target, adversary)] if adversary else [],
                {name: encode(schema[name], 1, n_hidden, 1, dropout, encode_covariates) for name in inferred},
                decoders("posterior_predictors", decode),
                likelihoods,
            )

    def start(self, mosaic: Mosaic) -> None:
        """Set input scaling, feature-level parameters and the decoders' biases from the data."""
        self.guide.fusion.start(mosaic)
        for name, modality in mosaic.modalities.items():
            if not modality.present.any():
                raise ValueError(f"modality {name!r} has no cell to learn from; load a trained model for such data")
            view = measured(mosaic, modality.sample()).observed[name]
            for encoders in (self.guide.encoders, self.guide.size_encoders):
                if name in encoders:
                    encoders[name].scaling.start(view)
            if name in self.guide.size_encoders:
                self.model.sizes[name].start(view)
                nn.init.constant_(self.guide.size_encoders[name].log_variance.bias, -4.0)  # a count says much of a size
            values = self.model.likelihoods[name].start(view)
            for decoders in (self.model.decoders, self.guide.decoders):
                if name in decoders:
                    decoders[name].start(values)

    def finish(self, mosaic: Mosaic) -> None:
        """Learn sizes; warn if the shared latent space has collapsed."""
        super().finish(mosaic)
        if self.model.private:
            assert self.split is not None
            held_out = self.split.validation if len(self.split.validation) else self.split.train
            shares = self.get_shared_share(held_out[:: 1 + len(held_out) // 2000])
            for name in shares.index[shares < COLLAPSED]:
                warnings.warn(
                    f"the shared latent space explains only {shares[name]:.0%} of what the model knows of modality "
                    f"{name!r}; more private_kl, or fewer private dimensions, move it there",
                    stacklevel=2,
                )

    def get_shared_share(self, cells: Cells = None, *, data: Mosaic | None = None) -> pd.Series:
        """How much of what the model knows of a modality's measurements it knows from the shared latent variable z.

        The gain in log-likelihood over the mean profile when a cell's predictors are decoded from z with the private
        variable at its prior mean, over the gain when they are decoded from both. Latent variables stand at their
        posterior means; the mean profile is the mean of the predictors of cells of the same batch and categories. Near
        1 the private variable adds nothing; near 0 z has collapsed, and the modalities share nothing.

        Parameters
        ----------
        cells
            Names, numbers or a mask of the cells; better those held out of training, ``model.split.validation``. None
            for all.
        data
            Other cells than the training data.

        Returns
        -------
        pandas.Series
            A share, between 0 and 1, for each modality with private dimensions and measured cells.
        """
        mosaic = self._data(data)
        shares: dict[str, float] = {}
        with inference_mode(self.model, self.guide):
            minibatch = measured(mosaic, mosaic.find(cells)).to(self._device)
            with AtMean():
                found = poutine.trace(self.guide).get_trace(minibatch)
            for name, view in minibatch.decoded.items():
                if name in self.model.private:
                    z, own = found.nodes["z"]["value"][view.rows, 0], found.nodes[f"z_{name}"]["value"][:, 0]
                    both = self.model.decoders[name](torch.cat([z, own], dim=-1), view)
                    shared = self.model.decoders[name](torch.cat([z, torch.zeros_like(own)], dim=-1), view)
                    alike = (view.codes.unsqueeze(1) == view.codes).all(-1).to(z)  # cells of the same categories
                    mean = {k: alike @ v / alike.sum(-1, keepdim=True) for k, v in shared.items()}
                    likelihood = poutine.replay(self.model.likelihoods[name], trace=found)
                    totals = []
                    for predictors in (mean, shared, both):
                        site = poutine.trace(likelihood).get_trace(name, predictors, view).nodes[name]
                        totals.append(float(site["fn"].log_prob(view.counts).sum()))
                    shares[name] = (totals[1] - totals[0]) / (totals[2] - totals[0])
        return pd.Series(shares, dtype=float).clip(0, 1)

    def _data(self, data: Mosaic | None) -> Mosaic:
        mosaic = super()._data(data)
        self.guide.fusion.meet(mosaic)
        return mosaic


def _private(n_private: int | Mapping[str, int], schema: Schema) -> dict[str, int]:
    """Number of private dimensions of the modalities that have any."""
    by_name = n_private if isinstance(n_private, Mapping) else dict.fromkeys(schema.modalities, n_private)
    for name, n in by_name.items():
        schema[name]
        if n < 0:
            raise ValueError(f"n_private is at least 0; found {n} for modality {name!r}")
    return {name: n for name, n in by_name.items() if n}
