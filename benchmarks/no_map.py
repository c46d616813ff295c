"""Alignment without links, pairs or labels: how good it is, how sure it is, and what little knowledge adds.

Every cell with both modalities counts as two; FOSCTTM is over these copies, transfer over labels that both modalities
have. ``stability`` is what `linkage.cca` says of itself, ``warned`` whether it gave a warning. In ``unrelated``, the
features of the second modality are permuted cell by cell. ``--calibrate`` compares the stability of simulated designs
with the truth: a matching is right if at least 80 % of the cells (of types that both modalities have) are of a type
that has most of its partners in the same type. ``--large`` measures processor time and memory.

    python benchmarks/no_map.py --seeds 5
    python benchmarks/no_map.py --data snare_cortex.h5mu --second atac --min-share 0.005 --label-key cell_class \
        --leave-out Mis --systems nothing unrelated
    python benchmarks/no_map.py --calibrate 50
    python benchmarks/no_map.py --large 20000
"""

import time
import warnings
from argparse import Namespace
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, measured_cost, quiet, report
from linkage import load
from scipy import sparse

SHARES = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04])  # the fifth type is in the first modality only
SYSTEMS = ("nothing", "1 link", "5 links", "5 pairs", "10 pairs", "20 pairs", "1 population", "unrelated")


def aligned(mdata: Any, modalities: tuple[str, str], labels: str, batch: str, seed: int, **known: Any) -> Figures:
    """Align and judge."""
    quiet()
    from pyromosaic import Mosaic, linkage, metrics

    mosaic = Mosaic.from_mudata(mdata, batch_key=batch)
    if "links" in known:
        known["links"] = linkage.links_from_table(mosaic, modalities, known["links"])
        order = np.random.default_rng(seed).permutation(len(known["links"]))
        known |= {"links": known["links"].take(order[: known.pop("n_links")]), "start": "geometry"}
    start = time.process_time()
    with measured_cost() as cost, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        link = linkage.cca(mosaic, modalities, seed=seed, **known)
    x, y = (link.scores[name] for name in modalities)
    kinds = [mdata.mod[n].obs[labels].astype(str).loc[link.scores[n].index] for n in modalities]
    shared = [kind.isin(other) for kind, other in (kinds, kinds[::-1])]
    transfer = metrics.label_transfer_both_ways(x[shared[0]], kinds[0][shared[0]], y, kinds[1]).x_to_y
    back = metrics.label_transfer_both_ways(x, kinds[0], y[shared[1]], kinds[1][shared[1]]).y_to_x
    both = x.index.intersection(y.index)
    matched = matched_populations(link.by_shape.chosen.correspondence, [kind.to_numpy() for kind in kinds])
    return {
        "FOSCTTM": metrics.foscttm(x.loc[both], y.loc[both]) if len(both) else float("nan"),
        "transfer": transfer,
        "transfer back": back,
        "populations matched": matched,
        "largest class": max(kind.value_counts(normalize=True).iloc[0] for kind in kinds),
        "stability": link.by_shape.stability,
        "warned": float(any("share nothing" in str(w.message) or "not sure" in str(w.message) for w in caught)),
        "changed by what is known": link.by_shape.changed,
        "processor seconds": time.process_time() - start,
        "peak memory, MB": cost.peak_mb,
    }


def matched_populations(correspondence: Any, kinds: list[np.ndarray]) -> float:
    """Share of the cells of shared types whose type has most of its partners in the same type; the worse direction."""
    types = np.intersect1d(*kinds)
    each = [pd.get_dummies(pd.Categorical(kind)).astype(float) for kind in kinds]
    size = [np.bincount(groups) for groups in correspondence.groups]
    first, second = (
        sparse.coo_array((np.ones(len(groups)), (groups, np.arange(len(groups))))).tocsr() @ labels.to_numpy()
        for groups, labels in zip(correspondence.groups, each, strict=True)
    )
    plan = correspondence.plan / np.outer(*size)
    table = pd.DataFrame(first.T @ plan @ second, each[0].columns, each[1].columns)
    found = []
    for partners, kind in ((table, kinds[0]), (table.T, kinds[1])):
        right = partners.loc[types].idxmax(axis=1) == types
        found.append(float(right.reindex(kind[np.isin(kind, types)]).mean()))
    return min(found)


