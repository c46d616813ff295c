"""Experiments of the MultiVI paper (Ashuach et al., Nature Methods 2023), on any data with fully measured cells.

Cells without all modalities are left out. Each call runs one experiment:

``unpairing``    from 1 to 99 % of the cells are split into copies with one modality each (Fig. 2)
``factors``      inferred cell factors against observed depth, all cells paired (Supplementary Fig. 1)
``uncertainty``  imputation at 75 % unpaired, and its error against its uncertainty (Fig. 4)
``heldout``      one modality of one cell type is removed completely; its differences are inferred (Fig. 5)
``robustness``   fusions and penalties (Supplementary Fig. 3)
``markers``      differential expression of types with known marker genes, and of shuffled types
``trimodal``     RNA, chromatin and antibodies in all seven patterns, simulated with known truth

    python benchmarks/multivi_paper.py unpairing --figure unpairing.png
    python benchmarks/multivi_paper.py heldout --types B Mono
    python benchmarks/multivi_paper.py markers --markers B=MS4A1,CD79A NK=NKG7,GNLY
    python benchmarks/multivi_paper.py uncertainty --data snare_cortex.h5mu --min-share 0.005 --label-key cell_class
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, model_options, quiet, read, report
from multivi_mosaic import open_regions, quality

Runs = dict[str, list[Figures]]
FUSIONS = {name: {"fusion": name} for name in ("mean", "global", "cell", "product", "mixture")}
PENALTIES = {
    "both (default)": {},
    "jeffreys": {"mmd": 0.0},
    "mmd": {"jeffreys": 0.0},
    "none": {"jeffreys": 0.0, "mmd": 0.0},
}
N_DRAWS = 15  # draws of z behind an uncertainty, as in the paper
TENTHS = 10
N_SHUFFLES = 5
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))


# Data


def complete(options: Namespace) -> Any:
    """The cells with all modalities."""
    import mudata

    whole = read(options)
    modalities = open_regions(whole, options.min_share).mod
    cells = [c for c in whole.obs_names if all(c in a.obs_names for a in modalities.values())]
    return mudata.MuData({name: a[cells].copy() for name, a in modalities.items()})


def hidden(whole: Any, mosaic: Any, name: str) -> Any:
    """Measurements of the modality that each copy lacks, named by the copies."""
    copies = [c for c in mosaic.obs_names if c not in mosaic[name].obs_names]
    truth = whole[name][[c.rsplit(":", 1)[0] for c in copies]].copy()
    truth.obs_names = copies
    return truth


def train(mosaic: Any, options: Namespace, seed: int, **choices: Any) -> Any:
    """A trained MultiVI."""
    from pyromosaic import Mosaic, MultiVI

    choices = model_options(options.options) | choices
    model = MultiVI(Mosaic.from_mudata(mosaic, batch_key=options.batch_key), seed=seed, **choices)
    model.train(options.epochs, seed=seed, progress_bar=False)
    return model


def scaled(adata: Any, name: str, size: float) -> Any:
    """Measurements at the same size in every cell, or for chromatin whether a region is open."""
    from pyromosaic import metrics

    return (adata.X > 0).astype(float) if name == "atac" else metrics.scale_by_library(adata.X, size)


def at_one_size(model: Any, name: str) -> float | None:
    """Size of cell at which to impute: the median size; for chromatin, the size of each cell."""
    return None if name == "atac" else model.schema[name].library


# Experiments, one seed


def unpairing(options: Namespace, seed: int, rate: float, system: str) -> Figures:
    """Mixing, and distance of the copies, if a share of the cells is unpaired."""
    quiet()
    from pyromosaic import metrics, unpair

    mosaic = unpair(complete(options), rate, seed)
    if system == "pyromosaic":
        latent = train(mosaic, options, seed).get_latent_representation()
    else:
        import scvi_tools

        result = scvi_tools.multivi(mosaic, options.batch_key, options.peer_epochs, seed)
        latent = pd.DataFrame(result.latent, index=mosaic.obs_names)
    names = list(mosaic.mod)
    has = pd.DataFrame({n: latent.index.isin(a.obs_names) for n, a in mosaic.mod.items()}, index=latent.index)
    pattern = has.apply(lambda row: "+".join(has.columns[row]), axis=1)
    labels = pd.concat([a.obs[options.label_key].astype(str) for a in mosaic.mod.values()])
    labels = labels[~labels.index.duplicated()].reindex(latent.index)
    first, second = (latent[pattern == name] for name in names[:2])
    second = second.loc[first.index.str.removesuffix(names[0]) + names[1]].set_axis(first.index)
    whole = latent[has.all(axis=1)]
    figures = {
        "cells": float(len(latent)),
        "modality enrichment (1 = mixed)": metrics.modality_enrichment(latent, pattern),
        "  maximum": 1 / float((pattern.value_counts(normalize=True) ** 2).sum()),
        "rank distance of copies": metrics.neighbor_rank_distance(first, second, others=whole),
        "label purity": metrics.label_purity(latent, labels),
    }
    for a, b in [(a, b) for a in names for b in names if a != b]:
        # From all cells with the one modality, including paired cells, to those with only the other.
        figures[f"transfer {a} -> {b} only"] = metrics.label_transfer_accuracy(
            latent[has[a]], labels[has[a]], latent[pattern == b], labels[pattern == b], n_neighbors=15
        )
    return figures


def factors(options: Namespace, seed: int) -> Figures:
    """Correlation of cell factors with observed depth, all cells paired."""
    quiet()
    whole = complete(options)
    model = train(whole, options, seed, library="latent")
    inferred = model.get_cell_factors()
    figures = {}
    for name, adata in whole.mod.items():
        counts = adata.X > 0 if name == "atac" else adata.X
        depth = pd.Series(np.asarray(counts.sum(axis=1)).ravel(), adata.obs_names).reindex(inferred.index)
        table = pd.DataFrame({"factor": inferred[name], "depth": depth})
        held_out = table.iloc[model.split.validation]
        figures[f"{name}: Pearson with depth, all cells"] = float(table.corr().iloc[0, 1])
        figures[f"  {name} of logarithms"] = float(np.log(table).corr().iloc[0, 1])
        figures[f"  {name} of cells held out of training"] = float(held_out.corr().iloc[0, 1])
        figures[f"  {name} standard deviation of log depth"] = float(np.log(depth).std())
    return figures


def uncertainty(options: Namespace, seed: int) -> dict[str, Figures]:
    """Quality of imputed values, and one or two curves per modality: squared error over its mean, by uncertainty."""
    quiet()
    from pyromosaic import metrics, unpair

    whole = complete(options)
    mosaic = unpair(whole, options.unpair, seed)
    model = train(mosaic, options, seed)
    figures: Figures = {}
    curves: dict[str, Figures] = {}
    for name in mosaic.mod:
        truth, size = hidden(whole, mosaic, name), at_one_size(model, name)
        imputed = model.get_imputed_values(name, truth.obs_names, library=size, n_samples=N_DRAWS, quantiles=())
        mean, sd = imputed.mean.to_numpy(), imputed.sd.to_numpy()
        values = scaled(truth, name, size)
        smooth = metrics.smooth_by_neighbors(whole[name].X, "lsi" if name == "atac" else "pca")
        smooth = smooth[whole[name].obs_names.get_indexer(truth.obs_names.str.rsplit(":", n=1).str[0])]
        # Baseline without any information about the cell.
        profile = np.asarray(scaled(mosaic[name], name, size).mean(axis=0)).reshape(1, -1)
        profile = np.broadcast_to(profile, mean.shape)
        if name == "atac":
            figures[f"{name}: AUPRC"] = metrics.imputation_auprc(truth.X, mean)
            figures[f"  {name} mean profile for every cell"] = metrics.imputation_auprc(truth.X, profile)
        else:
            figures[f"{name}: Spearman"] = metrics.imputation_spearman(values, mean)
            figures[f"  {name} mean profile for every cell"] = metrics.imputation_spearman(values, profile)
            per_feature = metrics.imputation_spearman(values, mean, per="feature")
            figures[f"{name}: Spearman, median of features"] = float(np.nanmedian(per_feature))
        figures[f"{name}: Spearman with smoothed"] = metrics.imputation_spearman(smooth, mean)
        figures[f"  {name} mean profile, with smoothed"] = metrics.imputation_spearman(smooth, profile)
        per_feature = metrics.imputation_spearman(smooth, mean, per="feature")
        figures[f"{name}: with smoothed, median of features"] = float(np.nanmedian(per_feature))
        error = mean - (values.toarray() if hasattr(values, "toarray") else values)
        for word, (e, u) in {"all entries": (error, sd), "within features": within_features(error, sd)}.items():
            squared = metrics.error_by_uncertainty(e, u, TENTHS)["squared_error"] / float((e**2).mean())
            curves[f"{name}, {word}"] = {f"tenth {i + 1}": float(v) for i, v in enumerate(squared)}
    return {"figures": figures, **curves}


def within_features(error: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors over the feature's root mean square, and each cell's rank of uncertainty within the feature."""
    scale = np.sqrt((error**2).mean(axis=0))
    ranks = sd.argsort(axis=0).argsort(axis=0) / len(sd)
    return (error / np.where(scale > 0, scale, 1.0)), ranks


