"""Every argument of every public call: beyond its range it is refused in one sentence, within it, it has an effect."""

import math
import traceback
import warnings
from inspect import Parameter, isclass, isfunction, signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroSample
from scipy import sparse

import pyromosaic
from pyromosaic import (
    ContrastiveVI,
    DiagVI,
    ModalitySpec,
    Mosaic,
    MultiVI,
    ScModal,
    checks,
    hide,
    linkage,
    metrics,
    nn,
    read,
    simulate,
    unpair,
)
from pyromosaic.data import measured
from pyromosaic.likelihoods import NB
from pyromosaic.links import GuidanceGraph
from pyromosaic.penalties import MMD, CohortMMD
from pyromosaic.priors import StudentT
from pyromosaic.train import MosaicELBO

HOME = str(Path(pyromosaic.__file__).parent)
HERE = Path(__file__).parent

#: Values that few arguments take; each is refused in one sentence, or means something.
ODD = (-1, 0, 2.5, math.nan, 10**12, True, "nonsense", {}, object())

#: Methods for those who write models, whose arguments the package gives.
HOOKS = {"arranged", "check_data", "construction", "start", "prepare", "finish", "explaining_size", "loader"}
HOOKS |= {"linked_features", "latent", "embedding"}


class Elsewhere(NamedTuple):
    """An argument whose effect another test shows."""

    test: str


class With(NamedTuple):
    """A value, and what else has to be given for it to have an effect."""

    value: Any
    others: dict[str, Any]


class Call(NamedTuple):
    """A public call: what it is given, and for each argument another value within its range."""

    function: Any
    given: dict[str, Any]
    varied: dict[str, Any]
    result: Any = None  # what it leads to, from keyword arguments; by default what it returns


class Uncertain(NB):
    """Dispersions with a prior, which are global latent variables."""

    def __init__(self, schema: Any) -> None:
        super().__init__(schema)
        self.log_theta = PyroSample(dist.Normal(torch.zeros(20), 1.5).to_event(1))


class Doubled(nn.InnerProductDecoder):
    """A decoder of another kind."""

    def forward(self, *args: Any) -> dict[str, torch.Tensor]:
        return {name: 2 * value for name, value in super().forward(*args).items()}


def flat(value: Any) -> list[Any]:
    """All numbers and words in a result."""
    if isinstance(value, pd.DataFrame | pd.Series):
        index = [str(name) for name in value.index]
        return [*index, *map(str, getattr(value, "columns", ())), *flat(value.to_numpy())]
    if isinstance(value, np.ndarray):
        return [value.shape, *value.ravel().tolist()]
    if sparse.issparse(value):
        return flat(value.toarray())
    if isinstance(value, torch.Tensor):
        return flat(value.detach().numpy())
    if isinstance(value, dict):
        return [part for key, entry in value.items() for part in (str(key), *flat(entry))]
    if isinstance(value, tuple | list):
        return [part for entry in value for part in flat(entry)]
    if hasattr(value, "mod"):  # MuData
        return [part for name, m in value.mod.items() for part in (name, *m.obs_names, *flat(m.X))]
    if hasattr(value, "__dict__"):
        return flat({k: v for k, v in vars(value).items() if not k.startswith("_") and k not in ("model", "guide")})
    return [value]


