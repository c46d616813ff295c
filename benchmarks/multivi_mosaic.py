"""MultiVI on a mosaic with hidden truth, compared with scvi-tools' MULTIVI on the same data and split.

``--hide N``: of the cells with all modalities, N lose one modality and N others another; imputed values are compared
with the hidden ones. ``--unpair SHARE``: this share of the cells is replaced by copies with one modality each (the
experiment of the MultiVI paper); the other copy holds the truth.

    python benchmarks/multivi_mosaic.py --hide 200 --peer
    python benchmarks/multivi_mosaic.py --data snare_cortex.h5mu --unpair 0.75 --min-share 0.005 --label-key cell_class
"""

from argparse import Namespace
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, measured_cost, model_options, quiet, read, report


def open_regions(mdata: Any, min_share: float) -> Any:
    """The same data with only the regions that are open in more than this share of the cells."""
    import mudata

    if not min_share:
        return mdata
    modalities = dict(mdata.mod.items())
    opened = np.asarray((modalities["atac"].X > 0).mean(axis=0)).ravel()
    return mudata.MuData(modalities | {"atac": modalities["atac"][:, opened > min_share].copy()})


def gene_activity(adata: Any) -> Any:
    """Chromatin by gene: the fragments of all regions of a gene."""
    import anndata
    from scipy import sparse

    genes = pd.DataFrame(index=np.asarray(adata.uns["gene_links_columns"]))
    return anndata.AnnData(sparse.csr_matrix(adata.X @ sparse.csr_matrix(adata.varm["gene_links"])), adata.obs, genes)


def load(options: Namespace, seed: int) -> tuple[Any, dict[str, Any]]:
    """The mosaic, and for each modality the hidden measurements, named by their cells."""
    from pyromosaic import hide, unpair

    whole = read(options)
    whole = open_regions(whole, options.min_share)
    if options.unpair is None:
        return hide(whole, dict.fromkeys(whole.mod, options.hide), seed)
    mosaic = unpair(whole, options.unpair, seed)
    truth = {}
    for name, adata in mosaic.mod.items():
        # A cell's measurement in one modality is the truth for its copies in the others.
        copies = adata[adata.obs_names.str.endswith(f":{name}")]
        for other in mosaic.mod:
            if other != name:
                hidden = copies.copy()
                hidden.obs_names = copies.obs_names.str.removesuffix(f":{name}") + f":{other}"
                truth[name] = hidden
    return mosaic, truth


def quality(mosaic: Any, truth: dict[str, Any], options: Namespace, latent: pd.DataFrame, imputed: Any) -> Figures:
    """All metrics of one trained system; `imputed(name, cells)` returns its expectation, cells × features."""
    from pyromosaic import metrics

    names = list(mosaic.mod)
    measured = pd.DataFrame({n: latent.index.isin(a.obs_names) for n, a in mosaic.mod.items()}, index=latent.index)
    pattern = measured.apply(lambda row: "+".join(measured.columns[row]), axis=1)
    labels = pd.concat([a.obs[options.label_key].astype(str) for a in mosaic.mod.values()])
    labels = labels[~labels.index.duplicated()].reindex(latent.index)
    figures = {
        "modality enrichment (1 = mixed)": metrics.modality_enrichment(latent, pattern),
        "  maximum": 1 / float((pattern.value_counts(normalize=True) ** 2).sum()),
        "label purity": metrics.label_purity(latent, labels),
    }
    for a, b in [(a, b) for a in names for b in names if a != b]:
        only_a, only_b = pattern == a, pattern == b
        for k in (1, 15):
            accuracy = metrics.label_transfer_accuracy(
                latent[only_a], labels[only_a], latent[only_b], labels[only_b], n_neighbors=k
            )
            figures[f"transfer {a} -> {b}, {k} NN"] = accuracy
    if options.unpair is not None:
        first, second = (latent[pattern == name] for name in names[:2])
        second = second.loc[first.index.str.removesuffix(f":{names[0]}") + f":{names[1]}"].set_axis(first.index)
        figures["rank distance of copies"] = metrics.neighbor_rank_distance(
            first, second, others=latent[pattern.str.contains(r"\+")]
        )
        figures["FOSCTTM of copies"] = metrics.foscttm(first, second)
    for name, hidden in truth.items():
        values = imputed(name, hidden.obs_names)
        counts = hidden.X.tocsr()
        if name == "atac":
            figures[f"{name} AUPRC"] = metrics.imputation_auprc(counts, values)
            figures["  share open"] = counts.nnz / np.prod(counts.shape)
            continue
        library = np.asarray(counts.sum(axis=1))
        if name == "rna":
            values = values * library
        figures[f"{name} Spearman, all entries"] = metrics.imputation_spearman(counts, values)
        per_feature = metrics.imputation_spearman(counts, values, per="feature")
        figures[f"{name} Spearman, mean of features"] = float(np.nanmean(per_feature))
        figures[f"{name} Spearman, median of features"] = float(np.nanmedian(per_feature))
        if name != "rna":
            profile = values / values.sum(axis=1, keepdims=True) * library
            per_feature = metrics.imputation_spearman(counts, profile, per="feature")
            figures[f"{name} Spearman at hidden size, median"] = float(np.nanmedian(per_feature))
    return figures