def heldout(options: Namespace, seed: int, name: str, label: str | None) -> dict[str, Figures]:
    """Differences of one cell type from the rest in a modality that was removed from it (None: from no type)."""
    quiet()
    import mudata

    from pyromosaic import unpair

    whole = complete(options)
    mosaic = unpair(whole, options.unpair, seed)
    kind = {n: a.obs[options.label_key].astype(str) for n, a in mosaic.mod.items()}
    kept = {n: a[(kind[n] != label) | (n != name)].copy() for n, a in mosaic.mod.items()}
    mosaic = mudata.MuData(kept)
    model = train(mosaic, options, seed)
    types = pd.concat(kind.values())
    types = types[~types.index.duplicated()].reindex(mosaic.obs_names)
    # If nothing was removed, the cells that have the modality are compared.
    cells = mosaic.obs_names if label is not None else mosaic[name].obs_names
    results = {}
    for tested in options.types if label is None else [label]:
        own, rest = cells[types[cells] == tested], cells[types[cells] != tested]
        truth = observed_difference(whole[name], options, name, tested, model)
        size = at_one_size(model, name)
        means = [
            model.get_imputed_values(name, some, library=size, n_samples=None).mean.mean(axis=0) for some in (own, rest)
        ]
        effect = difference(*(m.to_numpy() for m in means), name)
        calls = model.differential(cells1=own, cells2=rest, modality=name, n_samples=2000, seed=seed)
        calls = calls.loc[truth.index]
        sign = np.sign(calls.filter(regex="^(lfc|difference)_mean$").iloc[:, 0])
        both = calls["is_significant"] & truth["called"]
        up = truth["effect"] > (0.05 if name == "atac" else 1.0)
        confirmed = truth["called"][calls["is_significant"]].mean()
        figures = {
            "cells": float(len(own)),
            "Pearson, all features": float(np.corrcoef(effect, truth["effect"])[0, 1]),
            "markers": float(up.sum()),
            "Pearson, markers": float(np.corrcoef(effect[up], truth["effect"][up])[0, 1]) if up.sum() > 4 else np.nan,
            "called": float(calls["is_significant"].sum()),
            "  of these, called in the observed data": float(confirmed),
            "  share of all features called there": float(truth["called"].mean()),
            "  same direction, if called in both": float((sign == np.sign(truth["effect"]))[both].mean()),
        }
        results[tested] = {k: v for k, v in figures.items() if not np.isnan(v)}
    return results


