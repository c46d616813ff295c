"""ContrastiveVI on treated and control cells, compared with scvi-tools' ContrastiveVI on the same data.

Without ``--data`` on planted data: types that both cohorts share, and a perturbation with two response groups in target
cells only. Also compared are a model without cohorts (MultiVI on the same modality) and contrastive PCA.

    python benchmarks/contrastive.py --seeds 5 --peer
    python benchmarks/contrastive.py --data pbmc_stim_adt.h5ad --likelihood nb --condition-key condition
        --background control --type-key cell_type --markers CD69,CD25,CD278,CD71 --peer
"""

import argparse
import json
from argparse import Namespace
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, measured_cost, model_options, quiet, report

NO_PENALTIES = {"cohort_mmd": 0.0, "dependence": 0.0, "wasserstein": 0.0}
SYSTEMS: dict[str, dict[str, Any]] = {
    "pyromosaic": {},
    "no penalties": NO_PENALTIES,
    "Wasserstein 10": {"wasserstein": 10.0},
    "ARD": {"salient_prior": "ard"},
    "encoders see all": {"input_dropout": 0.0},
    "cohort MMD 20": {"cohort_mmd": 20.0},
    "cohort MMD 0": {"cohort_mmd": 0.0},
}


def load(options: Namespace, seed: int) -> Any:
    """The data of one modality as AnnData."""
    import anndata

    from pyromosaic import simulate

    if options.data is not None:
        return anndata.read_h5ad(options.data)
    mdata, _ = simulate(
        options.cells,
        {"rna": options.genes},
        types=4,
        treated_types=[0.45, 0.35, 0.2, 0.0] if options.deplete else None,
        n_batches=1,
        treated=0.5,
        n_responses=2 * options.dimensions,
        n_salient=options.dimensions,
        affected=0.2,
        seed=seed,
    )
    return mdata["rna"]


def quality(adata: Any, options: Namespace, z: np.ndarray | None, s: np.ndarray | None) -> Figures:
    """Every metric of background (z) and salient (s) representations of all cells."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    from pyromosaic import metrics

    condition = adata.obs[options.condition_key].astype(str).to_numpy()
    target = condition != options.background
    shares = pd.Series(condition).value_counts(normalize=True)
    figures = {"maximum condition enrichment": 1 / float((shares**2).sum())}
    for name, values in (("z", z), ("s", s)):
        if values is None:
            continue
        figures[f"condition enrichment in {name} (1 = mixed)"] = metrics.modality_enrichment(values, condition)
        for word, key in (("type", options.type_key), ("response", options.response_key)):
            if key not in adata.obs:
                continue
            labels = adata.obs[key].astype(str).to_numpy()[target]
            own = values[target]
            figures[f"{word} purity of target cells in {name}"] = metrics.label_purity(own, labels)
            figures[f"{word} silhouette in {name}"] = float(silhouette_score(own, labels, sample_size=3000))
            clusters = KMeans(len(set(labels)), n_init=5, random_state=0).fit_predict(own)
            figures[f"{word} ARI in {name}"] = float(adjusted_rand_score(labels, clusters))
        if name == "z" and options.type_key in adata.obs:
            labels = adata.obs[options.type_key].astype(str).to_numpy()
            figures["type transfer background to target in z"] = metrics.label_transfer_accuracy(
                values[~target], labels[~target], values[target], labels[target], n_neighbors=1
            )
        figures |= predicted_markers(adata, options, values, target, name)
    return figures


def normalized(adata: Any) -> np.ndarray:
    """``log1p`` of counts scaled to the median size."""
    x = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, dtype=float)
    size = x.sum(1, keepdims=True)
    return np.log1p(x / size * np.median(size))


def predicted_markers(adata: Any, options: Namespace, values: np.ndarray, target: np.ndarray, name: str) -> Figures:
    """Share of the variance of known markers in target cells that a representation explains, cross-validated."""
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import cross_val_predict

    known = [m for m in options.markers if m in adata.var_names]
    if not known:
        return {}
    x = normalized(adata)[target][:, adata.var_names.get_indexer(known)]
    own = values[target]
    predicted = cross_val_predict(RidgeCV(), (own - own.mean(0)) / (own.std(0) + 1e-9), x)
    return {f"variance of markers explained by {name}": float(1 - ((x - predicted) ** 2).mean() / x.var(0).mean())}


def marker_ranks(ranking: pd.Index, options: Namespace) -> Figures:
    """Ranks of known markers of the response in a list of features."""
    ranks = [ranking.get_loc(m) + 1 for m in options.markers if m in ranking]
    return {"median rank of markers by salient effect": float(np.median(ranks))} if ranks else {}


def ours(options: Namespace, seed: int, arguments: dict[str, Any]) -> Figures:
    """Train and evaluate this package's ContrastiveVI."""
    quiet()
    from pyromosaic import ContrastiveVI, Mosaic

    adata = load(options, seed)
    mosaic = Mosaic.from_anndata({"x": adata}, {"x": options.likelihood}, batch_key=options.batch_key)
    mosaic = mosaic.with_cohorts(options.condition_key, background=options.background)
    model = ContrastiveVI(mosaic, seed=seed, **(arguments | options.model))
    with measured_cost() as cost:
        model.train(options.epochs, seed=seed, progress_bar=False, **options.train)
    z = model.get_latent_representation(representation="background").to_numpy()
    s = model.get_latent_representation(as_target=True).to_numpy()
    figures = quality(adata, options, z, s)
    held_out, groups = model.split.validation, mosaic.groups
    size = (s[held_out] ** 2).sum(1)
    figures["leakage: |s|² of held-out background / target cells"] = float(
        size[groups[held_out] == 0].mean() / size[groups[held_out] > 0].mean()
    )
    figures["held-out ELBO per cell"] = float(model.history["validation_elbo"].iloc[-1])
    for least in (0.1, 0.5):
        figures[f"salient dimensions used (> {least} nats)"] = float((model.salient_information() > least).sum())
    if options.markers:
        figures |= marker_ranks(model.salient_effect().index, options)
    seconds = cost.seconds / len(model.history)
    return {**figures, "seconds per epoch": seconds, "seconds in total": cost.seconds, "peak memory, MB": cost.peak_mb}


