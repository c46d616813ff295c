"""MIDAS (He et al. 2024; scmidas): default configuration, 2000 epochs in minibatches of 256 cells.

Its README names 1000 to 2000 epochs as typical and trains the reader's own data for 2000. A batch of MIDAS is the cells
of one batch that have the same modalities. The latent is c, the part of the posterior mean that is free of technical
effects. Hidden measurements are encoded as cells of their batch that have this modality alone. ATAC is encoded as a
whole, not by chromosome, as features need not be named after chromosomes.
"""

import anndata
import lightning
import numpy as np
import pandas as pd
import torch
from exchange import Answer, Given, answer
from mudata import MuData
from scmidas import MIDAS
from scmidas.config import load_config


def fit(given: Given) -> Answer:
    """Train, then encode and decode the cells."""
    lightning.seed_everything(given.seed, verbose=False)
    has = pd.DataFrame({name: pd.Index(given.cells).isin(table.cells) for name, table in given.shown.items()})
    pattern = pd.Series([" ".join(has.columns[row]) for row in has.to_numpy()], given.cells)
    tables = {}
    for name, table in given.shown.items():
        obs = pd.DataFrame({"batch": np.array(table.batch) + " " + pattern[table.cells].to_numpy()}, table.cells)
        adata = anndata.AnnData(table.counts.astype(np.float32), obs, pd.DataFrame(index=table.features))
        tables[name] = adata[pattern.index[has[name]]].copy()  # MIDAS pairs the cells of a batch by their order
    mdata = MuData(tables)
    MIDAS.setup_mudata(mdata, batch_key="batch")
    whole = ("dims_before_enc_atac", "dims_after_dec_atac")
    config = {key: value for key, value in load_config().items() if key not in whole}
    model = MIDAS(mdata, configs=config | {"num_workers": 0, "persistent_workers": False, "pin_memory": False})
    model.train(max_epochs=given.epochs or 2000, logger=False, enable_progress_bar=False, accelerator="cpu")

    latent = pd.DataFrame(model.get_latent_representation(), mdata.obs_names)
    result: Answer = {"latent": latent.loc[given.cells].to_numpy()}
    names = list(model.batch_names)
    for name, table in given.hidden.items():
        values = pd.DataFrame(model.get_imputed_values(modality=name), mdata.obs_names).loc[table.cells].to_numpy()
        result[f"imputed_{name}"] = values / values.sum(axis=1, keepdims=True) if name == "rna" else values
        counts = torch.tensor(table.counts.toarray(), dtype=torch.float32)
        counts = (counts > 0).float() if name == "atac" else counts
        batch = torch.tensor([[names.index(f"{b} {name}")] for b in table.batch])
        with torch.no_grad():
            mean = model.net.eval()({"x": {name: counts}, "s": {"joint": batch}, "e": {}})[2]
        result[f"hidden_{name}"] = mean[:, : model.dim_c].numpy()
    return result


answer(fit)