def observed_difference(adata: Any, options: Namespace, name: str, label: str, model: Any) -> pd.DataFrame:
    """Effect of a cell type against the rest in all measurements, and the calls of a rank-sum test at 5 % FDR."""
    from scipy.stats import false_discovery_control, mannwhitneyu

    from pyromosaic import metrics

    counts = (adata.X > 0).astype(float) if name == "atac" else adata.X
    size = float(np.median(np.asarray(counts.sum(axis=1)))) if name == "atac" else model.schema[name].library
    values = metrics.scale_by_library(counts, size).tocsc()
    own = (adata.obs[options.label_key].astype(str) == label).to_numpy()
    p = []
    for start in range(0, values.shape[1], 500):
        part = values[:, start : start + 500].toarray()
        p.append(np.nan_to_num(mannwhitneyu(part[own], part[~own], axis=0, method="asymptotic").pvalue, nan=1.0))
    effect = difference(values[own].mean(axis=0), values[~own].mean(axis=0), name)
    called = false_discovery_control(np.concatenate(p)) <= 0.05
    return pd.DataFrame({"effect": effect, "called": called}, index=adata.var_names)


def difference(first: np.ndarray, second: np.ndarray, name: str) -> np.ndarray:
    """Difference of two mean profiles at the median size: log2 fold change, or difference of shares that are open."""
    if name == "atac":
        return first - second
    pseudocount = 0.01 if name == "rna" else 1.0  # as in `model.differential`
    return np.log2((first + pseudocount) / (second + pseudocount))