def run(options: Namespace, system: str, seed: int) -> Figures:
    """One alignment of given data."""
    mdata, table = load(options)
    first, second = modalities = (options.first, options.second)
    rng = np.random.default_rng(seed)
    names = mdata[first].obs_names.intersection(mdata[second].obs_names)
    known: dict[str, Any] = {}
    number = int(system.split()[0]) if system[0].isdigit() else 0
    if system.endswith(("link", "links")):
        known = {"links": table, "n_links": number}
    elif system.endswith("pairs"):
        chosen = rng.choice(names, number, replace=False)
        known = {"pairs": pd.DataFrame({first: chosen, second: chosen})}
    elif system.endswith("population"):
        kinds = {n: mdata[n].obs[options.label_key].astype(str) for n in modalities}
        kind = rng.choice(np.intersect1d(*(k.unique() for k in kinds.values())))
        known = {"population": {n: k.index[k == kind] for n, k in kinds.items()}}
    elif system == "unrelated":
        matrix = sparse.csr_matrix(mdata[second].X).toarray()
        mdata[second].X = sparse.csr_matrix(rng.permuted(matrix, axis=0))
    return aligned(mdata, modalities, options.label_key, options.batch_key, seed, **known)


def simulated(seed: int) -> Figures:
    """One simulated design: 8 types of unequal proportions, one of which is private."""
    from pyromosaic import simulate

    second, width = (("adt", 40), ("atac", 400))[seed % 2]
    mdata, _ = simulate(
        1600,
        {"rna": 200, second: width},
        patterns=["rna", second],
        types=list(SHARES),
        private={"type4": ["rna"]},
        separation=(1.5, 2.0, 3.0)[seed % 3],
        keep_means=False,
        seed=seed,
    )
    return aligned(mdata, ("rna", second), "celltype", "batch", 0)


def calibration(seeds: range) -> Figures:
    """Of the designs by stability, the share that is right."""
    found = []
    for seed in seeds:
        found.append(simulated(seed))
        print(seed, {name: round(value, 2) for name, value in found[-1].items()}, flush=True)
    designs = pd.DataFrame(found)
    designs["right"] = designs["populations matched"] >= 0.8
    sure = designs["warned"] == 0
    above = designs["stability"] >= 0.9
    return {
        "designs": len(designs),
        "right": designs["right"].mean(),
        "transfer": designs["transfer"].mean(),
        "without a warning": sure.mean(),
        "right, of those without a warning": designs["right"][sure].mean(),
        "right, of those with a warning": designs["right"][~sure].mean(),
        "stability of at least 0.9": above.mean(),
        "right, of these": designs["right"][above].mean(),
        "processor seconds each": designs["processor seconds"].mean(),
    }


def large(n_cells: int) -> Figures:
    """Time and memory for `n_cells` cells of each modality."""
    from pyromosaic import simulate

    mdata, _ = simulate(
        2 * n_cells, {"rna": 500, "adt": 100}, patterns=["rna", "adt"], types=list(SHARES), keep_means=False
    )
    return aligned(mdata, ("rna", "adt"), "celltype", "batch", 0)


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--first", default="rna", help="first modality")
    parser.add_argument("--second", default="adt", help="second modality")
    parser.add_argument("--min-share", type=float, default=0.0, help="use features found in more than this share")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--leave-out", help="label of cells to leave out")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS, help="what is known")
    parser.add_argument("--calibrate", type=int, metavar="DESIGNS", help="compare stability with the truth")
    parser.add_argument("--first-design", type=int, default=1000, help="seed of the first simulated design")
    parser.add_argument("--large", type=int, metavar="CELLS", help="measure time and memory")
    options = parser.parse_args()
    options.activity = False
    if options.calibrate:
        seeds = range(options.first_design, options.first_design + options.calibrate)
        report("Simulated designs", {"all": [calibration(seeds)]}, vars(options), options.json)
    elif options.large:
        report("Large data", {"nothing": [isolated(large, options.large)]}, vars(options), options.json)
    else:
        runs = {s: [isolated(run, options, s, seed) for seed in range(options.seeds)] for s in options.systems}
        report("Alignment without a map", runs, vars(options), options.json)


if __name__ == "__main__":
    main()
