"""scMODAL on modalities whose pairing is hidden, by the default program or the reference's, and what a step costs.

Data are hidden as in `diagvi_unpaired.py`: every measurement is a cell of its own, in random order, without its labels.
Beside the model stand the scores of the linkage from which its anchors come, and with ``--control`` the same with every
feature's values shuffled over cells, which must come out at chance. Last, a training step of the reference is timed,
with its kernels from inner products and from differences (cells × cells × features).

    python benchmarks/scmodal_unpaired.py
    python benchmarks/scmodal_unpaired.py --reference --steps 1000
"""

import time
from argparse import Namespace
from typing import Any

import pandas as pd
from common import Figures, arguments, isolated, measured_cost, quiet, report
from diagvi_unpaired import load, quality


def ours(options: Namespace, seed: int) -> Figures:
    """Train and judge this package's ScModal."""
    quiet()
    import torch

    from pyromosaic import Mosaic, ScModal
    from pyromosaic.guidance import GuidanceGraph

    torch.set_num_threads(options.threads)
    adatas, labels, table = load(options, seed)
    mosaic = Mosaic.from_anndata(adatas, batch_key=options.batch_key)
    graph = GuidanceGraph.from_table(mosaic, table, drop_absent=True)
    settings: dict[str, Any] = {}
    training: dict[str, Any] = {"n_epochs": options.epochs}
    if options.reference:
        preset = ScModal.presets["reference"]
        settings, training = dict(preset.options), {**preset.training, "max_steps": options.steps}
    model = ScModal(mosaic, graph, seed=seed, **settings)
    with measured_cost() as cost:
        model.train(**training, seed=seed, progress_bar=False)

    def by_cell(table: pd.DataFrame, name: str) -> pd.DataFrame:
        own = table[mosaic.modalities[name].present]
        return own.set_axis(own.index.str.removeprefix(f"{name}:"))

    latent = {name: by_cell(model.get_latent_representation(), name) for name in adatas}
    figures = quality(latent, labels)
    if model.scores:
        scores = pd.DataFrame(model.scores.values.numpy(), mosaic.obs_names)
        figures |= quality({name: by_cell(scores, name) for name in adatas}, labels, "linkage alone: ")
    return {**figures, "seconds in all": cost.seconds, "peak memory, MB": cost.peak_mb}


def steps(options: Namespace, seed: int, naive: bool) -> Figures:
    """Cost of training steps of the reference; `naive` forms differences of all pairs of cells in its kernels."""
    quiet()
    import torch

    from pyromosaic import Mosaic, ScModal
    from pyromosaic.guidance import GuidanceGraph
    from pyromosaic.penalties import geometry

    torch.set_num_threads(options.threads)
    if naive:
        geometry.squared_distances = lambda x: (x.unsqueeze(1) - x).square().sum(-1)
    adatas, _, table = load(options, seed)
    mosaic = Mosaic.from_anndata(adatas, batch_key=options.batch_key)
    graph = GuidanceGraph.from_table(mosaic, table, drop_absent=True)
    preset = ScModal.presets["reference"]
    model = ScModal(mosaic, graph, **preset.options)
    training = {**preset.training, "progress_bar": False}
    model.train(**training | {"max_steps": 1})
    start = time.perf_counter()
    with measured_cost() as cost:
        model.train(**training | {"max_steps": options.timed_steps})
    seconds = time.perf_counter() - start
    return {"seconds a step": seconds / options.timed_steps, "peak memory, MB": cost.peak_mb}


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--drop", nargs="*", default=[], help="labels whose cells are left out")
    parser.add_argument(
        "--min-share", type=float, default=0.0, help="use regions seen in more than this share of cells"
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", action="store_true", help="the reference's program and weights instead of ours")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps of the reference")
    parser.add_argument("--timed-steps", type=int, default=0, help="steps of the reference to time; 0 for none")
    parser.add_argument("--control", action="store_true", help="shuffle every feature over cells: chance level")
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