def robustness(options: Namespace, seed: int, choices: Mapping[str, Any]) -> Figures:
    """All metrics of `multivi_mosaic.py` for one fusion or penalty."""
    quiet()
    from pyromosaic import unpair

    whole = complete(options)
    mosaic = unpair(whole, options.unpair, seed)
    model = train(mosaic, options, seed, **choices)

    def imputed(name: str, cells: pd.Index) -> np.ndarray:
        if name == "atac":
            return model.get_accessibility_estimates(name, cells, factors=True).to_numpy()
        library = 1.0 if name == "rna" else None
        return model.get_imputed_values(name, cells, library=library, n_samples=None).mean.to_numpy()

    truth = {name: hidden(whole, mosaic, name) for name in mosaic.mod}
    figures = quality(mosaic, truth, options, model.get_latent_representation(), imputed)
    figures["held-out ELBO per cell"] = float(model.history["validation_elbo"].iloc[-1])
    return figures


def markers(options: Namespace, seed: int) -> dict[str, Figures]:
    """Ranks of the known markers of a type among the features that are higher in it, and calls by chance."""
    quiet()
    from pyromosaic import unpair

    mosaic = unpair(complete(options), options.unpair, seed)
    model = train(mosaic, options, seed)
    types = pd.concat([a.obs[options.label_key].astype(str) for a in mosaic.mod.values()])
    types = types[~types.index.duplicated()].reindex(model.mosaic.obs_names)
    rng = np.random.default_rng(seed)
    results = {}
    for tested, known in options.markers.items():
        own = (types == tested).to_numpy()
        table = model.differential(cells1=own, modality="rna", n_samples=2000, seed=seed)
        up = table.index[table["lfc_median"] > 0]
        chance = [
            model.differential(cells1=rng.permutation(own), modality="rna", n_samples=2000, seed=seed)["is_significant"]
            for _ in range(N_SHUFFLES)
        ]
        results[tested] = {
            "cells": float(own.sum()),
            "called": float(table["is_significant"].sum()),
            "called, types shuffled": float(np.mean([calls.sum() for calls in chance])),
            **{f"rank of {gene}": float(up.get_loc(gene) + 1) for gene in known if gene in up},
        }
    return results


def trimodal(options: Namespace, seed: int) -> Figures:
    """Mixing of seven patterns of three modalities, and imputed against expected measurements in simulated cells."""
    quiet()
    from pyromosaic import metrics, simulate

    mdata, truth = simulate(options.cells, {"rna": 300, "atac": 500, "adt": 30}, seed=seed)
    model = train(mdata, options, seed)
    latent, patterns = model.get_latent_representation(), model.mosaic.patterns
    labels = pd.Series(truth.type.astype(str), mdata.obs_names)[latent.index]
    figures = {
        "modality enrichment (1 = mixed)": metrics.modality_enrichment(latent, patterns),
        "  maximum": 1 / float((patterns.value_counts(normalize=True) ** 2).sum()),
        "label purity": metrics.label_purity(latent, labels),
    }
    for a, b in [(a, b) for a in mdata.mod for b in mdata.mod if a != b]:
        one, other = (patterns == name for name in (a, b))
        figures[f"transfer {a} -> {b}, cells with one modality"] = metrics.label_transfer_accuracy(
            latent[one], labels[one], latent[other], labels[other], n_neighbors=15
        )
    for name in mdata.mod:
        for word, cells in (("measured", model.mosaic.presence[name]), ("imputed", ~model.mosaic.presence[name])):
            found = model.get_imputed_values(name, cells.index[cells], n_samples=None).mean.to_numpy()
            expected = truth.mean[name][mdata.obs_names.get_indexer(cells.index[cells])]
            shares = [x / x.sum(axis=1, keepdims=True) for x in (found, expected)]
            per_feature = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(x.T for x in shares), strict=True)]
            figures[f"{name} {word}: Pearson with truth, median of features"] = float(np.nanmedian(per_feature))
    return figures


