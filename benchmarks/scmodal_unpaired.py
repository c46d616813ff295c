"""scMODAL on modalities whose pairing is hidden, with the default or the reference program, and the cost of a step.

Data are hidden as in `diagvi_unpaired.py`: every measurement is a separate cell, in random order and without its
labels. For comparison there are the scores of the linkage from which the anchors come and, with ``--control``, the same
data with every feature shuffled over cells, where results must be at chance. ``--leave-out`` hides a share of the links
from the model: their agreement between nearest cells evaluates it without pairs or labels, and they are searched among
the inferred links. Finally, the time and memory of a training step of the reference are measured, with kernels from
inner products and from differences (cells × cells × features).

    python benchmarks/scmodal_unpaired.py
    python benchmarks/scmodal_unpaired.py --leave-out 0.25 --options '{"pull": 80}'
    python benchmarks/scmodal_unpaired.py --reference --steps 1000
"""

import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, measured_cost, model_options, quiet, report
from diagvi_unpaired import as_mosaic, load, quality


def ours(options: Namespace, seed: int) -> Figures:
    """Train and evaluate this package's ScModal."""
    quiet()
    import torch

    from pyromosaic import ScModal, linkage
    from pyromosaic.guidance import GuidanceGraph

    torch.set_num_threads(options.threads)
    adatas, labels, table = load(options, seed)
    first, second = adatas
    mosaic = as_mosaic(options, adatas)
    links = linkage.links_from_table(mosaic, (first, second), table)
    order = np.random.default_rng(seed).permutation(len(links))
    left_out = order < round(options.leave_out * len(links))
    kept = links.take(order < options.n_links) if options.n_links is not None else links.take(~left_out)
    settings: dict[str, Any] = {}
    training: dict[str, Any] = {"n_epochs": options.epochs, "validation": options.validation}
    if options.reference:
        preset = ScModal.presets["reference"]
        settings, training = dict(preset.options), {**preset.training, "max_steps": options.steps}
    if options.n_links == 0:
        settings["linkage"] = None
    graph = GuidanceGraph.from_table(mosaic, kept.pairs) if len(kept) else None
    model = ScModal(mosaic, graph, seed=seed, **settings | model_options(options.options))

    def by_cell(table: pd.DataFrame, name: str) -> pd.DataFrame:
        own = table[mosaic.modalities[name].present]
        return own.set_axis(own.index.str.removeprefix(f"{name}:"))

    figures: Figures = {}
    if options.every:

        def judge(trainer: Any, plan: Any) -> None:
            if trainer.global_step % options.every == 0 and f"FOSCTTM, step {trainer.global_step}" not in figures:
                latent = model.get_latent_representation()
                now = quality({name: by_cell(latent, name) for name in adatas}, labels)
                figures.update({f"{k}, step {trainer.global_step}": v for k, v in now.items()})
                print(figures, flush=True)

        from lightning.pytorch.callbacks import LambdaCallback

        training["callbacks"] = [LambdaCallback(on_train_batch_end=lambda trainer, plan, *_: judge(trainer, plan))]
    with measured_cost() as cost:
        model.train(**training, seed=seed, progress_bar=False)
    latent = {name: by_cell(model.get_latent_representation(), name) for name in adatas}
    figures |= quality(latent, labels)
    if left_out.any():
        others = links.take(left_out)
        figures["agreement of left-out links"] = model.link_agreement(others.pairs)
        found = model.feature_links(first, second, level=1.0)
        partners = found[found["correlation"] > 0].groupby(first).head(5)  # sorted, strongest first
        precision, recall = linkage.link_recovery(partners, others)
        figures |= {"left-out links: precision of 5 best partners": precision, "  recall": recall}
        beyond = model.feature_links(first, second)
        precision, recall = linkage.link_recovery(beyond[beyond["correlation"] > 0], others)
        figures |= {"pairs beyond chance": len(beyond), "  precision": precision, "  recall of them": recall}
    if model.scores:
        scores = pd.DataFrame(model.scores.values.numpy(), mosaic.obs_names)
        figures |= quality({name: by_cell(scores, name) for name in adatas}, labels, "linkage alone: ")
    return {**figures, "seconds in total": cost.seconds, "peak memory, MB": cost.peak_mb}