def same(first: Any, second: Any) -> bool:
    one, other = flat(first), flat(second)
    return len(one) == len(other) and all(a == b or (a != a and b != b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def mdata():
    sizes, options = {"rna": 260, "adt": 6}, {"types": 2, "links": {"adt": 1.0}, "treated": 0.5}
    return simulate(44, sizes, patterns=["rna", "adt", "rna+adt"], seed=1, **options)


@pytest.fixture(scope="module")
def mosaic(mdata):
    return Mosaic.from_mudata(mdata[0], batch_key="batch", label_key="celltype")


@pytest.fixture(scope="module")
def graph(mosaic, mdata):
    table = mdata[1].links.rename(columns={"gene": "rna", "feature": "adt"})[["rna", "adt"]]
    with pytest.warns(UserWarning, match="few links"):
        return GuidanceGraph.from_table(mosaic, table)


@pytest.fixture(scope="module")
def calls(mdata, mosaic, graph, tmp_path_factory):
    """All public calls by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return all_calls(mdata, mosaic, graph, tmp_path_factory.mktemp("saved"))


def _written(mdata: Any, path: Path) -> Path:
    mdata.write(path)
    return path


def all_calls(mdata: Any, mosaic: Mosaic, graph: GuidanceGraph, folder: Path) -> dict[str, Call]:
    cohorts = mosaic.with_cohorts("condition", background="control")
    quiet = {"progress_bar": False, "validation": 0.25, "batch_size": 16}
    small = {"n_latent": 3, "n_hidden": 8}
    names = [f"{n}:{c}" for n in ("rna", "adt") for c in mosaic.obs_names[mosaic.modalities[n].present]]
    apart = pd.DataFrame(np.random.default_rng(1).normal(size=(len(names), 2)).astype(np.float32), names)

    def loss(model: Any) -> list[Any]:
        """The loss of an untrained model with noise, and its parameters."""
        model.prepare(model.mosaic)
        model.model.train()
        model.guide.train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            minibatch = measured(model.mosaic, np.arange(model.mosaic.n_cells))
            with pyro.validation_enabled(False):  # as in training
                value = MosaicELBO()(model.model, model.guide)(minibatch, 0.5)
        parameters = [(name, p.sum().item()) for name, p in model.guide.named_parameters()]
        return [value.item(), *parameters, [name for name, _ in model.model.named_parameters()]]

    def trained(cls: Any, data: Any, base: dict[str, Any]) -> Any:
        def run(**options: Any) -> list[Any]:
            model = cls(data, **base)
            model.train(**options)
            return [model.history, [p.sum().item() for p in model.guide.parameters()], vars(model.split)]

        return run

    networks = {"encoder": nn.Encoder, "decoder": nn.Decoder}
    sigmoid = {
        "encoder": lambda *args, **kw: networks["encoder"](*args[:2], n_hidden=5),
        "decoder": lambda *args, **kw: networks["decoder"](*args[:3], n_hidden=5),
    }
    common = {
        **{"n_latent": 2, "n_hidden": 6, "n_encoder_layers": 1, "dropout": 0.5, "encode_covariates": False},
        **{"prior": StudentT(), "penalties": [MMD(7.0)], "seed": 1, **sigmoid},
    }
    multi = {"n_private": 1} | small
    linking = {"graph": graph, "linkage": apart} | small
    training = {
        **{"n_epochs": 3, "batch_size": 8, "learning_rate": 0.1, "weight_decay": 5.0, "kl_warmup_epochs": 0},
        **{"schedule": "constant", "gradient_clip": 1e-4, "validation": 0.5, "test": 0.25, "seed": 1},
        **{"likelihood_rate": 10.0, "sleep_steps": 2},
        "early_stopping": Elsewhere("test_early_stopping_returns_to_the_best_epoch"),
        "n_workers": Elsewhere("test_a_run_is_resumed_with_workers_and_by_another_optimiser_too"),
    }
    answers = {
        **{"cells": mosaic.obs_names[:3], "features": ["rna_3"], "batch": "batch0", "n_samples": 2},
        **{"library": 50.0, "data": With(None, {}), "seed": With(1, {"n_samples": 2})},
    }
    model = MultiVI(mosaic, **multi)
    model.train(1, **quiet)
    part = Mosaic.from_mudata(mdata[0][:20].copy(), schema=mosaic.schema)
    answers["data"] = part
    specs = {"rna": ModalitySpec("nb", batch_key="batch")}
    specs["adt"] = ModalitySpec("nb_mixture", batch_key="batch", background="latent")
    inferring = MultiVI(Mosaic.from_mudata(mdata[0], specs), **multi)
    regions = simulate(30, {"rna": 20, "atac": 20}, patterns=["rna+atac"], n_batches=2, seed=1)[0]
    opened = MultiVI(Mosaic.from_mudata(regions, batch_key="batch"), **small)
    other_regions = opened.register(regions[:9].copy())
    uncertain = MultiVI(Mosaic.from_mudata(regions, {"rna": ModalitySpec(Uncertain), "atac": "bernoulli"}), **small)
    treated = ContrastiveVI(cohorts, **small)
    some = treated.register(mdata[0][:20].copy())
    linked, matched = DiagVI(mosaic, **linking), ScModal(mosaic, **linking)
    for each in (treated, linked, matched):
        each.train(1, sleep_steps=0, **quiet)
    both = part.presence["rna"] & part.presence["adt"]  # cells with both, also in the part
    some_links = mdata[1].links.rename(columns={"gene": "rna", "feature": "adt"})[:3]
    hidden = mdata[0]["adt"][part.obs_names[both]].to_df()
    truth = np.random.default_rng(3).poisson(1.0, (30, 6))
    x, y = np.random.default_rng(4).normal(size=(2, 30, 3))
    words = np.resize(["a", "b", "b"], 30)
    share = np.random.default_rng(5).random((30, 6))
    similarity = np.random.default_rng(6).normal(size=(12, 9))
    weights = np.full(12, 1 / 12), np.full(9, 1 / 9)
    pi = linkage.Correspondence(np.eye(30) / 30, (np.arange(30), np.arange(30)))
    wide, tall = np.random.default_rng(7).normal(size=(2, 30, 5))
    canonical = linkage.canonical_correlation(wide, wide + 0.1 * tall, pi)
    null = linkage.shuffled_covariances(wide, wide + 0.1 * tall, pi)
    half_large = null * np.resize([1000, 0], len(null))[:, None, None]
    unrelated = linkage.canonical_correlation(wide, tall, pi)
    pair = {"mosaic": mosaic, "modalities": ("rna", "adt"), "links": graph, "n_pcs": 5, "n_components": 2}
    counts = iter(range(10_000))

    def saved(**options: Any) -> None:
        model.save(**{"directory": folder / f"{next(counts)}"} | options)

    def adapted(**options: Any) -> Any:
        fresh = mdata[0].copy()
        for m in (fresh, *fresh.mod.values()):
            m.obs["batch"] = "later"
        new = MultiVI(mosaic, **multi).adapt(**{"data": fresh, "progress_bar": False} | options)
        return [p.sum().item() for p in new.guide.parameters()]

    unseen = mdata[0][:20].copy()
    for m in (unseen, *unseen.mod.values()):
        m.obs["batch"] = "later"

    changed = mdata[0][:20].copy()
    changed.mod["rna"].X.data[:] = 9
    later = Mosaic.from_mudata(changed, schema=mosaic.schema)

    def without(answer: dict[str, Any], *names: str) -> dict[str, Any]:
        return {name: value for name, value in answer.items() if name not in names}

    of = {"modality": "rna"}
    protein = answers | {"modality": "rna", "features": ["adt_3"]}
    where = without(answers, "features", "batch", "library", "n_samples", "seed")
    compared = {
        "groupby": With("batch", {}),
        **{"group1": "type1", "group2": With("type1", {"group1": "type0"})},
        "cells1": Elsewhere("test_groups_may_be_given_in_any_way"),
        "cells2": Elsewhere("test_groups_may_be_given_in_any_way"),
        **{"modality": "adt", "mode": "vanilla", "delta": 0.7, "batch_correction": True, "n_samples": 60},
        "fdr": 0.9,
        "protein_foreground": With(True, {"modality": "adt"}),
        **{"features": ["rna_3"], "data": part, "seed": 1},
    }
    joint = without(answers, "library") | {
        "modalities": ["rna", "adt"],
        "features": {"rna": ["rna_3"]},
        "n_samples": 3,
        "encode": With(["rna"], {"cells": mosaic.modalities["rna"].present}),
        "seed": 1,
    }
    effect = without(
        compared, "groupby", "group1", "group2", "cells1", "cells2", "batch_correction", "protein_foreground"
    )
    effect |= {"cells": With(None, {})}
    neighbours = {
        "modality": With("adt", {}),
        "to": With("rna", {}),
        "cells": [0, 1],
        "n_neighbors": 2,
    }
    full = Elsewhere("test_every_model_takes_it")
    blocks = Elsewhere("test_copies_may_come_in_any_order_dtype_place_and_block")
    found = {
        "MultiVI": Call(
            MultiVI,
            {"data": mosaic} | multi,
            common
            | {"data": part, "n_decoder_layers": 2, "input_dropout": 0.0, "covariate_embedding": 2, "library": "latent"}
            | {"fusion": "product", "n_private": 2, "private_kl": 5.0, "jeffreys": 5.0, "mmd": 0.0, "adversary": 5.0}
            | {"left_out": 0.9, "covariance": Elsewhere("test_multivi_trains_and_is_saved")}
            | {
                "graph": Elsewhere("test_links_stand_in_for_pairs"),
                "linkage": Elsewhere("test_few_pairs_suffice_and_many_lose_nothing"),
                "pull": Elsewhere("test_most_of_the_pull_fades_in_the_warm_up"),
            },
            lambda **o: loss(MultiVI(**o)),
        ),
        "ContrastiveVI": Call(
            ContrastiveVI,
            {"data": cohorts} | small,
            common
            | {"penalties": [CohortMMD(7.0)], "covariance": full}
            | {
                "data": Elsewhere("test_cells_of_neither_cohort_take_no_part"),
                "n_salient": 4,
                "salient": Elsewhere("test_several_groups_with_shared_or_own_salient_variables"),
                "salient_prior": "ard",
            }
            | {"n_decoder_layers": 2, "input_dropout": 0.0, "library": "latent", "fusion": "product", "cohort_mmd": 0.0}
            | {"dependence": 0.0, "wasserstein": 0.0, "jeffreys": 5.0, "mmd": 0.0, "left_out": 0.9},
            lambda **o: loss(ContrastiveVI(**o)),
        ),
        "DiagVI": Call(
            DiagVI,
            {"data": mosaic} | linking,
            common
            | {"decoder": Doubled, "covariance": full}
            | {
                "data": part,
                "graph": None,
                "n_private": 2,
                "pairing": With(True, {"linkage": None}),
                "prior": "mixture",
                "likelihood_weight": 2.0,
            }
            | {"shared_kl": 2.0, "kl_per_feature": True, "private_kl": 5.0, "graph_weight": 1.0, "alignment": 0.0}
            | {
                "anchors": 9.0,
                "pull": 9.0,
                "classifier": 9.0,
                "linkage": None,
                "fusion": With("product", {"pairing": True, "linkage": None}),
            },
            lambda **o: loss(DiagVI(**o)),
        ),
        "ScModal": Call(
            ScModal,
            {"data": mosaic} | linking,
            common
            | {"data": part, "graph": With(None, {"linkage": "features"}), "n_private": 2, "private_kl": 5.0}
            | {"covariance": full}
            | {
                "deterministic": With(True, {"n_private": 0}),
                "pairs": Elsewhere("test_three_modalities_form_a_chain_or_all_pairs"),
                "linkage": None,
            }
            | {
                "refresh_every": Elsewhere("test_anchors_are_sought_anew_by_scores_and_embedding"),
                "likelihood_weight": 2.0,
                "adversary": 0.0,
            }
            | {"cycle": 0.0, "anchors": 9.0, "pull": 0.0, "geometry": 9.0, "encoder": sigmoid["encoder"]},
            lambda **o: loss(ScModal(**o)),
        ),
        "MultiVI.train": Call(MultiVI.train, {"n_epochs": 2} | quiet, training, trained(MultiVI, mosaic, multi)),
        "ContrastiveVI.train": Call(
            ContrastiveVI.train,
            {"n_epochs": 1} | quiet,
            {"n_epochs": 2, "batch_size": 8, "learning_rate": 0.1, "replay": With(True, {"n_epochs": 3})},
            trained(ContrastiveVI, cohorts, small),
        ),
        "DiagVI.train": Call(
            DiagVI.train,
            {"n_epochs": 1} | quiet,
            {"n_epochs": 2, "batch_size": 8, "learning_rate": 0.1},
            trained(DiagVI, mosaic, linking),
        ),
        "ScModal.train": Call(
            ScModal.train,
            {"n_epochs": 1} | quiet,
            {"n_epochs": 2, "callbacks": Elsewhere("test_anchors_are_sought_anew_by_scores_and_embedding")},
            trained(ScModal, mosaic, linking),
        ),
        "to": Call(model.to, {"device": "cpu"}, {"device": Elsewhere("test_to_a_device")}),
        "save": Call(
            MultiVI.save,
            {},
            {
                "directory": Elsewhere("test_save_and_load_give_the_same_answers"),
                "overwrite": Elsewhere("test_save_and_load_give_the_same_answers"),
            },
            saved,
        ),
        "load": Call(
            MultiVI.load,
            {"directory": folder},
            dict.fromkeys(("directory", "data"), Elsewhere("test_save_and_load_give_the_same_answers")),
        ),
        "register": Call(
            model.register,
            {"data": unseen, "new_batches": "average"},
            {"data": mdata[0][:20].copy(), "new_batches": "refuse"},
        ),
        "adapt": Call(
            model.adapt,
            {"n_epochs": 1},
            {"data": Elsewhere("test_adapted_model_explains_new_cells_better_and_mixes_them"), "n_epochs": 2},
            adapted,
        ),
        "get_normalized_expression": Call(model.get_normalized_expression, of, {"modality": "adt"} | answers),
        "get_protein_foreground_probability": Call(
            model.get_protein_foreground_probability, {}, without(protein, "library")
        ),
        "get_accessibility_estimates": Call(
            opened.get_accessibility_estimates,
            {},
            {"modality": "rna", "cells": [0, 1], "features": ["atac_3"], "batch": "batch0", "factors": True}
            | {"n_samples": 2, "data": other_regions, "seed": With(1, {"n_samples": 2}), "threshold": 0.5},
        ),
        "get_cell_factors": Call(model.get_cell_factors, {}, where),
        "get_region_factors": Call(
            model.get_region_factors, {}, {"modality": Elsewhere("test_region_factors_and_foreground_probabilities")}
        ),
        "get_imputed_values": Call(
            model.get_imputed_values,
            of | {"n_samples": 3},
            {"modality": "adt"}
            | answers
            | {"encode": With(["rna"], {"cells": mosaic.modalities["rna"].present})}
            | {"quantiles": (0.5,), "seed": 1, "out": Elsewhere("test_a_file_holds_what_is_returned_without_one")},
        ),
        "posterior_predictive_sample": Call(
            model.posterior_predictive_sample,
            of,
            {"modality": "adt"}
            | answers
            | {"encode": With(["rna"], {"cells": mosaic.modalities["rna"].present}), "seed": 1}
            | {"form": Elsewhere("test_sparse_measurements")},
        ),
        "get_draws": Call(
            model.get_draws,
            {"modalities": ["rna"], "n_samples": 2},
            joint | {"kind": "predicted"},
            lambda **o: [v.to_numpy() for v in model.get_draws(**o).data_vars.values()],
        ),
        "to_inference_data": Call(
            model.to_inference_data,
            {"modalities": ["rna"], "n_samples": 2},
            joint,
            lambda **o: [v.to_numpy() for v in model.to_inference_data(**o)["posterior"].data_vars.values()],
        ),
        "get_protein_background_mean": Call(
            inferring.get_protein_background_mean,
            {"n_samples": 3},
            without(answers, "library", "seed")
            | {"modality": "rna", "features": ["adt_3"], "seed": 1, "data": inferring.register(mdata[0][:20].copy())},
        ),
        "get_feature_correlation_matrix": Call(
            model.get_feature_correlation_matrix,
            {"modalities": "adt", "n_samples": 2},
            without(answers, "library", "n_samples")
            | {"modalities": ["rna", "adt"], "features": {"adt": ["adt_3", "adt_1"]}, "method": "pearson"}
            | {"cells": mosaic.obs_names[:9], "n_samples": 3, "seed": 1},
        ),
        "differential_abundance": Call(
            model.differential_abundance, {"key": "celltype"}, {"key": "batch", "cells": [0, 1], "data": part}
        ),
        "get_latent_posterior": Call(
            treated.get_latent_posterior,
            {},
            {"cells": [0, 1], "site": "s", "modality": "rna", "data": some},
            lambda **o: treated.get_latent_posterior(**o).mean,
        ),
        "differential": Call(model.differential, {"groupby": "celltype", "n_samples": 40} | of, compared),
        "get_latent_representation": Call(
            model.get_latent_representation,
            {},
            where | {"modality": "rna", "sample": True, "seed": With(1, {"sample": True})},
        ),
        "get_global_posterior": Call(
            uncertain.get_global_posterior, {"n_samples": 5}, {"n_samples": 6, "quantiles": (0.5,), "seed": 1}
        ),
        "get_shared_share": Call(model.get_shared_share, {}, where),
        "nearest_cells": Call(model.nearest_cells, {"modality": "rna", "to": "adt"}, neighbours),
        "transfer_labels": Call(
            model.transfer_labels,
            {"key": "celltype", "modality": "rna", "to": "adt"},
            neighbours | {"key": "batch", "modality": With("adt", {"to": "rna"}), "to": "rna"},
        ),
        "ContrastiveVI.get_latent_representation": Call(
            treated.get_latent_representation,
            {},
            where
            | {"representation": "background", "as_target": True, "modality": "rna", "sample": True}
            | {
                "seed": With(1, {"sample": True}),
                "data": some,
            },
        ),
        "ContrastiveVI.get_normalized_expression": Call(
            treated.get_normalized_expression,
            of,
            {
                "modality": "adt",
                "cells": [0, 1],
                "salient": False,
                "data": some,
            },
        ),
        "salient_effect": Call(
            treated.salient_effect,
            of | {"n_samples": 40},
            effect
            | {
                "cells": np.flatnonzero(cohorts.groups == 1)[:3],
                "data": some,
            },
        ),
        "salient_effect_per_cell": Call(
            treated.salient_effect_per_cell,
            of | {"n_samples": 5},
            without(effect, "mode")
            | {"cells": np.flatnonzero(cohorts.groups == 1)[:3], "n_samples": 9}
            | {
                "delta": 0.01,
                "data": some,
            },
        ),
        "contrast_scores": Call(
            treated.contrast_scores,
            {"n_samples": 2},
            {"cells": [0, 1], "n_samples": 3, "data": some, "seed": 1},
        ),
        "salient_information": Call(
            treated.salient_information,
            {},
            {
                "cells": Elsewhere("test_salient_information_is_by_dimension"),
                "data": some,
            },
        ),
        "get_feature_embeddings": Call(linked.get_feature_embeddings, {}, {"modality": "rna"}),
        "predict_celltype": Call(
            linked.predict_celltype,
            {},
            where | {"modality": "rna", "data": part, "cells": [0, 1]},
        ),
        "nearest_features": Call(
            linked.nearest_features,
            {"modality": "rna", "to": "adt"},
            {"modality": "adt", "to": "rna", "features": ["rna_3"], "n_neighbors": 2},
        ),
        "link_agreement": Call(
            matched.link_agreement,
            {"graph": graph},
            {"graph": Elsewhere("test_agreement_of_links_tells_an_aligned_model"), "n_neighbors": 3},
        ),
        "feature_links": Call(
            matched.feature_links,
            {"first": "rna", "second": "adt", "n_shuffles": 5},
            {"first": With("adt", {"second": "rna"}), "second": With("rna", {"first": "adt"}), "level": 1.0}
            | {"n_shuffles": With(1, {"level": 0.9}), "seed": With(1, {"level": 0.9, "n_shuffles": 1})},
        ),
        "cca": Call(
            linkage.cca,
            pair,
            {
                "mosaic": Elsewhere("test_what_is_learnt_does_not_depend_on_order_or_hidden_columns"),
                "modalities": ("adt", "rna"),
                "links": None,
                "match": "mutual",
            }
            | {"start": With("diagonal", {"held_out": 0.0}), "rounds": With(1, {"held_out": 0.0}), "held_out": 0.6}
            | {"link_share": 0.1, "n_components": 1, "n_pcs": 4, "n_neighbors": 3, "ridge": 0.9, "n_metacells": 8}
            | {"correspondence": Elsewhere("test_known_pairs_and_labels_are_given_from_outside"), "seed": 1}
            | dict.fromkeys(("pairs", "population"), Elsewhere("test_pairs_a_population_and_links_are_known")),
        ),
        "variational_cca": Call(
            linkage.variational_cca,
            pair | {"n_steps": 3, "batch_size": 16},
            {
                "mosaic": Elsewhere("test_what_is_learnt_does_not_depend_on_order_or_hidden_columns"),
                "modalities": ("adt", "rna"),
                "links": None,
                "n_hidden": 4,
            }
            | {"ridge": 0.9, "n_steps": 5, "batch_size": 32, "learning_rate": 0.1, "seed": 1},
        ),
        "transport": Call(
            linkage.transport,
            {"similarity": similarity, "weights": weights},
            {
                "similarity": similarity**2,
                "weights": (np.arange(1, 13) / 78, np.arange(1, 10) / 45),
            }
            | {"epsilon": 0.5, "reach": 0.1, "n_iterations": 1},
        ),
        "mutual_nearest": Call(
            linkage.mutual_nearest,
            {"similarity": similarity, "weights": weights, "k": 3},
            {
                "similarity": similarity**2,
                "weights": Elsewhere("test_anchors_are_mutual_neighbours_and_pull_is_a_distance"),
                "k": 1,
            },
        ),
        "assignment": Call(
            linkage.assignment,
            {"similarity": similarity, "weights": weights},
            {
                "similarity": similarity**2,
                "weights": Elsewhere("test_balanced_transport_meets_its_weights_and_agrees_with_pot"),
                "keep": 0.2,
            },
        ),
        "diagonal": Call(
            linkage.diagonal, {"x": wide, "y": tall, "n_components": 3}, {"x": tall, "y": wide, "n_components": 2}
        ),
        "gromov_wasserstein": Call(
            linkage.gromov_wasserstein,
            {"x": x[:12], "y": y[:9], "weights": weights, "similarity": similarity},
            {
                "x": y[:12],
                "y": y[:9] ** 2,
                "weights": (np.arange(1, 13) / 78, np.arange(1, 10) / 45),
            }
            | {"similarity": None, "geometry": 0.9},
        ),
        "canonical_correlation": Call(
            linkage.canonical_correlation,
            {"x": wide, "y": tall, "pi": pi},
            {"x": tall, "y": wide, "pi": Elsewhere("test_known_pairs_and_labels_are_given_from_outside"), "ridge": 0.9},
        ),
        "shuffled_covariances": Call(
            linkage.shuffled_covariances,
            {"x": wide, "y": tall, "pi": pi, "n_shuffles": 3},
            {
                "x": tall,
                "y": wide,
                "pi": Elsewhere("test_known_pairs_and_labels_are_given_from_outside"),
                "n_shuffles": 4,
                "seed": 1,
            },
        ),
        "count_components": Call(
            linkage.count_components,
            {"canonical": canonical, "null": null},
            {"canonical": unrelated, "null": 1000 * null, "level": With(1.0, {"null": half_large})},
        ),
        "crossfit_correlations": Call(
            linkage.crossfit_correlations,
            {"x": wide, "y": tall, "pi": pi},
            {
                "x": tall,
                "y": wide,
                "pi": Elsewhere("test_known_pairs_and_labels_are_given_from_outside"),
                "ridge": 0.9,
                "seed": 1,
            },
        ),
        "link_recovery": Call(
            linkage.link_recovery,
            {},
            dict.fromkeys(("found", "held_out"), Elsewhere("test_precision_and_recall_count_pairs")),
        ),
        "foscttm": Call(
            metrics.foscttm,
            {"x": x, "y": y},
            {
                "x": x**2,
                "y": y**2,
                "per_cell": True,
                "block_size": blocks,
            },
        ),
        "neighbor_rank_distance": Call(
            metrics.neighbor_rank_distance,
            {"x": x, "y": y},
            {
                "x": x**2,
                "y": y**2,
                "others": x + 1,
                "normalized": False,
                "block_size": blocks,
            },
        ),
        "label_transfer_accuracy": Call(
            metrics.label_transfer_accuracy,
            {"reference": x, "reference_labels": words, "query": y, "query_labels": words},
            {"reference": y, "reference_labels": words == "a", "query": y[::-1], "query_labels": words[::-1]}
            | {"n_neighbors": 7},
        ),
        "label_transfer_both_ways": Call(
            metrics.label_transfer_both_ways,
            {"x": x, "x_labels": words, "y": y, "y_labels": words},
            {"x": x**3, "x_labels": words[::-1], "y": y**3, "y_labels": words[::-1], "n_neighbors": 7},
        ),
        "modality_enrichment": Call(
            metrics.modality_enrichment,
            {"latent": x, "groups": words, "n_neighbors": 3},
            {"latent": y, "groups": words[::-1], "n_neighbors": 5},
        ),
        "label_purity": Call(
            metrics.label_purity,
            {"latent": x, "labels": words, "n_neighbors": 3},
            {"latent": y, "labels": words[::-1], "n_neighbors": 5},
        ),
        "imputation_spearman": Call(
            metrics.imputation_spearman,
            {"truth": truth, "imputed": share},
            {"truth": truth[::-1], "imputed": share**2 - share, "per": "cell"},
        ),
        "imputation_auprc": Call(
            metrics.imputation_auprc,
            {"truth": truth, "probability": share},
            {"truth": truth[::-1], "probability": 1 - share},
        ),
        "scale_by_library": Call(metrics.scale_by_library, {"counts": truth}, {"counts": truth + 1, "total": 10.0}),
        "smooth_by_neighbors": Call(
            metrics.smooth_by_neighbors,
            {"counts": truth, "n_components": 3, "n_neighbors": 4},
            {"counts": truth + 1, "method": "lsi", "n_components": 1, "n_neighbors": 9},
        ),
        "interval_coverage": Call(
            metrics.interval_coverage,
            {"truth": share, "lower": 0 * share, "upper": 0 * share + 0.5},
            {"truth": share**2, "lower": 0 * share + 0.2, "upper": 0 * share + 0.9},
        ),
        "reliability_curve": Call(
            metrics.reliability_curve,
            {"confidence": share[:, 0], "correct": words == "a"},
            {"confidence": share[:, 1], "correct": words == "b", "n_bins": 4},
        ),
        "expected_calibration_error": Call(
            metrics.expected_calibration_error,
            {"confidence": share[:, 0], "correct": words == "a"},
            {"confidence": share[:, 1], "correct": words == "b", "n_bins": 4},
        ),
        "error_by_uncertainty": Call(
            metrics.error_by_uncertainty,
            {"error": share[:, 0], "uncertainty": share[:, 1]},
            {"error": share[:, 2], "uncertainty": share[:, 3], "n_bins": 4},
        ),
        "simulate": Call(
            simulate,
            {"n_cells": 30, "modalities": {"rna": 30, "adt": 6}, "treated": 0.5, "links": {"adt": 0.5}},
            {
                "n_cells": 31,
                "modalities": {"rna": 30, "adt": 7},
                "likelihoods": {"rna": "zinb"},
                "patterns": ["rna", "adt"],
            }
            | {"types": 2, "private": {"type4": ["rna"]}, "n_latent": 3, "separation": 1.0, "n_batches": 3}
            | {"batch_effect": 0.9, "depth": 2.0, "links": {"adt": 0.9}, "negative_links": 0.9, "treated": 0.2}
            | {
                "treated_types": [0.6, 0.1, 0.1, 0.1, 0.1],
                "n_responses": 1,
                "n_salient": 3,
                "affected": 0.9,
                "effect": 2.0,
            }
            | {"keep_means": False, "seed": 1},
        ),
        "unpair": Call(
            unpair,
            {"mdata": mdata[0], "share": 0.5},
            {"mdata": Elsewhere("test_unpaired_cells_stand_once_for_each_modality"), "share": 0.9, "seed": 1},
        ),
        "read": Call(
            read,
            {"path": _written(mdata[0], folder / "whole.h5mu")},
            {
                "path": _written(mdata[0][:20].copy(), folder / "part.h5mu"),
                "modality": Elsewhere("test_data_that_do_not_say_their_features"),
                "genome": Elsewhere("test_several_genomes"),
            },
            lambda **o: [part.shape for part in read(**o).mod.values()],
        ),
        "hide": Call(
            hide,
            {"mdata": mdata[0], "n_hidden": {"adt": 3}},
            {
                "mdata": Elsewhere("test_hidden_measurements_are_kept_from_training_and_compared"),
                "n_hidden": {"adt": 5},
                "seed": 1,
            },
        ),
        "predictive_check": Call(
            checks.predictive_check,
            {"model": model, "n_samples": 2},
            {"model": linked, "cells": np.flatnonzero(mosaic.patterns == "rna+adt")[:4], "prior": True}
            | {"links": some_links, "n_samples": 3, "data": part, "seed": 1},
        ),
        "calibration_report": Call(
            checks.calibration_report,
            {"model": model, "n_samples": 2},
            {"model": linked, "cells": np.flatnonzero(mosaic.patterns == "rna+adt")[:4], "n_cells": 5}
            | {"links": some_links, "n_samples": 3, "data": part, "seed": 1},
            lambda **o: checks.calibration_report(**o).table,
        ),
        "held_out_log_likelihood": Call(
            checks.held_out_log_likelihood,
            {"model": model, "n_samples": 2},
            {
                "model": linked,
                "cells": [0, 1],
                "n_samples": 3,
                "data": part,
                "seed": 1,
            },
        ),
        "prior_sample": Call(
            checks.prior_sample,
            {"model": model},
            {"model": linked, "cells": [0, 1], "data": part, "seed": 1},
            lambda **o: [m.read(np.flatnonzero(m.present)) for m in checks.prior_sample(**o)[0].modalities.values()],
        ),
        "simulation_based_calibration": Call(
            checks.simulation_based_calibration,
            {"model": model, "n_samples": 2, "n_steps": 2, "batch_size": 8, "cells": [0, 1, 2, 3, 4, 5]},
            {"model": linked, "cells": [0, 1], "of": "mean", "n_samples": 3}
            | {"n_steps": 4, "batch_size": 3}
            | {"learning_rate": 0.5, "data": With(part, {"cells": None}), "seed": 1},
        ),
        "imputation_ranks": Call(
            checks.imputation_ranks,
            {"model": model, "modality": "adt", "truth": hidden, "n_samples": 3},
            {
                "model": linked,
                "modality": "rna",
                "truth": hidden + 1,
            }
            | {"n_samples": 4, "encode": ["rna"], "data": With(later, {"seed": 0}), "seed": 1},
        ),
    }
    return found


def arguments(function: Any) -> dict[str, Parameter]:
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {n: p for n, p in signature(function).parameters.items() if n not in ("self", "cls") and p.kind not in kinds}


def answer(call: Call, **given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (call.result or call.function)(**given)


def refused_by_us(error: BaseException) -> bool:
    """Whether an error is a sentence of the package: raised in it, by its own hand, in one line."""
    text = str(error.args[0]) if error.args else ""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = frame.filename.startswith(HOME) and "raise" in (frame.line or "")
    missing = isinstance(error, TypeError) and "() " in text and "argument" in text  # Python's, of a name
    return (
        isinstance(error, ValueError | TypeError | KeyError | RuntimeError | FileExistsError)
        and (ours or missing)
        and "\n" not in text
    )


def public_functions() -> dict[str, Any]:
    """All functions that users call, by name."""
    found: dict[str, Any] = {}
    for room in (pyromosaic, linkage, metrics, checks):
        for name in room.__all__:
            if isfunction(getattr(room, name)):
                found[f"{room.__name__}.{name}"] = getattr(room, name)
    for model in (MultiVI, ContrastiveVI, DiagVI, ScModal):
        found[model.__name__] = model
        for name in dir(model):
            method = getattr(model, name)
            if callable(method) and not isclass(method) and not name.startswith("_") and name not in HOOKS:
                found[f"{method.__module__}.{method.__qualname__}"] = method
    return {name: function for name, function in found.items() if isclass(function) or arguments(function)}


def test_every_public_call_is_in_the_table(calls):
    there = {(call.function.__module__, call.function.__qualname__) for call in calls.values()}
    missing = [n for n, f in public_functions().items() if (f.__module__, f.__qualname__) not in there]
    assert not missing


def test_every_argument_has_an_entry(calls):
    written = "".join(file.read_text() for file in HERE.rglob("test_*.py"))
    faults = []
    for name, call in calls.items():
        wanted = set(arguments(call.function))
        faults += [f"{name}: {argument} has no entry" for argument in wanted - set(call.varied)]
        faults += [f"{name}: there is no {argument}" for argument in set(call.varied) - wanted]
        for argument, value in call.varied.items():
            if isinstance(value, Elsewhere) and f"def {value.test}(" not in written:
                faults.append(f"{name}: no test {value.test} for {argument}")
    assert not faults, "\n".join(faults)


def test_each_argument_has_an_effect(calls):
    faults = []
    for name, call in calls.items():
        first: dict[str, Any] = {}
        for argument, value in call.varied.items():
            if isinstance(value, Elsewhere):
                continue
            value, others = value if isinstance(value, With) else (value, {})
            key = repr(sorted(others))
            if key not in first:
                first[key] = answer(call, **call.given | others)
            try:
                other = answer(call, **call.given | others | {argument: value})
            except (ValueError, KeyError) as error:
                if not refused_by_us(error):
                    raise
            else:
                if same(first[key], other):
                    faults.append(f"{name}: {argument}={value!r} has no effect")
    assert not faults, "\n".join(faults)


def test_odd_values_are_refused_in_one_sentence_or_mean_something(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults = []
    for name, call in calls.items():
        for argument in arguments(call.function):
            for value in ODD:
                try:
                    answer(call, **call.given | {argument: value})
                except Exception as error:  # noqa: BLE001 - whatever it is
                    if not refused_by_us(error):
                        where = traceback.extract_tb(error.__traceback__)[-1]
                        faults.append(f"{name}: {argument}={value!r}: {error!r:.150} ({where.filename}:{where.lineno})")
    assert not faults, "\n".join(faults)
