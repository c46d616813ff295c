"""Save and load a model without any code, and give it new cells."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from pyromosaic import described, penalties, priors
from pyromosaic.accepted import Count, checked
from pyromosaic.data import ModalitySpec, Mosaic, Schema, Split
from pyromosaic.data.mosaic import NewBatches
from pyromosaic.foreign import check_words
from pyromosaic.likelihoods import Likelihood
from pyromosaic.models.base import TrainedModel, accepted_options
from pyromosaic.models.formats import ADDED, FORMAT, READ, upgraded, upgraded_schema
from pyromosaic.models.query import carry_over, only
from pyromosaic.program import own
from pyromosaic.threads import one_thread
from pyromosaic.train.checkpoints import check_state
from pyromosaic.train.files import shapes
from pyromosaic.train.folders import DAMAGED, WEIGHTS, check_digest, descriptions, digest, keep, saved_by

#: The parts that are saved with a model, by name.
PARTS = {
    name: part
    for room in (penalties, priors)
    for name, part in vars(room).items()
    if isinstance(part, type) and issubclass(part, described.Described) and part.__module__.startswith(room.__name__)
}


class Keeping(TrainedModel):
    """Methods that save, load and adapt a model; see `pyromosaic.models.MosaicModel`."""

    @checked
    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Save the model: weights as safetensors, everything else as JSON.

        If several processes trained the model, the first one saves it, and this does nothing in the others.

        Parameters
        ----------
        directory
            Directory to write to; it is created if it does not exist.
        overwrite
            Replace an existing model; it stays until the new one is written.

        Raises
        ------
        FileExistsError
            If the directory holds a model and `overwrite` is False.
        OSError
            If the model cannot be written, e.g. on a full disk; a model that is there stays.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     model.save(directory)
        ...     sorted(path.name for path in Path(directory).iterdir())
        ['model.json', 'weights.safetensors']
        """
        if not self.saves:
            return
        tensors = {f"{k}.{n}": t for k in ("model", "guide") for n, t in getattr(self, k).state_dict().items()}
        options, objects = {}, [m.spec.likelihood_name for m in self.schema.modalities.values() if _is_own(m.spec)]
        for key, value in self.options.items():
            try:
                options[key] = described.to_json(value, PARTS)
            except TypeError:
                objects.append(key)  # code is not saved; it is given again at load
        content = {
            "format": FORMAT,
            "class": type(self).__name__,
            "options": options,
            "objects": objects,
            "schema": self.schema.to_json(),
            "history": _numbers(self.history.reset_index()),
            "split": None if self.split is None or self.mosaic is None else _parts(self.split, self.mosaic),
        }
        keep(Path(directory), content, tensors, overwrite)

    @classmethod
    @checked
    def load(cls, directory: str | Path, data: Any = None, **objects: Any) -> Self:
        """Load a saved model; no code from the files is run.

        Parameters
        ----------
        directory
            Directory that `save` wrote.
        data
            A MuData or a dictionary of AnnData, which is registered and checked against the schema of the model
            (features are put in its order); or a `Mosaic` that was registered with that schema; None for no data. If
            they are the cells of the training, in any order, the model has its `split` again.
        **objects
            The objects that the model was constructed with, but for the package's own penalties and priors, which are
            saved; and the classes of likelihoods of your own, by their names.

        Raises
        ------
        ValueError
            If the files are missing, damaged, or of another class of model, or if the data do not fit.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as directory:
        ...     model.save(directory)
        ...     again = MultiVI.load(directory, data=mosaic)
        >>> model.get_latent_representation().equals(again.get_latent_representation())
        True
        """
        check_words("load", objects, {"directory", "data", *accepted_options(cls)})
        directory, refused = Path(directory), []
        for content in descriptions(directory, cls.__name__, READ, _KINDS):
            try:
                model = cls._loaded(directory, content, objects)
                break
            except ValueError as error:
                refused.append(error)
        else:
            raise refused[0]
        if data is not None:
            model.mosaic = model.register(data)
            model.split = _split(content.get("split"), model.arranged(model.mosaic))
        return model

    @classmethod
    def _loaded(cls, directory: Path, content: dict[str, Any], objects: dict[str, Any]) -> Self:
        """The model of a description; its weights are read only if their names, shapes and types fit."""
        of = saved_by(directory, content)
        missing = [key for key in content["objects"] if key not in objects]
        if missing:
            raise ValueError(
                "the saved model was constructed with your own objects; pass "
                f"{', '.join(f'{name}=<object>' for name in missing)} to load()"
            )
        try:
            likelihoods = {k: v for k, v in objects.items() if isinstance(v, type) and issubclass(v, Likelihood)}
            schema = Schema.from_json(upgraded_schema(content, likelihoods), likelihoods)
            others = {k: v for k, v in objects.items() if k not in likelihoods}
            options, outline = upgraded(content, shapes(directory / WEIGHTS), schema, accepted_options(cls))
            with _no_larger_than(outline):
                model = cls(schema, **{**described.from_json(options, PARTS), **others})
            own = {f"{k}.{n}": t for k in ("model", "guide") for n, t in getattr(model, k).state_dict().items()}
            ends = tuple(end for came, names in ADDED.items() if content["format"] < came for end in names)
            added = {name: tensor for name, tensor in own.items() if name.endswith(ends)}
            check_state(added | outline, own, WEIGHTS)
            check_digest(directory, content)
            _, weights = upgraded(content, load_file(directory / WEIGHTS), schema, accepted_options(cls))
            weights = added | weights
            check_state(weights, own, WEIGHTS)
            for part in ("model", "guide"):
                state = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
                getattr(model, part).eval().load_state_dict(state)  # also what a subclass added to them
            history = content["history"]
            model.history = pd.DataFrame(history["data"], columns=history["columns"], dtype=float)
        except DAMAGED as error:
            if isinstance(error, OSError) and error.strerror:
                raise ValueError(f"the weights in {of} cannot be read: {error.strerror}") from error
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"the description and the weights in {of} do not fit together: {reason}") from error
        if not len(model.history):
            model.history = pd.DataFrame(index=pd.Index([], dtype=int, name="epoch"))
        elif "epoch" in model.history:
            model.history = model.history.astype({"epoch": int}).set_index("epoch")
        return model

    def to(self, device: str | torch.device) -> Self:
        """Move the model to a device, on which it then answers; `train` chooses its own (``accelerator=``).

        Parameters
        ----------
        device
            E.g. ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.

        Returns
        -------
        MosaicModel
            The model itself.

        Raises
        ------
        ValueError
            If there is no such device.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> model = MultiVI(Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0]), n_latent=3)
        >>> model.to("cpu") is model
        True
        """
        try:
            torch.zeros(1, device=device).item()  # "meta" has no values
        except (RuntimeError, AssertionError, TypeError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"device must be one that PyTorch can use here, e.g. 'cpu'; found {device!r}: {why}"
            ) from None
        with one_thread:
            self.model.to(device)
            self.guide.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A separate model of the same data; the data are not copied."""
        memo[id(self.mosaic)] = self.mosaic
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(deepcopy(vars(self), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what pickle or deepcopy kept; the parts belong to this model alone."""
        vars(self).update(state)
        for program in (self.model, self.guide):
            for part in program.modules():
                own(part)

    @checked
    def register(self, data: Any, new_batches: NewBatches = "refuse") -> Mosaic:
        """Register data for this model: a MuData, AnnData (cells matched by name), or a Mosaic.

        Features that the data lack count as not measured; those that the model does not know are left out, with a
        warning.

        Parameters
        ----------
        data
            A MuData; a dictionary from modality to AnnData, or to a list of AnnData; an AnnData of one modality, which
            is found by its features; or a Mosaic.
        new_batches
            ``"average"``: cells of batches that the model has not seen are treated as an average of the known batches.
            See also `adapt`.

        Raises
        ------
        ValueError
            If batches or labels differ from those of the model, a modality has none of its features, or `new_batches`
            is given with a Mosaic, which is registered already.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mdata, _ = simulate(60, {"rna": 50, "adt": 5}, patterns=["rna+adt"])
        >>> model = MultiVI(Mosaic.from_mudata(mdata[:40].copy()), n_latent=3)
        >>> model.get_latent_representation(data=model.register(mdata[40:].copy())).shape
        (20, 3)
        """
        if isinstance(data, Mosaic):
            if new_batches != "refuse":
                raise ValueError(
                    f"new_batches={new_batches!r} does not apply to a Mosaic, which is registered already; pass the "
                    "MuData or the dictionary of AnnData"
                )
            return self._data(data)
        return self._registered(data, new_batches)

    def _registered(self, data: Any, new_batches: NewBatches) -> Mosaic:
        if hasattr(data, "obs_names") and not hasattr(data, "mod"):
            data = {self.schema.of_features(data.var_names): data}
        if isinstance(data, Mapping):
            return Mosaic.from_anndata(data, match_cells=True, schema=self.schema, new_batches=new_batches)
        if not hasattr(data, "mod"):
            raise ValueError(
                "data must be a MuData, an AnnData of one modality, or a dictionary from modality to AnnData, e.g. "
                f'{{"rna": adata}}; found a {type(data).__name__}'
            )
        return Mosaic.from_mudata(data, schema=self.schema, new_batches=new_batches)

    @checked
    def adapt(self, data: Any, n_epochs: Count = 50, **training: Any) -> Self:
        """A copy of the model with additional batches; only the parameters of these batches are fitted.

        All other parameters stay as they are; therefore results for cells of known batches do not change. A model
        without parameters of batches is not fitted. The new cells need not have all modalities.

        Parameters
        ----------
        data
            A MuData, or a dictionary of AnnData (cells matched by name); they become the data of the new model.
        n_epochs
            Number of passes over the new cells.
        **training
            Further arguments of `train`; the learning rate is 0.01 by default.

        Raises
        ------
        ValueError
            If no batch is new, or labels differ from those of the model.

        References
        ----------
        Lotfollahi et al., Mapping single-cell data to reference atlases by transfer learning, Nature Biotechnology
        2022.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mdata, _ = simulate(90, {"rna": 50, "adt": 5}, n_batches=3)
        >>> new = (mdata.obs["batch"] == "batch2").to_numpy()
        >>> model = MultiVI(Mosaic.from_mudata(mdata[~new].copy(), batch_key="batch"), n_latent=3)
        >>> adapted = model.adapt(mdata[new].copy(), n_epochs=1, progress_bar=False)
        >>> adapted.schema["rna"].categories["batch"]
        ('batch0', 'batch1', 'batch2')
        """
        mosaic = self._registered(data, "add")
        if mosaic.schema == self.schema:
            raise ValueError("the data have no batch that is new to the model; use register(data) instead")
        adapted = type(self)(mosaic.schema, **deepcopy(self.options))
        adapted.model.to(self._device).eval()
        adapted.guide.to(self._device).eval()
        with torch.no_grad():
            of_model, of_guide = (
                carry_over(getattr(self, part), getattr(adapted, part), self.schema, mosaic.schema)
                for part in ("model", "guide")
            )
        adapted.mosaic, adapted.history = mosaic, self.history.copy()
        fresh = of_model.keys() & dict(adapted.model.named_parameters()).keys()
        fresh |= of_guide.keys() & dict(adapted.guide.named_parameters()).keys()
        if not fresh:
            return adapted
        with only(adapted.model, of_model), only(adapted.guide, of_guide):
            few = {"learning_rate": 1e-2, "weight_decay": 0.0, "likelihood_rate": 1.0, "kl_warmup_epochs": 0}
            adapted.train(n_epochs, **few | {"sleep_steps": 0} | training)
        return adapted


