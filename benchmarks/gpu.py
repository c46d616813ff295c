"""A GPU beside the CPU: whether results are equal, how often a step waits for the device, and what a step costs.

Loss, gradients and latent variables of every model are computed on both devices, with the same parameters and the same
noise, which is drawn on the CPU. Then MultiVI is trained on a simulated mosaic with minibatches of several sizes: time
of a step, peak memory, and the operations for which the host waits for the device. With --peer, scvi-tools' MULTIVI is
timed beside it. All of it is meant to take under eight minutes; what the time (--minutes) does not suffice for is named
and left out. --device cpu tries the script itself.

    python benchmarks/gpu.py --peer --json gpu.json
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Figures, quiet, report
from lightning.pytorch.callbacks import Callback
from speed import simulated
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

#: Largest relative difference from the CPU; sums of thousands of float32 terms differ in their order.
TOLERANCE = {"loss": 1e-4, "gradient": 1e-2, "latent": 1e-3}
#: Operations after which the host waits for a device, as a profile names them.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")


class NoiseOfTheCPU(TorchDispatchMode):
    """Draws every random number on the CPU, and moves it to the device that asked for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        device = (kwargs or {}).get("device") or (tensors[0].device if tensors else torch.device("cpu"))

        def on(place: Any) -> Callable[[Any], Any]:
            return lambda value: value.to(place) if isinstance(value, torch.Tensor) else value

        there = {k: torch.device("cpu") if k == "device" else v for k, v in (kwargs or {}).items()}
        drawn = func(*tree_map(on("cpu"), args), **tree_map(on("cpu"), there))
        written = func._schema.arguments[0].alias_info if func._schema.arguments else None
        if written is not None and written.is_write:  # in place, e.g. Tensor.normal_
            return args[0].copy_(drawn)
        return tree_map(on(device), drawn)


def models() -> Iterator[tuple[str, Any]]:
    """A model of each kind, with start values from a few hundred cells."""
    import pandas as pd

    from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, simulate

    mosaic = Mosaic.from_mudata(simulate(600, {"rna": 500, "atac": 400, "adt": 30}, seed=0)[0], batch_key="batch")
    apart = Mosaic.from_mudata(simulate(600, {"rna": 500, "adt": 30}, patterns=["rna", "adt"], seed=0)[0])
    links = pd.DataFrame({name: apart.schema[name].features[:30] for name in ("rna", "adt")})
    treated = Mosaic.from_mudata(simulate(600, {"rna": 500}, treated=0.5, seed=0)[0])
    yield "MultiVI", MultiVI(mosaic)
    yield "MultiVI, adversary", MultiVI(mosaic, adversary=1.0)
    yield "ContrastiveVI", ContrastiveVI(treated.with_cohorts("condition", background="control"))
    yield "DiagVI", DiagVI(apart, links)
    yield "ScModal", ScModal(apart, links)


def evaluated(model: Any, device: torch.device) -> dict[str, np.ndarray]:
    """Loss, gradients and latent variables of a model on a device."""
    from pyromosaic.data import measured
    from pyromosaic.program import unannounced
    from pyromosaic.train import MosaicELBO

    model.to(device)
    objective = MosaicELBO()(model.model, model.guide)
    objective.zero_grad()
    minibatch = measured(model.mosaic, model.mosaic.find(None)).to(device)
    torch.manual_seed(0)
    with NoiseOfTheCPU(), unannounced():
        loss = objective(minibatch, 0.5) / minibatch.n_cells
        loss.backward()
    gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return {
        "loss": loss.detach().cpu().numpy(),
        "gradient": torch.cat(gradients).cpu().numpy(),
        "latent": model.get_latent_representation().to_numpy(),
    }


def compare(device: torch.device) -> tuple[Figures, list[str]]:
    """Largest differences from the CPU, relative to the largest value there; and those above the tolerance."""
    figures, wrong = {}, []
    for name, model in models():
        if hasattr(model, "scores"):
            model.prepare(model.mosaic)
        here, there = evaluated(model, torch.device("cpu")), evaluated(model, device)
        for what, value in here.items():
            figure = float(abs(there[what] - value).max() / abs(value).max())
            figures[f"{name}: {what}"] = figure
            if not figure <= TOLERANCE[what]:
                wrong.append(f"{name}: the {what} differs by {figure:.2g}; accepted: {TOLERANCE[what]:g}")
    return figures, wrong