# Experiments, all seeds: run, print, draw


def over_seeds(options: Namespace, experiment: Callable[..., Any], *args: Any) -> list[Any]:
    """Run each seed in a separate process."""
    return [isolated(experiment, options, seed, *args) for seed in range(options.seeds)]


def run_unpairing(options: Namespace) -> None:
    """One table per system, with one column per rate."""
    systems = ["pyromosaic"] + ["scvi-tools"] * options.peer
    results: dict[str, Runs] = {}
    for system in systems:
        results[system] = {f"{r:.0%}": over_seeds(options, unpairing, r, system) for r in options.rates}
        show(options, f"unpairing, {system}", results[system])
    if options.figure:
        draw_unpairing(options, results)


def run_factors(options: Namespace) -> None:
    """One column."""
    show(options, "cell factors", {"pyromosaic": over_seeds(options, factors)})


def run_uncertainty(options: Namespace) -> None:
    """One table of the quality of imputation, and one of the curves, which are drawn."""
    results = over_seeds(options, uncertainty)
    show(options, f"imputation, {options.unpair:.0%} unpaired", {"pyromosaic": [r.pop("figures") for r in results]})
    curves = {name: [r[name] for r in results] for name in results[0]}
    show(options, "squared error by uncertainty", curves)
    if options.figure:
        draw_uncertainty(options, curves)


def run_heldout(options: Namespace) -> None:
    """Two tables per modality, with and without the type's measurements; one column per type."""
    whole = complete(options)
    counts = whole[next(iter(whole.mod))].obs[options.label_key].astype(str).value_counts()
    options.types = options.types or sorted(counts.index[counts >= options.min_cells])
    for name in whole.mod:
        taken: Runs = {t: [r[t] for r in over_seeds(options, heldout, name, t)] for t in options.types}
        show(options, f"{name} of one type held out", taken)
        seeds = over_seeds(options, heldout, name, None)
        show(options, f"{name} of no type held out", {t: [r[t] for r in seeds] for t in options.types})


def run_robustness(options: Namespace) -> None:
    """A table for the fusions, with the default penalties, and one for the penalties, with the default fusion."""
    for what, systems in (("fusion", FUSIONS), ("penalty", PENALTIES)):
        show(options, what, {name: over_seeds(options, robustness, choices) for name, choices in systems.items()})


def run_trimodal(options: Namespace) -> None:
    """One column."""
    report("three modalities, simulated", {"pyromosaic": over_seeds(options, trimodal)}, vars(options), options.json)


def run_markers(options: Namespace) -> None:
    """One table per type."""
    seeds = over_seeds(options, markers)
    for tested in options.markers:
        show(options, f"markers of {tested}", {"pyromosaic": [r[tested] for r in seeds]})


def type_and_markers(words: str) -> tuple[str, list[str]]:
    """``TYPE=GENE,GENE``, as given on the command line."""
    name, genes = words.split("=")
    return name, genes.split(",")


EXPERIMENTS = {
    "markers": run_markers,
    "trimodal": run_trimodal,
    "unpairing": run_unpairing,
    "factors": run_factors,
    "uncertainty": run_uncertainty,
    "heldout": run_heldout,
    "robustness": run_robustness,
}


def show(options: Namespace, title: str, runs: Runs) -> None:
    """Print a table; the file name of its JSON contains its title."""
    path: Path | None = options.json
    if path is not None:
        path = path.with_stem(f"{path.stem}_{title.replace(', ', '_').replace(' ', '_').replace('%', '')}")
    data = "PBMC, paired cells" if options.data is None else options.data.stem
    report(f"{title} ({data})", runs, vars(options), path)


def spread(values: np.ndarray, axis: int) -> np.ndarray | None:
    """Standard deviation over seeds, if there are several."""
    return values.std(axis) if values.shape[axis] > 1 else None


