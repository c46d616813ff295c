"""MultiVI: one latent space for cells measured by RNA, chromatin, surface protein, or any mix of them.

Ashuach et al., MultiVI: deep generative model for the integration of multimodal data, Nature Methods 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import nn

from pyromosaic.data import Minibatch, Mosaic, Schema, measured
from pyromosaic.fusion import MeanFusion, Posterior, leave_out, presence
from pyromosaic.likelihoods import LIKELIHOODS
from pyromosaic.models.mosaic_model import MosaicModel
from pyromosaic.nn import Decoder, Encoder, Size
from pyromosaic.penalties import MMD, Jeffreys, Penalty, apply
from pyromosaic.priors import StandardNormal
from pyromosaic.program import Program


class MultiVIModel(Program):
    """The generative story.

    Each cell has a latent variable z. Each modality that is measured in it is decoded from z and the cell's batch and
    covariates, and its likelihood gives the measurements.
    """

    def __init__(
        self,
        prior: nn.Module,
        sizes: Mapping[str, nn.Module],
        decoders: Mapping[str, nn.Module],
        likelihoods: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.prior = prior
        self.sizes: Any = nn.ModuleDict(sizes)
        self.decoders: Any = nn.ModuleDict(decoders)
        self.likelihoods: Any = self.container(likelihoods)

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """Sites: ``z``, and one of each modality's name (with ``<protein>_background`` beside an NB mixture)."""
        with pyro.plate("cells", minibatch.n_cells, subsample=minibatch.index, dim=-2), poutine.scale(scale=kl_weight):
            z = pyro.sample("z", self.prior(minibatch))
        decoders, likelihoods = self.decoders, self.likelihoods  # looked up once: Pyro notes every parameter each time
        for name, view in minibatch.decoded.items():
            own = z[..., view.rows, 0, :]
            view = self.sizes[name](own, view)
            predictors, likelihood = decoders[name](own, view), likelihoods[name]
            with self.plates(name, minibatch, likelihood.schema.n_features):
                likelihood(name, predictors, view, kl_weight)