def steps(options: Namespace, seed: int, naive: bool) -> Figures:
    """Cost of training steps of the reference; `naive` computes kernels from differences of all pairs of cells."""
    quiet()
    import torch

    from pyromosaic import ScModal
    from pyromosaic.data import measured
    from pyromosaic.guidance import GuidanceGraph
    from pyromosaic.measurement import encoded
    from pyromosaic.penalties import kernels
    from pyromosaic.train import MosaicELBO

    torch.set_num_threads(options.threads)
    if naive:
        kernels.squared_distances = lambda x: (x.unsqueeze(1) - x).square().sum(-1)
    adatas, _, table = load(options, seed)
    mosaic = as_mosaic(options, adatas)
    graph = GuidanceGraph.from_table(mosaic, table, drop_absent=True)
    preset = ScModal.presets["reference"]
    model = ScModal(mosaic, graph, **preset.options)
    training = {**preset.training, "progress_bar": False}
    model.train(**training | {"max_steps": 1})
    start = time.perf_counter()
    with measured_cost() as cost:
        model.train(**training | {"max_steps": options.timed_steps})
    seconds = time.perf_counter() - start

    rows = [np.flatnonzero(mosaic.modalities[name].present)[:500] for name in adatas]
    minibatch = measured(mosaic, np.concatenate(rows))
    model.model.train()
    model.guide.train()
    term = model.guide.penalties[-1]

    def whole() -> None:
        MosaicELBO().differentiable_loss(model.model, model.guide, minibatch).backward()

    def geometry() -> None:
        term(encoded(model.guide.modalities, minibatch)[0], minibatch).backward()

    return {
        "seconds per step": seconds / options.timed_steps,
        "whole step: peak above the level before, MB": peak(whole),
        "geometry and encoders: peak above the level before, MB": peak(geometry),
        "peak memory of the process, MB": cost.peak_mb,
    }


def peak(step: Callable[[], None]) -> float:
    """Largest net allocation (MB) by torch on the CPU during a step, after a first step."""
    import torch

    step()
    with warnings.catch_warnings(action="ignore"):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return float(np.cumsum([size for _, size in changes]).max()) / 2**20


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--drop", nargs="*", default=[], help="labels of cells to leave out")
    parser.add_argument(
        "--min-share", type=float, default=0.0, help="use regions open in more than this share of cells"
    )
    parser.add_argument("--activity", action="store_true", help="sum the regions of each gene, and link genes by name")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--validation", type=float, default=0.1, help="share of cells held out of training; none in the reference"
    )
    parser.add_argument("--reference", action="store_true", help="use the program and weights of the reference")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps of the reference")
    parser.add_argument("--timed-steps", type=int, default=0, help="steps of the reference to time; 0 for none")
    parser.add_argument("--every", type=int, default=0, help="also evaluate every so many steps; 0 for the end only")
    parser.add_argument("--n-links", type=int, help="number of links, chosen at random, to give to the model")
    parser.add_argument("--leave-out", type=float, default=0.0, help="share of the links to hide from the model")
    parser.add_argument("--options", default="{}", help="other options of the model, as JSON")
    parser.add_argument("--control", action="store_true", help="shuffle every feature over cells, as a chance level")
    options = parser.parse_args()
    name = "the PBMC mosaic" if options.data is None else options.data.stem
    if options.seeds:
        runs = {"pyromosaic": [isolated(ours, options, seed) for seed in range(options.seeds)]}
        report(f"scMODAL on {name}, pairing hidden", runs, vars(options), options.json)
    if options.timed_steps:
        cost = {
            "inner products": [isolated(steps, options, 0, False)],
            "differences": [isolated(steps, options, 0, True)],
        }
        path = None if options.json is None else options.json.with_suffix(".steps.json")
        report(f"a training step on {name}", cost, vars(options), path)


if __name__ == "__main__":
    main()
