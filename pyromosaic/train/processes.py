"""Several processes that train one model: how they are started, and what they tell each other."""

import atexit
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import lightning.pytorch as lightning
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import distributed, nn

T = TypeVar("T")

#: Strategies by name, and how each starts processes.
START: Mapping[str, str] = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}
#: A minibatch may lack a modality, whose parameters then have no gradient in this process; a plain DDP would wait for
#: them for ever. Buffers are equal from the start, and some are as long as the data.
NEEDED: Mapping[str, bool] = {"find_unused_parameters": True, "broadcast_buffers": False}


class Processes:
    """The processes of a training run: this one alone, or several with a model each, whose gradients are averaged.

    Parameters
    ----------
    options
        Options for `lightning.pytorch.Trainer`. Left out, `devices` and `num_nodes` are those of torchrun or SLURM if
        one of them has started this process, and 1 otherwise.

    Attributes
    ----------
    n
        Number of processes.
    options
        ``devices``, ``num_nodes`` and ``strategy`` for the trainer.

    Raises
    ------
    ValueError
        If the strategy is none that trains these models, or the number of processes is not that of the launcher.

    Examples
    --------
    >>> Processes({"accelerator": "cpu", "devices": 2}).n
    2
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        n_nodes, n_started = _launched()
        given = {"devices": n_started // n_nodes, "num_nodes": n_nodes} | {
            name: options[name] for name in ("accelerator", "devices", "num_nodes") if name in options
        }
        trial = None
        if set(given.values()) != {1}:  # "auto" and lists are for Lightning to read
            with warnings.catch_warnings(action="ignore"):
                trial = lightning.Trainer(**given, logger=False, enable_checkpointing=False)
        self.n = trial.num_devices * trial.num_nodes if trial is not None else 1
        strategy = _strategy(options.get("strategy", "auto"), self.n)
        if n_started > 1 and self.n != n_started:
            raise ValueError(
                f"{n_started} processes were started, and devices times num_nodes is {self.n}; leave devices and "
                "num_nodes out, or start one process to train one model"
            )
        self.options = {"devices": given["devices"], "num_nodes": given["num_nodes"], "strategy": strategy}
        if self.n > 1:
            atexit.register(_disconnect)

    @property
    def first(self) -> bool:
        """Whether this process is the first of them, or the parent that started them and has none of their work."""
        return self.n == 1 or not distributed.is_initialized() or distributed.get_rank() == 0

    @property
    def leads(self) -> bool:
        """Whether this process is the first of those that have been started before."""
        started = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
        return self.n == 1 or next((os.environ[name] for name in started if name in os.environ), "0") == "0"

    @property
    def shows(self) -> bool:
        """Whether a progress bar of this process sees the steps; the parent of spawned processes takes none."""
        return self.leads and (self.n == 1 or self.options["strategy"]._start_method == "popen")

    def once(self, work: Callable[[], T], *parts: nn.Module) -> T:
        """Let the first process work, and give its result and these modules to the others; its error is that of all."""
        if self.n == 1 or not distributed.is_initialized():
            return work()
        answer: list[Any] = [None, (), ""]
        try:
            if self.first:
                answer[:2] = work(), [part.state_dict() for part in parts]
        except Exception as error:
            answer[2] = f"{type(error).__name__}: {error}"
            raise
        finally:
            distributed.broadcast_object_list(answer)
        found, states, failure = answer
        if failure:
            raise RuntimeError(f"the first process failed: {failure}")
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        result: T = found
        return result


def gathered(value: T, n: int) -> list[T]:
    """The value of each of `n` processes, in their order."""
    if n == 1:
        return [value]
    values: list[Any] = [None] * n
    distributed.all_gather_object(values, value)
    return values


def _disconnect() -> None:
    """End the connection of the processes; Gloo's threads may abort an interpreter that ends before them."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _strategy(given: Any, n: int) -> Any:
    """The strategy for the trainer."""
    if given == "auto":
        given = "auto" if n == 1 else "ddp_notebook" if hasattr(sys, "ps1") else "ddp"
    if given == "auto":
        return given
    if isinstance(given, DDPStrategy):
        lacking = [f"{name}={value}" for name, value in NEEDED.items() if given._ddp_kwargs.get(name) is not value]
        if lacking:
            raise ValueError(f"a DDPStrategy for these models needs {' and '.join(lacking)}; or set strategy='ddp'")
        return given
    name = given.removesuffix("_find_unused_parameters_true") if isinstance(given, str) else given
    if isinstance(given, Strategy) or name not in START:
        raise ValueError(
            f"strategy must be 'auto', {', '.join(map(repr, START))} or a DDPStrategy, because a minibatch may lack a "
            f"modality and each process holds the whole model; found {given!r}"
        )
    return DDPStrategy(start_method=START[name], gradient_as_bucket_view=True, **NEEDED)  # type: ignore[arg-type]


def _launched() -> tuple[int, int]:
    """Numbers of nodes and processes that torchrun, SLURM or Lightning have started."""
    n = int(os.environ.get("WORLD_SIZE") or 1)
    if n > 1 and "LOCAL_RANK" in os.environ:
        return n // int(os.environ.get("LOCAL_WORLD_SIZE") or n), n
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            raise ValueError(
                f"{name}={os.environ[name]}, but this process was not started by torchrun or srun, by which several "
                "processes find each other; start it by one of these, or alone"
            )
    by_hand = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # which Lightning takes for one process
    step = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    n = int(os.environ.get("SLURM_NTASKS") or 1) if step == 1 and not by_hand else step
    if n == 1 or (step == 1 and "SLURM_STEP_NUM_TASKS" in os.environ):
        return 1, 1
    if step == 1:
        raise ValueError(f"SLURM has {n} tasks for this job, but this process is not one of them; start it by srun")
    if by_hand or "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ValueError(
            f"SLURM started {n} tasks, which do not find each other; submit a job that is not called 'bash' or "
            "'interactive', with --ntasks-per-node instead of --ntasks"
        )
    return int(os.environ.get("SLURM_NNODES") or 1), n