def ours(options: Namespace, seed: int) -> Figures:
    """Train and evaluate this package's MultiVI."""
    quiet()
    from pyromosaic import Mosaic, MultiVI

    data, truth = load(options, seed)
    mosaic = Mosaic.from_mudata(data, batch_key=options.batch_key)
    model = MultiVI(mosaic, seed=seed, **model_options(options.options))
    with measured_cost() as cost:
        model.train(options.epochs, seed=seed, progress_bar=False)
    latent = model.get_latent_representation()

    def imputed(name: str, cells: pd.Index) -> np.ndarray:
        if name == "atac":
            return model.get_accessibility_estimates(name, cells, factors=True).to_numpy()
        library = 1.0 if name == "rna" else None
        return model.get_imputed_values(name, cells, library=library, n_samples=None).mean.to_numpy()

    figures = quality(data, truth, options, latent, imputed)
    figures["held-out ELBO per cell"] = float(model.history["validation_elbo"].iloc[-1])
    reconstruction = -sum(model.history[f"validation_{name}"].iloc[-1] for name in data.mod)
    figures["held-out reconstruction per cell"] = float(reconstruction)
    return {**figures, **_cost(cost.seconds, len(model.history), cost.peak_mb)}


def peer(options: Namespace, seed: int) -> Figures:
    """Train and evaluate scvi-tools' MULTIVI."""
    quiet()
    import scvi_tools

    data, truth = load(options, seed)
    result = scvi_tools.multivi(data, options.batch_key, options.peer_epochs, seed)
    latent = pd.DataFrame(result.latent, index=data.obs_names)
    rows = pd.Series(np.arange(data.n_obs), index=data.obs_names)
    figures = quality(data, truth, options, latent, lambda name, cells: result.imputed[name][rows[cells]])
    if result.heldout_reconstruction is not None:
        figures["held-out reconstruction per cell"] = -result.heldout_reconstruction
    return {**figures, **_cost(result.seconds, result.epochs, result.peak_memory_mb)}


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
    parser.add_argument("--hide", type=int, default=200, help="number of cells from which to hide each modality")
    parser.add_argument("--unpair", type=float, help="share of cells to unpair instead of hiding")
    parser.add_argument(
        "--min-share", type=float, default=0.0, help="use regions open in more than this share of cells"
    )
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--peer-epochs", type=int, default=500)
    parser.add_argument("--options", default="{}", help="other options of the model, as JSON")
    options = parser.parse_args()
    runs: dict[str, list[Figures]] = {"pyromosaic": []}
    if options.peer:
        runs["scvi-tools"] = []
    for seed in range(options.seeds):
        runs["pyromosaic"].append(isolated(ours, options, seed))
        if options.peer:
            runs["scvi-tools"].append(isolated(peer, options, seed))
    title = "MultiVI on " + ("the PBMC mosaic" if options.data is None else options.data.stem)
    report(title, runs, vars(options), options.json)


if __name__ == "__main__":
    main()