def peer(options: Namespace, seed: int) -> Figures:
    """Train and evaluate scvi-tools' ContrastiveVI."""
    quiet()
    import scvi_tools

    adata = load(options, seed)
    background = np.asarray(adata.obs[options.condition_key].astype(str) == options.background)
    result = scvi_tools.contrastivevi(
        adata, background, options.batch_key, options.peer_epochs, seed, differential=bool(options.markers)
    )
    figures = quality(adata, options, result.latents["background"], result.latents["salient"])
    if result.ranking is not None:
        figures |= marker_ranks(result.ranking, options)
    seconds = result.seconds_per_epoch
    return {
        **figures,
        "seconds per epoch": seconds,
        "seconds in total": result.seconds,
        "peak memory, MB": result.peak_memory_mb,
    }


def without_cohorts(options: Namespace, seed: int) -> Figures:
    """A model without cohorts: MultiVI on this modality alone."""
    quiet()
    from pyromosaic import Mosaic, MultiVI

    adata = load(options, seed)
    model = MultiVI(
        Mosaic.from_anndata({"x": adata}, {"x": options.likelihood}, batch_key=options.batch_key),
        n_latent=10,
        seed=seed,
    )
    with measured_cost() as cost:
        model.train(options.epochs, seed=seed, progress_bar=False)
    figures = quality(adata, options, model.get_latent_representation().to_numpy(), None)
    return {**figures, "seconds per epoch": cost.seconds / options.epochs, "seconds in total": cost.seconds}


def contrastive_pca(options: Namespace, seed: int) -> Figures:
    """Contrastive PCA: leading eigenvectors of the targets' covariance minus the background's."""
    adata = load(options, seed)
    x = normalized(adata)
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    target = np.asarray(adata.obs[options.condition_key].astype(str) != options.background)
    with measured_cost() as cost:
        difference = np.cov(x[target].T) - options.cpca_alpha * np.cov(x[~target].T)
        s = x @ np.linalg.eigh(difference)[1][:, ::-1][:, :10]
    return {**quality(adata, options, None, s), "seconds in total": cost.seconds}


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=2000, help="planted data: number of cells")
    parser.add_argument("--genes", type=int, default=2000, help="planted data: number of genes")
    parser.add_argument("--dimensions", type=int, default=1, help="planted data: dimensions of the perturbation")
    parser.add_argument(
        "--deplete", action="store_true", help="planted data: one type is missing from the target cohort"
    )
    parser.add_argument("--likelihood", default="nb")
    parser.add_argument("--condition-key", default="condition")
    parser.add_argument("--background", default="control")
    parser.add_argument("--type-key", default="celltype")
    parser.add_argument("--response-key", default="response")
    parser.add_argument("--batch-key")
    parser.add_argument("--markers", type=lambda words: words.split(","), default=[], help="known response features")
    parser.add_argument("--cpca-alpha", type=float, default=1.0, help="weight of the background in contrastive PCA")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--model", type=model_options, default={}, help="further arguments of our model, as JSON")
    parser.add_argument("--train", type=json.loads, default={}, help="arguments of our training, as JSON")
    parser.add_argument("--peer-epochs", type=int, default=60)
    parser.add_argument(
        "--systems", type=lambda words: words.split(","), default=list(SYSTEMS), help="variants of ours"
    )
    parser.add_argument(
        "--others", action=argparse.BooleanOptionalAction, default=True, help="also run MultiVI and contrastive PCA"
    )
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    runs: dict[str, list[Figures]] = {name: [] for name in options.systems}
    beside = {"scvi-tools": peer} if options.peer else {}
    if options.others:
        beside |= {"without cohorts": without_cohorts, "contrastive PCA": contrastive_pca}
    runs |= {name: [] for name in beside}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.systems:
            runs[name].append(isolated(ours, options, seed, SYSTEMS[name]))
        for name, function in beside.items():
            runs[name].append(isolated(function, options, seed))
    title = "ContrastiveVI on " + ("planted data" if options.data is None else options.data.stem)
    report(title, runs, vars(options), options.json)


if __name__ == "__main__":
    main()
