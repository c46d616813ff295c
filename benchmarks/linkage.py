"""Linkage of two modalities whose pairing is hidden: ways of matching, with upper bounds and chance levels.

Every cell with both modalities counts as two; FOSCTTM is over these copies, label transfer over all cells. Systems with
more information than a linkage may have are marked: ``labels (supervised)``, ``pairs (oracle)``. ``shuffled features``
is the chance level. ``transport`` has all links, ``40 links`` to ``no links`` have fewer; ``variational`` is linear,
``deep`` is not. ``--simulate`` measures time and memory on large sparse data instead, and ``--warnings`` counts how
often `cca` warns of right, exchanged and random links in simulated data.

    python benchmarks/linkage.py
    python benchmarks/linkage.py --data snare_cortex.h5mu --second atac --min-share 0.005 --label-key cell_class \
        --leave-out Mis
    python benchmarks/linkage.py --data snare_cortex.h5mu --second atac --activity --label-key cell_class \
        --leave-out Mis
    python benchmarks/linkage.py --simulate 100000 20000
    python benchmarks/linkage.py --warnings --seeds 20
"""

from argparse import Namespace
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, measured_cost, quiet, read, report
from multivi_mosaic import gene_activity
from scipy import sparse

SYSTEMS: dict[str, dict[str, Any]] = {
    "transport": {},
    "mutual": {"match": "mutual"},
    "assignment": {"match": "assignment"},
    "start: links": {"start": "links"},
    "start: diagonal": {"start": "diagonal"},
    "start: geometry": {"start": "geometry"},
    "40 links": {},
    "20 links": {},
    "10 links": {},
    "no links": {},
    "shuffled features": {},
    "labels (supervised)": {},
    "pairs (oracle)": {},
    "variational": {},
    "deep": {"n_hidden": 64},
    "variational, pairs (oracle)": {},
    "deep, pairs (oracle)": {"n_hidden": 64},
}


def load(options: Namespace) -> tuple[Any, pd.DataFrame]:
    """The two modalities without unlabelled cells, and the table of links."""
    import mudata

    from pyromosaic import protein_gene_links

    whole = read(options)
    parts = {}
    for name in (options.first, options.second):
        labels = whole.mod[name].obs[options.label_key].astype(str)
        parts[name] = whole.mod[name][(labels != options.leave_out).to_numpy()].copy()
    second = parts[options.second]
    if options.activity:
        parts[options.second] = gene_activity(second)
        shared = parts[options.first].var_names.intersection(parts[options.second].var_names)
        return mudata.MuData(parts), pd.DataFrame({options.first: shared, options.second: shared})
    if options.min_share:
        opened = np.asarray((second.X > 0).mean(axis=0)).ravel()
        second = parts[options.second] = second[:, opened > options.min_share].copy()
    if "gene_links" in second.varm:
        lies_at = sparse.coo_array(second.varm["gene_links"])
        genes = np.asarray(second.uns["gene_links_columns"])[lies_at.col]
        table = pd.DataFrame({options.first: genes, options.second: second.var_names.to_numpy()[lies_at.row]})
        del second.varm["gene_links"]
    else:
        table = protein_gene_links() if options.links is None else pd.read_csv(options.links)
    return mudata.MuData(parts), table


def run(options: Namespace, system: str, seed: int) -> Figures:
    """Link and judge."""
    quiet()
    from pyromosaic import Mosaic, linkage, metrics

    data, table = load(options)
    modalities = (options.first, options.second)
    rng = np.random.default_rng(seed)
    if system == "shuffled features":
        second = data.mod[options.second]
        second.X = sparse.csr_matrix(rng.permuted(second.X.toarray(), axis=0))
    kinds = {options.first: "nb", options.second: "nb"} if options.activity else None
    mosaic = Mosaic.from_mudata(data, kinds, batch_key=options.batch_key)
    cells = [mosaic.obs_names[mosaic.modalities[name].present] for name in modalities]
    labels = [data.mod[n].obs[options.label_key].astype(str).loc[c] for n, c in zip(modalities, cells, strict=True)]
    both = cells[0].intersection(cells[1])
    known = linkage.links_from_table(mosaic, modalities, table)
    hidden = rng.permutation(len(known)) < len(known) // 4
    arguments: dict[str, Any] = {"links": known, "seed": seed, **SYSTEMS[system]}
    if system.removesuffix(" links").isdigit():
        arguments["links"] = known.take(rng.permutation(len(known))[: int(system.removesuffix(" links"))])
    elif system == "no links":
        arguments["links"] = None
    elif system == "labels (supervised)":
        arguments["correspondence"] = linkage.Correspondence.from_labels(*labels)
        arguments["n_components"] = min(labels[0].nunique(), labels[1].nunique()) - 1
    elif system.endswith("pairs (oracle)"):
        rows = [c.get_indexer(both) for c in cells]
        arguments["correspondence"] = linkage.Correspondence.from_pairs(*rows, (len(cells[0]), len(cells[1])))
    method = linkage.variational_cca if system.startswith(("variational", "deep")) else linkage.cca
    with measured_cost() as cost:
        link = method(mosaic, modalities, **arguments)
    x, y = (link.scores[name] for name in modalities)
    transfer = metrics.label_transfer_both_ways(x, labels[0], y, labels[1])
    figures = {
        "FOSCTTM": metrics.foscttm(x.loc[both], y.loc[both]),
        f"transfer {options.first} -> {options.second}": transfer.x_to_y,
        f"transfer {options.second} -> {options.first}": transfer.y_to_x,
        "components": len(link.correlations),
    }
    if link.agreement:
        figures["left-out links' correlation"] = max(max(a) for a in link.agreement.values())
        figures["rounds"] = max((max(a), int(np.argmax(a)) + 1) for a in link.agreement.values())[1]
    figures |= {"seconds": cost.seconds, "peak memory, MB": cost.peak_mb}
    if system in ("transport", "variational"):
        part = method(mosaic, modalities, known.take(~hidden), seed=seed)
        found = part.feature_links()
        partners = found[found["correlation"] > 0].groupby(options.first).head(5)  # sorted, strongest first
        precision, recall = linkage.link_recovery(partners, known.take(hidden))
        figures |= {"hidden links: precision of 5 best partners": precision, "  recall": recall}
    return figures


