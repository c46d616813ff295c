"""scvi-tools in the benchmarks, run on the same data, splits and metrics.

Every function takes the data as a user has them, trains a model with its defaults and returns a :class:`PeerResult`.
scvi-tools (1.5 or later) is not a dependency; it is imported on call.
"""

import contextlib
import io
import logging
import resource
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import scipy.sparse
import torch


@dataclass(frozen=True)
class PeerResult:
    """Results of a trained system, and the cost of training.

    Attributes
    ----------
    latent
        Posterior means of the (joint) latent, cells x dimensions, in the order of the data's ``obs_names``.
    latents
        Posterior means from the encoder of each modality, all cells; rows of cells without it are NaN.
    imputed
        Decoded features of each modality, all cells x features, see the runners.
    seconds
        Wall time of training, including validation after every epoch; without set-up and decoding.
    epochs
        Number of epochs trained.
    seconds_per_epoch
        ``seconds / epochs``.
    peak_memory_mb
        Largest resident memory of the process (MiB on Linux) until the end of training, before anything is decoded. It
        never decreases within a process. Therefore run one system per process to compare.
    history
        Losses, one row per epoch.
    heldout_reconstruction
        Reconstruction loss of the validation cells after the last epoch, i.e. of the returned model: negative log
        likelihood per cell, summed over the measured features. None without validation, which takes ``train_size=1.0,
        check_val_every_n_epoch=None``. The best epoch is ``history["reconstruction_loss_validation"].min()``.
    ranking
        Features by their difference between the cohorts, the most certain first, if requested.
    """

    latent: np.ndarray
    latents: dict[str, np.ndarray]
    imputed: dict[str, np.ndarray]
    seconds: float
    epochs: int
    seconds_per_epoch: float
    peak_memory_mb: float
    history: pd.DataFrame
    heldout_reconstruction: float | None
    ranking: pd.Index | None = None


def multivi(
    mdata: mudata.MuData,
    batch_key: str | None,
    n_epochs: int,
    seed: int,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    **train_kwargs: Any,
) -> PeerResult:
    """Train scvi-tools' MULTIVI on a mosaic.

    A cell has a modality if it is among its ``obs_names``. MULTIVI instead reads a row without counts as "not
    measured". Therefore it gets a copy with zero rows for absent cells; measured cells without any counts are missing
    to it too. A cell that is empty in all modalities still gets a latent, a mix of the encoders' outputs for zeros.

    Values are imputed at the posterior mean of the joint latent and in the batch of each cell: for ``rna`` the
    normalised expression (sum 1 per cell), for ``atac`` the probability of accessibility times the region's factor,
    without the cell's factor, and for ``adt`` the expected count, including background.

    Parameters
    ----------
    mdata
        Raw counts in ``X`` of the modalities ``"rna"``, ``"atac"`` and ``"adt"`` (or ``"protein"``), in any combination
        except proteins alone, with which MULTIVI fails.
    batch_key
        Column of each modality's ``obs`` with the batch; None for a single batch.
    n_epochs
        Number of epochs. All are run: early stopping is off, unless ``early_stopping=True`` is given.
    seed
        Seed of all random numbers, including the split into training and validation cells.
    model_kwargs
        Arguments of ``scvi.model.MULTIVI``, such as ``n_latent``.
    **train_kwargs
        Arguments of its ``train``, such as ``lr``, ``accelerator`` or, for a given split,
        ``datasplitter_kwargs={"external_indexing": [train, validation]}`` with positions in ``mdata.obs_names``.

    Returns
    -------
    PeerResult
        Latents and imputed features, by the names of the modalities in `mdata`.

    Raises
    ------
    ValueError
        If a modality is not one of those above, or two modalities assign one cell to different batches.

    References
    ----------
    Ashuach et al., MultiVI: deep generative model for the integration of multimodal data, Nature Methods 2023.
    """
    from scvi import settings
    from scvi.model import MULTIVI

    layers = {"rna": "rna_layer", "atac": "atac_layer", "adt": "protein_layer", "protein": "protein_layer"}
    encoders = {"rna": "expression", "atac": "accessibility", "adt": "protein", "protein": "protein"}
    if unknown := set(mdata.mod) - set(layers):
        raise ValueError(f"unknown modalities {sorted(unknown)}, accepted are {sorted(layers)}")

    with _quiet():
        settings.seed = seed
        names = [name for name in layers if name in mdata.mod]
        filled = mudata.MuData({name: _zero_filled(mdata.mod[name], mdata.obs_names) for name in names})
        if batch_key is not None:
            filled.obs[batch_key] = _batches(mdata, batch_key)
        MULTIVI.setup_mudata(filled, batch_key=batch_key, modalities={layers[name]: name for name in names})
        model = MULTIVI(filled, **(model_kwargs or {}))
        cost = _train(model, n_epochs, train_kwargs)

        latents, imputed = {}, {}
        for name in names:
            latents[name] = model.get_latent_representation(modality=encoders[name])
            latents[name][~mdata.obs_names.isin(mdata.mod[name].obs_names)] = np.nan
            if name == "rna":
                imputed[name] = model.get_normalized_expression(return_numpy=True)
            elif name == "atac":
                imputed[name] = model.get_normalized_accessibility(normalize_regions=True, return_numpy=True)
            else:
                imputed[name] = _expected_protein(model)
        return PeerResult(latent=model.get_latent_representation(), latents=latents, imputed=imputed, **cost)


