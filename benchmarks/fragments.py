r"""Chromatin as fragments (Poisson, negative binomial) or as open and closed (Bernoulli): imputation and alignment.

The same mosaics, splits and models; only the likelihood of chromatin differs. Most cells are unpaired: their RNA and
their chromatin become two cells, of which each is the truth for the other (`pyromosaic.unpair`). Simulated counts are
cut sites of Poisson fragments with known rates: ``--depths`` fragments per region in the mean cell. ``--data`` uses
real counts of fragments instead, of ``--cells`` cells and of regions open in more than ``--min-share`` of them.

    python benchmarks/fragments.py --seeds 2
    python benchmarks/fragments.py --data snare_cortex.h5mu --label-key cell_class --min-share 0.02 --cells 1500 \
        --epochs 60 --seeds 2
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, quiet, read, report
from multivi_mosaic import open_regions
from scipy import sparse

LIKELIHOODS = ("bernoulli", "poisson", "nb")
MISSED = 0.1  # share of simulated fragments of which one end is outside the region


def simulated(depth: float, options: argparse.Namespace, seed: int) -> tuple[Any, pd.DataFrame]:
    """Paired cells with cut sites of Poisson fragments, and the rates of the fragments."""
    import anndata
    import mudata

    from pyromosaic import simulate

    sizes = {"rna": 300, "atac": options.regions}
    mdata, truth = simulate(
        options.cells, sizes, likelihoods={"atac": "nb"}, patterns=["rna+atac"], separation=1.0, seed=seed
    )
    rng, mean = np.random.default_rng(seed), truth.mean["atac"] * depth / truth.mean["atac"].mean()
    fragments = rng.poisson(mean)
    cut_sites = 2 * fragments - rng.binomial(fragments, MISSED)
    kept = cut_sites.any(axis=1)
    atac = anndata.AnnData(sparse.csr_matrix(cut_sites, dtype=np.float32), mdata["atac"].obs, mdata["atac"].var)
    whole = mudata.MuData({"rna": mdata["rna"][kept].copy(), "atac": atac[kept].copy()})
    rates = mean / mean.sum(axis=1, keepdims=True)
    return whole, pd.DataFrame(rates[kept], whole.obs_names, atac.var_names)


def real(options: argparse.Namespace, seed: int) -> Any:
    """A sample of the paired cells."""
    whole = read(options)
    cells = np.random.default_rng(seed).permutation(whole.n_obs)[: options.cells]
    whole = open_regions(whole[np.sort(cells)].copy(), options.min_share)
    seen = np.all([np.asarray(adata.X.sum(axis=1)).ravel() > 0 for adata in whole.mod.values()], axis=0)
    return whole[seen].copy()


def run(likelihood: str, depth: float | None, options: argparse.Namespace, seed: int) -> Figures:
    """Train one model and measure it."""
    quiet()
    from pyromosaic import ModalitySpec, Mosaic, MultiVI, metrics, unpair

    whole, rates = (real(options, seed), None) if depth is None else simulated(depth, options, seed)
    mosaic = unpair(whole, options.unpair, seed)
    keys = {"batch_key": options.batch_key, "cut_sites": depth is not None}
    specs = {"rna": ModalitySpec("nb", batch_key=options.batch_key), "atac": ModalitySpec(likelihood, **keys)}
    model = MultiVI(Mosaic.from_mudata(mosaic, specs), seed=seed)
    model.train(options.epochs, seed=seed, progress_bar=False)
    latent = model.get_latent_representation()

    rna = latent.index[latent.index.str.endswith(":rna")]
    cells, copies = rna.str.removesuffix(":rna"), rna.str.removesuffix(":rna") + ":atac"
    labels = whole["rna"].obs[options.label_key].astype(str).loc[cells]
    truth = mosaic["atac"][copies].X.tocsr()
    imputed = model.get_imputed_values("atac", rna, n_samples=None).mean.to_numpy()
    sites = [latent.loc[rna].set_axis(cells), latent.loc[copies].set_axis(cells)]
    sizes = np.asarray(truth.sum(axis=1))
    figures = {
        "AUPRC, all entries": metrics.imputation_auprc(truth, imputed),
        "  share open": truth.nnz / np.prod(truth.shape),
        "AUPRC at hidden size": metrics.imputation_auprc(truth, imputed / imputed.sum(1, keepdims=True) * sizes),
        "FOSCTTM of copies": metrics.foscttm(*sites),
        "rank distance of copies": metrics.neighbor_rank_distance(
            *sites, others=latent[~latent.index.str.contains(":")]
        ),
        "transfer rna -> atac": metrics.label_transfer_accuracy(sites[0], labels, sites[1], labels),
        "transfer atac -> rna": metrics.label_transfer_accuracy(sites[1], labels, sites[0], labels),
        "label purity": metrics.label_purity(sites[1], labels),
    }
    if rates is not None:
        estimate = model.get_accessibility_estimates("atac", rna).to_numpy() if likelihood == "bernoulli" else imputed
        per_region = metrics.imputation_spearman(
            rates.loc[cells].to_numpy(), estimate / estimate.sum(1, keepdims=True), per="feature"
        )
        figures["Spearman with true rates, mean of regions"] = float(np.nanmean(per_region))
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 1.0], help="simulated fragments per region")
    parser.add_argument("--cells", type=int, default=700, help="number of paired cells")
    parser.add_argument("--regions", type=int, default=300, help="number of simulated regions")
    parser.add_argument("--unpair", type=float, default=0.75, help="share of cells to unpair")
    parser.add_argument(
        "--min-share", type=float, default=0.0, help="use regions open in more than this share of cells"
    )
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--epochs", type=int, default=50)
    options = parser.parse_args()
    for depth in [None] if options.data else options.depths:
        one = partial(isolated, run)
        runs = {name: [one(name, depth, options, seed) for seed in range(options.seeds)] for name in LIKELIHOODS}
        title = f"{options.data.stem}" if depth is None else f"simulated cut sites, {depth:g} fragments per region"
        path = options.json and options.json.with_stem(f"{options.json.stem}{'' if depth is None else f'_{depth:g}'}")
        report(title, runs, vars(options), path)


if __name__ == "__main__":
    main()