def large(n_cells: int, n_genes: int) -> Figures:
    """Time and memory on sparse counts of 7 % density, and 200 proteins in as many cells."""
    quiet()
    import anndata

    from pyromosaic import Mosaic, linkage

    rng = np.random.default_rng(0)
    kind = rng.integers(0, 10, n_cells)

    def counts(width: int, per_cell: int, prefix: str) -> Any:
        own = rng.random((n_cells, per_cell), dtype=np.float32) < 0.2
        columns = rng.integers(0, width // 10, (n_cells, per_cell), dtype=np.int32) * 10
        columns += np.where(own, kind[:, None], rng.integers(0, 10, (n_cells, per_cell), dtype=np.int32)).astype(
            np.int32
        )
        pointers = np.arange(n_cells + 1) * per_cell
        values = np.ones(n_cells * per_cell, np.float32)
        matrix = sparse.csr_matrix((values, columns.ravel(), pointers), shape=(n_cells, width))
        del own, columns
        matrix.sum_duplicates()
        return anndata.AnnData(matrix, var=pd.DataFrame(index=[f"{prefix}{i}" for i in range(width)]))

    mosaic = Mosaic.from_anndata({"rna": counts(n_genes, n_genes * 7 // 100, "g"), "adt": counts(200, 60, "p")})
    table = pd.DataFrame({"rna": [f"g{i}" for i in range(100)], "adt": [f"p{i}" for i in range(100)]})
    with measured_cost() as made:
        pass
    with measured_cost() as cost:
        link = linkage.cca(mosaic, ("rna", "adt"), table)
    x, y = (scores.to_numpy() for scores in link.scores.values())
    nearest = (x[:1000] @ y.T).argmax(axis=1)
    return {
        "measurements, million": mosaic.modalities["rna"].matrix.source.nnz / 1e6,
        "kinds matched": float(np.mean(kind[nearest] == kind[:1000])),
        "seconds": cost.seconds,
        "peak memory before, MB": made.peak_mb,
        "peak memory, MB": cost.peak_mb,
    }


def warned(seed: int) -> dict[str, float]:
    """Whether `cca` warns, for right links and for links whose partners are exchanged or random."""
    import warnings

    quiet()
    from pyromosaic import Mosaic, linkage, simulate

    found = {}
    mdata, truth = simulate(500, {"rna": 100, "adt": 40}, patterns=["rna", "adt"], links={"adt": 1.0}, seed=seed)
    mosaic, rng = Mosaic.from_mudata(mdata, batch_key="batch"), np.random.default_rng(seed)
    for n in (4, 6, 8, 12, 20, 40):
        chosen = truth.links.sample(n, random_state=seed)
        right = pd.DataFrame({"rna": chosen["gene"].to_numpy(), "adt": chosen["feature"].to_numpy()})
        genes = rng.choice(mdata["rna"].var_names, n, replace=False)
        tables = {
            "right": right,
            "exchanged": right.assign(adt=np.roll(right["adt"], 1)),
            "random": right.assign(rna=genes),
        }
        for kind, links in tables.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                linkage.cca(mosaic, ("rna", "adt"), links, n_pcs=10)
            found[f"{n} {kind} links"] = float(any("the right cells" in str(w.message) for w in caught))
    return found


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--first", default="rna", help="first modality")
    parser.add_argument("--second", default="adt", help="second modality")
    parser.add_argument(
        "--min-share", type=float, default=0.0, help="use features of the second found in more than this share of cells"
    )
    parser.add_argument("--activity", action="store_true", help="sum the regions of each gene, and link genes by name")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--leave-out", help="label of cells to leave out")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), help="what to run")
    parser.add_argument("--simulate", type=int, nargs=2, metavar=("CELLS", "GENES"), help="measure on simulated data")
    parser.add_argument("--warnings", action="store_true", help="count warnings of doubtful links in simulated data")
    options = parser.parse_args()
    if options.warnings:
        runs = {"share of runs with a warning": [warned(20_000 + seed) for seed in range(options.seeds)]}
        report("Warnings of doubtful links", runs, vars(options), options.json)
        return
    if options.simulate:
        title = "Linkage of {} cells, {} genes".format(*options.simulate)
        report(title, {"transport": [isolated(large, *options.simulate)]}, vars(options), options.json)
        return
    runs = {
        system: [isolated(run, options, system, seed) for seed in range(options.seeds)] for system in options.systems
    }
    title = "Linkage of " + ("the PBMC mosaic" if options.data is None else options.data.stem)
    report(title, runs, vars(options), options.json)


if __name__ == "__main__":
    main()
