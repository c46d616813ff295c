"""Mosaics with any number of paired cells: MultiVI, the linkage it starts from, baselines and peers.

A number of cells keeps all modalities; each other complete cell keeps one, and its other measurements are hidden and
compared with imputed ones. All figures are of cells; intervals are paired bootstrap intervals of differences from the
first system, over cells within each split. Rank correlations reward ties at the lowest value, as means over few cells
have them in sparse genes; correlations of logarithms do not.

    python benchmarks/few_pairs.py
    python benchmarks/few_pairs.py --data snare_cortex.h5mu --cells 3000 --pairs 750 300 30 \
        --min-share 0.005 --label-key cell_class --epochs 20
    python benchmarks/few_pairs.py --simulated --pairs 20 100 200
    python benchmarks/few_pairs.py --pairs 0 20 --multivi '{"MultiVI with links": {"links": true}}'
    python benchmarks/few_pairs.py --pairs 200 --private NK rna
"""

import json
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import arguments, isolated, model_options, quiet, read
from exchange import Counts, Given, ask
from multivi_mosaic import open_regions
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.stats import rankdata

N_BOOTSTRAP = 500


def load(options: Namespace, n_pairs: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """A mosaic in which `n_pairs` cells have all modalities, and the hidden measurements of each modality."""
    from mudata import MuData

    rng = np.random.default_rng(seed)
    if options.simulated:
        from pyromosaic import simulate

        sizes = {"rna": 300, "adt": 40, "atac": 400}
        whole, truth = simulate(2000, sizes, types=6, n_batches=2, keep_means=False, seed=seed)
        for adata in whole.mod.values():
            adata.X = sparse.csr_matrix(adata.X)
            adata.obs[options.label_key] = np.asarray(truth.type)[whole.obs_names.get_indexer(adata.obs_names)]
    else:
        whole = open_regions(read(options), options.min_share)
    if options.private:
        label, lacking = options.private
        others = whole.mod[lacking].obs[options.label_key].astype(str).ne(label).to_numpy()
        whole = MuData(dict(whole.mod) | {lacking: whole.mod[lacking][others].copy()})
    names = list(whole.mod)
    complete = whole.obs_names[np.all([whole.obs_names.isin(a.obs_names) for a in whole.mod.values()], axis=0)]
    labels = whole.mod[names[0]].obs[options.label_key].astype(str).reindex(complete)
    dropped = pd.Index([])
    if options.cells:
        usable = complete[labels.ne("Mis").to_numpy()]
        dropped = complete.difference(rng.permutation(usable)[: options.cells])
    order = rng.permutation(complete.difference(dropped))
    if n_pairs > len(order) - len(names):
        raise ValueError(f"{len(order)} cells have all modalities; --pairs must leave some to hide, found {n_pairs}")
    split = order[n_pairs:]  # the same cells stay paired with more pairs
    keeps = {name: split[i :: len(names)] for i, name in enumerate(names)}
    shown, hidden = {}, {}
    for name, adata in whole.mod.items():
        lost = np.concatenate([cells for other, cells in keeps.items() if other != name])
        hidden[name] = adata[adata.obs_names.isin(lost)].copy()
        shown[name] = adata[~adata.obs_names.isin(np.concatenate([lost, dropped]))].copy()
    return MuData(shown), hidden


def evidence(options: Namespace, mdata: Any, truth: Mapping[str, Any], result: Any, seed: int) -> dict[str, Any]:
    """Each figure as an array: its value, then its values in bootstrap samples of the cells."""
    from pyromosaic import metrics
    from pyromosaic.neighbors import nearest, vote

    rng = np.random.default_rng([seed, 1])
    labels = pd.concat([a.obs[options.label_key].astype(str) for a in mdata.mod.values()])
    labels = labels[~labels.index.duplicated()]
    found: dict[str, np.ndarray] = {}

    def weights(n: int) -> np.ndarray:
        """How often each cell is in the data, and in each bootstrap sample; the same for all systems."""
        return np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), N_BOOTSTRAP)])

    latent = result.latent
    cells = mdata.obs_names
    all_cells = weights(len(cells))
    if latent is not None:
        latent = latent.loc[cells]
        pattern = pd.Series("", cells)
        for name, adata in mdata.mod.items():
            pattern += np.where(cells.isin(adata.obs_names), f"{name}+", "")
        near = nearest(latent.to_numpy(), 15)[1]
        share = pattern.value_counts(normalize=True)
        same = (pattern.to_numpy()[near] == pattern.to_numpy()[:, None]).mean(1)
        found["modality enrichment"] = all_cells @ same / len(cells) / float((share**2).sum())
        own = labels.loc[cells].to_numpy()
        pure = (own[near] == own[:, None]).mean(1)
        found["label purity"] = all_cells @ pure / len(cells)
        if options.private:
            private = own == options.private[0]
            found["label purity, private type"] = (all_cells @ (pure * private)) / (all_cells @ private)
    for a in mdata.mod:
        for b in mdata.mod:
            if a == b:
                continue
            reference, query = (cells[pattern_of(mdata, cells, name)] for name in (a, b))
            drawn = weights(len(query))
            if latent is not None:
                codes, known = pd.factorize(labels.loc[reference])
                winners = vote(codes[nearest(latent.loc[reference], 15, latent.loc[query])[1]])[0]
                right = np.asarray(known)[winners] == labels.loc[query].to_numpy()
                found[f"transfer {a} -> {b}"] = drawn @ right / len(query)
    for name, hidden in truth.items():
        rows = hidden.obs_names
        drawn = weights(len(rows))
        if latent is not None and name in result.hidden:
            shown = latent.loc[rows].to_numpy()
            far = metrics.foscttm(result.hidden[name].loc[rows].to_numpy(), shown, per_cell=True)
            found[f"FOSCTTM, {name}"] = drawn @ np.asarray(far) / len(rows)
        if name not in result.imputed:
            continue
        counts, values = hidden.X.toarray().astype(float), result.imputed[name]
        if name == "atac":
            found["ATAC AUPRC"] = np.array([metrics.imputation_auprc(counts, values)])
            continue
        library = counts.sum(axis=1, keepdims=True)
        if name == "rna":
            found["RNA rho per gene"] = correlation(counts, values * library, drawn)
            logs = np.log1p(counts), np.log1p(values * library)
            found["RNA Pearson per gene, logs"] = correlation(*logs, drawn, ranks=False)
            continue
        found["ADT rho per protein"] = correlation(counts, values, drawn)
        at_size = values / values.sum(axis=1, keepdims=True) * library
        found["ADT rho at hidden size"] = correlation(counts, at_size, drawn)
        clr = [np.log1p(v) - np.log1p(v).mean(axis=1, keepdims=True) for v in (counts, values)]
        found["ADT Pearson, CLR"] = correlation(*clr, drawn, ranks=False)
    return found


