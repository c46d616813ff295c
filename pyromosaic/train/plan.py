"""Stochastic variational inference under Lightning."""

import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyromosaic.data import Minibatch
from pyromosaic.train.elbo import MosaicELBO


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number; the parameters are restored from the start of the epoch."""


Schedule = str | Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class Optimisation:
    """How parameters are fitted.

    Parameters
    ----------
    learning_rate, weight_decay
        Settings of AdamW.
    kl_warmup_epochs
        Number of epochs over which the weight of the divergences of latent variables rises linearly to 1; at most half
        of the run.
    schedule
        ``"cosine"`` lets the learning rate fall to a fiftieth over the run, ``"constant"`` keeps it; or a function that
        maps an optimiser to a learning-rate scheduler, which steps once per epoch.
    gradient_clip
        Largest norm of the gradient; 0 for no limit.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    kl_warmup_epochs: int = 50
    schedule: Schedule = "cosine"
    gradient_clip: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in ("cosine", "constant"):
            raise ValueError(f'schedule must be "cosine", "constant" or a function; found {self.schedule!r}')


class Plan(lightning.LightningModule):
    """A model and a guide under Lightning.

    Training minimises the negative ELBO plus penalties, divided by the number of cells. Each epoch appends a row to
    `rows`. For training and validation cells it has the ``objective`` that is minimised, the ``elbo`` (without
    penalties and with full weight on the divergences), the ``reconstruction`` (the negative log-likelihood of the
    measurements) and the part of every site in the negative ELBO, all per cell.

    If a module has a method ``optimiser()``, as an adversary does, that optimiser trains it; AdamW trains all other
    parameters. One backward pass serves both, so no gradient may flow from the loss of one side to the parameters of
    the other. `Optimisation` applies only to the parameters of AdamW.

    Parameters
    ----------
    model, guide
        The Pyro program; both are called with a `Minibatch` and a KL weight.
    optimisation
        How parameters are fitted.
    n_epochs
        Number of epochs.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, optimisation: Optimisation, n_epochs: int) -> None:
        super().__init__()
        self.elbo = MosaicELBO()
        self.objective = self.elbo(model, guide)
        self.optimisation = optimisation
        self.n_epochs = n_epochs
        self.warmup_epochs = min(optimisation.kl_warmup_epochs, n_epochs // 2)
        self.rows: list[dict[str, float]] = []
        self._sums: dict[str, dict[tuple[str, ...], Tensor]] = {}
        self._n_cells: Counter[str] = Counter()
        self._latent: set[str] = set()
        self._last_good: dict[str, Tensor] = {}
        self.own_optimisers: list[torch.optim.Optimizer] = []
        self._own_states: list[dict[str, Any]] = []

    def transfer_batch_to_device(self, batch: Minibatch, device: torch.device, dataloader_idx: int) -> Minibatch:
        """Move a minibatch; Lightning's default would go through it field by field."""
        return batch.to(device)

    def configure_optimizers(self) -> Any:
        """Make AdamW, the schedule if there is one, and the optimisers of modules that have one."""
        o = self.optimisation
        self.own_optimisers = [m.optimiser() for m in self.objective.modules() if hasattr(m, "optimiser")]
        for own, state in zip(self.own_optimisers, self._own_states, strict=bool(self._own_states)):
            own.load_state_dict(state)
        elsewhere = {p for own in self.own_optimisers for group in own.param_groups for p in group["params"]}
        parameters = [p for p in self.objective.parameters() if p not in elsewhere]
        optimiser = torch.optim.AdamW(parameters, lr=o.learning_rate, weight_decay=o.weight_decay, fused=True)
        if o.schedule == "constant":
            return optimiser
        if o.schedule == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.n_epochs, o.learning_rate / 50)
            return [optimiser], [cosine]
        assert callable(o.schedule)
        return [optimiser], [o.schedule(optimiser)]

    def kl_weight(self) -> float:
        """Weight of latent variables' divergences at this step."""
        if self.warmup_epochs == 0:
            return 1.0
        return min(1.0, (self.global_step + 1) / (self.warmup_epochs * int(self.trainer.num_training_batches)))

    def training_step(self, minibatch: Minibatch, step: int) -> Tensor:
        """One step of stochastic variational inference."""
        weight = self.kl_weight()
        loss: Tensor = self.objective(minibatch, weight) / minibatch.n_cells
        # On an accelerator a look at the loss waits for the device, so it is not taken at every step.
        if (loss.device.type == "cpu" or step % 50 == 0) and not torch.isfinite(loss):
            sites = [name for name, term in self.elbo.terms.items() if not torch.isfinite(term)]
            self.objective.load_state_dict(self._last_good)
            raise NonFiniteLossError(
                f"the loss is not finite in epoch {self.current_epoch}, at {', '.join(map(repr, sites))}; the "
                "parameters are restored from the start of this epoch. Lower the learning rate, or set gradient_clip"
            )
        self._add("train", minibatch, loss.detach())
        return loss

    def on_after_backward(self) -> None:
        """Take the steps of the modules' optimisers; Lightning takes the step of AdamW, after clipping."""
        for own in self.own_optimisers:
            own.step()
            own.zero_grad()

    def validation_step(self, minibatch: Minibatch, step: int) -> None:
        """Evaluate the bound on cells that are not used in training."""
        loss = self.objective(minibatch, 1.0) / minibatch.n_cells
        self._add("validation", minibatch, loss)

    def _add(self, part: str, minibatch: Minibatch, loss: Tensor) -> None:
        """Add the parts of the loss to the epoch's sums, on the device."""
        terms, latent = self.elbo.terms, self.elbo.latent
        n = len(minibatch)
        share = n / minibatch.n_cells  # each term stands for n_cells cells
        values = [term * (share / (latent.get(name) or 1.0)) for name, term in terms.items()]  # 0 stays 0
        # Modalities, and so sites, may be missing from a minibatch.
        sums, key = self._sums.setdefault(part, {}), (*terms, "objective")
        sums[key] = sums.get(key, 0.0) + torch.stack([*values, loss * n])
        self._n_cells[part] += n
        self._latent |= latent.keys()

    def on_train_epoch_start(self) -> None:
        """Remember parameters that gave a finite loss."""
        self._sums, self._n_cells = {}, Counter()
        self._last_good = {k: v.detach().clone() for k, v in self.objective.state_dict().items()}

    def on_train_epoch_end(self) -> None:
        """Append a row to the history and pass it to the loggers."""
        row: dict[str, float] = {}
        for part, sums in self._sums.items():
            parts: dict[str, float] = defaultdict(float)
            for names, values in sums.items():
                for name, value in zip(names, values.tolist(), strict=True):  # a copy from the device
                    parts[name] += value / self._n_cells[part]
            bound = {k: v for k, v in parts.items() if k != "objective" and not k.startswith("penalty/")}
            parts["elbo"] = -sum(bound.values())
            parts["reconstruction"] = sum(v for k, v in bound.items() if k not in self._latent)
            row |= {f"{part}_{name}": value for name, value in parts.items()}
        self.rows.append({"epoch": self.current_epoch, "kl_weight": self.kl_weight(), **row})
        # For the progress bar and for callbacks; Lightning's own bookkeeping of all takes longer than a small epoch.
        self.log_dict({k: v for k, v in row.items() if k.endswith(("objective", "elbo"))}, prog_bar=True)
        self.log_dict({k: v for k, v in row.items() if k == "validation_reconstruction"})
        for logger in self.loggers:
            logger.log_metrics(row, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history and the state of the modules' optimisers with a checkpoint."""
        checkpoint["rows"] = self.rows
        checkpoint["own_optimisers"] = [own.state_dict() for own in self.own_optimisers]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the history of a checkpoint; optimisers, which do not exist yet, get their state later."""
        self.rows = list(checkpoint["rows"])
        self._own_states = checkpoint["own_optimisers"]


class ReturnToBest(EarlyStopping):
    """Early stopping on validation cells that ends with the parameters of the best epoch.

    Parameters
    ----------
    patience
        Number of epochs without a better value after which training stops.
    monitor
        The value: ``"elbo"`` or ``"reconstruction"``.
    """

    def __init__(self, patience: int, monitor: str = "elbo") -> None:
        if monitor not in ("elbo", "reconstruction"):
            raise ValueError(f'monitor must be "elbo" or "reconstruction"; found {monitor!r}')
        mode = "max" if monitor == "elbo" else "min"
        super().__init__(f"validation_{monitor}", patience=patience, mode=mode, check_on_train_epoch_end=True)
        self.best: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Keep the parameters if they are the best so far."""
        super().on_train_epoch_end(trainer, plan)
        if self.wait_count == 0:
            self.best = {k: v.detach().clone() for k, v in plan.state_dict().items()}

    def on_train_end(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Restore the best parameters."""
        plan.load_state_dict(self.best)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Lightning's remarks on hardware and products from the user; show its warnings."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)


def fit(
    model: nn.Module,
    guide: nn.Module,
    train: DataLoader[Minibatch],
    validation: DataLoader[Minibatch] | None,
    n_epochs: int,
    optimisation: Optimisation,
    *,
    early_stopping: int | None = None,
    monitor: str = "elbo",
    checkpoint_dir: str | None = None,
    resume_from: str | None = None,
    progress_bar: bool = True,
    logger: Any = False,
    callbacks: Iterable[Callback] = (),
    **trainer: Any,
) -> pd.DataFrame:
    """Train a model and its guide by stochastic variational inference.

    Parameters
    ----------
    model, guide
        The Pyro program; trained in place.
    train, validation
        Minibatches; without `validation`, nothing is validated.
    n_epochs
        Number of epochs.
    optimisation
        How parameters are fitted.
    early_stopping
        Stop after this many epochs without a better value on validation cells, and restore the best parameters; None
        never stops early.
    monitor
        The value for early stopping: ``"elbo"``, or ``"reconstruction"``, the negative log-likelihood.
    checkpoint_dir
        Directory for Lightning checkpoints, the last of them ``last.ckpt``; None writes none.
    resume_from
        A checkpoint to resume from.
    progress_bar, logger, callbacks, **trainer
        Arguments of `lightning.pytorch.Trainer`. Unless early stopping or another callback monitors them, validation
        cells are evaluated about 20 times in the run, at regular epochs up to the last; set ``check_val_every_n_epoch``
        to change this.

    Returns
    -------
    pandas.DataFrame
        One row per epoch; columns as described at `Plan`, missing (NaN) where validation cells were not evaluated.

    Raises
    ------
    ValueError
        If early stopping is asked for without validation cells.
    NonFiniteLossError
        If the loss is not finite; the parameters are then those at the start of the epoch.
    """
    if early_stopping is not None and validation is None:
        raise ValueError(
            "early stopping needs validation cells: set validation to a share above 0, or set early_stopping=None"
        )
    plan = Plan(model, guide, optimisation, n_epochs)
    callbacks = list(callbacks)
    if early_stopping is not None:
        callbacks.append(ReturnToBest(early_stopping, monitor))
    if checkpoint_dir is not None:
        callbacks.append(ModelCheckpoint(checkpoint_dir, save_last=True, filename="{epoch}"))
    if progress_bar:
        callbacks.append(TQDMProgressBar(refresh_rate=20))
    if not any(getattr(callback, "monitor", None) for callback in callbacks):
        every = max(k for k in range(1, 1 + max(1, int(n_epochs) // 20)) if n_epochs % k == 0)
        trainer = {"check_val_every_n_epoch": every} | trainer
    with _quiet(), warnings.catch_warnings():
        # Loading runs in the main process on purpose, and minibatches are few on small data.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        runner = lightning.Trainer(
            max_epochs=int(n_epochs),
            gradient_clip_val=optimisation.gradient_clip or None,
            callbacks=callbacks,
            logger=logger,
            enable_checkpointing=checkpoint_dir is not None,
            enable_progress_bar=progress_bar,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **trainer,
        )
        runner.fit(plan, train, validation, ckpt_path=resume_from)
    return pd.DataFrame(plan.rows).set_index("epoch")
