"""A training run under Lightning, from its first epoch or from a checkpoint to its last."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyromosaic.accepted import Count, check_arguments, checked
from pyromosaic.data import Divided, Minibatch
from pyromosaic.foreign import check_words
from pyromosaic.progress import Bar, shown
from pyromosaic.train.checkpoints import Files, Keeper, check_state, newest
from pyromosaic.train.plan import Optimisation, Plan
from pyromosaic.train.processes import Processes


class ReturnToBest(EarlyStopping):
    """Early stopping on validation cells that ends with the parameters of the best epoch.

    Parameters
    ----------
    patience
        Epochs without a better value after which training stops.
    monitor
        The value: ``"elbo"`` or ``"reconstruction"``.
    """

    def __init__(self, patience: int, monitor: str = "elbo") -> None:
        mode = "max" if monitor == "elbo" else "min"
        super().__init__(f"validation_{monitor}", patience=patience, mode=mode, check_on_train_epoch_end=True)
        self.best: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Keep the parameters if they are the best so far."""
        super().on_train_epoch_end(trainer, plan)
        if self.wait_count == 0:
            self.best = {k: v.detach().clone() for k, v in plan.state_dict().items()}

    def on_fit_end(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Return to the best parameters."""
        if self.best:
            plan.load_state_dict(self.best)

    def on_train_start(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Do not go on with a run that had stopped."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """With the best parameters."""
        return super().state_dict() | {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """With the best parameters."""
        super().load_state_dict(state_dict)
        self.best = state_dict["best"]


class _Advance(Callback):
    """Advances a bar by every step, and shows the bounds of the last epoch."""

    def __init__(self, bar: Bar, n_steps: int) -> None:
        self.bar, self.n_steps = bar, n_steps

    def on_train_start(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Expect fewer steps if Lightning was told to take fewer."""
        self._expect(min(self.n_steps, int(trainer.num_training_batches) * (trainer.max_epochs or 0)))
        if trainer.max_steps >= 0:
            self._expect(min(self.n_steps, trainer.max_steps))

    def on_train_epoch_start(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Say which epoch it is, and how good the last one was."""
        assert isinstance(plan, Plan)
        last = plan.rows[-1] if plan.rows else {}
        note = f"ELBO {last['train_elbo']:.4g}" if last else ""
        self.bar.say(f"Training, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}", note)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """One step more."""
        self.bar.advance()

    def on_train_end(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Take off the steps that a run that stopped early leaves out."""
        self._expect(self.bar.done)

    def _expect(self, n_steps: int) -> None:
        self.bar.total += n_steps - self.n_steps
        self.n_steps = n_steps


def has_bar(callbacks: Iterable[Callback]) -> bool:
    """Whether a progress bar of Lightning is among callbacks; then ours is not shown."""
    return any(isinstance(callback, ProgressBar) for callback in callbacks)


#: What Lightning's trainer takes and `fit` sets by another argument, or by itself.
_SET_HERE = {
    "max_epochs": "n_epochs",
    "gradient_clip_val": "gradient_clip",
    "enable_progress_bar": "progress_bar",
    "enable_checkpointing": "checkpoint_dir",
    "num_sanity_val_steps": None,
    "enable_model_summary": None,
    "use_distributed_sampler": None,
}


def check_trainer(options: Mapping[str, Any]) -> Processes:
    """Refuse options of a training run that neither `fit` nor `lightning.pytorch.Trainer` takes.

    Returns
    -------
    Processes
        Those that are to train.

    Raises
    ------
    TypeError
        With the name of an option that there is not.
    ValueError
        If an option is set by another one, the precision is not that of the likelihoods, or the processes are refused
        by `pyromosaic.train.processes.Processes`.

    Examples
    --------
    >>> check_trainer({"max_epochs": 3})
    Traceback (most recent call last):
        ...
    ValueError: max_epochs is set by n_epochs here; leave it out
    """
    own, lightnings = signature(fit).parameters, signature(lightning.Trainer.__init__).parameters
    for name in options:
        if name in _SET_HERE:
            by = _SET_HERE[name]
            raise ValueError(f"{name} is set {f'by {by} here' if by else 'by training itself'}; leave it out")
        if name not in own and name not in lightnings:
            known = ("validation", "test", "seed", "n_workers", "trainer")
            check_words("train", [name], {*known, *own, *signature(Optimisation).parameters})
            raise TypeError(f"train takes no option {name!r}, nor does lightning.pytorch.Trainer")
    plugins = [type(plugin).__name__ for plugin in _listed(options.get("plugins")) if isinstance(plugin, Precision)]
    if options.get("precision") not in (None, 32, "32", "32-true") or plugins:
        raise ValueError(
            f"precision must be '32-true' or None, because data and models are in single precision; found "
            f"{plugins[0] if plugins else repr(options['precision'])}"
        )
    check_arguments(fit, options)
    with _quiet():
        return Processes(options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on hardware and products out of the user's output; its warnings are shown."""
    levels = {log: log.level for log in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    for log, level in levels.items():
        log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)


@checked
def fit(
    model: nn.Module,
    guide: nn.Module,
    train: DataLoader[Minibatch],
    validation: DataLoader[Minibatch] | None,
    n_epochs: Count,
    optimisation: Optimisation,
    *,
    early_stopping: Count | None = None,
    monitor: Literal["elbo", "reconstruction"] = "elbo",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    progress_bar: bool | Bar = True,
    logger: Any = False,
    callbacks: Sequence[Callback] = (),
    rows: list[dict[str, float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    **trainer: Any,
) -> pd.DataFrame:
    """Train a model and its guide by stochastic variational inference.

    Parameters
    ----------
    model, guide
        The Pyro program; trained in place.
    train, validation
        Minibatches; None validates nothing.
    n_epochs
        Length of the run.
    optimisation
        How parameters are fitted.
    early_stopping
        Stop after this many epochs without a better value on validation cells, and return to the best; None to train
        on.
    monitor
        The value that early stopping looks at: ``"elbo"``, or ``"reconstruction"``, the negative log-likelihood.
    checkpoint_dir
        Where to write ``last.ckpt``, all that the run is made of, after each epoch (less often once writing has taken
        more than a minute and longer than training, but once a minute), and when training is left. The one before is
        kept as ``previous.ckpt``. None writes none.
    resume_from
        A checkpoint to go on from, or the folder of some, of which the newest whole one is taken. The run goes on as if
        it had never stopped, with the same settings; others are refused. Beyond the `n_epochs` that it began with, the
        learning rate stays where the schedule left it. Nothing in a checkpoint is run.
    rows
        Where to append the rows of whole epochs; they are there also if training is left by an exception.
    settings
        Further values and tensors that a resumed run must have in common with the first.
    progress_bar
        Whether to show one bar for the whole run, with the time left; or the `pyromosaic.progress.Bar` of a larger
        task, which is then advanced by the steps of this one. None is shown beside a progress bar of Lightning.
    logger, callbacks, **trainer
        For `lightning.pytorch.Trainer`. A logger gets one row an epoch. Unless early stopping or another callback
        monitors them, validation cells are looked at some 20 times in the run, at regular epochs up to the last;
        ``check_val_every_n_epoch`` says how often. Unless ``devices``, ``num_nodes``, ``strategy`` or
        a launcher say otherwise, one process trains on one device.

    Returns
    -------
    pandas.DataFrame
        A row an epoch; columns as described at `Plan`, missing (NaN) where validation cells were not looked at.

    Raises
    ------
    ValueError
        If early stopping is asked for without validation cells, the checkpoint to go on from is not there, damaged, or
        that of another run, or processes or minibatches cannot be divided.
    NonFiniteLossError
        If the loss is not finite.
    KeyboardInterrupt, SystemExit
        If training is interrupted; the second, with exit code 143, by SIGTERM.

    However training is left, the parameters are those of the last whole epoch.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import loader
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0])
    >>> model = MultiVI(mosaic)
    >>> minibatches = loader(mosaic, mosaic.find(None), batch_size=32, seed=0)
    >>> history = fit(model.model, model.guide, minibatches, None, 2, Optimisation(), progress_bar=False)
    >>> len(history), "train_elbo" in history
    (2, True)
    """
    processes = check_trainer(trainer)
    if early_stopping is not None and validation is None:
        raise ValueError(
            "early stopping needs validation cells: set validation to a share above 0, or set early_stopping=None"
        )
    callbacks = list(callbacks)
    stopping = None if early_stopping is None else ReturnToBest(early_stopping, monitor)
    if stopping is not None:
        callbacks.append(stopping)
    samplers = [loader.sampler for loader in (train, validation) if loader is not None]
    divided = [sampler for sampler in samplers if isinstance(sampler, Divided)]
    if processes.n > 1 and len(divided) < len(samplers):
        raise ValueError("several processes divide minibatches of `pyromosaic.data.loader` alone; train in one process")
    plan = Plan(model, guide, optimisation, n_epochs, rows, divided if len(divided) == len(samplers) else ())
    taken = None
    if resume_from is not None:
        size = sum(value.nbytes for value in plan.state_dict().values())
        size += sum(value.nbytes for value in (settings or {}).values() if isinstance(value, Tensor))
        taken = newest(resume_from, 16 * size + (1 << 26), 200_000 + 500 * n_epochs)  # several times what a run has
        with suppress(*_OF_FOREIGN_STATE):  # refused below
            plan.n_epochs = min(int(taken[1]["run"]["n_epochs"]), 1_000_000)
            plan.warmup_epochs = min(optimisation.kl_warmup_epochs, plan.n_epochs // 2)
    every = 1
    # Lightning writes checkpoints at the end of epochs only if validation cells are looked at in each.
    if not any(getattr(callback, "monitor", None) or isinstance(callback, Checkpoint) for callback in callbacks):
        every = max(k for k in range(1, 1 + max(1, plan.n_epochs // 20)) if plan.n_epochs % k == 0)
    trainer.setdefault("check_val_every_n_epoch", every)
    plan.settings = {
        **{k: v if isinstance(v, int | float | str) else _name(v) for k, v in asdict(optimisation).items()},
        "early_stopping": early_stopping,
        "monitor": None if early_stopping is None else monitor,
        "check_val_every_n_epoch": trainer["check_val_every_n_epoch"],
        **(settings or {}),
    }
    message = "" if taken is None else _check_resumed(taken, plan, n_epochs)
    files = Files(taken)
    if checkpoint_dir is not None:
        goes_on = taken is not None and taken[0].parent == Path(checkpoint_dir).absolute()
        callbacks.append(Keeper(checkpoint_dir, files, goes_on))
    wanted = False if has_bar(callbacks) or not processes.shows else progress_bar
    per_epoch = -(-len(train) // processes.n)
    with _quiet(), warnings.catch_warnings(), shown(wanted, "Training", n_epochs * per_epoch) as bar:
        if bar is not None:
            bar.done = 0 if taken is None else len(taken[1]["run"]["rows"]) * per_epoch
            callbacks.append(_Advance(bar, n_epochs * per_epoch))
        # Loading runs in the main process on purpose, and minibatches are few on small data.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # the values are those of all processes
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated.*")  # its successor is too new
        runner = lightning.Trainer(
            max_epochs=n_epochs,
            gradient_clip_val=optimisation.gradient_clip or None,
            callbacks=callbacks,
            logger=logger,
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=has_bar(callbacks),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=[files, *_listed(trainer.pop("plugins", None))],
            use_distributed_sampler=False,
            **trainer | processes.options,
        )
        if message and runner.is_global_zero:
            print(message, file=sys.stderr)
        try:
            runner.fit(plan, train, validation, ckpt_path=None if taken is None else str(taken[0]))
        except BaseException as error:
            plan.back()
            if isinstance(error, OSError | ValueError) and "Original Traceback" in str(error):  # of a worker
                raise type(error)(str(error).splitlines()[-1].partition(": ")[2]) from error
            if isinstance(error, SIGTERMException):
                raise SystemExit(128 + signal.SIGTERM) from None
            if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # which Lightning makes an exit of
            if taken is not None and not plan.begun and isinstance(error, _OF_FOREIGN_STATE):
                raise ValueError(f"{taken[0]} does not fit this run: {_line(error)}") from error
            raise
    plan.rows[:] = vars(runner.state)["rows"]
    if not plan.rows:
        raise ValueError("training ended before its first epoch; check max_steps, max_time and your callbacks")
    return pd.DataFrame(plan.rows).set_index("epoch")


#: What Lightning and torch raise for a state that is not theirs.
_OF_FOREIGN_STATE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _check_resumed(taken: tuple[Path, Any], plan: Plan, n_epochs: int) -> str:
    """Refuse a checkpoint of another run, and say what is gone on from."""
    path, content = taken
    try:
        run, state = content["run"], content["state_dict"]
        done, before, version = len(run["rows"]), dict(run["settings"]), run["version"]
        n_states = len(content["optimizer_states"]), len(content["lr_schedulers"])
        if plan.n_epochs != run["n_epochs"]:
            raise ValueError("n_epochs")
        if [row["epoch"] for row in run["rows"]] != list(range(done)) or not done:
            raise ValueError("a row of an epoch")
        sum(float(value) for row in run["rows"] for value in row.values())
    except _OF_FOREIGN_STATE as error:
        raise ValueError(f"{path} is not the checkpoint of a training run: {_line(error)} is not there") from error
    of = f"{path} (pyromosaic {version})"
    for name in plan.settings | before:
        was, now = before.get(name), plan.settings.get(name)
        if isinstance(was, Tensor) and isinstance(now, Tensor):
            if not _same(was, now):
                raise ValueError(f"the run of {of} had other {name}; a run is resumed on the same data")
        elif isinstance(was, Tensor) or isinstance(now, Tensor) or was != now:
            raise ValueError(
                f"the run of {of} had {name}={was!r}; found {now!r}. A resumed run keeps its settings; begin "
                "a new run to change them"
            )
    if n_states != (1, int(plan.optimisation.schedule != "constant")):
        raise ValueError(f"{of} lacks the state of an optimiser or schedule")
    if n_epochs < done:
        raise ValueError(f"the run of {of} has {done} epochs already; found n_epochs={n_epochs}")
    own = plan.state_dict()
    check_state(state, own, of)
    message = f"training goes on from {path}, after {done} of {n_epochs} epochs"
    if n_epochs > plan.n_epochs and plan.optimisation.schedule == "cosine":
        message += f"; the learning rate stays where it was left after the first {plan.n_epochs}, at its lowest"
    return message


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether data are the same, up to the order in which another machine sums."""
    if one.dtype.is_floating_point and one.shape == other.shape and one.dtype == other.dtype:
        return torch.allclose(one, other, rtol=1e-9, atol=1e-7, equal_nan=True)
    return torch.equal(one, other)


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _listed(plugins: Any) -> list[Any]:
    return plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]


def _line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return next(iter(str(error).splitlines()), type(error).__name__)