def scvi_rna(
    adata: anndata.AnnData,
    batch_key: str | None,
    n_epochs: int,
    seed: int,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    **train_kwargs: Any,
) -> PeerResult:
    """Train scvi-tools' SCVI on the RNA counts in ``X``.

    ``"rna"`` is imputed by the normalised expression (sum 1 per cell) at one draw of the latent, SCVI's default.

    Parameters
    ----------
    adata
        Raw counts, cells x genes. Not modified.
    batch_key
        Column of ``obs`` with the batch; None for a single batch.
    n_epochs, seed, model_kwargs, **train_kwargs
        As in :func:`multivi`, for ``scvi.model.SCVI``.

    Returns
    -------
    PeerResult
        Without ``latents``: there is one modality.

    References
    ----------
    Lopez et al., Deep generative modeling for single-cell transcriptomics, Nature Methods 2018.
    """
    from scvi import settings
    from scvi.model import SCVI

    with _quiet():
        settings.seed = seed
        adata = adata.copy()
        SCVI.setup_anndata(adata, batch_key=batch_key)
        model = SCVI(adata, **(model_kwargs or {}))
        cost = _train(model, n_epochs, train_kwargs)
        imputed = {"rna": model.get_normalized_expression(return_numpy=True)}
        return PeerResult(latent=model.get_latent_representation(), latents={}, imputed=imputed, **cost)


def contrastivevi(
    adata: anndata.AnnData,
    background: np.ndarray,
    batch_key: str | None,
    n_epochs: int,
    seed: int,
    *,
    differential: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    **train_kwargs: Any,
) -> PeerResult:
    """Train scvi-tools' ContrastiveVI on the counts in ``X``.

    Parameters
    ----------
    adata
        Raw counts, cells x features. Not modified.
    background
        Which cells are background, boolean; the others are target.
    batch_key
        Column of ``obs`` with the batch; None for a single batch.
    differential
        Rank features by its differential expression between target and background cells, with target cells decoded with
        their salient variables and background cells without.
    n_epochs, seed, model_kwargs, **train_kwargs
        As in :func:`multivi`, for ``scvi.external.ContrastiveVI``.

    Returns
    -------
    PeerResult
        With the latents ``"background"`` and ``"salient"`` of all cells.

    References
    ----------
    Weinberger, Lin and Lee, Isolating salient variations of interest in single-cell data with contrastiveVI, Nature
    Methods 2023.
    """
    from scvi import settings
    from scvi.external import ContrastiveVI

    with _quiet():
        settings.seed = seed
        adata = adata.copy()
        ContrastiveVI.setup_anndata(adata, batch_key=batch_key)
        model = ContrastiveVI(adata, **(model_kwargs or {}))
        cohorts = {
            "background_indices": np.flatnonzero(background).tolist(),
            "target_indices": np.flatnonzero(~background).tolist(),
        }
        cost = _train(model, n_epochs, cohorts | train_kwargs)
        latents = {
            kind: model.get_latent_representation(representation_kind=kind) for kind in ("background", "salient")
        }
        ranking = None
        if differential:
            target = np.flatnonzero(~background)
            ranking = model.differential_expression(idx1=~background, idx2=background, target_idx=target).index
        return PeerResult(latent=latents["background"], latents=latents, imputed={}, ranking=ranking, **cost)


