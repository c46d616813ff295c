"""Words of scvi-tools that users know, and what to use here instead."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple


class Word(NamedTuple):
    """What to use instead of an argument.

    Parameters
    ----------
    here
        The argument that does this here; empty if none has to.
    advice
        What to do, after "…; ".
    """

    here: str
    advice: str


DATA = Word("data", "use data, a Mosaic such as model.register(mdata)")
#: Arguments of methods and constructors.
ARGUMENTS: Mapping[str, Word] = {
    # of all questions
    "adata": DATA,
    "mdata": DATA,
    "adatas": DATA,
    "indices": Word("cells", "use cells, which takes names, numbers or a mask"),
    "gene_list": Word("features", "use features, the names of the genes"),
    "protein_list": Word("features", "use features, the names of the proteins"),
    "region_list": Word("features", "use features, the names of the regions"),
    "transform_batch": Word("batch", "use batch, one batch or a list of batches to average over"),
    "library_size": Word("library", "use library, the size of the cells in counts"),
    "use_z_mean": Word("n_samples", "use n_samples, which decodes the posterior mean if it is None"),
    "n_samples_overall": Word("n_samples", "use n_samples, the number of draws for each cell"),
    "give_mean": Word("sample", "the mean is the default; use sample=True for a draw"),
    "mc_samples": Word("sample", "use sample=True for a draw"),
    "representation_kind": Word("representation", "use representation, 'salient' or 'background'"),
    "sample_key": Word("key", "use key, a column of obs"),
    "correlation_type": Word("method", "use method"),
    "normalize_cells": Word("factors", "use factors=True to multiply by the factors of cells and regions"),
    "normalize_regions": Word("factors", "use factors=True to multiply by the factors of cells and regions"),
    "return_mean": Word("", "results are means over draws; get_draws has the draws themselves"),
    "return_dist": Word("", "use get_latent_posterior, which has mean and standard deviation"),
    "return_numpy": Word("", "leave it out; results are tables, of which .to_numpy() makes an array"),
    "silent": Word("", "leave it out; nothing is printed"),
    "dataloader": Word("data", "use data, a Mosaic, which reads cells from files as they are needed"),
    "include_protein_background": Word(
        "", "get_imputed_values includes the background of proteins, get_normalized_expression does not"
    ),
    "scale_protein": Word("", "leave it out; divide the result by its row sums if you need proportions"),
    # of differential
    "idx1": Word("cells1", "use cells1, which takes names, numbers or a mask"),
    "idx2": Word("cells2", "use cells2, which takes names, numbers or a mask"),
    "fdr_target": Word("fdr", "use fdr"),
    "batchid1": Word(
        "batch_correction", "use batch_correction=True, which decodes both groups for every batch in turn"
    ),
    "batchid2": Word(
        "batch_correction", "use batch_correction=True, which decodes both groups for every batch in turn"
    ),
    "all_stats": Word("", "leave it out; the table always has all statistics"),
    "pseudocounts": Word("", "leave it out, or call pyromosaic.tasks.compare on your own draws with a pseudocount"),
    "target_idx": Word("", "leave it out; each cell is decoded by its cohort, which mosaic.with_cohorts chooses"),
    # of train
    "lr": Word("learning_rate", "use learning_rate"),
    "train_size": Word("validation", "use validation and test, the shares of cells that are kept out of training"),
    "validation_size": Word("validation", "use validation, the share of cells"),
    "shuffle_set_split": Word("seed", "leave it out; the split is drawn at random, with seed"),
    "n_epochs_kl_warmup": Word("kl_warmup_epochs", "use kl_warmup_epochs"),
    "n_steps_kl_warmup": Word("kl_warmup_epochs", "use kl_warmup_epochs, a number of epochs"),
    "early_stopping_patience": Word("early_stopping", "use early_stopping, the number of epochs to wait"),
    "reduce_lr_on_plateau": Word("schedule", "use schedule"),
    "use_gpu": Word("trainer", "use accelerator, e.g. accelerator='gpu'"),
    "eps": Word("", "leave it out; the optimiser is fixed, and plain pyro.infer.SVI takes any other"),
    "plan_kwargs": Word("", "leave it out; its entries are arguments of train, or options of the model"),
    "plan_config": Word("", "leave it out; its entries are arguments of train, or options of the model"),
    "trainer_config": Word("trainer", "pass its entries to train itself"),
    "datasplitter_kwargs": Word("n_workers", "leave it out; n_workers is the number of processes that read data"),
    "load_sparse_tensor": Word("", "leave it out; sparse counts always stay sparse until they are in a minibatch"),
    "adversarial_mixing": Word("", "leave it out, and use the option adversary of the model"),
    "adversarial_classifier": Word("", "leave it out, and use the option adversary of the model"),
    "background_indices": Word("", "choose the cells before: mosaic.with_cohorts(background=..., target=...)"),
    "target_indices": Word("", "choose the cells before: mosaic.with_cohorts(background=..., target=...)"),
    # of constructors
    "n_genes": Word("", "leave it out; sizes follow from the data"),
    "n_regions": Word("", "leave it out; sizes follow from the data"),
    "n_proteins": Word("", "leave it out; sizes follow from the data"),
    "modality_weights": Word("fusion", "use fusion, e.g. 'mean', 'global' or 'cell'"),
    "modality_penalty": Word("jeffreys", "use the weights jeffreys and mmd"),
    "n_layers_encoder": Word("n_encoder_layers", "use n_encoder_layers"),
    "n_layers_decoder": Word("n_decoder_layers", "use n_decoder_layers"),
    "dropout_rate": Word("dropout", "use dropout"),
    "n_background_latent": Word("n_latent", "use n_latent"),
    "n_salient_latent": Word("n_salient", "use n_salient"),
    "use_observed_lib_size": Word("library", "use library, 'observed' or 'latent'"),
    "wasserstein_penalty": Word("wasserstein", "use wasserstein"),
    "latent_distribution": Word("prior", "use prior, a module such as those of pyromosaic.priors"),
    "gene_likelihood": Word("", "name the likelihood at registration, e.g. {'rna': 'zinb'}"),
    "gene_dispersion": Word("", "set dispersion at registration, in ModalitySpec"),
    "protein_dispersion": Word("", "set dispersion at registration, in ModalitySpec"),
    "dispersion": Word("", "set dispersion at registration, in ModalitySpec"),
    "region_factors": Word("", "leave it out; regions always have factors, see get_region_factors"),
    "fully_paired": Word("", "leave it out; a mosaic knows which cells have which modalities"),
    "use_batch_norm": Word("encoder", "pass your own networks as encoder and decoder"),
    "use_layer_norm": Word("encoder", "pass your own networks as encoder and decoder"),
    "deeply_inject_covariates": Word("decoder", "pass your own networks as encoder and decoder"),
    "guidance_graph": Word("graph", "use graph"),
    "mapping_df": Word("graph", "use graph, e.g. a table with a column of features for each modality"),
    # of registration
    "labels_key": Word("label_key", "use label_key"),
    "categorical_covariate_keys": Word("categorical_covariates", "use categorical_covariates"),
    "continuous_covariate_keys": Word("continuous_covariates", "use continuous_covariates"),
    "unlabeled_category": Word("unlabelled", "use unlabelled"),
    "rna_layer": Word("layer", "use layer in the ModalitySpec of the modality"),
    "atac_layer": Word("layer", "use layer in the ModalitySpec of the modality"),
    "protein_layer": Word("layer", "use layer in the ModalitySpec of the modality"),
    "protein_expression_obsm_key": Word(
        "layer", "register with Mosaic.from_obsm(adata, {'rna': None, 'adt': <key in obsm>})"
    ),
    "protein_names_uns_key": Word("layer", "make the matrix in obsm a table whose columns are the names of proteins"),
    # of save and load
    "dir_path": Word("directory", "use directory"),
    "prefix": Word("directory", "leave it out; each model has a directory of its own"),
    "save_anndata": Word("", "leave it out; data are not saved with the model, write them by mdata.write"),
    "backup_url": Word("directory", "download the directory before"),
}

REGISTER = "register the data by Mosaic.from_mudata, from_anndata or from_obsm, and pass the mosaic to the constructor"
QUERY = "use model.adapt(data) for cells of new batches, and model.register(data) for others"
LIKELIHOOD = "use pyromosaic.checks.held_out_log_likelihood(model), which has both for each cell"
SPLIT = "use model.split, which has the numbers of the cells for training, validation and test"

#: Methods and attributes of models.
METHODS: Mapping[str, str] = {
    "setup_anndata": REGISTER,
    "setup_mudata": REGISTER,
    "view_anndata_setup": "print model.mosaic",
    "summary_string": "print the model",
    "adata": "use model.mosaic",
    "adata_manager": "use model.mosaic and model.schema",
    "registry": "use model.schema",
    "module": "use model.model and model.guide, the two Pyro programs",
    "is_trained": "use len(model.history), the number of epochs",
    "device": "use next(model.guide.parameters()).device",
    "to_device": "use model.to(device)",
    "train_indices": SPLIT,
    "validation_indices": SPLIT,
    "test_indices": SPLIT,
    "get_normalized_accessibility": "use get_accessibility_estimates",
    "get_library_size_factors": "use get_cell_factors",
    "get_latent_library_size": "use get_cell_factors",
    "differential_expression": "use differential, which compares any modality",
    "differential_accessibility": "use differential(..., modality='atac'), which compares any modality",
    "get_likelihood_parameters": "use get_imputed_values for means and posterior_predictive_sample for draws",
    "get_elbo": LIKELIHOOD,
    "get_marginal_ll": LIKELIHOOD,
    "get_reconstruction_error": "use the columns reconstruction of model.history",
    "get_salient_normalized_expression": "use get_normalized_expression(..., salient=True)",
    "get_specific_normalized_expression": "use get_normalized_expression(..., salient=True or False)",
    "construct_custom_guidance_graph": "use pyromosaic.links, or pass a table of linked features as graph",
    "load_query_data": QUERY,
    "prepare_query_anndata": QUERY,
    "prepare_query_mudata": QUERY,
}


def check_words(where: str, given: Iterable[str], accepted: Collection[str]) -> None:
    """Refuse arguments that scvi-tools has and that are named otherwise here.

    Parameters
    ----------
    where
        Name of the function.
    given, accepted
        Names of the given arguments, and of those that the function takes.

    Raises
    ------
    TypeError
        With the argument to use.

    Examples
    --------
    >>> check_words("train", ["lr"], ["n_epochs", "learning_rate"])
    Traceback (most recent call last):
        ...
    TypeError: train takes no 'lr'; use learning_rate
    """
    for name in given:
        word = ARGUMENTS.get(name)
        if name not in accepted and word is not None and (not word.here or word.here in accepted):
            raise TypeError(f"{where} takes no {name!r}; {word.advice}")


def check_name(where: str, name: str) -> None:
    """Refuse a method or an attribute that scvi-tools has and that is named otherwise here.

    Raises
    ------
    AttributeError
        With the method to use.

    Examples
    --------
    >>> check_name("MultiVI", "differential_expression")
    Traceback (most recent call last):
        ...
    AttributeError: MultiVI has no 'differential_expression'; use differential, which compares any modality
    """
    if name in METHODS:
        raise AttributeError(f"{where} has no {name!r}; {METHODS[name]}")
