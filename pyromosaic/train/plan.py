"""Stochastic variational inference under Lightning."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as lightning
import numpy as np
import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyromosaic import __version__
from pyromosaic.accepted import Positive, Weight, Whole, checked
from pyromosaic.data import Divided, Minibatch
from pyromosaic.measurement import Measurement
from pyromosaic.program import unannounced
from pyromosaic.train.elbo import MosaicELBO
from pyromosaic.train.processes import gathered


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number; the parameters are restored from the start of the epoch."""


Schedule = Literal["cosine", "constant"] | Callable[[torch.optim.Optimizer], Any]


@checked
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
    likelihood_rate
        Learning rate of the parameters of likelihoods (dispersions, backgrounds, region factors), as a multiple of
        `learning_rate`. They are logarithms or logits that move by at most one learning rate in a step, and would not
        arrive in the steps of a run otherwise. They have no weight decay. At 1 they are treated like all others.
    """

    learning_rate: Positive = 3e-3
    weight_decay: Weight = 1e-3
    kl_warmup_epochs: Whole = 50
    schedule: Schedule = "cosine"
    gradient_clip: Weight = 10.0
    likelihood_rate: Positive = 1.0


class Plan(lightning.LightningModule):
    """A model and a guide under Lightning.

    Training minimises the negative ELBO plus penalties, divided by the number of cells. Each epoch appends a row to
    `rows`. For training and validation cells it has the ``objective`` that is minimised, the ``elbo`` (without
    penalties and with full weight on the divergences), the ``reconstruction`` (the negative log-likelihood of the
    measurements) and the part of every site in the negative ELBO, all per cell.

    The parameters of likelihoods are a parameter group of their own (`Optimisation.likelihood_rate`). If a module
    has a method ``optimiser()``, as an adversary does, that optimiser trains it; AdamW trains all other parameters.
    One backward pass serves both, so no gradient may flow from the loss of one side to the parameters of the other.
    `Optimisation` applies only to the parameters of AdamW.

    Several processes divide the minibatches, average the gradients, and have the same history. Their noise differs.

    Parameters
    ----------
    model, guide
        The Pyro program; both are called with a `Minibatch` and a KL weight.
    optimisation
        How parameters are fitted.
    n_epochs
        Number of epochs over which the learning rate falls; after them it stays where it is.
    rows
        List to which the rows are appended.
    samplers
        Those of the training and the validation cells, which processes divide; the generator of the first is kept in
        checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        optimisation: Optimisation,
        n_epochs: int,
        rows: list[dict[str, float]] | None = None,
        samplers: Sequence[Divided] = (),
    ) -> None:
        super().__init__()
        self.elbo = MosaicELBO()
        self.objective = self.elbo(model, guide)
        self.optimisation = optimisation
        self.n_epochs = n_epochs
        self.warmup_epochs = min(optimisation.kl_warmup_epochs, n_epochs // 2)
        self.rows = [] if rows is None else rows
        self.samplers = samplers
        self.order = samplers[0].generator if samplers else None
        self.settings: dict[str, Any] = {}
        self.begun = False
        self.validated = is_validation_enabled()  # which a spawned process does not know
        self._sums: dict[str, dict[tuple[str, ...], Tensor]] = {}
        self._n_cells: Counter[str] = Counter()
        self._latent: set[str] = set()
        self._last_good: dict[str, Tensor] = {}
        self.own_optimisers: list[torch.optim.Optimizer] = []
        self._own_states: list[dict[str, Any]] = []
        self._generators: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Start where the first process starts, with this one's part of the cells and noise of its own."""
        rank, n = self.trainer.global_rank, self.trainer.world_size
        if n == 1:
            return
        for sampler in self.samplers:
            sampler.divide(rank, n)
        if self.samplers[0].n < n:
            raise ValueError(f"{n} processes need at least a training cell each; found {self.samplers[0].n}")
        own = {name: value.cpu() for name, value in self.objective.state_dict().items()}
        self.objective.load_state_dict(self.trainer.strategy.broadcast(own))
        seeds = np.random.SeedSequence(torch.initial_seed()).generate_state(n, np.uint64)
        torch.manual_seed(int(seeds[rank] >> 1))
        pyro.enable_validation(self.validated)

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
        faster = {p for m in self.objective.modules() if isinstance(m, Measurement) for p in m.likelihood.parameters()}
        faster = faster if o.likelihood_rate != 1 else set()
        groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p not in faster]}]
        if faster:
            of_likelihoods = [p for p in parameters if p in faster]
            groups.append({"params": of_likelihoods, "lr": o.likelihood_rate * o.learning_rate, "weight_decay": 0.0})
        optimiser = torch.optim.AdamW(groups, lr=o.learning_rate, weight_decay=o.weight_decay, fused=True)
        if o.schedule == "constant":
            return optimiser
        if o.schedule == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.n_epochs, o.learning_rate / 50)
            return [optimiser], [cosine]
        assert callable(o.schedule)
        return [optimiser], [o.schedule(optimiser)]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Let the rate fall to its end and stay there; beyond it the cosine would rise again."""
        if self.optimisation.schedule != "cosine" or scheduler.last_epoch < self.n_epochs:
            super().lr_scheduler_step(scheduler, metric)

    def kl_weight(self) -> float:
        """Weight of latent variables' divergences at this step."""
        if self.warmup_epochs == 0:
            return 1.0
        return min(1.0, (self.global_step + 1) / (self.warmup_epochs * int(self.trainer.num_training_batches)))

    def training_step(self, minibatch: Minibatch, step: int) -> Tensor:
        """One step of stochastic variational inference."""
        weight = self.kl_weight()
        with unannounced():
            loss: Tensor = self.objective(minibatch, weight) / minibatch.n_cells
        # On an accelerator a look at the loss waits for the device, so it is not taken at every step.
        if (loss.device.type == "cpu" or step % 50 == 0) and not self._finite(loss):
            sites = [name for name, term in self.elbo.terms.items() if not torch.isfinite(term)]
            raise NonFiniteLossError(
                f"the loss is not finite in epoch {self.current_epoch}, at {', '.join(map(repr, sites))}; the "
                "parameters are restored from the start of this epoch. Lower the learning rate, or set gradient_clip; "
                "if the first epoch fails, check the distributions of these sites for NaN and negative scales"
            )
        self._add("train", minibatch, loss.detach())
        return loss

    def _finite(self, loss: Tensor) -> bool:
        """Whether the loss is finite in every process, so that all stop together and none waits for another."""
        finite = bool(torch.isfinite(loss))
        return finite if self.trainer.world_size == 1 else self.trainer.strategy.reduce_boolean_decision(finite)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the steps of the modules' optimisers; Lightning takes the step of AdamW, after clipping."""
        for own in self.own_optimisers:
            own.step()
            own.zero_grad()

    def validation_step(self, minibatch: Minibatch, step: int) -> None:
        """Evaluate the bound on cells that are not used in training."""
        with unannounced():
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

    def on_fit_start(self) -> None:
        """Draw noise and the order of cells from where a checkpoint left them."""
        if self._generators:
            self._set_generators(self._generators)

    def on_train_start(self) -> None:
        """Look at what optimisers were given by a checkpoint."""
        for optimiser in self.trainer.optimizers:
            for parameter, state in optimiser.state.items():
                for name, value in state.items():
                    if value.shape not in (parameter.shape, ()) or not torch.isfinite(value).all():
                        raise ValueError(f"{name!r} of the optimiser does not fit its parameter")

    def on_train_epoch_start(self) -> None:
        """Remember parameters that gave a finite loss."""
        # Before Lightning 2.6 a resumed epoch begins its minibatches a second time.
        if self._generators and not hasattr(self.trainer.fit_loop, "is_resuming"):
            self._set_generators(self._generators)
        self._generators = {}
        self._sums, self._n_cells = {}, Counter()
        self._last_good = {k: v.detach().clone() for k, v in self.objective.state_dict().items()}
        self.begun = True

    def back(self) -> None:
        """Go back to the start of an epoch that did not come to its end; one not begun leaves no rows."""
        if not self.begun:
            self.rows.clear()
        elif self._last_good:
            self.objective.load_state_dict(self._last_good)
            self._last_good = {}

    def on_train_epoch_end(self) -> None:
        """Append a row to the history and pass it to the loggers."""
        row: dict[str, float] = {}
        for part, totals in self._totals().items():
            n_cells = totals.pop("")
            parts = {name: value / n_cells for name, value in totals.items()}
            bound = {k: v for k, v in parts.items() if k != "objective" and not k.startswith("penalty/")}
            parts["elbo"] = -sum(bound.values())
            parts["reconstruction"] = sum(v for k, v in bound.items() if k not in self._latent)
            row |= {f"{part}_{name}": value for name, value in parts.items()}
        self.rows.append({"epoch": self.current_epoch, "kl_weight": self.kl_weight(), **row})
        self._last_good = {}  # the present ones are
        # For the progress bar and for callbacks; Lightning's own bookkeeping of all takes longer than a small epoch.
        shown = {k: v for k, v in row.items() if k.endswith(("objective", "elbo"))}
        self.log_dict(shown, prog_bar=True, logger=False)
        self.log_dict({k: v for k, v in row.items() if k == "validation_reconstruction"}, logger=False)
        for logger in self.loggers:  # one row an epoch
            logger.log_metrics(self.rows[-1], self.global_step)

    def _totals(self) -> dict[str, dict[str, float]]:
        """Sums over the cells of all processes, by part of the data and name; that of ``""`` counts the cells."""
        own: dict[str, dict[str, float]] = {}
        for part, sums in self._sums.items():
            own[part] = defaultdict(float, {"": self._n_cells[part]})
            for names, values in sums.items():
                for name, value in zip(names, values.tolist(), strict=True):  # a copy from the device
                    own[part][name] += value
        marks = {name: value for name, value in self.objective.named_buffers() if value.dtype == torch.bool}
        totals: dict[str, dict[str, float]] = {}
        for sums_of, latent, marked in gathered((own, self._latent, marks), self.trainer.world_size):
            for part, values_of in sums_of.items():
                total = totals.setdefault(part, defaultdict(float))
                for name, value in values_of.items():
                    total[name] += value
            self._latent |= latent
            for name, value in marks.items():  # what any process has seen, e.g. classes of cells
                value |= marked[name].to(value.device)
        return totals

    def on_fit_end(self) -> None:
        """Leave the history where a process that Lightning has spawned brings it to its parent."""
        vars(self.trainer.state)["rows"] = self.rows

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of."""
        checkpoint["run"] = {
            "version": __version__,
            "n_epochs": self.n_epochs,
            "settings": self.settings,
            "rows": self.rows,
            "own_optimisers": [own.state_dict() for own in self.own_optimisers],
            "generators": gathered(self._get_generators(), self.trainer.world_size),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the history of a checkpoint; optimisers and generators get their state when it is time."""
        run = checkpoint["run"]
        self.rows[:] = run["rows"]
        self._own_states = run["own_optimisers"]
        n, found = self.trainer.world_size, len(run["generators"])
        if found != n:
            raise ValueError(f"it is that of a run of {found} processes, and this one has {n}")
        self._generators = run["generators"][self.trainer.global_rank]

    def _get_generators(self) -> dict[str, Any]:
        """State of what draws noise and the order of cells."""
        states: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.order is not None:
            states["order"] = self.order.bit_generator.state
        return states

    def _set_generators(self, states: Mapping[str, Any]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)
        if self.order is not None:
            self.order.bit_generator.state = states["order"]
