"""totalVI (Gayoso et al. 2021; scvi-tools): defaults, at most 400 epochs of few cells, and early stopping.

totalVI takes no cells without RNA, so it learns from those that have RNA, and says nothing of others: there is no
latent. It takes proteins that are zero in all cells of a batch as missing, so cells with and without antibodies of a
batch are two batches for it. Imputed antibodies are expected counts, background included, averaged over 25 samples and
decoded as in the cells of the same batch that have antibodies, or in all batches with antibodies where it has none.
"""

import anndata
import numpy as np
import pandas as pd
import scvi
from exchange import Answer, Given, answer


def fit(given: Given) -> Answer:
    """Train on the cells with RNA, and impute the antibodies of those that lack them."""
    rna, adt = given.shown["rna"], given.shown["adt"]
    cells = pd.Index(rna.cells)
    proteins = pd.DataFrame(adt.counts.toarray(), adt.cells, adt.features).reindex(cells)
    has = proteins.notna().all(axis=1).to_numpy()
    hidden = given.hidden["adt"]
    if not has.any() or not set(hidden.cells) <= set(cells):
        return {}
    scvi.settings.seed = given.seed
    obs = pd.DataFrame({"donor": rna.batch, "batch": np.array(rna.batch) + np.where(has, " with", " without")}, cells)
    adata = anndata.AnnData(rna.counts.astype(np.float32), obs, pd.DataFrame(index=rna.features))
    adata.obsm["proteins"] = proteins.fillna(0.0)
    scvi.model.TOTALVI.setup_anndata(adata, protein_expression_obsm_key="proteins", batch_key="batch")
    model = scvi.model.TOTALVI(adata)
    model.train(max_epochs=given.epochs, accelerator="cpu", enable_progress_bar=False)

    measured = obs["batch"][has].unique()
    imputed = []
    for donor in pd.unique(np.array(hidden.batch)):
        rows = cells.get_indexer([cell for cell, b in zip(hidden.cells, hidden.batch, strict=True) if b == donor])
        batches = [f"{donor} with"] if f"{donor} with" in measured else list(measured)
        values = model.get_normalized_expression(
            indices=rows, transform_batch=batches, n_samples=25, include_protein_background=True
        )[1]
        imputed.append(values)
    return {"imputed_adt": pd.concat(imputed).loc[hidden.cells].to_numpy()}


answer(fit)
