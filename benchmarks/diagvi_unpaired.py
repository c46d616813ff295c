"""DiagVI on modalities whose pairing is hidden, compared with scvi-tools' DIAGVI on the same data and links.

Every measurement is a separate cell, in random order and without its labels; pairing and labels are used only for
evaluation. For comparison there are the scores of the linkage from which the model starts and, with ``--control``, the
same data with every feature shuffled over cells, where results must be at chance.

    python benchmarks/diagvi_unpaired.py --peer
    python benchmarks/diagvi_unpaired.py --data snare_cortex.h5mu --min-share 0.005 --label-key cell_class --drop Mis
"""

from argparse import Namespace
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, measured_cost, quiet, read, report
from multivi_mosaic import gene_activity, open_regions


def load(options: Namespace, seed: int) -> tuple[dict[str, Any], dict[str, pd.Series], pd.DataFrame]:
    """Modalities with shuffled cells and without labels; the labels by cell; and the links between features."""
    from pyromosaic import protein_gene_links

    mdata = read(options)
    adatas = {
        name: adata[~adata.obs[options.label_key].isin(options.drop)].copy()
        for name, adata in open_regions(mdata, options.min_share).mod.items()
    }
    first, second = adatas
    if options.activity:
        adatas[second] = gene_activity(mdata[second][adatas[second].obs_names])
        shared = adatas[first].var_names.intersection(adatas[second].var_names)
        table = pd.DataFrame({first: shared, second: shared})
    elif options.data is None or options.links is not None:
        table = protein_gene_links() if options.links is None else pd.read_csv(options.links)
        table = table.rename(columns={"gene": first, "protein": second})
    else:
        linked = pd.DataFrame.sparse.from_spmatrix(
            adatas[second].varm["gene_links"], adatas[second].var_names, adatas[second].uns["gene_links_columns"]
        )
        rows, columns = linked.sparse.to_coo().coords
        table = pd.DataFrame({first: linked.columns[columns], second: linked.index[rows]})
    rng = np.random.default_rng(seed)
    labels, hidden = {}, {}
    for name, adata in adatas.items():
        labels[name] = adata.obs[options.label_key].astype(str)
        adata = adata[rng.permutation(adata.n_obs)].copy()
        adata.obs = adata.obs[[options.batch_key]].copy()
        if options.control:
            shuffled = adata.X.toarray()
            rng.permuted(shuffled, axis=0, out=shuffled)
            adata.X = shuffled
            adata = adata[shuffled.sum(axis=1) > 0].copy()
        hidden[name] = adata
    return hidden, labels, table


def as_mosaic(options: Namespace, adatas: dict[str, Any]) -> Any:
    """The modalities with their likelihoods; gene activities are counts."""
    from pyromosaic import Mosaic

    kinds = dict.fromkeys(adatas, "nb") if options.activity else None
    return Mosaic.from_anndata(adatas, kinds, batch_key=options.batch_key)


def quality(latent: dict[str, pd.DataFrame], labels: dict[str, pd.Series], prefix: str = "") -> Figures:
    """Alignment of the two modalities; latents are indexed by the true names of the cells."""
    from pyromosaic import metrics

    first, second = latent
    pairs = latent[first].index.intersection(latent[second].index)
    kinds = {name: labels[name][z.index] for name, z in latent.items()}
    transfer = metrics.label_transfer_both_ways(latent[first], kinds[first], latent[second], kinds[second])
    names = np.repeat([first, second], [len(latent[first]), len(latent[second])])
    return {
        f"{prefix}FOSCTTM": metrics.foscttm(latent[first].loc[pairs], latent[second].loc[pairs]),
        f"{prefix}transfer {first} -> {second}": transfer.x_to_y,
        f"{prefix}transfer {second} -> {first}": transfer.y_to_x,
        f"{prefix}modality enrichment (1 = mixed)": metrics.modality_enrichment(pd.concat(latent.values()), names),
    }


def ours(options: Namespace, seed: int) -> Figures:
    """Train and evaluate this package's DiagVI."""
    quiet()
    import torch

    from pyromosaic import DiagVI
    from pyromosaic.guidance import GuidanceGraph

    torch.set_num_threads(options.threads)
    adatas, labels, table = load(options, seed)
    mosaic = as_mosaic(options, adatas)
    graph = GuidanceGraph.from_table(mosaic, table, drop_absent=True)
    changes: dict[str, Any] = {"linkage": None} if options.no_linkage else {}
    training: dict[str, Any] = {}
    if options.reference:
        changes, training = map(dict, DiagVI.presets["reference"])
    model = DiagVI(mosaic, graph, seed=seed, **changes)
    with measured_cost() as cost:
        model.train(**(training | {"n_epochs": options.epochs}), seed=seed, progress_bar=False)

    def by_cell(table: pd.DataFrame, name: str) -> pd.DataFrame:
        own = table[mosaic.modalities[name].present]
        return own.set_axis(own.index.str.removeprefix(f"{name}:"))

    latent = {name: by_cell(model.get_latent_representation(), name) for name in adatas}
    figures = quality(latent, labels)
    if model.scores:
        scores = pd.DataFrame(model.scores.values.numpy(), mosaic.obs_names)
        figures |= quality({name: by_cell(scores, name) for name in adatas}, labels, "linkage alone: ")
    return {**figures, **_cost(cost.seconds, len(model.history), cost.peak_mb)}


def peer(options: Namespace, seed: int) -> Figures:
    """Train and evaluate scvi-tools' DIAGVI."""
    quiet()
    import scvi_tools
    import torch

    torch.set_num_threads(options.threads)
    adatas, labels, table = load(options, seed)
    likelihoods = {name: "nbmixture" if name == "adt" else "nb" for name in adatas}
    result = scvi_tools.diagvi(adatas, table, likelihoods, options.batch_key, options.peer_epochs, seed)
    latent = {name: pd.DataFrame(result.latents[name], index=adata.obs_names) for name, adata in adatas.items()}
    return {**quality(latent, labels), **_cost(result.seconds, result.epochs, result.peak_memory_mb)}


def _cost(seconds: float, epochs: int, peak_mb: float) -> Figures:
    return {
        "epochs": epochs,
        "seconds per epoch": seconds / epochs,
        "seconds in total": seconds,
        "peak memory, MB": peak_mb,
    }


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
    parser.add_argument("--peer-epochs", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", action="store_true", help="use the loss and weights of the reference")
    parser.add_argument("--no-linkage", action="store_true", help="without anchors and pull from the linkage")
    parser.add_argument("--control", action="store_true", help="shuffle every feature over cells, as a chance level")
    options = parser.parse_args()
    runs: dict[str, list[Figures]] = {"pyromosaic": []}
    if options.peer:
        runs["scvi-tools"] = []
    for seed in range(options.seeds):
        runs["pyromosaic"].append(isolated(ours, options, seed))
        if options.peer:
            runs["scvi-tools"].append(isolated(peer, options, seed))
    title = "DiagVI on " + ("the PBMC mosaic" if options.data is None else options.data.stem) + ", pairing hidden"
    report(title, runs, vars(options), options.json)


if __name__ == "__main__":
    main()
