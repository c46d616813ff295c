"""One modality in a program: its part of the generative model, and its part of the guide.

For every modality, a `Measurement` is part of the model and a `MeasurementGuide` is part of the guide. Both make their
sites inside the same `Plates`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyromosaic.accepted import Weight, checked
from pyromosaic.data import Minibatch, Traits, View
from pyromosaic.data.minibatch import across_batches
from pyromosaic.posterior import Posterior, alone
from pyromosaic.program import Part, Slots, weighted


@contextmanager
def cells(minibatch: Minibatch, kl_weight: float = 1.0, balanced: Mapping[str, float] | None = None) -> Iterator[None]:
    """Plate of all cells (dim -2), for the latent variables that modalities share.

    Parameters
    ----------
    minibatch
        The cells.
    kl_weight
        Weight of the divergences.
    balanced
        The total weight of the cells of each modality, by name; None gives every cell a weight of 1.
    """
    plate = pyro.plate("cells", minibatch.n_cells, subsample=minibatch.index, dim=-2)
    with plate, weighted(kl_weight), nullcontext() if balanced is None else _balance(minibatch, balanced):
        yield


def _balance(minibatch: Minibatch, weights: Mapping[str, float]) -> AbstractContextManager[Any]:
    scale = torch.zeros(len(minibatch), device=minibatch.index.device)
    for name, view in minibatch.observed.items():
        share = weights[name] * len(minibatch) / len(view.rows)
        scale = scale.index_add(0, view.rows, scale.new_full((len(view.rows),), share))
    balanced: AbstractContextManager[Any] = poutine.scale(scale=scale.unsqueeze(-1))
    return balanced


def scaled(by: float) -> AbstractContextManager[Any]:
    """Multiply log densities by a number, which may be 0, unlike in `pyro.poutine.scale`."""
    scale: AbstractContextManager[Any] = poutine.scale(scale=by) if by else poutine.mask(mask=False)
    return scale


@checked
@dataclass(frozen=True)
class Plates:
    """Plates and weights of a modality's sites, the same in model and guide.

    Parameters
    ----------
    name, n_features
        Name of the modality, and its number of features.
    likelihood_weight
        Weight of the likelihood.
    private_kl
        Weight of the divergence of the private latent variable, relative to that of z.
    balanced
        Whether every modality has the same weight, however many cells have it.
    """

    name: str
    n_features: int
    likelihood_weight: Weight = 1.0
    private_kl: Weight = 1.0
    balanced: bool = False

    @contextmanager
    def cells(self, minibatch: Minibatch) -> Iterator[None]:
        """Plate of the cells that have the modality (dim -2), scaled to all cells."""
        n = len(minibatch.decoded[self.name].rows)
        scale = minibatch.scale * (len(minibatch) / n) if self.balanced else minibatch.scale
        with poutine.scale(scale=scale), pyro.plate(f"{self.name}_cells", n, dim=-2):
            yield

    def private(self, kl_weight: float) -> AbstractContextManager[Any]:
        """Weight of the private latent variable."""
        return weighted(kl_weight * self.private_kl)

    @contextmanager
    def features(self, view: View | None = None) -> Iterator[None]:
        """Plate of the features (dim -1), inside that of the cells; only what was measured in the view counts."""
        partial = view is not None and view.counts is not None and view.measured is not None
        with scaled(self.likelihood_weight), pyro.plate(f"{self.name}_features", self.n_features, dim=-1):
            with poutine.mask(mask=view.measured) if partial and view is not None else nullcontext():
                yield


class Measurement(Part):
    """A modality in the generative model: size, private latent variable, decoder and likelihood.

    Parameters
    ----------
    plates
        Plates and weights of the modality.
    size
        Module for the sizes of cells in which the modality was not measured, see `pyromosaic.sizes.Size`. None if the
        likelihood does not use ``view.library``, which is then NaN in such cells.
    decoder
        Module that maps the latent variable, shape (..., b, latent), and the `View` of the b cells to the predictors of
        the likelihood by name, each of shape (..., b, features), e.g. a `pyromosaic.nn.Decoder`. If it has a method
        ``start(biases)``, this is called with the start values that ``start`` of the likelihood returns, if any.
    likelihood
        Maps predictors to the observed site, see `pyromosaic.likelihoods.Likelihood`.
    n_private
        Dimension of the private latent variable ``z_<name>``, which the decoder sees after the shared variable.

    Raises
    ------
    ValueError
        If `size` is None, but the traits of the likelihood say that it depends on sizes.
    """

    size: Any
    decoder: Any
    likelihood: Any

    def __init__(
        self, plates: Plates, size: nn.Module | None, decoder: nn.Module, likelihood: nn.Module, n_private: int = 0
    ) -> None:
        super().__init__()
        traits = getattr(likelihood, "traits", None)
        if size is None and isinstance(traits, Traits) and traits.sized:
            raise ValueError(
                f"modality {plates.name!r}: likelihood {type(likelihood).__name__} depends on the cell's size, as its "
                "traits say; give the Measurement a pyromosaic.sizes.Size"
            )
        self.plates, self.n_private = plates, n_private
        self.size, self.decoder, self.likelihood = size, decoder, likelihood
        self.held: list[tuple[Tensor, Tensor | None, View]] | None = None  # inside `held_back`

    def forward(self, z: Tensor, view: View, minibatch: Minibatch, kl_weight: float = 1.0, *context: Any) -> None:
        """Sites: ``<name>``, before it ``<name>_library`` or ``<name>_size``, ``z_<name>`` and those of the likelihood.

        Parameters
        ----------
        z
            Shared latent variable of all cells of the minibatch, shape (..., B, 1, latent).
        view
            The cells that have the modality.
        minibatch
            All cells.
        kl_weight
            Weight of the divergences.
        *context
            Further arguments of the decoder, see `predictors`.
        """
        shared, own = z[..., view.rows, 0, :], None
        with self.plates.cells(minibatch):
            view = view if self.size is None else self.size(shared, view, minibatch)
            if self.n_private:
                prior = dist.Normal(shared.new_zeros(len(view.rows), 1, self.n_private), 1.0).to_event(1)
                with self.plates.private(kl_weight):
                    own = pyro.sample(f"z_{self.plates.name}", prior)[..., 0, :]
            if self.held is not None:
                inputs = self.decoder.inputs(shared if own is None else torch.cat([shared, own], dim=-1), view)
                value, slope = forward_ad.unpack_dual(inputs)
                self.held.append((value, slope, view))
                return
            predictors = self.predictors(shared, own, view, *context)
            with self.plates.features(view):
                self.likelihood(self.plates.name, predictors, view, kl_weight)

    def predictors(self, z: Tensor, own: Tensor | None, view: View, *context: Any) -> dict[str, Tensor]:
        """Outputs of the decoder for the shared and the private latent variable, by predictor."""
        latent = z if own is None else torch.cat([z, own], dim=-1)
        decoded = across_batches(lambda view: self.decoder(latent, view), view, self.likelihood)
        lacking = [name for name in getattr(self.likelihood, "predictors", ()) if name not in decoded]
        if lacking:
            raise ValueError(
                f"the decoder of modality {self.plates.name!r} returns {', '.join(map(repr, decoded))}; its likelihood "
                f"{type(self.likelihood).__name__} needs {', '.join(map(repr, lacking))}"
            )
        return decoded

    def start(self, view: View) -> dict[str, Tensor]:
        """Set start values from some cells, and return the biases at which decoders start."""
        if hasattr(self.size, "start"):
            self.size.start(view)
        biases: dict[str, Tensor] = self.likelihood.start(view)
        for name, values in biases.items():
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"modality {self.plates.name!r}: start() of likelihood {type(self.likelihood).__name__} returns "
                    f"NaN or infinite values for {name!r}"
                )
        if biases and hasattr(self.decoder, "start"):
            self.decoder.start(biases)
        return biases


class MeasurementGuide(Part):
    """A modality in the guide: the posteriors of latent variables given its measurements.

    Parameters
    ----------
    plates
        Plates and weights of the modality, the same as in the `Measurement`.
    encoder
        Module that maps the `View` of the b cells with the modality to mean and standard deviation, each of shape
        (b, n_latent + n_private): first of the shared latent variable, then of the private one. It may return the
        Cholesky factor of the correlation matrix as well, of which the part of the shared variable is used. An example
        is `pyromosaic.nn.Encoder`.
    n_latent, n_private
        Dimensions of the shared and of the private latent variable.
    decoder
        Module that maps z to the predictors of the posterior of the likelihood's latent variables; None if it has none.
    likelihood
        The likelihood, which is part of the model; None if it has no latent variables.
    size_encoder
        Module that maps measurements to the posterior of the log size minus the log count; None if sizes are observed.
    """

    encoder: Any
    decoder: Any
    size_encoder: Any

    def __init__(
        self,
        plates: Plates,
        encoder: nn.Module,
        n_latent: int,
        n_private: int = 0,
        decoder: nn.Module | None = None,
        likelihood: nn.Module | None = None,
        size_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.plates, self.n_latent, self.n_private = plates, n_latent, n_private
        self.encoder, self.decoder, self.size_encoder = encoder, decoder, size_encoder
        self.owned_by_model: tuple[Any] = (likelihood,)
        self.known: dict[tuple[int, int], Any] | None = None  # cache inside `encoded_once`

    def encode(self, view: View) -> tuple[Posterior, Posterior]:
        """Posteriors of the shared and of the private latent variable given the modality alone."""
        loc, scale, *factor = self._once(self.encoder, view)
        if loc.shape[-1] < self.n_latent + self.n_private:
            raise ValueError(
                f"the encoder of modality {self.plates.name!r} returns {loc.shape[-1]} dimensions; accepted: "
                f"n_latent + n_private = {self.n_latent + self.n_private}"
            )
        q = Posterior(view.rows, loc, scale, *factor)
        return q.first(self.n_latent), q.after(self.n_latent)

    def forward(
        self, z: Tensor, view: View, minibatch: Minibatch, kl_weight: float = 1.0, private: Posterior | None = None
    ) -> None:
        """Sites: ``<name>_library`` if the size is latent, ``z_<name>``, and the likelihood's own latent variables.

        Parameters
        ----------
        z, view, minibatch, kl_weight
            As in `Measurement.forward`.
        private
            Posterior of the private variable, from `encoded`; needed if `n_private` is above 0 and a cell has the
            modality. In cells without the modality, the posterior of the variable is its prior.
        """
        name = self.plates.name
        latent = z[..., view.rows, 0, :] if self.n_private or self.decoder is not None else z
        with self.plates.cells(minibatch):
            if self.size_encoder is not None and view.counts is not None:
                loc, scale = self._once(self.size_encoder, view)
                pyro.sample(f"{name}_library", dist.Normal(view.library.log() + loc, scale))
            if self.n_private:
                if private is None and name in minibatch.observed:
                    raise ValueError(
                        f"modality {name!r} has a private variable; pass its posterior after kl_weight, from the "
                        "second dictionary that `encoded` returns"
                    )
                q = alone(private, z.new_ones(len(minibatch)), self.n_private, view.rows)
                with self.plates.private(kl_weight):
                    latent = torch.cat([latent, pyro.sample(f"z_{name}", q)[..., 0, :]], dim=-1)
            if self.decoder is not None:
                (likelihood,) = self.owned_by_model
                predictors = across_batches(lambda view: self.decoder(latent, view), view)
                with self.plates.features(view):
                    likelihood.posterior(name, predictors, kl_weight)

    def _once(self, network: nn.Module, view: View) -> tuple[Tensor, ...]:
        """Output of a network for a view, cached inside `encoded_once`."""
        if self.known is None:
            encoding: tuple[Tensor, ...] = network(view)
            return encoding
        key = id(network), id(view)
        if key not in self.known:
            self.known[key] = network(view), view  # the view is kept, so that no other view gets its id
        found: tuple[Tensor, ...] = self.known[key][0]
        return found

    def start(self, view: View, biases: Mapping[str, Tensor]) -> None:
        """Set input scaling and start values from some cells."""
        for network in (self.encoder, self.size_encoder):
            if hasattr(network, "start"):
                network.start(view)
        if self.size_encoder is not None:
            # A small variance: the count determines most of the size.
            nn.init.constant_(self.size_encoder.log_variance.bias, -4.0)
        if self.decoder is not None and hasattr(self.decoder, "start"):
            self.decoder.start(biases)


@contextmanager
def held_back(part: Measurement) -> Iterator[list[tuple[Tensor, Tensor | None, View]]]:
    """Context in which a modality makes no site; in its place, it leaves what its features are decoded from.

    Yields
    ------
    list
        For each run of the program: the inputs of the decoder's heads, their derivative in the direction of drawn
        weights (see `pyromosaic.laplace`), and the view with the sizes of the cells.
    """
    held: list[tuple[Tensor, Tensor | None, View]] = []
    part.held = held
    try:
        yield held
    finally:
        part.held = None


@contextmanager
def encoded_once(guide: nn.Module) -> Iterator[None]:
    """Context in which a guide in evaluation mode encodes each view only once.

    Parameters
    ----------
    guide
        The guide; its `MeasurementGuide` parts cache their encodings.
    """
    parts = [part for part in guide.modules() if isinstance(part, MeasurementGuide)]
    for part in parts:
        part.known = {}
    try:
        yield
    finally:
        for part in parts:
            part.known = None


def encoded(
    modalities: Mapping[str, MeasurementGuide], minibatch: Minibatch
) -> tuple[dict[str, Posterior], dict[str, Posterior]]:
    """Posteriors given each modality alone: of the shared, and of the private latent variables.

    Parameters
    ----------
    modalities
        The modalities of a guide.
    minibatch
        The cells.
    """
    found = {name: modalities[name].encode(view) for name, view in minibatch.observed.items()}
    return {name: q for name, (q, _) in found.items()}, {name: q for name, (_, q) in found.items()}


def part_of(program: nn.Module, name: str) -> Any:
    """The part of a modality in a model or guide; None if a user's program does not have one.

    Examples
    --------
    >>> part_of(nn.Module(), "rna") is None
    True
    """
    modalities = getattr(program, "modalities", None)
    part = modalities[name] if isinstance(modalities, Slots | nn.ModuleDict) and name in modalities else None
    return part if isinstance(part, Measurement | MeasurementGuide) else None