def pattern_of(mdata: Any, cells: pd.Index, name: str) -> np.ndarray:
    """Which cells have this modality alone."""
    others = [a.obs_names for other, a in mdata.mod.items() if other != name]
    return cells.isin(mdata[name].obs_names) & ~np.any([cells.isin(other) for other in others], axis=0)


def correlation(truth: np.ndarray, values: np.ndarray, weights: np.ndarray, ranks: bool = True) -> np.ndarray:
    """Mean over features of the correlation over weighted cells; constant predictions count as 0."""
    varies = truth.std(axis=0) > 0
    x, y = truth[:, varies], values[:, varies]
    if ranks:
        x, y = rankdata(x, axis=0), rankdata(y, axis=0)
    x, y = x - x.mean(0), y - y.mean(0)
    w = weights / weights.sum(axis=1, keepdims=True)
    mx, my = w @ x, w @ y
    vx, vy = w @ x**2 - mx**2, w @ y**2 - my**2
    scale = np.sqrt(np.maximum(vx, 0) * np.maximum(vy, 0))
    r = np.divide(w @ (x * y) - mx * my, scale, out=np.zeros_like(scale), where=scale > 1e-9)
    return np.asarray(r.mean(axis=1))


def multivi(options: Namespace, mdata: Any, truth: Mapping[str, Any], seed: int, more: Mapping[str, Any]) -> Any:
    """MultiVI of this package."""
    from baselines import Result
    from mudata import MuData

    from pyromosaic import Mosaic, MultiVI

    mosaic = Mosaic.from_mudata(mdata, batch_key=options.batch_key)
    more = dict(more)
    graph = known_links(options, mosaic) if more.pop("links", False) else None
    model = MultiVI(mosaic, graph, seed=seed, **more)
    model.train(options.epochs, seed=seed, progress_bar=False)
    imputed = {}
    for name, hidden in truth.items():
        if name == "atac":
            imputed[name] = model.get_accessibility_estimates(name, hidden.obs_names, factors=True).to_numpy()
        else:
            library = 1.0 if name == "rna" else None
            values = model.get_imputed_values(name, hidden.obs_names, library=library, n_samples=None)
            imputed[name] = values.mean.to_numpy()
    other = model.register(MuData(dict(truth)))
    latents = {name: model.get_latent_representation(modality=name, data=other) for name in truth}
    return Result(model.get_latent_representation(), latents, imputed)


