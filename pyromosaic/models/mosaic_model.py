"""What all models share: a Pyro program with its data, trained, asked, saved and loaded."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyromosaic.data import Minibatch, Mosaic, Schema, Split, loader, split, to_predict
from pyromosaic.program import Program
from pyromosaic.tasks import Estimate, draws, estimate, inference_mode
from pyromosaic.train import Optimisation, Schedule, fit

FORMAT = 1  # version of the saved form
CHUNK_ENTRIES = 20_000_000  # draws × cells × features in memory at once

Cells = Sequence[str] | np.ndarray | pd.Index | None


class MosaicModel:
    """A Pyro program (`model`, `guide`) over a mosaic.

    A subclass builds `model` and `guide` in its constructor inside ``with self._construction(data, options, seed)``
    and defines `start`.

    Attributes
    ----------
    model, guide
        The Pyro program; both are called with a `Minibatch`.
    schema
        What is remembered of the data.
    mosaic
        The training data, if there are any.
    history
        A row an epoch, once trained; see `pyromosaic.train.Plan`.
    split
        Training, validation and test cells, once trained.
    """

    model: Program
    guide: Program

    @contextmanager
    def _construction(self, data: Mosaic | Schema, options: Mapping[str, Any], seed: int) -> Iterator[Schema]:
        """Seeded and with local parameters; afterwards start values are taken from the data, if there are any."""
        self.mosaic = data if isinstance(data, Mosaic) else None
        self.schema = data.schema if isinstance(data, Mosaic) else data
        self.options = {k: v for k, v in options.items() if k not in ("self", "data", "__class__")}
        self.history = pd.DataFrame()
        self.split: Split | None = None
        with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
            torch.manual_seed(seed)
            yield self.schema
        if self.mosaic is not None:
            with torch.no_grad():
                self.start(self.mosaic)
        self.model.eval()
        self.guide.eval()

    def start(self, mosaic: Mosaic) -> None:
        """Set input scaling and start values from data."""

    def finish(self, mosaic: Mosaic) -> None:
        """Whatever is to be learnt once training is over."""

    def __repr__(self) -> str:
        trained = f"trained for {len(self.history)} epochs" if len(self.history) else "not trained"
        return f"{type(self).__name__}, {trained}, on {self.mosaic if self.mosaic is not None else 'no data'}"

    # Training

    def train(
        self,
        n_epochs: int = 150,
        *,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-3,
        kl_warmup_epochs: int = 50,
        schedule: Schedule = "cosine",
        gradient_clip: float = 10.0,
        validation: float = 0.1,
        test: float = 0.0,
        early_stopping: int | None = None,
        seed: int = 0,
        n_workers: int = 0,
        **trainer: Any,
    ) -> None:
        """Fit the parameters by stochastic variational inference.

        Parameters
        ----------
        n_epochs
            Passes over the training cells.
        batch_size
            Largest number of cells in a minibatch.
        learning_rate, weight_decay, kl_warmup_epochs, schedule, gradient_clip
            See `pyromosaic.train.Optimisation`.
        validation, test
            Shares of the cells kept out of training, drawn within each pattern of modalities.
        early_stopping
            Stop after this many epochs without a better validation ELBO, and return to the best.
        seed
            Seed of split, order of minibatches and noise.
        n_workers
            Processes that read minibatches ahead; 0 reads in the process itself.
        **trainer
            ``progress_bar``, ``logger``, ``callbacks``, ``checkpoint_dir``, ``resume_from``, and anything that
            `lightning.pytorch.Trainer` takes (``accelerator``, ``devices``, ``strategy``, …).

        Raises
        ------
        ValueError
            If the model has no data, or an argument is out of range.
        NonFiniteLossError
            If the loss is not finite; the parameters are then those at the start of the epoch.
        """
        mosaic = self._data(None)
        if n_epochs < 1 or batch_size < 1:
            raise ValueError(f"n_epochs and batch_size are at least 1; found {n_epochs} and {batch_size}")
        self.split = split(mosaic, validation, test, seed)
        train = loader(mosaic, self.split.train, batch_size, seed, n_workers)
        held_out = loader(mosaic, self.split.validation, batch_size) if len(self.split.validation) else None
        optimisation = Optimisation(learning_rate, weight_decay, kl_warmup_epochs, schedule, gradient_clip)
        self.model.train()
        self.guide.train()
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            self.history = fit(
                self.model,
                self.guide,
                train,
                held_out,
                n_epochs,
                optimisation,
                early_stopping=early_stopping,
                **trainer,
            )
        self.model.eval()
        self.guide.eval()
        with torch.no_grad():
            self.finish(mosaic)

    # Asking

    def get_latent_representation(
        self,
        cells: Cells = None,
        *,
        modality: str | None = None,
        sample: bool = False,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Latent variable of each cell.

        Parameters
        ----------
        cells
            Names, numbers or a mask; None for all.
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
            Cells × latent dimensions ``z_0``, ``z_1``, …
        """
        mosaic = self._data(data)
        index = mosaic.find(cells)
        if modality is not None:
            self.schema[modality]
            index = index[mosaic.modalities[modality].present[index]]
            if len(index) == 0:
                raise ValueError(f"none of the cells asked for has modality {modality!r}")
        values = []
        with inference_mode(self.model, self.guide, seed=seed):
            for minibatch in self._minibatches(mosaic, index, (), None if modality is None else (modality,)):
                site = poutine.trace(self.guide).get_trace(minibatch).nodes["z"]
                values.append((site["value"] if sample else site["fn"].mean)[..., 0, :].cpu().numpy())
        z = np.concatenate(values)
        return pd.DataFrame(z, mosaic.obs_names[index], [f"z_{i}" for i in range(z.shape[1])])

    def get_normalized_expression(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        batch: str | None = None,
        library: float = 1.0,
        n_samples: int | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Denoised expression, measured or not: the share of each gene, or a protein's expected foreground.

        Parameters
        ----------
        modality
            The modality; by default the first of the model that is not accessibility.
        cells, features
            Names (cells also by number or mask); None for all.
        batch
            Predict as if cells had been measured in this batch; by default each cell's own.
        library
            Size of the cells to predict at; 1 gives shares of RNA.
        n_samples
            Average over this many posterior draws; None decodes the posterior mean.
        data
            Other cells than the training data.
        seed
            Seed of the draws.

        Returns
        -------
        pandas.DataFrame
            Cells × features.
        """
        if modality is None:
            candidates = [n for n, m in self.schema.modalities.items() if m.spec.likelihood != "bernoulli"]
            if not candidates:
                raise ValueError("the model has no expression modality; accessibility is get_accessibility_estimates")
            modality = candidates[0]
        value = self._likelihood(modality).normalized
        size = library if self.schema[modality].spec.likelihood in ("nb", "zinb") else self.schema[modality].library
        return self._estimate(modality, cells, features, batch, size, n_samples, (), data, None, seed, value).mean

    def get_accessibility_estimates(
        self,
        modality: str | None = None,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        batch: str | None = None,
        factors: bool = False,
        n_samples: int | None = None,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Denoised accessibility, measured or not.

        Parameters
        ----------
        modality
            The modality; by default the first one with a Bernoulli likelihood.
        cells, features, batch, n_samples, data, seed
            As in `get_normalized_expression`.
        factors
            Multiply by cell and region factor, which gives the probability of observing a fragment.

        Returns
        -------
        pandas.DataFrame
            Cells × regions, between 0 and 1.
        """
        if modality is None:
            candidates = [n for n, m in self.schema.modalities.items() if m.spec.likelihood == "bernoulli"]
            if not candidates:
                raise ValueError("the model has no accessibility modality (likelihood 'bernoulli')")
            modality = candidates[0]
        value = (lambda d: d.mean) if factors else self._likelihood(modality).normalized
        return self._estimate(modality, cells, features, batch, None, n_samples, (), data, None, seed, value).mean

    def get_imputed_values(
        self,
        modality: str,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        encode: Sequence[str] | None = None,
        batch: str | None = None,
        library: float | None = None,
        n_samples: int | None = 25,
        quantiles: Sequence[float] = (0.05, 0.95),
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Expected measurements of a modality with their uncertainty, from whatever the cells were measured by.

        Parameters
        ----------
        modality
            The modality to impute.
        cells, features, data, seed
            As in `get_normalized_expression`.
        encode
            Modalities to infer from; by default all that a cell has.
        batch
            Predict as if measured in this batch; by default the cell's own, or an average over batches where the
            modality was never measured in the cell's batch.
        library
            Size of the cells in counts; by default the cell's own, or where the modality is missing what the model
            expects of a cell with such a latent variable.
        n_samples
            Number of independent posterior draws; None evaluates at the mean of the posterior, without uncertainty.
        quantiles
            Levels at which to report quantiles over the draws.

        Returns
        -------
        Estimate
            Mean, standard deviation and quantiles, each cells × features.
        """
        return self._estimate(
            modality, cells, features, batch, library, n_samples, quantiles, data, encode, seed, lambda d: d.mean
        )

    def posterior_predictive_sample(
        self,
        modality: str,
        cells: Cells = None,
        *,
        features: Sequence[str] | None = None,
        encode: Sequence[str] | None = None,
        batch: str | None = None,
        library: float | None = None,
        n_samples: int = 1,
        data: Mosaic | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Measurements drawn from the posterior predictive distribution, measured or not.

        Parameters
        ----------
        modality, cells, features, encode, batch, library, data, seed
            As in `get_imputed_values`.
        n_samples
            Number of independent draws.

        Returns
        -------
        numpy.ndarray
            Draws × cells × features, in the order of `cells` and `features`.
        """
        chunks = self._draws(
            modality, cells, features, batch, library, n_samples, data, encode, seed, lambda d: d.sample()
        )
        return np.concatenate([chunk.cpu().numpy() for chunk in chunks], axis=1)

    def _estimate(
        self,
        modality: str,
        cells: Cells,
        features: Sequence[str] | None,
        batch: str | None,
        library: float | None,
        n_samples: int | None,
        quantiles: Sequence[float],
        data: Mosaic | None,
        encode: Sequence[str] | None,
        seed: int,
        value: Callable[[TorchDistribution], Tensor],
    ) -> Estimate:
        mosaic = self._data(data)
        names = mosaic.obs_names[mosaic.find(cells)]
        columns = pd.Index(self.schema[modality].features)[self._features(modality, features)]
        chunks = self._draws(modality, cells, features, batch, library, n_samples, data, encode, seed, value)
        return estimate(chunks, names, columns, quantiles)

    def _draws(
        self,
        modality: str,
        cells: Cells,
        features: Sequence[str] | None,
        batch: str | None,
        library: float | None,
        n_samples: int | None,
        data: Mosaic | None,
        encode: Sequence[str] | None,
        seed: int,
        value: Callable[[TorchDistribution], Tensor],
    ) -> Iterator[Tensor]:
        """Draws of a quantity, chunk of cells by chunk of cells."""
        mosaic = self._data(data)
        index, columns = mosaic.find(cells), self._features(modality, features)
        if n_samples is not None and n_samples < 1:
            raise ValueError(f"n_samples is at least 1; found {n_samples}")
        if encode is not None:
            for name in encode:
                self.schema[name]
            present = np.any([mosaic.modalities[name].present[index] for name in encode], axis=0)
            if not present.all():
                cell = mosaic.obs_names[index[~present][0]]
                raise ValueError(f"cell {cell!r} has none of the modalities to infer from: {', '.join(encode)}")
        wanted = torch.from_numpy(columns).to(self._device)
        with inference_mode(self.model, self.guide, seed=seed):
            size = max(1, CHUNK_ENTRIES // (self.schema[modality].n_features * (n_samples or 1)))
            for minibatch in self._minibatches(mosaic, index, (modality,), encode, batch, library, min(size, 1024)):
                yield draws(self.model, self.guide, minibatch, modality, value, n_samples, wanted)

    def _minibatches(
        self,
        mosaic: Mosaic,
        index: np.ndarray,
        decode: tuple[str, ...],
        encode: Sequence[str] | None = None,
        batch: str | None = None,
        library: float | None = None,
        size: int = 1024,
    ) -> Iterator[Minibatch]:
        for start in range(0, len(index), size):
            part = index[start : start + size]
            yield to_predict(mosaic, part, decode, encode, batch, library).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.guide.parameters()).device

    def _likelihood(self, modality: str) -> Any:
        self.schema[modality]
        return self.model.likelihoods[modality]

    def _features(self, modality: str, features: Sequence[str] | None) -> np.ndarray:
        known = pd.Index(self.schema[modality].features)
        if features is None:
            return np.arange(len(known))
        columns = known.get_indexer(pd.Index(features))
        if (columns < 0).any():
            raise ValueError(f"modality {modality!r} has no feature {str(np.asarray(features)[columns < 0][0])!r}")
        return columns.astype(np.int64)

    def _data(self, data: Mosaic | None) -> Mosaic:
        mosaic = self.mosaic if data is None else data
        if mosaic is None:
            raise ValueError("the model has no data: give some, data=model.register(mdata) say")
        if mosaic.schema != self.schema:
            raise ValueError("the data were not registered for this model: model.register(mdata) does that")
        return mosaic

    # Keeping

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write the model: weights in safetensors, everything else in JSON.

        Parameters
        ----------
        directory
            Where to; made if it does not exist.
        overwrite
            Replace a model that is there.

        Raises
        ------
        FileExistsError
            If a model is there and `overwrite` is False.
        """
        directory = Path(directory)
        if (directory / "model.json").exists() and not overwrite:
            raise FileExistsError(f"{directory} holds a model already; overwrite=True replaces it")
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{k}.{n}": t.contiguous() for k in ("model", "guide") for n, t in getattr(self, k).state_dict().items()
        }
        save_file(weights, directory / "weights.safetensors")
        options, objects = {}, []
        for key, value in self.options.items():
            try:
                json.dumps(value)
            except TypeError:
                objects.append(key)  # code is not saved; it is given again at load
            else:
                options[key] = value
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
        """Read a saved model; no code in the files is run.

        Parameters
        ----------
        directory
            What `save` wrote.
        data
            A MuData or a dictionary of AnnData, registered and checked against the model's schema (features are put in
            its order), or a `Mosaic` that was registered with it; None for no data.
        **objects
            The objects, such as priors, that the model was constructed with.

        Raises
        ------
        ValueError
            If the files are missing, damaged, or not those of such a model, or the data do not fit.
        """
        directory = Path(directory)
        try:
            content = json.loads((directory / "model.json").read_text())
            version, name = content["format"], content["class"]
            weights = load_file(directory / "weights.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{directory} does not hold a whole saved model: {error}") from error
        if version != FORMAT:
            raise ValueError(
                f"{directory} was saved in format {version}; this version of pyromosaic reads format {FORMAT}"
            )
        if name != cls.__name__:
            raise ValueError(f"{directory} holds a model of class {name}, not {cls.__name__}; use {name}.load")
        missing = [key for key in content["objects"] if key not in objects]
        if missing:
            raise ValueError(
                f"the saved model was constructed with objects of the user's: give {', '.join(missing)} again"
            )
        try:
            model = cls(Schema.from_json(content["schema"]), **content["options"], **objects)  # type: ignore[call-arg]
            for part in ("model", "guide"):
                state = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
                getattr(model, part).load_state_dict(state)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the description and the weights in {directory} do not fit together: {error}") from error
        history = content["history"]
        model.history = pd.DataFrame(history["data"], columns=history["columns"])
        if "epoch" in model.history:
            model.history = model.history.set_index("epoch")
        if data is not None:
            model.mosaic = model.register(data)
        return model

    def register(self, data: Any) -> Mosaic:
        """Register data for this model: a MuData, a dictionary of AnnData (cells matched by name), or a Mosaic.

        Raises
        ------
        ValueError
            If features, batches or labels are not those of the model.
        """
        if isinstance(data, Mosaic):
            return self._data(data)
        if isinstance(data, Mapping):
            return Mosaic.from_anndata(data, match_cells=True, schema=self.schema)
        return Mosaic.from_mudata(data, schema=self.schema)