def _numbers(history: pd.DataFrame) -> dict[str, list[Any]]:
    """Columns and rows of numbers with all their digits; null for what is missing."""
    rows = history.astype(object).where(np.isfinite(history.astype(float)), None).to_numpy().tolist()
    return {"columns": list(history.columns), "data": rows}


#: How the cells are saved that were in a part of the split, or in none.
_LETTERS = {"train": "t", "validation": "v", "test": "e"}


def _parts(split: Split, mosaic: Mosaic) -> dict[str, str]:
    """The part of each cell as a letter, in the order of the cells' names, and a digest of these names."""
    names = mosaic.obs_names.to_numpy().astype(str)
    letters = np.full(len(names), "-")
    for part, letter in _LETTERS.items():
        letters[getattr(split, part)] = letter
    order = np.argsort(names, kind="stable")
    return {"cells": digest(names[order].tolist()), "parts": "".join(letters[order])}


def _split(saved: Mapping[str, str] | None, mosaic: Mosaic) -> Split | None:
    """The inverse of `_parts`; None if these are other cells."""
    names = mosaic.obs_names.to_numpy().astype(str)
    order = np.argsort(names, kind="stable")
    if saved is None or saved["cells"] != digest(names[order].tolist()):
        return None
    letters = np.array(list(saved["parts"]))
    return Split(**{part: np.sort(order[letters == letter]) for part, letter in _LETTERS.items()})


def _is_own(spec: ModalitySpec) -> bool:
    return not isinstance(spec.likelihood, str)


#: What a description must hold.
_KINDS = {"class": str, "options": dict, "objects": list, "schema": dict, "history": dict}


@contextmanager
def _no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop building a program once it is larger than its weights, before it takes time and memory."""
    longest = max((n for value in weights.values() for n in value.shape), default=0)
    room = 4 * sum(100 + value.numel() for value in weights.values())  # some parts are built twice

    def count(module: nn.Module, name: str, parameter: Tensor) -> None:
        nonlocal room
        room -= 100 + parameter.numel()
        if room < 0 or max(parameter.shape, default=0) > longest:
            raise ValueError(f"the model described is larger than the {len(weights)} weights")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
