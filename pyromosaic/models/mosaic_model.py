"""The class of all models."""

from abc import ABCMeta
from typing import TYPE_CHECKING, Any

from pyromosaic.foreign import check_name
from pyromosaic.models.asking import Asking
from pyromosaic.models.base import Preset
from pyromosaic.models.comparing import Comparing
from pyromosaic.models.keeping import Keeping
from pyromosaic.models.locating import Locating
from pyromosaic.shown import as_html, call
from pyromosaic.tasks.question import Cells

__all__ = ["Cells", "MosaicModel", "Preset"]


class _Kind(ABCMeta):
    """The class of the classes of models, which says what to use instead of a method of scvi-tools."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            check_name(cls.__name__, name)
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")


class MosaicModel(Locating, Asking, Comparing, Keeping, metaclass=_Kind):
    """A Pyro program (`model`, `guide`) over a mosaic.

    A subclass builds `model` and `guide` in its constructor inside ``with self.construction(data, seed) as schema``.
    Both are a `pyromosaic.program.Program`, called with a `Minibatch` and the weight of the divergences:

    - The model samples ``z``, shape (cells, 1, latent), inside `pyromosaic.measurement.cells`, and for each modality of
      ``minibatch.decoded`` a site of its name with ``obs=view.counts``. To predict, ``view.counts`` is None.
    - The guide samples ``z``, and what else is latent in the model, from the modalities of ``minibatch.observed``.
    - If both have ``self.modalities``, `pyromosaic.program.Slots` of `pyromosaic.measurement.Measurement` and
      `MeasurementGuide`, the base class sets start values, learns sizes, and computes denoised values and differences
      from the likelihoods.

    `save` stores the arguments of the constructor by name. `load` and `adapt` pass them to the constructor again, with
    a `Schema` in place of data. `pyromosaic.testing.check_model` checks all methods of a class.

    Attributes
    ----------
    model, guide
        The Pyro program; both are called with a `Minibatch`. The class of a model names their classes as ``Model`` and
        ``Guide``; a subclass may replace them.
    schema
        Description of the data that is saved with the model.
    mosaic
        The training data, if there are any.
    history
        One row per epoch, after training; see `pyromosaic.train.Plan`.
    split
        Training, validation and test cells, after training.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
    >>> model = MultiVI(mosaic, n_latent=3)
    >>> model  # before training, results are those of the start values
    MultiVI(n_latent=3), not trained, on Mosaic of 60 cells
      rna: 40 cells × 50 features, nb, batch 'batch' (2)
      adt: 40 cells × 5 features, nb_mixture, batch 'batch' (2)
    >>> model.get_latent_representation().shape
    (60, 3)
    >>> model.get_normalized_expression("rna", features=["rna_0", "rna_1"]).shape  # also where RNA was not measured
    (60, 2)
    """

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say what to use instead of a method of scvi-tools."""
            check_name(type(self).__name__, name)
            return super().__getattribute__(name)  # raises the error again

    def _repr_html_(self) -> str:
        n = sum(parameter.numel() for program in (self.model, self.guide) for parameter in program.parameters())
        last = {} if self.history.empty else dict(self.history.iloc[-1])
        rows: list[list[object]] = [["epochs trained", len(self.history)]]
        rows += [[name, f"{last[name]:.4g}"] for name in ("train_elbo", "validation_elbo") if name in last]
        rows += [["parameters", f"{n:,}"], ["device", self._device]]
        data = "" if self.mosaic is None else self.mosaic._repr_html_()
        return as_html(call(type(self), self.options), ["", ""], rows, "no data" * (not data)) + data
