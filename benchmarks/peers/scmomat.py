"""scMoMaT (Zhang et al. 2023; scmomat): 30 factors, 4000 iterations, lambda 0.001, as its README runs it.

A batch of scMoMaT is the cells of one batch that have the same modalities. Each is normalised by its own functions as
its authors do for RNA and antibodies of blood: quantiles of counts of RNA, quantiles of log counts of antibodies, open
regions. The latent is the cell factors; the authors' post-processing makes a graph of cells, not a vector for each. An
iteration draws a tenth of the cells of each batch, or more where a batch has fewer than ten. There are no latents of
hidden measurements, as cells outside the fit have no factors, and no imputed values, as factors reconstruct normalised
values with terms of each batch and modality that are unknown where the modality is missing.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from exchange import Answer, Given, answer
from scmomat import preprocess, scmomat_model


def fit(given: Given) -> Answer:
    """Factorise the matrices of all batches."""
    batch = pd.Series("", given.cells)
    for name, table in given.shown.items():
        batch[batch.index.isin(table.cells)] += f" {name}"
    of = {cell: b for table in given.shown.values() for cell, b in zip(table.cells, table.batch, strict=True)}
    batch += " " + batch.index.map(of)
    groups = [batch.index[batch == one] for one in batch.unique()]
    counts: dict[str, Any] = {"nbatches": len(groups)}
    for name, table in given.shown.items():
        row = {cell: i for i, cell in enumerate(table.cells)}
        kind = "ATAC" if name == "atac" else name
        counts[name] = [
            preprocess(table.counts[[row[cell] for cell in cells]].toarray(), modality=kind, log=name != "rna")
            if cells[0] in row
            else None
            for cells in groups
        ]
    share = max(0.1, 1 / min(len(cells) for cells in groups))
    model = scmomat_model(counts, K=30, batch_size=share, seed=given.seed, device=torch.device("cpu"))
    model.train_func(T=given.epochs or 4000)
    factors = pd.DataFrame(np.concatenate(model.extract_cell_factors()), np.concatenate(groups))
    return {"latent": factors.loc[given.cells].to_numpy()}


answer(fit)
