"""Panels: a third of the features of a modality hidden from one batch, and queries with a part of the genes.

Each choice hides another random third from another batch. Models are compared on the same cells: ``panels``, in which
the third was not measured in that batch; ``own modality``, in which the third is a modality of its own that the cells
of the batch do not have; ``disjoint panels``, in which a second batch lacks another third; and ``equal panels``, from
which nothing is hidden. Imputed values of the hidden features in their batch are compared with the hidden counts.
``other batches`` is no model, and knows the type of each hidden cell: it imputes the mean of this type in the batches
that have the feature, at the cell's size. It shows how far the batches agree.

    python benchmarks/panels.py                       # antibodies, then genes, five choices each
    python benchmarks/panels.py --query 0.8 --seeds 20   # a trained model and new cells with 80 % of its genes
"""

from argparse import Namespace
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, quiet, read, report


def without(mdata: Any, modality: str, absent: dict[str, list[str]], apart: bool) -> Any:
    """A dictionary of AnnData: per batch, without these features; or with these features as a modality of their own."""
    data = dict(mdata.mod.items())
    whole = data.pop(modality)
    batch = whole.obs["batch"].astype(str)
    if apart:
        ((hidden_from, features),) = absent.items()
        of_third = whole.var_names.isin(features)
        other = whole[(batch != hidden_from).to_numpy(), of_third].copy()
        other = other[np.asarray(other.X.sum(axis=1)).ravel() > 0].copy()
        return data | {modality: whole[:, ~of_third].copy(), f"{modality} apart": other}
    parts = [
        whole[(batch == b).to_numpy(), ~whole.var_names.isin(absent.get(b, []))].copy() for b in sorted(set(batch))
    ]
    return data | {modality: parts}


def trained(data: Any, options: Namespace, seed: int) -> Any:
    """A trained MultiVI."""
    from pyromosaic import Mosaic, MultiVI

    likelihood = {"rna": "nb", "adt": "nb_mixture"}
    chosen = {name: likelihood[name.removesuffix(" apart")] for name in data}
    model = MultiVI(Mosaic.from_anndata(data, chosen, match_cells=True, batch_key="batch"), seed=seed)
    model.train(options.epochs, seed=seed, sleep_steps=options.sleep_steps, progress_bar=False)
    return model


def of_latent(model: Any, mdata: Any) -> Figures:
    """Quality of the latent space: purity of cell types, transfer between modalities, mixing of batches."""
    from pyromosaic import metrics

    latent = model.get_latent_representation()
    labels, batch = (mdata.obs[key].astype(str).reindex(latent.index) for key in ("celltype", "batch"))
    has = {name: latent.index.isin(adata.obs_names) for name, adata in mdata.mod.items()}
    figures = {
        "label purity": metrics.label_purity(latent, labels),
        "batch enrichment (1 = mixed)": metrics.modality_enrichment(latent, batch),
    }
    for a, b in (("rna", "adt"), ("adt", "rna")):
        only_a, only_b = has[a] & ~has[b], has[b] & ~has[a]
        figures[f"transfer {a} -> {b}"] = metrics.label_transfer_accuracy(
            latent[only_a], labels[only_a], latent[only_b], labels[only_b], n_neighbors=15
        )
    return figures


def of_imputed(values: Callable[[Any], np.ndarray], adata: Any, absent: dict[str, list[str]]) -> Figures:
    """Imputed values against hidden counts: rank correlation per feature, and ratios of means."""
    from pyromosaic import metrics

    rank, ratios, total = [], [], []
    for batch, features in absent.items():
        hidden = adata[(adata.obs["batch"].astype(str) == batch).to_numpy(), features]
        truth, found = np.asarray(hidden.X.todense(), dtype=float), values(hidden)
        rank.append(metrics.imputation_spearman(truth, found, per="feature"))
        seen = truth.mean(0) >= 0.1  # the mean of a rarer feature is not known well enough
        ratios.append(np.log(found.mean(0)[seen] / truth.mean(0)[seen]))
        total.append(found.sum() / truth.sum())
    ratio = np.concatenate(ratios)
    return {
        "Spearman, mean of hidden features": float(np.nanmean(np.concatenate(rank))),
        "Spearman, median": float(np.nanmedian(np.concatenate(rank))),
        "mean, imputed / hidden (all features)": float(np.mean(total)),
        "  median feature": float(np.exp(np.median(ratio))),
        "  features within a tenth": float(np.mean(np.abs(np.expm1(ratio)) < 0.1)),
        "  features within a factor of 1.5": float(np.mean(np.abs(ratio) < np.log(1.5))),
    }


def of_type(hidden: Any, adata: Any, n_least: int = 5) -> np.ndarray:
    """Mean of each hidden cell's type in the other batches, at its size; both by the features that all batches have."""
    batch, types = (adata.obs[key].astype(str).to_numpy() for key in ("batch", "celltype"))
    lacking = adata.var_names.isin(hidden.var_names)
    own = batch == hidden.obs["batch"].astype(str).iloc[0]
    counts = np.asarray(adata.X.todense(), dtype=float)
    size, counts = counts[:, ~lacking].sum(axis=1), counts[:, adata.var_names.get_indexer(hidden.var_names)]
    found = np.empty((own.sum(), counts.shape[1]))
    for kind in np.unique(types[own]):
        alike = ~own & (types == kind)
        alike = alike if alike.sum() >= n_least else ~own
        found[types[own] == kind] = counts[alike].sum(0) / size[alike].sum()
    return found * size[own, None]


