"""What all models share: a Pyro program with its data, built and trained."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from torch.utils.data import DataLoader

from pyromosaic.data import Minibatch, Mosaic, Schema, Split, loader, measured, split, to_predict
from pyromosaic.fusion import Fusion
from pyromosaic.laplace import learn_weights
from pyromosaic.measurement import part_of
from pyromosaic.program import Program, check, check_names
from pyromosaic.tasks import inference_mode
from pyromosaic.tasks.question import columns_of, portions
from pyromosaic.train import Optimisation, Schedule, fit

#: Options that have another name than in earlier versions.
RENAMED: Mapping[str, str] = {"n_layers": "n_encoder_layers", "lam_private": "private_kl"}

#: Options that count dimensions, units or layers.
WIDTHS = ("n_latent", "n_salient", "n_hidden", "n_encoder_layers", "n_decoder_layers")


class Preset(NamedTuple):
    """Named choices: options of a model's constructor, and of its `train`."""

    options: Mapping[str, Any]
    training: Mapping[str, Any]


class TrainedModel:
    """A Pyro program over a mosaic that can be trained; see `pyromosaic.models.MosaicModel`."""

    model: Program
    guide: Program
    options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the options of the outermost constructor, a subclass's for example, to rebuild the model from."""
        model = super().__new__(cls)
        model.options = _options(cls, args, kwargs)
        for data in args[:1]:
            if not isinstance(data, Mosaic | Schema):
                raise ValueError(
                    f"{cls.__name__} takes a Mosaic, from Mosaic.from_mudata or Mosaic.from_anndata; found a "
                    f"{type(data).__name__}"
                )
        for name, value in model.options.items():
            if name in WIDTHS and not isinstance(value, Mapping | None):
                _check_whole(name, value)
        dropout = model.options.get("dropout", 0)
        if not (_is_number(dropout) and 0 <= dropout < 1):
            raise ValueError(f"dropout is a number from 0 to below 1; found {dropout!r}")
        return model

    @contextmanager
    def _construction(self, data: Mosaic | Schema, seed: int) -> Iterator[Schema]:
        """Seeded and with local parameters; afterwards start values are taken from the data, if there are any."""
        self.mosaic = self.arranged(data) if isinstance(data, Mosaic) else None
        self.schema = data.schema if isinstance(data, Mosaic) else data
        check_names(self.schema)
        for name, modality in (self.mosaic.modalities if self.mosaic is not None else {}).items():
            if modality.present.sum() == 1:
                raise ValueError(f"modality {name!r} has a single cell, which nothing can be learnt from; leave it out")
        self.history = pd.DataFrame()
        self.split: Split | None = None
        with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
            torch.manual_seed(seed)
            yield self.schema
            self.guide.match(self.model)
        if self.mosaic is not None:
            with torch.no_grad():
                self.start(self.mosaic)
        self.model.eval()
        self.guide.eval()

    def _keep(self, **options: Any) -> None:
        """Save these values in place of what options were given as."""
        self.options |= {name: value for name, value in options.items() if name in self.options}

    def arranged(self, mosaic: Mosaic) -> Mosaic:
        """The cells as the model takes them."""
        return mosaic

    def check_data(self, mosaic: Mosaic) -> None:
        """Refuse data that the model cannot learn from."""

    def start(self, mosaic: Mosaic) -> None:
        """Set input scaling, feature-level parameters and the decoders' biases from the data."""
        self.check_data(mosaic)
        if self._fusion is not None:
            self._fusion.start(mosaic)
        for name, modality in mosaic.modalities.items():
            part, of_guide = part_of(self.model, name), part_of(self.guide, name)
            if part is not None and modality.present.any():
                view = measured(mosaic, modality.sample()).observed[name]
                biases = part.start(view)
                if of_guide is not None:
                    of_guide.start(view, biases)

    def loader(
        self, mosaic: Mosaic, cells: np.ndarray, batch_size: int, seed: int | None = None, n_workers: int = 0
    ) -> DataLoader[Minibatch]:
        """Minibatches to train on and to validate with."""
        return loader(mosaic, cells, batch_size, seed, n_workers)

    def finish(self, mosaic: Mosaic) -> None:
        """Learn how sure decoders are, and how a cell's size depends on z, for cells in which it was not measured."""
        for name, modality in mosaic.modalities.items():
            part = part_of(self.model, name)
            if part is not None and modality.present.any():
                cells, latent = self.explaining_size(mosaic, modality.sample())
                view = measured(mosaic, cells).observed[name].to(self._device)
                part.size.fit(torch.from_numpy(latent).to(self._device), view)
                parts = np.array_split(cells, -(-len(cells) // 256))
                minibatches = (measured(mosaic, part).to(self._device) for part in parts)
                with inference_mode(self.model, self.guide, seed=0):
                    learn_weights(self.model, self.guide, name, minibatches, int(modality.present.sum()))

    def explaining_size(self, mosaic: Mosaic, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of these cells those to learn sizes from, and draws of what explains them (as predicting does)."""
        return cells, self._latent(mosaic, cells, "z", sample=True)

    def _latent(
        self,
        mosaic: Mosaic,
        index: np.ndarray,
        site: str,
        modality: str | None = None,
        sample: bool = False,
        seed: int = 0,
    ) -> np.ndarray:
        """Posterior mean of a latent variable of cells, or a draw, shape (cells, width)."""
        values = []
        with inference_mode(self.model, self.guide, seed=seed):
            for part in portions(index):
                encode = None if modality is None else (modality,)
                minibatch = to_predict(mosaic, part, (), encode).to(self._device)
                found = poutine.trace(self.guide).get_trace(minibatch).nodes[site]
                values.append((found["value"] if sample else found["fn"].mean)[..., 0, :].cpu().numpy())
        return np.concatenate(values)

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
            Shares of the cells kept out of training, drawn within each pattern of modalities. Validation cells are
            looked at some 20 times in the run and at its end, in every epoch if training may stop early.
        early_stopping
            Stop after this many epochs without a better validation ELBO (or, with ``monitor="reconstruction"``, a
            better likelihood), and return to the best.
        seed
            Seed of split, order of minibatches and noise.
        n_workers
            Processes that read minibatches ahead; 0 reads in the process itself.
        **trainer
            ``monitor``, ``progress_bar``, ``logger``, ``callbacks``, ``checkpoint_dir``, ``resume_from``, and what
            `lightning.pytorch.Trainer` takes (``accelerator``, ``devices``, ``strategy``, …).

        Raises
        ------
        ValueError
            If the model has no data, an argument is out of range, or model and guide do not fit each other or the data
            (`pyromosaic.program.SiteError`).
        NonFiniteLossError
            If the loss is not finite; the parameters are then those at the start of the epoch.

        Examples
        --------
        >>> from pyromosaic import Mosaic, MultiVI, simulate
        >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0], batch_key="batch")
        >>> model = MultiVI(mosaic, n_latent=3)
        >>> model.train(n_epochs=2, validation=0.2, progress_bar=False)
        >>> len(model.history), "validation_elbo" in model.history
        (2, True)
        """
        mosaic = self._data(None)
        _check_whole("n_epochs", n_epochs)
        _check_whole("batch_size", batch_size)
        if early_stopping is not None:
            _check_whole("early_stopping", early_stopping)
        if "max_epochs" in trainer:
            raise ValueError(f"the number of epochs is n_epochs here; found max_epochs={trainer['max_epochs']!r}")
        self.split = split(mosaic, validation, test, seed)
        train = self.loader(mosaic, self.split.train, batch_size, seed, n_workers)
        # In no order, so that each minibatch holds all populations.
        shuffled = np.random.default_rng(seed).permutation(self.split.validation)
        held_out = self.loader(mosaic, shuffled, batch_size) if len(shuffled) else None
        optimisation = Optimisation(learning_rate, weight_decay, kl_warmup_epochs, schedule, gradient_clip)
        some = measured(mosaic, self.split.train[:: 1 + len(self.split.train) // 128]).to(self._device)
        unchecked = [name for name, m in self.schema.modalities.items() if m.spec.allow_non_integer]
        check(self.model, self.guide, some, unchecked)
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

    def __repr__(self) -> str:
        trained = f"trained for {len(self.history)} epochs" if len(self.history) else "not trained"
        return f"{type(self).__name__}, {trained}, on {self.mosaic if self.mosaic is not None else 'no data'}"

    def _data(self, data: Mosaic | None) -> Mosaic:
        mosaic = self.mosaic if data is None else data
        if mosaic is None:
            raise ValueError("the model has no data: give some, data=model.register(mdata) say")
        if not isinstance(mosaic, Mosaic):
            raise ValueError(
                f"data are a Mosaic, registered for this model: model.register(mdata); found a {type(mosaic).__name__}"
            )
        if mosaic.schema != self.schema:
            raise ValueError("the data were not registered for this model: model.register(mdata) does that")
        mosaic = self.arranged(mosaic)
        if self._fusion is not None:
            self._fusion.meet(mosaic)
        return mosaic

    def _features(self, modality: str, features: Sequence[str] | None) -> np.ndarray:
        return columns_of(modality, self.schema[modality], features)

    def _likelihood(self, modality: str) -> Any:
        self.schema[modality]
        part = part_of(self.model, modality)
        if part is None:
            raise ValueError(
                f"the program has no likelihood of modality {modality!r} to ask: none of its `modalities` is a "
                "pyromosaic.measurement.Measurement of that name"
            )
        return part.likelihood

    @property
    def _fusion(self) -> Fusion | None:
        return getattr(self.guide, "fusion", None)

    @property
    def _device(self) -> torch.device:
        return next(self.guide.parameters()).device


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _check_whole(name: str, value: Any) -> None:
    if not (_is_number(value) and isinstance(value, int | np.integer) and value >= 1):
        raise ValueError(f"{name} is a whole number from 1; found {value!r}")


def _options(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, given or by default, of the constructor of a class."""
    constructor = signature(cls.__init__)  # type: ignore[misc]
    for old, new in RENAMED.items():
        if old in kwargs and old not in constructor.parameters and new in constructor.parameters:
            raise TypeError(f"{cls.__name__} calls the option {old!r} {new!r} now")
    bound = constructor.bind_partial(None, *args, **kwargs)
    bound.apply_defaults()
    options: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[2:]:  # behind the model itself and its data
        kind = constructor.parameters[name].kind
        options |= value if kind is Parameter.VAR_KEYWORD else {name: value}
    return options