class Clock(Callback):
    """Times of epochs, once the device has done its work, and its peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends, self.n_steps = device, [], 0

    def on_train_epoch_start(self, trainer: Any, plan: Any) -> None:
        """Begin to count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_epoch_end(self, trainer: Any, plan: Any) -> None:
        """Note the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())
        self.n_steps = int(trainer.num_training_batches)

    def figures(self, size: int) -> Figures:
        """Milliseconds of a step, and megabytes."""
        found = {f"ms a step of {size} cells": 1e3 * float(np.median(np.diff(self.ends))) / self.n_steps}
        if self.device.type == "cuda":
            found[f"peak MB on the device, {size} cells"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return found


class Waits(Callback):
    """Operations for which the host waits in one epoch."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.n_steps = 0

    def on_train_start(self, trainer: Any, plan: Any) -> None:
        """Begin to record."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self.profile = torch.profiler.profile(activities=activities)
        self.profile.start()

    def on_train_batch_end(self, trainer: Any, plan: Any, *minibatch: Any) -> None:
        """Count the step."""
        self.n_steps += 1

    def on_train_end(self, trainer: Any, plan: Any) -> None:
        """Count what was recorded."""
        self.profile.stop()
        for event in self.profile.key_averages():
            self.counts[event.key] += event.count

    def figures(self) -> Figures:
        """Number of waits a step, by operation."""
        return {f"{name} a step": self.counts[name] / self.n_steps for name in WAITS if self.counts[name]}


@contextmanager
def left_out(what: str, until: float) -> Iterator[bool]:
    """Whether there is time left; says what is left out if not."""
    enough = time.perf_counter() < until
    if not enough:
        print(f"{what}: left out, because the time is over")
    yield enough


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …, or cpu to try the script")
    parser.add_argument("--cells", type=int, default=40_000, help="of the simulated mosaic")
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--proteins", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--epochs", type=int, default=3, help="for each size; the first is not counted")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=False, help="also time scvi-tools")
    parser.add_argument("--minutes", type=float, default=7.5, help="begin nothing new after this time")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use here; --device cpu tries the script without one")
    until, device = time.perf_counter() + 60 * options.minutes, torch.device(options.device)
    quiet()
    import warnings

    warnings.filterwarnings("ignore")
    figures, wrong = compare(device)
    from pyromosaic import Mosaic, MultiVI

    mdata = simulated(options.cells, options.genes, options.proteins, seed=0)
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    place: dict[str, Any] = {"accelerator": "cpu"}
    if device.type == "cuda":
        place = {"accelerator": "gpu", "devices": [device.index or 0]}
    ours = {"validation": 0.0, "sleep_steps": 0, "progress_bar": False} | place
    waits = Waits()
    MultiVI(mosaic).train(1, batch_size=max(options.sizes), callbacks=[waits], **ours)
    figures |= waits.figures()
    theirs: Figures = {}
    for size in options.sizes:
        with left_out(f"steps of {size} cells", until) as enough:
            if enough:
                clock = Clock(device)
                MultiVI(mosaic).train(options.epochs, batch_size=size, callbacks=[clock], **ours)
                figures |= clock.figures(size)
        with left_out(f"scvi-tools, steps of {size} cells", until) as enough:
            if enough and options.peer:
                import scvi_tools

                clock = Clock(device)
                train = {"early_stopping": False, "batch_size": size, "callbacks": [clock], **place}
                scvi_tools.multivi(mdata, "batch", options.epochs, 0, **train)
                theirs |= clock.figures(size)
    runs = {"pyromosaic": [figures]} | ({"scvi-tools": [theirs]} if options.peer else {})
    report(f"MultiVI on {device}, and all models beside the CPU", runs, vars(options), options.json)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