def choice(mdata: Any, modality: str, seed: int) -> list[tuple[str, list[str]]]:
    """Two batches, and the features that are hidden from each."""
    rng = np.random.default_rng(seed)
    adata = mdata[modality]
    batches = sorted(adata.obs["batch"].astype(str).unique())
    features = rng.permutation(adata.var_names)
    third = len(features) // 3
    first, second = (str(b) for b in rng.permutation(batches)[:2])
    return [(first, list(features[:third])), (second, list(features[third : 2 * third]))]


def compared(
    mdata: Any, modality: str, options: Namespace, equal: Callable[[int], Figures]
) -> dict[str, list[Figures]]:
    """Figures of all systems and choices."""
    names = "panels", "own modality", "disjoint panels", "equal panels", "other batches"
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    for seed in range(options.seeds):
        pairs = choice(mdata, modality, seed)
        for system in names[:3]:
            absent, apart = dict(pairs if system == "disjoint panels" else pairs[:1]), system == "own modality"
            name = f"{modality} apart" if apart else modality
            model = trained(without(mdata, modality, absent, apart), options, seed)

            def values(hidden: Any, model: Any = model, name: str = name) -> np.ndarray:
                features = list(hidden.var_names)
                return model.get_imputed_values(name, hidden.obs_names, features=features).mean.to_numpy()

            runs[system].append(of_latent(model, mdata) | of_imputed(values, mdata[modality], absent))
        runs["equal panels"].append(equal(seed))
        by_type = partial(of_type, adata=mdata[modality])
        runs["other batches"].append(of_imputed(by_type, mdata[modality], dict(pairs[:1])))
    return runs


def queried(mdata: Any, options: Namespace) -> dict[str, list[Figures]]:
    """Label transfer to the RNA of each donor from the others, by all genes, and by random parts of them.

    The model is trained on all genes. Principal components and logistic regression are of the log-normalised RNA of the
    other donors, anew for each part: what these genes can tell without a model of all genes.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels, rna = mdata.obs["celltype"].astype(str), mdata["rna"]
    donor = rna.obs["batch"].astype(str).to_numpy()
    rng = np.random.default_rng(0)
    parts = [np.sort(rng.permutation(rna.n_vars)[: round(options.query * rna.n_vars)]) for _ in range(options.seeds)]

    def linear(query: np.ndarray, genes: np.ndarray, pipeline: Any) -> float:
        counts = np.asarray(rna.X[:, genes].todense(), dtype=float)
        total = counts.sum(axis=1, keepdims=True)
        x, y = np.log1p(counts / total * np.median(total)), labels.loc[rna.obs_names].to_numpy()
        return float(pipeline.fit(x[~query], y[~query]).score(x[query], y[query]))

    def transfer(new: str) -> dict[str, Callable[[np.ndarray], float]]:
        query = donor == new
        reference = {name: a[(a.obs["batch"].astype(str) != new).to_numpy()].copy() for name, a in mdata.mod.items()}
        model = trained(reference, options, 0)
        latent = model.get_latent_representation()
        classify = KNeighborsClassifier(15).fit(latent.to_numpy(), labels.loc[latent.index])

        def by_model(genes: np.ndarray) -> float:
            cells = model.register({"rna": rna[query, genes].copy()}, new_batches="average")
            z = model.get_latent_representation(data=cells)
            return float(classify.score(z.to_numpy(), labels.loc[z.index]))

        components = make_pipeline(StandardScaler(), PCA(30, random_state=0), KNeighborsClassifier(15))
        regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        return {
            "MultiVI": by_model,
            "principal components": lambda genes: linear(query, genes, components),
            "logistic regression": lambda genes: linear(query, genes, regression),
        }

    runs: dict[str, list[Figures]] = {}
    for new in np.unique(donor):
        for system, score in transfer(new).items():
            found = runs.setdefault(system, [{} for _ in parts])
            whole = score(np.arange(rna.n_vars))
            for figures, genes in zip(found, parts, strict=True):
                some = score(genes)
                figures |= {f"{new}, all genes": whole, f"{new}, a part": some, f"{new}, loss": whole - some}
    for found in runs.values():
        for figures in found:
            figures["loss"] = float(np.mean([value for name, value in figures.items() if name.endswith("loss")]))
    return runs


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.set_defaults(seeds=5, label_key="celltype")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--sleep-steps", type=int, help="steps of the sleep phase; by default those of MultiVI")
    parser.add_argument("--modality", choices=("adt", "rna"), help="hide features of this modality only")
    parser.add_argument("--query", type=float, help="share of the genes that new cells have")
    options = parser.parse_args()
    quiet()
    mdata = read(options)
    mdata.obs["celltype"] = (
        pd.concat([a.obs["celltype"].astype(str) for a in mdata.mod.values()]).groupby(level=0).first()
    )
    mdata.obs["batch"] = pd.concat([a.obs["batch"].astype(str) for a in mdata.mod.values()]).groupby(level=0).first()
    if options.query:
        report(
            f"label transfer with {options.query:.0%} of the genes",
            queried(mdata, options),
            vars(options),
            options.json,
        )
        return

    @cache
    def equal(seed: int) -> Figures:
        return of_latent(trained(dict(mdata.mod), options, seed), mdata)

    for modality in [options.modality] if options.modality else ["adt", "rna"]:
        path = options.json and options.json.with_stem(f"{options.json.stem}_{modality}")
        title = f"a third of {modality} hidden from one batch"
        report(title, compared(mdata, modality, options, equal), vars(options), path)


if __name__ == "__main__":
    main()
