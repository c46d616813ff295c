"""Save and load a model without any code, and give it new cells."""

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pyromosaic import described, penalties, priors
from pyromosaic.data import ModalitySpec, Mosaic, Schema
from pyromosaic.likelihoods import Likelihood
from pyromosaic.models.base import TrainedModel, accepted_options
from pyromosaic.models.formats import FORMAT, READ, upgraded, upgraded_schema
from pyromosaic.models.query import carry_over, only

#: The parts that are saved with a model, by name.
PARTS = {
    name: part
    for room in (penalties, priors)
    for name, part in vars(room).items()
    if isinstance(part, type) and issubclass(part, described.Described) and part.__module__.startswith(room.__name__)
}


class Keeping(TrainedModel):
    """Methods that save, load and adapt a model; see `pyromosaic.models.MosaicModel`."""

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Save the model: weights as safetensors, everything else as JSON.

        Parameters
        ----------
        directory
            Directory to write to; it is created if it does not exist.
        overwrite
            Replace an existing model.

        Raises
        ------
        FileExistsError
            If the directory holds a model and `overwrite` is False.

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
        directory = Path(directory)
        if (directory / "model.json").exists() and not overwrite:
            raise FileExistsError(f"{directory} already holds a model; pass overwrite=True to replace it")
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{k}.{n}": t.contiguous() for k in ("model", "guide") for n, t in getattr(self, k).state_dict().items()
        }
        save_file(weights, directory / "weights.safetensors")
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
            "history": json.loads(self.history.reset_index().to_json(orient="split")),
        }
        (directory / "model.json").write_text(json.dumps(content))

    @classmethod
    def load(cls, directory: str | Path, data: Any = None, **objects: Any) -> Self:
        """Load a saved model; no code from the files is run.

        Parameters
        ----------
        directory
            Directory that `save` wrote.
        data
            A MuData or a dictionary of AnnData, which is registered and checked against the schema of the model
            (features are put in its order); or a `Mosaic` that was registered with that schema; None for no data.
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
        directory = Path(directory)
        try:
            content = json.loads((directory / "model.json").read_text())
            version, name = content["format"], content["class"]
            weights = load_file(directory / "weights.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{directory} does not hold a complete saved model: {error}") from error
        if version not in READ:
            raise ValueError(
                f"{directory} was saved in format {version}; this version of pyromosaic reads formats "
                f"{', '.join(map(str, READ))}"
            )
        if name != cls.__name__:
            raise ValueError(f"{directory} holds a model of class {name}, not {cls.__name__}; use {name}.load")
        missing = [key for key in content["objects"] if key not in objects]
        if missing:
            raise ValueError(
                "the saved model was constructed with your own objects; pass "
                f"{', '.join(f'{name}=<object>' for name in missing)} to load()"
            )
        try:
            likelihoods = {k: v for k, v in objects.items() if isinstance(v, type) and issubclass(v, Likelihood)}
            schema = Schema.from_json(upgraded_schema(content), likelihoods)
            others = {k: v for k, v in objects.items() if k not in likelihoods}
            options, weights = upgraded(content, weights, schema, accepted_options(cls))
            model = cls(schema, **{**described.from_json(options, PARTS), **others})
            for part in ("model", "guide"):
                state = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
                getattr(model, part).eval().load_state_dict(state)  # also what a subclass added to them
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the description and the weights in {directory} do not fit together: {error}") from error
        history = content["history"]
        model.history = pd.DataFrame(history["data"], columns=history["columns"])
        if "epoch" in model.history:
            model.history = model.history.set_index("epoch")
        if data is not None:
            model.mosaic = model.register(data)
        return model

    def register(self, data: Any, new_batches: str = "refuse") -> Mosaic:
        """Register data for this model: a MuData, a dictionary of AnnData (cells matched by name), or a Mosaic.

        Parameters
        ----------
        data
            The data.
        new_batches
            ``"average"``: cells of batches that the model has not seen are treated as an average of the known batches.
            See also `adapt`.

        Raises
        ------
        ValueError
            If features, batches or labels differ from those of the model.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mdata, _ = simulate(60, {"rna": 50, "adt": 5}, patterns=["rna+adt"])
        >>> model = MultiVI(Mosaic.from_mudata(mdata[:40].copy()), n_latent=3)
        >>> model.get_latent_representation(data=model.register(mdata[40:].copy())).shape
        (20, 3)
        """
        if isinstance(data, Mosaic):
            return self._data(data)
        if isinstance(data, Mapping):
            return Mosaic.from_anndata(data, match_cells=True, schema=self.schema, new_batches=new_batches)
        return Mosaic.from_mudata(data, schema=self.schema, new_batches=new_batches)

    def adapt(self, data: Any, n_epochs: int = 50, **training: Any) -> Self:
        """A copy of the model that knows the batches of new cells too; only what belongs to these is fitted.

        All other parameters stay as they are, so nothing that the model says of cells of known batches changes. A model
        without parameters of batches is not fitted at all. The new cells need not have all modalities.

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
            If no batch is new, or features or labels differ from those of the model.

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
        if isinstance(data, Mapping):
            mosaic = Mosaic.from_anndata(data, match_cells=True, schema=self.schema, new_batches="add")
        else:
            mosaic = Mosaic.from_mudata(data, schema=self.schema, new_batches="add")
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
            adapted.train(n_epochs, **{"learning_rate": 1e-2, "weight_decay": 0.0, "kl_warmup_epochs": 0} | training)
        return adapted


def _is_own(spec: ModalitySpec) -> bool:
    return not isinstance(spec.likelihood, str)