def known_links(options: Namespace, mosaic: Any) -> Any:
    """The links of ``--links``, or those of the packaged data."""
    from pyromosaic import protein_gene_links
    from pyromosaic.guidance import GuidanceGraph

    table = protein_gene_links() if options.links is None else pd.read_csv(options.links)
    columns = {"gene": "rna", "protein": "adt"}
    return GuidanceGraph.from_table(mosaic, table.rename(columns=columns), drop_absent=True)


def linked(options: Namespace, mdata: Any, truth: Mapping[str, Any], seed: int) -> Any:
    """`linkage.cca` of the pairs, or links if there are none, as MultiVI starts from it; neighbours in its scores."""
    from baselines import Result, from_neighbors
    from mudata import MuData

    from pyromosaic import Mosaic, linkage
    from pyromosaic.guidance.scores import FEWEST_PAIRS

    mosaic = Mosaic.from_mudata(mdata, batch_key=options.batch_key)
    start: dict[str, Any] = {"start": "pairs"}
    if mosaic.presence.all(axis=1).sum() < FEWEST_PAIRS:
        packaged = options.data is None and not options.simulated
        start = {"links": known_links(options, mosaic)} if options.links or packaged else {}
    if len(truth) != 2 or not start:
        return Result(None, {}, {})
    link = linkage.cca(mosaic, tuple(truth), n_components=15, seed=seed, **start)
    latent = pd.concat(link.scores.values()).groupby(level=0).mean()
    hidden = link.transform(Mosaic.from_mudata(MuData(dict(truth)), schema=mosaic.schema))
    return Result(latent, hidden, from_neighbors(mdata, truth, latent))


def peer(options: Namespace, system: str, mdata: Any, truth: Mapping[str, Any], seed: int) -> Any:
    """A peer, run by the interpreter of its own environment; see benchmarks/peers."""
    from baselines import Result

    shown, hidden = ({name: Counts.of(a, options.batch_key) for name, a in one.items()} for one in (mdata.mod, truth))
    given = Given(list(mdata.obs_names), shown, hidden, seed, options.peer_epochs)
    found = ask(options.peers[system], system, given)
    latents = {
        name: pd.DataFrame(found[key], a.obs_names) for name, a in truth.items() if (key := f"hidden_{name}") in found
    }
    imputed = {name: found[key] for name in truth if (key := f"imputed_{name}") in found}
    latent = pd.DataFrame(found["latent"], mdata.obs_names) if "latent" in found else None
    return Result(latent, latents, imputed, float(found["seconds"]), float(found["memory"]))