class MultiVIGuide(Program):
    """The inference story.

    Each measured modality is encoded to a normal posterior of z; the posteriors of a cell are fused to one. Penalties
    compare the posteriors. Likelihoods with latent variables of their own have a decoder for their posteriors.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        fusion: nn.Module,
        penalties: Sequence[nn.Module],
        decoders: Mapping[str, nn.Module],
        likelihoods: Mapping[str, nn.Module],
        left_out: float,
    ) -> None:
        super().__init__()
        self.encoders: Any = nn.ModuleDict(encoders)
        self.fusion = fusion
        self.left_out = left_out
        self.penalties = nn.ModuleList(penalties)
        self.decoders: Any = nn.ModuleDict(decoders)
        self.likelihoods: dict[str, Any] = dict(likelihoods)  # the model owns their parameters

    def posteriors(self, minibatch: Minibatch) -> dict[str, Posterior]:
        """Posterior of z given each modality alone."""
        encoders = self.encoders
        return {name: Posterior(view.rows, *encoders[name](view)) for name, view in minibatch.observed.items()}

    def forward(self, minibatch: Minibatch, kl_weight: float = 1.0) -> None:
        """Sites: ``z``, ``penalty/...``, and ``<protein>_background`` beside an NB mixture."""
        posteriors = self.posteriors(minibatch)
        apply(self.penalties, posteriors, minibatch, kl_weight)
        used = presence(posteriors, len(minibatch))
        if self.training and self.left_out:
            used = leave_out(used, self.left_out)
        loc, scale = self.fusion(posteriors, used)
        with pyro.plate("cells", minibatch.n_cells, subsample=minibatch.index, dim=-2), poutine.scale(scale=kl_weight):
            z = pyro.sample("z", dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1))
        for name, decoder in self.decoders.items():
            if name in minibatch.decoded:
                view = minibatch.decoded[name]
                predictors = decoder(z[..., view.rows, 0, :], view)
                with self.plates(name, minibatch, self.likelihoods[name].schema.n_features):
                    self.likelihoods[name].posterior(name, predictors, kl_weight)


class MultiVI(MosaicModel):
    """Integrate a mosaic of cells measured by one or several modalities.

    Parameters
    ----------
    data
        The registered data, or the `Schema` of data to come.
    n_latent
        Width of the latent space.
    n_hidden, n_encoder_layers, n_decoder_layers
        Shape of the networks.
    dropout
        Dropout of the encoders.
    encode_covariates
        Whether encoders see batch and covariates.
    jeffreys
        Weight of the symmetric divergence between the posteriors of a cell's modalities; 1 in the paper.
    mmd
        Weight of the discrepancy between the modalities' representations over all cells that have them; 0 as in the
        paper, and better lowered where modalities were measured in different kinds of cells.
    left_out
        Share of the cells with several modalities in which, at each training step, the posterior sees only one of them
        while the model explains all; 0 as in the paper.
    prior
        Callable module from a minibatch to the prior of z; by default a standard normal.
    penalties
        Further penalties, see `pyromosaic.penalties`.
    seed
        Seed of the networks' start values.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, pbmc_mosaic
    >>> mosaic = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    >>> model = MultiVI(mosaic, n_latent=10)
    >>> model.train(n_epochs=1, progress_bar=False)
    >>> model.get_latent_representation().shape
    (1600, 10)
    """

    model: MultiVIModel
    guide: MultiVIGuide

    def __init__(
        self,
        data: Mosaic | Schema,
        *,
        n_latent: int = 15,
        n_hidden: int = 128,
        n_encoder_layers: int = 2,
        n_decoder_layers: int = 1,
        dropout: float = 0.1,
        encode_covariates: bool = True,
        jeffreys: float = 0.5,
        mmd: float = 50.0,
        left_out: float = 0.5,
        prior: nn.Module | None = None,
        penalties: Sequence[Penalty] = (),
        seed: int = 0,
    ) -> None:
        with self._construction(data, locals(), seed) as schema:
            likelihoods = {name: LIKELIHOODS[m.spec.likelihood](m) for name, m in schema.modalities.items()}
            encoders = {
                name: Encoder(m, n_latent, n_hidden, n_encoder_layers, dropout, encode_covariates)
                for name, m in schema.modalities.items()
            }

            def decoders(heads: str) -> dict[str, nn.Module]:
                wanted = {name: getattr(likelihood, heads) for name, likelihood in likelihoods.items()}
                return {
                    name: Decoder(schema[name], predictors, n_latent, n_hidden, n_decoder_layers)
                    for name, predictors in wanted.items()
                    if predictors
                }

            sizes = {name: Size(m, n_latent) for name, m in schema.modalities.items()}
            self.model = MultiVIModel(prior or StandardNormal(n_latent), sizes, decoders("predictors"), likelihoods)
            self.guide = MultiVIGuide(
                encoders,
                MeanFusion(),
                [Jeffreys(jeffreys), MMD(mmd), *penalties],
                decoders("posterior_predictors"),
                likelihoods,
                left_out,
            )

    def start(self, mosaic: Mosaic) -> None:
        """Set input scaling, feature-level parameters and the decoders' biases from the data."""
        for name, modality in mosaic.modalities.items():
            if not modality.present.any():
                raise ValueError(f"modality {name!r} has no cell to learn from; load a trained model for such data")
            view = measured(mosaic, modality.sample()).observed[name]
            self.guide.encoders[name].scaling.start(view)
            values = self.model.likelihoods[name].start(view)
            for decoders in (self.model.decoders, self.guide.decoders):
                if name in decoders:
                    decoders[name].start({k: v for k, v in values.items() if k in decoders[name].heads})

    def finish(self, mosaic: Mosaic) -> None:
        """Learn how the size of a cell depends on its latent variable, for cells in which it was not measured."""
        for name, modality in mosaic.modalities.items():
            cells = modality.sample()
            z = torch.from_numpy(self.get_latent_representation(cells).to_numpy()).to(self._device)
            self.model.sizes[name].fit(z, measured(mosaic, cells).observed[name].to(self._device))