def draw_unpairing(options: Namespace, results: Mapping[str, Runs]) -> None:
    """Enrichment, rank distance and label transfer against the rate."""
    import matplotlib.pyplot as plt

    from pyromosaic.plot import PALETTE

    transfer = [n for n in next(iter(results["pyromosaic"].values()))[0] if n.startswith("transfer")]
    panels = {
        "modality enrichment": ["modality enrichment (1 = mixed)"],
        "rank distance of copies": ["rank distance of copies"],
        "label transfer, accuracy": transfer,
    }
    rates = [100 * r for r in options.rates]
    figure, axes = plt.subplots(1, 3, figsize=(12, 5), layout="constrained")
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for colour, marker, (system, runs) in zip(PALETTE, "os", results.items(), strict=False):
            for name, line in zip(names, LINES, strict=False):
                values = np.array([[run[name] for run in seeds] for seeds in runs.values()])
                words = [system] * (len(results) > 1) + [name.removeprefix("transfer ")] * (len(names) > 1)
                style: Any = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
                ax.errorbar(rates, values.mean(1), spread(values, 1), label=", ".join(words) or "pyromosaic", **style)
        ax.set(xlabel="cells unpaired (%)", ylabel=title, xlim=(-3, 103))
        ax.spines[["top", "right"]].set_visible(False)
    runs = results["pyromosaic"]
    most = [np.mean([run["  maximum"] for run in seeds]) for seeds in runs.values()]
    axes[0].plot(rates, most, ":", color="0.4", label="not mixed at all")
    axes[0].axhline(1, linestyle="--", color="0.4", label="mixed")
    axes[1].axhline(2 / 3, linestyle=":", color="0.4", label="random pairs")
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(0, 1.02)
    for ax in axes:
        ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))  # clear of the curves
    figure.savefig(options.figure, dpi=150)


def draw_uncertainty(options: Namespace, curves: Runs) -> None:
    """Squared error in each tenth of the imputed values, from the most to the least certain."""
    import matplotlib.pyplot as plt

    from pyromosaic.plot import PALETTE

    titles = {"rna": "RNA", "adt": "protein", "atac": "chromatin"}
    names = list(dict.fromkeys(curve.split(", ")[0] for curve in curves))
    styles = {"all entries": (PALETTE[0], "o"), "within features": (PALETTE[1], "s")}
    figure, axes = plt.subplots(1, len(names), figsize=(4.4 * len(names), 3.8), layout="constrained", squeeze=False)
    tenths = range(1, TENTHS + 1)
    for ax, name in zip(axes[0], names, strict=True):
        for word, (colour, marker) in styles.items():
            values = np.array([[run.get(f"tenth {i}", np.nan) for i in tenths] for run in curves[f"{name}, {word}"]])
            ax.errorbar(
                tenths, values.mean(0), spread(values, 0), color=colour, marker=marker, markersize=5, label=word
            )
        ax.axhline(1, linestyle=":", color="0.4", label="mean of all")
        ax.set(xlabel="tenth of imputed values, most to least certain", ylabel="squared error / its mean")
        ax.set(yscale="log", xticks=tenths, title=titles.get(name, name))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.savefig(options.figure, dpi=150)


def main() -> None:
    """Run one experiment."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.01, 0.25, 0.5, 0.75, 0.9, 0.99], help="unpairing: shares to unpair"
    )
    parser.add_argument("--unpair", type=float, default=0.75, help="the other experiments: share of cells unpaired")
    parser.add_argument("--types", nargs="+", help="heldout: cell types; by default all that are frequent enough")
    parser.add_argument(
        "--markers",
        type=type_and_markers,
        nargs="+",
        default=[],
        metavar="TYPE=GENE,GENE",
        help="known marker genes",
    )
    parser.add_argument("--cells", type=int, default=2800, help="trimodal: simulated cells")
    parser.add_argument("--min-cells", type=int, default=40, help="heldout: minimum number of cells of a type")
    parser.add_argument(
        "--min-share", type=float, default=0.0, help="use regions open in more than this share of cells"
    )
    parser.add_argument("--options", default="{}", help="other options of the model, as JSON")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--peer-epochs", type=int, default=500)
    parser.add_argument("--figure", type=Path, help="unpairing and uncertainty: write the figure here")
    options = parser.parse_args()
    if options.peer and options.experiment != "unpairing":
        parser.error("--peer is for unpairing only")
    if options.figure and options.experiment not in ("unpairing", "uncertainty"):
        parser.error("--figure is for unpairing and uncertainty only")
    options.markers = dict(options.markers)
    quiet()
    EXPERIMENTS[options.experiment](options)


if __name__ == "__main__":
    main()