def run(options: Namespace, systems: list[str], splits: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Figures of some systems on some splits, with processor seconds, and the memory of the process until then.

    Of MultiVI also those of imputation by the mean of the nearest cells in its latent space.
    """
    from baselines import Result, from_neighbors

    quiet()
    entries = []
    for n_pairs, seed in splits:
        mdata, truth = load(options, n_pairs, seed)
        for system in systems:
            start = time.process_time()
            result = fitted(options, system, mdata, truth, seed)
            seconds = result.seconds or time.process_time() - start
            memory = result.memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            cost = {"processor seconds": np.array([seconds]), "memory, MB": np.array([memory])}
            found = {system: evidence(options, mdata, truth, result, seed) | cost}
            if system in options.multivi:
                near = Result(None, {}, from_neighbors(mdata, truth, result.latent))
                found[f"{system}, neighbours"] = evidence(options, mdata, truth, near, seed)
            for name, figures in found.items():
                print(n_pairs, seed, name, {k: round(float(v[0]), 3) for k, v in figures.items()}, file=sys.stderr)
                values = {figure: np.round(value, 5).tolist() for figure, value in figures.items()}
                entries.append({"pairs": n_pairs, "seed": seed, "system": name, "figures": values})
    return entries


def fitted(options: Namespace, system: str, mdata: Any, truth: Mapping[str, Any], seed: int) -> Any:
    """What a system says about the mosaic."""
    if system in options.multivi:
        return multivi(options, mdata, truth, seed, model_options(options.multivi[system]))
    if system in options.peers:
        return peer(options, system, mdata, truth, seed)
    if system == "linkage.cca":
        return linked(options, mdata, truth, seed)
    from baselines import BASELINES

    return BASELINES[system](mdata, truth, options.batch_key, seed)


def show(runs: list[dict[str, Any]], first: str) -> None:
    """For every number of pairs, a table of figures × systems: means over splits, and intervals of differences."""
    console = Console(width=200)
    for n_pairs in dict.fromkeys(entry["pairs"] for entry in runs):
        some = [entry for entry in runs if entry["pairs"] == n_pairs]
        systems = list(dict.fromkeys(entry["system"] for entry in some))
        table = Table("figure", *systems, title=f"{n_pairs} pairs")
        by = {(e["system"], e["seed"]): e["figures"] for e in some}
        for figure in dict.fromkeys(name for e in some for name in e["figures"]):
            cells = []
            for system in systems:
                seeds = [s for (name, s), f in by.items() if name == system and figure in f]
                if not seeds:
                    cells.append("–")
                    continue
                text = f"{np.mean([by[system, s][figure][0] for s in seeds]):.3f}"
                shared = [s for s in seeds if figure in by.get((first, s), {})]
                if system != first and shared and len(by[system, shared[0]][figure]) > 1:
                    gaps = [np.subtract(by[first, s][figure], by[system, s][figure])[1:] for s in shared]
                    low, high = np.quantile(np.mean(gaps, axis=0), [0.025, 0.975])
                    text += f" [{low:+.3f}, {high:+.3f}]"
                cells.append(text)
            table.add_row(figure, *cells)
        console.print(table)
    console.print(f"In brackets: 95 % interval of the difference of {first} from the system.")


def main() -> None:
    """Run the benchmark, or show what earlier runs found."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--simulated", action="store_true", help="three simulated modalities instead of data")
    parser.add_argument("--pairs", type=int, nargs="+", default=[0, 10, 20, 50, 100, 200, 400])
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first split")
    parser.add_argument("--cells", type=int, default=0, help="use this many complete cells; 0 for all")
    parser.add_argument("--min-share", type=float, default=0.0)
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument(
        "--private", nargs=2, metavar=("LABEL", "MODALITY"), help="cells of this type lack this modality"
    )
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--systems", nargs="+", help="names of systems; all by default")
    parser.add_argument(
        "--multivi",
        type=json.loads,
        default={"MultiVI": {}, "MultiVI without linkage": {"linkage": None}},
        help="variants of MultiVI and their options, as JSON; the option links is whether they get linked features",
    )
    parser.add_argument("--peers", type=json.loads, default={}, help="names of peers and their interpreters, as JSON")
    parser.add_argument("--peer-epochs", type=int, help="length of the peers' training; as recommended by default")
    parser.add_argument("--show", type=Path, nargs="+", help="show these files of figures and run nothing")
    options = parser.parse_args()
    options.multivi = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.multivi.items()}
    if options.show:
        runs = [entry for path in options.show for entry in map(json.loads, path.read_text().splitlines())]
        show(runs, next(iter(options.multivi)))
        return
    from baselines import BASELINES

    systems = options.systems or [*options.multivi, "linkage.cca", *BASELINES, *options.peers]
    alone = [[name] for name in systems if name in options.multivi]  # in a process each, so that memory is its own
    together = [name for name in systems if name not in options.multivi]
    splits = [
        (n_pairs, seed)
        for n_pairs in options.pairs
        for seed in range(options.first_seed, options.first_seed + options.seeds)
    ]
    runs = []
    for group, some in [*((group, [split]) for split in splits for group in alone), (together, splits)]:
        for entry in isolated(run, options, group, some) if group else []:
            runs.append(entry)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
    show(runs, next(iter(options.multivi)))


if __name__ == "__main__":
    main()
