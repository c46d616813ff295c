"""Base of all models: a Pyro program with its data, built and trained."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from inspect import Parameter, signature
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import nn
from torch.utils.data import DataLoader

from pyromosaic.accepted import Count, Positive, Rate, Seed, Weight, Whole, checked
from pyromosaic.data import Minibatch, Mosaic, Schema, Split, loader, measured, split, to_predict
from pyromosaic.foreign import check_words
from pyromosaic.fusion import Fusion
from pyromosaic.laplace import learn_weights
from pyromosaic.measurement import part_of
from pyromosaic.program import Program, check, check_names
from pyromosaic.progress import shown
from pyromosaic.shown import call
from pyromosaic.tasks import inference_mode
from pyromosaic.tasks.question import Cells, columns_of, portions
from pyromosaic.threads import one_thread
from pyromosaic.train import (
    SMALLEST,
    Optimisation,
    Schedule,
    check_trainer,
    epochs_for,
    fit,
    has_bar,
    said,
    settings_for,
    sleep,
)

#: Options that have another name than in earlier versions, or are arguments of a part now.
RENAMED: Mapping[str, str] = {
    "n_layers": "n_encoder_layers",
    "lam_private": "private_kl",
    "lam_data": "likelihood_weight",
    "lam_kl": "shared_kl",
    "lam_graph": "graph_weight",
    "lam_sinkhorn": "alignment",
    "align_draws": "alignment=Sinkhorn(sampled=...)",
    "blur": "alignment=Sinkhorn(blur=...)",
    "reach": "alignment=Sinkhorn(reach=...)",
    "reference": "alignment=Sinkhorn(reference=...)",
    "lam_anchors": "anchors",
    "n_neighbors": "anchors=Anchors(n_neighbors=...)",
    "lam_pull": "pull",
    "lam_class": "classifier",
    "lam_adversary": "adversary",
    "n_adversary_steps": "adversary=Discriminator(n_steps=...)",
    "adversary_target": "adversary=Adversary(target=...)",
    "lam_cycle": "cycle",
    "lam_geometry": "geometry",
    "n_components": "prior=GaussianMixture(n_components=...)",
}


class Preset(NamedTuple):
    """A named set of options: for the constructor of a model, and for its `train`."""

    options: Mapping[str, Any]
    training: Mapping[str, Any]


class TrainedModel:
    """A Pyro program over a mosaic that can be trained; see `pyromosaic.models.MosaicModel`."""

    model: Program
    guide: Program
    options: dict[str, Any]
    #: The sleep phase after training: its number of steps by default, and whether it may change means of posteriors.
    sleep_steps: ClassVar[int] = 100
    sleep_means: ClassVar[bool] = False
    #: The most cells that a minibatch has by default.
    largest_minibatch: ClassVar[int] = SMALLEST
    #: Whether this process saves the model: of several that trained it, the first does.
    saves: bool = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the options of the outermost constructor (e.g. of a subclass), to rebuild the model from them."""
        model = super().__new__(cls)
        model.options = _options(cls, args, kwargs)
        for data in (*args[:1], *(value for name, value in kwargs.items() if name == "data")):
            if not isinstance(data, Mosaic | Schema):
                raise ValueError(f"data must be a Mosaic, e.g. from Mosaic.from_mudata; found a {type(data).__name__}")
        return model

    @contextmanager
    def construction(self, data: Mosaic | Schema, seed: int) -> Iterator[Schema]:
        """Where a subclass builds ``self.model`` and ``self.guide``.

        Inside, networks start from `seed`, and parameters belong to this model alone. At the end the guide gets a
        posterior of the global latent variables, if the model has any; start values are taken from the data, if there
        are any; and both programs are put in evaluation mode.

        Parameters
        ----------
        data
            What the constructor was given: a mosaic, or the `Schema` of data to come (as in `load` and `adapt`).
        seed
            Seed of the start values.

        Yields
        ------
        Schema
            The modalities. Take all shapes from it: with a `Schema` there are no data yet.

        Raises
        ------
        TypeError
            If ``self.model`` or ``self.guide`` is missing at the end, is not a `pyromosaic.program.Program`, or has
            modules in a dictionary.
        """
        self.mosaic = self.arranged(data) if isinstance(data, Mosaic) else None
        self.schema = data.schema if isinstance(data, Mosaic) else data
        check_names(self.schema)
        for name, modality in (self.mosaic.modalities if self.mosaic is not None else {}).items():
            if modality.present.sum() == 1:
                raise ValueError(f"modality {name!r} must have at least 2 cells; found 1")
        self.history = pd.DataFrame(index=pd.Index([], dtype=int, name="epoch"))
        self.split: Split | None = None
        with one_thread, torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
            torch.manual_seed(seed)
            yield self.schema
            for part in ("model", "guide"):
                found = vars(self).get(part)
                if not isinstance(found, Program):
                    raise TypeError(
                        f"{type(self).__name__} builds self.{part}, a pyromosaic.program.Program, inside "
                        f"`with self.construction(data, seed)`; found {type(found).__name__}"
                    )
                for name, value in vars(found).items():
                    if isinstance(value, dict) and any(isinstance(each, nn.Module) for each in value.values()):
                        if not name.startswith("_"):
                            raise TypeError(
                                f"self.{part}.{name} is a dictionary of modules, whose parameters are not found; make "
                                "it a pyromosaic.program.Slots"
                            )
            self.guide.match(self.model)
        if self.mosaic is not None:
            with torch.no_grad():
                self.start(self.mosaic)
        self.model.eval()
        self.guide.eval()

    def _keep(self, **options: Any) -> None:
        """Save these values instead of the given options."""
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

    def prepare(self, mosaic: Mosaic) -> None:
        """Compute what training needs of all cells, once its arguments were checked."""

    def finish(self, mosaic: Mosaic) -> None:
        """Fit the uncertainty of decoders, and how size depends on z, for cells without the modality."""
        for name, modality in mosaic.modalities.items():
            part = part_of(self.model, name)
            if part is not None and modality.present.any():
                cells = modality.sample()
                if part.size is not None:
                    cells, latent = self.explaining_size(mosaic, cells)
                    view = measured(mosaic, cells).observed[name].to(self._device)
                    part.size.fit(torch.from_numpy(latent).to(self._device), view, part.size.depths_in(mosaic, cells))
                parts = np.array_split(cells, -(-len(cells) // 256))
                minibatches = (measured(mosaic, part).to(self._device) for part in parts)
                with inference_mode(self.model, self.guide, seed=0):
                    learn_weights(self.model, self.guide, name, minibatches, int(modality.present.sum()))

    def explaining_size(self, mosaic: Mosaic, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cells from which sizes are learnt, and draws of the variables that explain them (as in prediction)."""
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
                nodes = poutine.trace(self.guide).get_trace(minibatch).nodes
                if site not in nodes:
                    raise ValueError(f"the guide has no site {site!r}; model and guide sample it for every cell")
                found = nodes[site]
                values.append((found["value"] if sample else found["fn"].mean)[..., 0, :].cpu().numpy())
        return np.concatenate(values)

    @checked
    @one_thread
    def train(
        self,
        n_epochs: Count | None = None,
        *,
        batch_size: Count | None = None,
        learning_rate: Positive | None = None,
        weight_decay: Weight = 1e-3,
        kl_warmup_epochs: Whole = 50,
        schedule: Schedule = "cosine",
        gradient_clip: Weight = 10.0,
        likelihood_rate: Positive = 1.0,
        validation: Rate = 0.1,
        test: Rate = 0.0,
        early_stopping: Count | None = None,
        sleep_steps: Whole | None = None,
        seed: Seed = 0,
        n_workers: Whole = 0,
        **trainer: Any,
    ) -> None:
        """Fit the parameters by stochastic variational inference.

        Parameters
        ----------
        n_epochs
            Number of passes over the training cells. If None, it is chosen by the number of steps and printed: 150
            where an epoch has few steps, fewer for many cells; see `pyromosaic.train.epochs_for`.
        batch_size
            Largest number of cells in a minibatch. If None, 256; in MultiVI more for more than about 10,000 cells, up
            to 1,024 from about 40,000 cells; see `pyromosaic.train.minibatch_for`.
        learning_rate
            If None, 0.003, times the square root of size / 256 for larger minibatches that were chosen by default.
        weight_decay, kl_warmup_epochs, schedule, gradient_clip, likelihood_rate
            See `pyromosaic.train.Optimisation`.
        validation, test
            Shares of the cells that are kept out of training, drawn within each pattern of modalities. Validation cells
            are evaluated about 20 times in the run and at its end, or in every epoch if training may stop early.
        early_stopping
            Stop after this many epochs without a better validation ELBO (or, with ``monitor="reconstruction"``, a
            better likelihood), and restore the parameters of the best epoch.
        sleep_steps
            Number of steps after training in which the guide is fitted to cells drawn from the model, so that
            posteriors are as wide as they should be; see `pyromosaic.train.sleep`. If None, 200 in MultiVI, where the
            means of posteriors may change too, and 100 in other models, where only widths change. 0 leaves them out;
            there are at most as many as steps of training. The last row of the history gets their loss as
            ``sleep_before`` and ``sleep_after``, means over the first and the last ten steps.
        seed
            Seed of split, order of minibatches and noise.
        n_workers
            Number of processes that read minibatches ahead; 0 reads in the main process.
        **trainer
            ``monitor``, ``progress_bar``, ``logger``, ``callbacks``, ``checkpoint_dir``, ``resume_from`` (see
            `pyromosaic.train.fit`), and what `lightning.pytorch.Trainer` takes (``accelerator``, ``max_time``, …).
            One process trains on one device unless ``devices``, ``num_nodes``, ``strategy`` or a launcher say
            otherwise; `batch_size` is that of each process.

        Raises
        ------
        ValueError
            If the model has no data, an argument is out of range, model and guide do not fit each other or the data
            (`pyromosaic.program.SiteError`), or a checkpoint is not that of this run.
        NonFiniteLossError
            If the loss is not finite.
        KeyboardInterrupt, SystemExit
            If training is interrupted, by SIGTERM with exit code 143.

        Notes
        -----
        A model whose training is left by an error or Ctrl-C is that of the last whole epoch, without the sleep phase,
        and can be used, saved or trained on; by SIGTERM, before an epoch is whole, or with several processes, it is as
        it was before.

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
        processes = check_trainer(trainer)
        parts = split(mosaic, validation, test, seed)
        own = -(-len(parts.train) // processes.n)
        size, rate = settings_for(own, self.largest_minibatch, batch_size, learning_rate)
        train = self.loader(mosaic, parts.train, size, seed, n_workers)
        # In no order, so that each minibatch holds all populations.
        shuffled = np.random.default_rng(seed).permutation(parts.validation)
        held_out = self.loader(mosaic, shuffled, size) if len(shuffled) else None
        optimisation = Optimisation(rate, weight_decay, kl_warmup_epochs, schedule, gradient_clip, likelihood_rate)
        some = measured(mosaic, parts.train[:: 1 + len(parts.train) // 128]).to(self._device)
        unchecked = [name for name, m in self.schema.modalities.items() if m.spec.allow_non_integer]
        check(self.model, self.guide, some, unchecked)
        self.prepare(mosaic)
        per_epoch, bar_wanted = -(-len(train) // processes.n), trainer.pop("progress_bar", True)
        if n_epochs is None:
            n_epochs = epochs_for(-(-own // SMALLEST) if batch_size is None else per_epoch)
            if processes.leads and bar_wanted:
                print(said(n_epochs, per_epoch), file=sys.stderr)
        settings = {
            "model": type(self).__name__,
            **{f"model option {name}": _recorded(value) for name, value in self.options.items()},
            "batch_size": size,
            "seed": seed,
            "validation": validation,
            "test": test,
            "sleep_steps": self.sleep_steps if sleep_steps is None else sleep_steps,
            **_of_data(mosaic),
            **{f"{name} cells": torch.from_numpy(cells) for name, cells in vars(parts).items()},
        }
        n_sleep = min(settings["sleep_steps"], n_epochs * per_epoch)
        bar_wanted = False if has_bar(trainer.get("callbacks", ())) or not processes.shows else bar_wanted
        rows: list[dict[str, float]] = []
        left: BaseException | None = None
        with self._as_before_if_it_fails():
            self.model.train()
            self.guide.train()
            try:
                with (
                    torch.random.fork_rng(),
                    pyro.validation_enabled(False),
                    shown(bar_wanted, "Training", n_epochs * per_epoch + n_sleep) as bar,
                ):
                    torch.manual_seed(seed)
                    fit(
                        self.model,
                        self.guide,
                        train,
                        held_out,
                        n_epochs,
                        optimisation,
                        early_stopping=early_stopping,
                        rows=rows,
                        settings=settings,
                        progress_bar=bar or False,
                        **trainer,
                    )
                    again = self.loader(mosaic, parts.train, size, seed)
                    n_steps = min(settings["sleep_steps"], len(rows) * per_epoch)
                    fitted = (self.model, self.guide)
                    options: dict[str, Any] = {"means": self.sleep_means, "seed": seed, "progress_bar": bar or False}
                    losses = processes.once(lambda: sleep(*fitted, again, n_steps, **options), *fitted)
                    if len(losses):
                        rows[-1] |= {"sleep_before": losses[:10].mean(), "sleep_after": losses[-10:].mean()}
            except (Exception, KeyboardInterrupt) as error:
                if not rows or processes.n > 1:
                    raise
                left = error
            self.history, self.split = pd.DataFrame(rows).set_index("epoch"), parts
            self.model.eval()
            self.guide.eval()
            with torch.no_grad():
                processes.once(lambda: self.finish(mosaic), self.model, self.guide)
        self.saves = processes.first
        if left is not None:
            raise left

    @contextmanager
    def _as_before_if_it_fails(self) -> Iterator[None]:
        """Put parameters, history and split back if what is inside fails; in any case end in evaluation mode."""
        history, parts = self.history, self.split
        states = [{k: v.clone() for k, v in part.state_dict().items()} for part in (self.model, self.guide)]
        try:
            yield
        except BaseException:
            self.history, self.split = history, parts
            for part, state in zip((self.model, self.guide), states, strict=True):
                part.load_state_dict(state)
            raise
        finally:
            self.model.eval()
            self.guide.eval()

    def __repr__(self) -> str:
        trained = f"trained for {len(self.history)} epochs" if len(self.history) else "not trained"
        name = call(type(self), self.options)
        return f"{name}, {trained}, on {self.mosaic if self.mosaic is not None else 'no data'}"

    def _data(self, data: Mosaic | None) -> Mosaic:
        mosaic = self.mosaic if data is None else data
        if mosaic is None:
            raise ValueError("the model has no data; pass some, e.g. data=model.register(mdata)")
        if not isinstance(mosaic, Mosaic):
            raise ValueError(f"data must be a Mosaic, e.g. data=model.register(mdata); found a {type(mosaic).__name__}")
        if mosaic.schema != self.schema:
            what = self.schema.difference(mosaic.schema)
            raise ValueError(f"the data were not registered for this model; call model.register(mdata) first: {what}")
        mosaic = self.arranged(mosaic)
        if self._fusion is not None:
            self._fusion.meet(mosaic)
        return mosaic

    def _features(self, modality: str, features: Cells) -> np.ndarray:
        return columns_of(modality, self.schema[modality], features)

    def _likelihood(self, modality: str) -> Any:
        self.schema[modality]
        part = part_of(self.model, modality)
        if part is None:
            raise ValueError(
                f"the program has no likelihood for modality {modality!r}: none of its `modalities` is a "
                "pyromosaic.measurement.Measurement with that name"
            )
        return part.likelihood

    @property
    def _fusion(self) -> Fusion | None:
        fusion = getattr(self.guide, "fusion", None)
        return fusion if isinstance(fusion, Fusion) else None

    @property
    def _device(self) -> torch.device:
        parameters = (p.device for program in (self.guide, self.model) for p in program.parameters())
        return next(parameters, torch.device("cpu"))


def accepted_options(cls: type) -> dict[str, Any]:
    """Options of a class and of those that it derives from, with their defaults."""
    constructors = [vars(base)["__init__"] for base in reversed(cls.__mro__[:-1]) if "__init__" in vars(base)]
    return {name: p.default for constructor in constructors for name, p in signature(constructor).parameters.items()}


def _options(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, given or by default, of the constructor of a class."""
    constructor, accepted = signature(cls.__init__), accepted_options(cls)  # type: ignore[misc]
    for old, new in RENAMED.items():
        if old in kwargs and old not in accepted and new.split("=")[0] in accepted:
            raise TypeError(f"the option {old!r} of {cls.__name__} was renamed; use {new!r}")
    check_words(cls.__name__, kwargs, accepted)
    bound = constructor.bind_partial(None, *args, **kwargs)
    bound.apply_defaults()
    options: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[2:]:  # after the model itself and its data
        kind = constructor.parameters[name].kind
        options |= value if kind is Parameter.VAR_KEYWORD else {name: value}
    return options


def _recorded(value: Any) -> Any:
    """An option as checkpoints hold it."""
    whole = value is None or isinstance(value, bool | int | float | str)
    return value if whole else json.dumps(value, default=lambda part: type(part).__name__)


def _of_data(mosaic: Mosaic) -> dict[str, Any]:
    """What tells the data of one run from those of another, for checkpoints."""
    found: dict[str, Any] = {"modalities": ", ".join(mosaic.modalities), "cells": _digest(list(mosaic.obs_names))}
    for name, modality in mosaic.modalities.items():
        has, codes = modality.present, np.column_stack([modality.codes, modality.labels])
        found[f"likelihood of {name}"] = modality.spec.likelihood_name
        schema = mosaic.schema.to_json()["modalities"][name]
        schema.pop("profile")  # follows from the measurements
        found[f"features or columns of {name}"] = _digest([json.dumps(schema)])
        found[f"cells with {name}"] = _digest(np.flatnonzero(has).astype(np.int64))
        found[f"batches or labels of {name}"] = _digest(codes[has].astype(np.int64))
        if modality.panels is not None:
            found[f"panels of {name}"] = _digest(modality.measured(np.flatnonzero(has)))
        found[f"continuous covariates of {name}"] = torch.from_numpy(modality.continuous[has])
        if modality.matrix.marks is not None:
            found[f"measurements of {name}"] = torch.from_numpy(modality.matrix.marks[modality.rows[has]])
    return found


def _digest(values: Iterable[Any]) -> torch.Tensor:
    """A digest of names, or of rows of whole numbers."""
    content = values.tobytes() if isinstance(values, np.ndarray) else "\n".join(map(str, values)).encode()
    return torch.tensor(list(sha256(content).digest()), dtype=torch.uint8)
