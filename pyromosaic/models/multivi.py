"""MultiVI: one latent space for cells measured by RNA, chromatin, surface protein, or any mix of them.

Ashuach et al., MultiVI: deep generative model for the integration of multimodal data, Nature Methods 2023.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from pyromosaic.accepted import Dimensions, Layers, Rate, Seed, Share, Weight, Width, checked
from pyromosaic.data import Minibatch, Mosaic, Schema, measured
from pyromosaic.described import complete
from pyromosaic.fusion import Fusion, Posterior, agreement_weights, fusion_of, leave_out, presence
from pyromosaic.guidance import few_pairs, linked_scores
from pyromosaic.likelihoods import likelihoods_of, posterior_decoders
from pyromosaic.links import GuidanceGraph
from pyromosaic.measurement import Measurement, MeasurementGuide, Plates, cells, encoded
from pyromosaic.models.mosaic_model import Cells, MosaicModel, Preset
from pyromosaic.nn import Covariance, Decoder, Encoder, encoder_of
from pyromosaic.penalties import (
    MMD,
    Adversary,
    Jeffreys,
    Penalty,
    Pull,
    Scores,
    apply,
    attached,
    chosen,
    with_given,
)
from pyromosaic.priors import GaussianMixture, StandardNormal
from pyromosaic.program import AtMean, Program, Slots, own
from pyromosaic.sizes import LatentSize, Size, latent_sizes, other_sizes
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
        "prior": "normal",
        "fusion": "mean",
        "jeffreys": 1.0,
        "mmd": 0.0,
        "left_out": 0.0,
        "linkage": None,
        "adversary": Adversary(target="batch"),
    },
    training={
        "n_epochs": 500,
        "batch_size": 128,
        "learning_rate": 1e-4,
        "weight_decay": 1e-3,
        "kl_warmup_epochs": 50,
        "schedule": "constant",
        "likelihood_rate": 1.0,
        "sleep_steps": 0,
        "gradient_clip": 0.0,
        "validation": 0.1,
        "early_stopping": 50,
        "monitor": "reconstruction",
    },
)
CALIBRATED = Preset(
    options={
        "input_dropout": 0.0,
        "fusion": "product",
        "jeffreys": 0.0,
        "mmd": 0.0,
        "left_out": 0.0,
        "linkage": None,
    },
    training={},
)


class MultiVIModel(Program):
    """The generative model.

    Each cell has a latent variable z, and optionally a private latent variable for each modality. Each modality that
    was measured in the cell is decoded from these variables and the cell's batch and covariates. The likelihood of the
    modality then generates the measurements.
    """

    def __init__(self, prior: nn.Module, modalities: Mapping[str, Measurement]) -> None:
        super().__init__()
        self.prior = own(prior)
        self.modalities = Slots(modalities)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> Tensor:
        """``z ~ prior``, then ``x_m ~ likelihood_m(decoder_m(z, batch))`` for each modality m (Methods).

        Sites: ``z``, and one named after each modality; also ``z_<modality>`` if it has private dimensions,
        ``<modality>_library`` if its size is latent, ``<modality>_background`` if that of antibodies is latent.
        """
        with cells(minibatch, kl_weight):
            z = pyro.sample("z", self.prior(minibatch))
        for name, view in minibatch.decoded.items():
            self.modalities[name](z, view, minibatch, kl_weight)
        return z


class MultiVIGuide(Program):
    """The variational posterior.

    Each measured modality is encoded to a normal posterior of z and of its private variable. The posteriors of z in one
    cell are fused to one. Penalties compare the posteriors; an adversary sees the fused posterior. If a likelihood has
    latent variables, a separate decoder gives their posteriors.
    """

    def __init__(
        self,
        modalities: Mapping[str, MeasurementGuide],
        fusion: Fusion,
        left_out: float,
        penalties: Sequence[nn.Module],
        adversaries: Sequence[nn.Module],
    ) -> None:
        super().__init__("guide")
        self.modalities = Slots(modalities)
        self.fusion = own(fusion)
        self.left_out = left_out
        self.penalties = attached(penalties, self.modalities)
        self.adversaries = nn.ModuleList(adversaries)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """``q(z | x) = fusion of q_m(z | x_m)`` over the modalities m that a cell has (Methods).

        Sites: those of the model that are not observed, and ``penalty/...``.
        """
        shared, private = encoded(self.modalities, minibatch)
        apply(self.penalties, shared, minibatch, kl_weight)
        used = presence(shared, len(minibatch))
        if self.training and self.left_out:
            used = leave_out(used, self.left_out)
            private = {name: q.of(seen[q.rows] > 0) for (name, q), seen in zip(private.items(), used.T, strict=True)}
        joint = self.fusion.posterior(shared, used, minibatch.index)
        if self.adversaries:
            apply(self.adversaries, {"z": Posterior.whole(joint)}, minibatch, kl_weight)
        with cells(minibatch, kl_weight):
            z = pyro.sample("z", joint)
        for name, view in minibatch.decoded.items():
            self.modalities[name](z, view, minibatch, kl_weight, private.get(name))


class MultiVI(MosaicModel):
    """Integrate a mosaic of cells measured by one or several modalities.

    On RNA alone this is scVI, on chromatin alone it is PeakVI, and on RNA and protein it is totalVI.

    Parameters
    ----------
    data
        The registered data, or only their `Schema`.
    graph
        Linked features, for `linkage`, in the forms that `DiagVI` accepts; None without. They help most if few or no
        cells have several modalities.
    n_latent
        Dimension of the latent space; None for the rule of the paper, the square root of `n_hidden`.
    n_hidden, n_encoder_layers, n_decoder_layers
        Shape of the networks. If `n_hidden` is None, the rule of the paper applies: the square root of the number of
        regions (without regions, of the largest number of features), at most 128.
    dropout
        Dropout rate of the hidden layers of the encoders.
    input_dropout
        Dropout rate on encoder inputs in training, scaled by ``1 - 250 / n_features``. It keeps encoders from
        memorising single cells.
    encode_covariates
        Whether encoders see batch and covariates.
    covariate_embedding
        Dimension of a learnt embedding that replaces the indicators of batch and covariates in the networks; 0 keeps
        the indicators. Useful with many batches.
    library
        Size of a cell in RNA: ``"observed"`` is its total count; ``"latent"`` infers it by a network, with a normal
        prior on its logarithm that depends on the cell's batch. To choose it for other modalities, give a dictionary,
        e.g. ``{"adt": "latent"}``.
    fusion
        How to combine the posteriors of a cell's modalities: ``"mean"`` (also ``"equal"``); a weighted mean with
        weights learnt per modality, ``"global"`` (also ``"universal"``), or per cell, ``"cell"``; a ``"product"`` or a
        ``"mixture"`` of experts; or a `pyromosaic.fusion.Fusion`.
    covariance
        Covariance of the posterior of z: ``"diagonal"``, or ``"full"``, where the latent dimensions of a cell may be
        correlated.
    n_private
        Number of private latent dimensions of each modality, or a dictionary with the number for some modalities; 0 as
        in the paper. See `get_shared_share`.
    private_kl
        Weight of their divergence, relative to that of z. At 1, and with `left_out` 0, the private variables tend to
        swallow what should be shared. The ELBO in the history counts their divergence once.
    jeffreys
        Weight of the symmetric divergence between the posteriors of a cell's modalities; 1 in the paper. If None, it is
        the number of features of all modalities divided by 10,000, at most 0.2.
    mmd
        Weight of the discrepancy between the modalities' representations over all cells that have them; 0 as in the
        paper, and better lowered where modalities were measured in different kinds of cells. The weights of penalties
        may be given as penalties with more arguments, e.g. ``mmd=MMD(50.0, n_cells=512)``, in all models.
    adversary
        Weight of an adversary that tells which modalities a cell has; or one that tells its batch,
        ``Adversary(target="batch")``.
    left_out
        Share of the cells with several modalities for which, in a training step, the guide sees only one modality while
        the model explains all of them; 0 in the paper. If None, it is the number of features divided by 10,000, as for
        `jeffreys`, at most 0.1.
    linkage
        Scores of cells in one space for all modalities, to which the encoders are pulled: ``"cca"`` computes them
        before training, by canonical correlation that starts from the cells with several modalities (at least 5), from
        the links of the graph, or from both. ``"auto"`` does so if a modality has few pairs: fewer than 300 of its
        cells, and less than a third of them, have another modality too. Or give a table of scores with one row per
        cell. None uses no scores. They are used only when a new model is trained. With many pairs they tell networks
        nothing new, and a type that only one modality has is less well apart.
    pull
        Weight of `Pull` to these scores, or this penalty. By default nine tenths of the weight fade while that of the
        divergences increases (`kl_warmup_epochs` of `train`); ``Pull(20.0, fades=0.0)`` stays as it is.
    prior
        Prior of z: ``"mixture"``, a mixture of 20 Gaussians with learnt parameters, so that cells drawn from the model
        look like the data; ``"normal"``, a standard normal, as in the paper; or a module that maps a minibatch to a
        distribution (`pyromosaic.priors`).
    encoder, decoder
        Class or function that makes the network of each modality; it takes the arguments of `pyromosaic.nn.Encoder` or
        `pyromosaic.nn.Decoder`, which are the defaults. A function can choose a network by the schema that it receives.
    penalties
        Additional penalties on the posteriors of z by modality, see `pyromosaic.penalties`.
    seed
        Seed for the initial weights of the networks.

    Attributes
    ----------
    presets
        Named sets of options. ``"paper"`` has the options of the paper and its reference implementation. Three things
        still differ: the inputs of the encoders (there raw counts, here log counts on a common scale), the start values
        of the biases of the decoders (here the mean profile of the data), and the variance of the fused posterior
        (there the sum of ``sqrt(w) var``, here the variance of a mean of independent variables, the sum of
        ``w^2 var``). ``"calibrated"`` has no penalties and a product of experts, as probability theory asks; intervals
        of imputed values are somewhat wider, and the modalities mix less.

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
    sleep_steps, sleep_means, largest_minibatch = 200, True, 1024

    @checked
    def __init__(
        self,
        data: Mosaic | Schema,
        graph: Any = None,
        *,
        n_latent: Width | None = 15,
        n_hidden: Width | None = 128,
        n_encoder_layers: Layers = 2,
        n_decoder_layers: Layers = 1,
        dropout: Rate = 0.1,
        input_dropout: Rate = 0.5,
        encode_covariates: bool = True,
        covariate_embedding: Dimensions = 0,
        library: Literal["observed", "latent"] | Mapping[str, Literal["observed", "latent"]] = "observed",
        fusion: str | Fusion = "mean",
        covariance: Covariance = "diagonal",
        n_private: Dimensions | Mapping[str, Dimensions] = 0,
        private_kl: Weight = 2.0,
        jeffreys: Weight | Jeffreys | None = None,
        mmd: Weight | MMD = 50.0,
        adversary: Weight | Adversary = 0.0,
        left_out: Share | None = None,
        linkage: Literal["auto", "cca"] | pd.DataFrame | None = "auto",
        pull: Weight | Pull = 20.0,
        prior: Literal["mixture", "normal"] | nn.Module = "mixture",
        encoder: Callable[..., nn.Module] | None = None,
        decoder: Callable[..., nn.Module] | None = None,
        penalties: Sequence[Penalty] = (),
        seed: Seed = 0,
    ) -> None:
        with self.construction(data, seed) as schema:
            modalities = schema.modalities
            self.graph = None if graph is None else GuidanceGraph.of(graph, schema)
            kept = linkage if isinstance(linkage, str) else None
            if kept == "auto":
                linkage = "cca" if self.mosaic is not None and few_pairs(self.mosaic, self.graph) else None
                kept = linkage or kept
            self._keep(graph=None if self.graph is None else self.graph.to_json(), linkage=kept)
            self.linkage, self.scores = linkage, Scores()
            jeffreys, left_out = agreement_weights(schema, jeffreys, left_out)
            if n_hidden is None:
                regions = [m.n_features for m in modalities.values() if m.spec.traits.binary]
                n_hidden = min(128, int(max(regions or [m.n_features for m in modalities.values()]) ** 0.5))
            self.n_latent = n_latent = int(n_hidden**0.5) if n_latent is None else n_latent
            self.private = private = _private(n_private, schema)
            width = {name: n_latent + private.get(name, 0) for name in modalities}
            likelihoods = likelihoods_of(schema)
            encode = partial(Encoder, embedding=covariate_embedding)
            encoder = encoder_of(encoder, covariance, embedding=covariate_embedding, input_dropout=input_dropout)
            decode: Callable[..., nn.Module] = partial(Decoder, embedding=covariate_embedding)
            encoders = {
                name: encoder(m, width[name], n_hidden, n_encoder_layers, dropout, encode_covariates)
                for name, m in modalities.items()
            }
            decoders = {
                name: (decoder or decode)(m, likelihoods[name].predictors, width[name], n_hidden, n_decoder_layers)
                for name, m in modalities.items()
            }
            latent = latent_sizes(library, schema)
            known = {"schema": schema, "n_latent": n_latent}
            adversaries = [chosen("adversary", adversary, Adversary, **known)] if adversary else []
            size_encoders = {name: encode(schema[name], 1, n_hidden, 1, dropout, encode_covariates) for name in latent}
            inferring = posterior_decoders(schema, likelihoods, width, n_hidden, n_decoder_layers, covariate_embedding)
            explains, infers = {}, {}
            for name, m in modalities.items():
                plates, likelihood = Plates(name, m.n_features, private_kl=private_kl), likelihoods[name]
                own, others = private.get(name, 0), other_sizes(schema, name)
                size = (LatentSize if name in latent else Size)(name, m, n_latent, others)
                explains[name] = Measurement(plates, size, decoders[name], likelihood, own)
                infers[name] = MeasurementGuide(
                    plates, encoders[name], n_latent, own, inferring.get(name), likelihood, size_encoders.get(name)
                )
            if isinstance(prior, str):
                prior = GaussianMixture(n_components=20) if prior == "mixture" else StandardNormal()
            self.model = self.Model(complete(prior, n_latent=n_latent), explains)
            self.guide = self.Guide(
                infers,
                fusion_of(fusion, tuple(modalities)),
                left_out,
                with_given(
                    [
                        chosen("jeffreys", jeffreys, Jeffreys),
                        chosen("mmd", mmd, MMD),
                        chosen("pull", 0.0 if linkage is None else pull, Pull, scores=self.scores, fades=0.9),
                    ],
                    penalties,
                ),
                adversaries,
            )

    def check_data(self, mosaic: Mosaic) -> None:
        """Refuse a modality that no cell has."""
        for name, modality in mosaic.modalities.items():
            if not modality.present.any():
                raise ValueError(f"modality {name!r} has no cell to learn from; load a trained model for such data")

    def prepare(self, mosaic: Mosaic) -> None:
        """Find the scores to which the encoders of a new model are pulled; warn if links or linkage have no effect."""
        used = any(
            penalty.weight and getattr(penalty, "scores", None) is self.scores for penalty in self.guide.penalties
        )
        if self.scores or not self.history.empty:
            return
        if used and self.linkage is not None:
            scores = linked_scores(self.linkage, mosaic, self.graph, self.n_latent, paired=True)
            if scores.shape[1]:
                self.scores.set(torch.tensor(scores).to(self._device))
            else:
                warnings.warn(
                    "the linkage has nothing to start from: no two modalities, each of more than 10 cells, have 5 "
                    "cells in common, or links between features that vary; the encoders are not pulled",
                    stacklevel=3,
                )
        elif self.graph is not None:
            warnings.warn(
                'the links have no effect, because the encoders are not pulled; set linkage="cca" to use them, or '
                "leave them out",
                stacklevel=3,
            )

    def finish(self, mosaic: Mosaic) -> None:
        """Fit the sizes; warn if the shared latent space has collapsed."""
        super().finish(mosaic)
        if self.private:
            assert self.split is not None
            held_out = self.split.validation if len(self.split.validation) else self.split.train
            shares = self.get_shared_share(held_out[:: 1 + len(held_out) // 2000])
            for name in shares.index[shares < COLLAPSED]:
                warnings.warn(
                    f"the shared latent space carries only {shares[name]:.0%} of the information on modality {name!r}; "
                    "increase private_kl or lower n_private to move it there",
                    stacklevel=2,
                )

    @checked
    def get_shared_share(self, cells: Cells = None, *, data: Mosaic | None = None) -> pd.Series:
        """Share of the information on each modality that comes from the shared latent variable z.

        It is a ratio of two gains in log-likelihood over the mean profile: the gain when a cell is decoded from z with
        the private variable at its prior mean, divided by the gain when it is decoded from both. Latent variables are
        at their posterior means. The mean profile is the mean of the predictors of cells of the same batch and
        categories. Near 1, the private variable adds nothing. Near 0, z has collapsed, and the modalities share
        nothing.

        Parameters
        ----------
        cells
            Names, positions or a mask of the cells; None for all. Preferably use cells that were held out of training,
            ``model.split.validation``.
        data
            Cells other than the training data.

        Returns
        -------
        pandas.Series
            A share between 0 and 1 for each modality that has private dimensions and measured cells.
        """
        mosaic = self._data(data)
        shares: dict[str, float] = {}
        with inference_mode(self.model, self.guide):
            minibatch = measured(mosaic, mosaic.find(cells)).to(self._device)
            with AtMean():
                found = poutine.trace(self.guide).get_trace(minibatch)
            for name, view in minibatch.decoded.items():
                if name in self.private:
                    part = self.model.modalities[name]
                    z, own = found.nodes["z"]["value"][view.rows, 0], found.nodes[f"z_{name}"]["value"][:, 0]
                    both = part.predictors(z, own, view)
                    shared = part.predictors(z, torch.zeros_like(own), view)
                    alike = (view.codes.unsqueeze(1) == view.codes).all(-1).to(z)  # cells of the same categories
                    mean = {k: alike @ v / alike.sum(-1, keepdim=True) for k, v in shared.items()}
                    likelihood = poutine.replay(part.likelihood, trace=found)
                    totals = []
                    for predictors in (mean, shared, both):
                        site = poutine.trace(likelihood).get_trace(name, predictors, view).nodes[name]
                        totals.append(float(scale_and_mask(site["fn"].log_prob(view.counts), mask=view.measured).sum()))
                    gained = totals[2] - totals[0]
                    shares[name] = (totals[1] - totals[0]) / gained if gained else float("nan")
        return pd.Series(shares, dtype=float).clip(0, 1)


def _private(n_private: int | Mapping[str, int], schema: Schema) -> dict[str, int]:
    """Number of private dimensions of the modalities that have any."""
    by_name = n_private if isinstance(n_private, Mapping) else dict.fromkeys(schema.modalities, n_private)
    for name in by_name:
        schema[name]
    return {name: n for name, n in by_name.items() if n}