def diagvi(
    adatas: Mapping[str, anndata.AnnData],
    links: pd.DataFrame,
    likelihoods: Mapping[str, str],
    batch_key: str | None,
    n_epochs: int,
    seed: int,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    **train_kwargs: Any,
) -> PeerResult:
    """Train scvi-tools' DIAGVI on two modalities measured in different cells.

    Parameters
    ----------
    adatas
        Measurements of the two modalities, in ``X``. Not modified.
    links
        One column of feature names per modality, one row per link; rows with an unknown feature are left out.
    likelihoods
        DIAGVI's name of the likelihood of each modality.
    batch_key, n_epochs, seed, model_kwargs, **train_kwargs
        As in :func:`multivi`, for ``scvi.external.DIAGVI``.

    Returns
    -------
    PeerResult
        ``latents`` by modality, each in the order of its cells; nothing is imputed.
    """
    from scvi import settings
    from scvi.external import DIAGVI

    with _quiet():
        settings.seed = seed
        copies = {name: adata.copy() for name, adata in adatas.items()}
        for name, adata in copies.items():
            DIAGVI.setup_anndata(adata, batch_key=batch_key, likelihood=likelihoods[name])
        known = np.all([links[name].isin(adata.var_names) for name, adata in copies.items()], axis=0)
        table = links.loc[known, list(copies)].reset_index(drop=True)
        model = DIAGVI(copies, mapping_df=table, **(model_kwargs or {}))
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # its progress bar
            model.train(max_epochs=n_epochs, **({"early_stopping": False} | train_kwargs))
        seconds = time.perf_counter() - start
        epochs = model.trainer.current_epoch
        latents = model.get_latent_representation()
        return PeerResult(
            latent=np.concatenate(list(latents.values())),
            latents=latents,
            imputed={},
            seconds=seconds,
            epochs=epochs,
            seconds_per_epoch=seconds / epochs,
            peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            history=pd.DataFrame(),
            heldout_reconstruction=None,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence log messages and warnings, and restore both afterwards."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def _zero_filled(adata: anndata.AnnData, cells: pd.Index) -> anndata.AnnData:
    """Counts of all `cells`, zero for those not in `adata`; sparse stays sparse."""
    rows = cells.get_indexer(adata.obs_names)
    ones = np.ones(adata.n_obs, dtype=adata.X.dtype)
    placement = scipy.sparse.csr_matrix((ones, (rows, np.arange(adata.n_obs))), shape=(len(cells), adata.n_obs))
    return anndata.AnnData(placement @ adata.X, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=adata.var_names))


def _batches(mdata: mudata.MuData, batch_key: str) -> pd.Series:
    """Batch of every cell, from the modalities in which it was measured."""
    columns = {name: adata.obs[batch_key].astype(str) for name, adata in mdata.mod.items()}
    batches = pd.concat(columns, axis=1).reindex(mdata.obs_names)
    if (conflicts := batches.nunique(axis=1) > 1).any():
        raise ValueError(f"modalities disagree on {batch_key!r} of {conflicts.sum()} cells; every cell has one batch")
    return batches.bfill(axis=1).iloc[:, 0]


def _train(model: Any, n_epochs: int, train_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Train `model` and return the fields of :class:`PeerResult` about training."""
    defaults = {"early_stopping": False, "check_val_every_n_epoch": 1, "enable_progress_bar": False}
    start = time.perf_counter()
    model.train(max_epochs=n_epochs, **(defaults | dict(train_kwargs)))
    seconds = time.perf_counter() - start
    epochs = model.trainer.current_epoch
    history = pd.concat(model.history.values(), axis=1).astype(float)
    validation = history.get("reconstruction_loss_validation")
    return {
        "seconds": seconds,
        "epochs": epochs,
        "seconds_per_epoch": seconds / epochs,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "history": history,
        "heldout_reconstruction": None if validation is None else float(validation.iloc[-1]),
    }


@torch.inference_mode()
def _expected_protein(model: Any) -> np.ndarray:
    """Mean of MULTIVI's protein mixture at the posterior mean, which MULTIVI cannot compute.

    The background b is log-normal and the foreground s * b, so E[count] = E[b] * (P(background) + P(foreground) * s).
    """
    expected = []
    for tensors in model._make_data_loader(adata=model.adata):
        _, decoded = model.module.forward(tensors, generative_kwargs={"use_z_mean": True}, compute_loss=False)
        protein = decoded["py_"]
        background = torch.exp(protein["back_alpha"] + protein["back_beta"] ** 2 / 2)
        is_background = torch.sigmoid(protein["mixing"])
        expected.append(background * (is_background + (1 - is_background) * protein["fore_scale"]))
    return torch.cat(expected).cpu().numpy()
