"""Questions to a trained MultiVI, and keeping it."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from mosaics import QUIET, small

from pyromosaic import Mosaic, MultiVI, metrics
from pyromosaic.data import measured
from pyromosaic.program import AtMean
from pyromosaic.sizes import Size
from pyromosaic.tasks import Block, Question, estimate

# Asking


def test_latent_representations(trained, mosaic):
    joint = trained.get_latent_representation()
    assert list(joint.index) == list(mosaic.obs_names) and joint.shape == (240, 4)
    rna = trained.get_latent_representation(modality="rna")
    present = mosaic.presence
    assert list(rna.index) == list(mosaic.obs_names[present["rna"]])
    only = mosaic.obs_names[mosaic.patterns == "rna"]
    np.testing.assert_allclose(rna.loc[only], joint.loc[only], atol=1e-6)
    both = mosaic.obs_names[mosaic.patterns == "rna+adt"]
    adt = trained.get_latent_representation(both, modality="adt")
    np.testing.assert_allclose((rna.loc[both] + adt) / 2, joint.loc[both], atol=1e-5)
    draws = [trained.get_latent_representation(sample=True, seed=seed) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(draws[0], draws[1])
    assert not np.allclose(draws[0], draws[2])
    purity = metrics.label_purity(joint, mosaic.labels(), n_neighbors=10)
    assert purity > 0.7  # 0.85 on average over seeds, 0.25 by chance


def test_expected_values_follow_the_data(trained, mosaic, data):
    shares = trained.get_normalized_expression("rna")
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-4)
    counts = data["rna"].to_df()
    own = trained.get_imputed_values("rna", counts.index, n_samples=2).mean
    np.testing.assert_allclose(own.sum(axis=1), counts.sum(axis=1), rtol=1e-3)
    assert metrics.imputation_spearman(counts, own) > 0.45
    accessibility = trained.get_accessibility_estimates()
    seen = trained.get_accessibility_estimates(factors=True)
    assert accessibility.shape == (240, 50) and (seen < accessibility).all().all() and (accessibility <= 1).all().all()
    foreground = trained.get_normalized_expression("adt", features=["adt3", "adt1"], cells=["c5", "c2"])
    assert list(foreground.index) == ["c5", "c2"] and list(foreground.columns) == ["adt3", "adt1"]


def test_size_of_unmeasured_cells_is_log_linear_in_the_latent_variable(mosaic):
    rng = torch.Generator().manual_seed(0)
    view = measured(mosaic, np.flatnonzero(mosaic.presence["adt"])).observed["adt"]
    z = torch.randn(len(view.rows), 3, generator=rng)
    slope, shift = torch.tensor([[0.5], [-1.0], [0.0]]), torch.tensor([[0.2], [-0.2]])
    size = Size("adt", mosaic.schema["adt"], 3)
    unknown = replace(view, library=torch.full_like(view.library, float("nan")))
    median = torch.full_like(view.library, mosaic.schema["adt"].library)
    torch.testing.assert_close(size(z, unknown).library, median, rtol=1e-4, atol=0.0)
    truth = (6 + z @ slope + view.one_hot() @ shift).exp()
    size.fit(z, replace(view, library=truth))
    with AtMean():
        torch.testing.assert_close(size(z, unknown).library, truth, rtol=0.05, atol=0.0)
    assert size(z, view) is view
    noise = torch.randn(truth.shape, generator=rng)
    size.fit(z, replace(view, library=truth * (0.4 * noise).exp()))
    assert abs(float(size.residual) - 0.4) < 0.05
    many = torch.stack([size(z, unknown).library for _ in range(2000)])
    torch.testing.assert_close(many.log().std(0), size.residual.expand_as(truth), rtol=0.1, atol=0.0)
    with AtMean():
        torch.testing.assert_close(size(z, unknown).library, many.mean(0), rtol=0.05, atol=0.0)


def test_imputed_counts_have_the_size_that_such_cells_have(trained, mosaic, data):
    """Cells of two types have few antibodies in all, cells of the other two many."""
    totals = data["adt"].to_df().sum(axis=1)
    types = mosaic.labels().astype(str)
    expected = totals.groupby(types[totals.index]).mean()
    unmeasured = mosaic.obs_names[~mosaic.presence["adt"]]
    imputed = trained.get_imputed_values("adt", unmeasured, n_samples=None).mean.sum(axis=1)
    by_type = imputed.groupby(types[unmeasured]).mean()
    np.testing.assert_allclose(by_type, expected, rtol=0.3)
    assert expected.max() / expected.min() > 1.3


def test_draws_are_independent_and_summarised(trained):
    estimate = trained.get_imputed_values("adt", n_samples=40, quantiles=(0.1, 0.5, 0.9))
    low, middle, high = (estimate.quantiles[q] for q in (0.1, 0.5, 0.9))
    assert ((low <= middle) & (middle <= high)).all().all()
    assert (estimate.sd.to_numpy() > 0).all() and (low < high).to_numpy().all()
    again = trained.get_imputed_values("adt", n_samples=40, quantiles=(0.1, 0.5, 0.9))
    pd.testing.assert_frame_equal(estimate.mean, again.mean)
    chunks = list(trained._answers(Question("adt", lambda distribution: distribution.mean, n_samples=300)))
    draws = torch.cat(chunks, dim=1).log().flatten(1)
    centred = draws - draws.mean(0)
    neighbours = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert abs(neighbours) < 0.05


def test_posterior_predictive_has_the_models_moments(trained):
    cells = ["c0", "c1"]
    draws = trained.posterior_predictive_sample("rna", cells, n_samples=1500, library=500.0)
    assert draws.shape == (1500, 2, 30) and (draws == np.round(draws)).all()
    expected = trained.get_imputed_values("rna", cells, n_samples=400, library=500.0).mean.to_numpy()
    error = draws.std(0) / np.sqrt(1500)
    assert (np.abs(draws.mean(0) - expected) < 5 * error + 0.02 * expected + 0.01).all()
    opened = trained.posterior_predictive_sample("atac", cells, n_samples=5)
    assert set(np.unique(opened)) <= {0, 1}


@pytest.mark.parametrize("n", [1, 2, 25])
def test_summaries_of_draws_are_those_of_numpy(n, monkeypatch):
    monkeypatch.setattr("pyromosaic.tasks.prediction.BLOCK", 7)
    draws, levels = torch.randn(n, 9, 5) + 100.0, (0.0, 0.05, 0.5, 0.77, 1.0)
    blocks = [Block(cells, slice(0, 5), draws[:, cells]) for cells in (slice(0, 4), slice(4, 9))]
    found = estimate(blocks, pd.RangeIndex(9), pd.RangeIndex(5), levels)
    np.testing.assert_allclose(found.mean, draws.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.sd, draws.std(0) if n > 1 else np.zeros((9, 5)), rtol=1e-5)
    for level in levels:
        np.testing.assert_allclose(found.quantiles[level], np.quantile(draws, level, axis=0), rtol=1e-6)


def test_chunks_of_cells_do_not_matter(trained, monkeypatch):
    whole = trained.get_normalized_expression("rna")
    monkeypatch.setattr("pyromosaic.tasks.prediction.ENTRIES", 30 * 7)
    pd.testing.assert_frame_equal(trained.get_normalized_expression("rna"), whole, rtol=1e-4)


def test_batches_can_be_exchanged_and_averaged(trained, mosaic):
    a, b, own = (trained.get_normalized_expression("rna", batch=batch) for batch in ("a", "b", None))
    pd.testing.assert_frame_equal(trained.get_normalized_expression("rna", batch=["a", "b"]), (a + b) / 2)
    draws = [trained.get_accessibility_estimates(batch=batch, n_samples=3) for batch in ("a", "b", ["a", "b"])]
    pd.testing.assert_frame_equal(draws[2], (draws[0] + draws[1]) / 2)
    is_a = (trained.mosaic.modalities["rna"].codes[:, 0] == 0) & mosaic.presence["rna"].to_numpy()
    pd.testing.assert_frame_equal(own[is_a], a[is_a])
    assert not np.allclose(a, b)


def test_region_factors_and_foreground_probabilities(trained, mosaic, data):
    factors = trained.get_region_factors()
    assert list(factors.index) == list(data["atac"].var_names) and factors.between(0, 1).all()
    foreground = trained.get_protein_foreground_probability()
    assert foreground.shape == (240, 8) and ((foreground > 0) & (foreground < 1)).all().all()
    one = trained.get_protein_foreground_probability(batch=["b"], features=["adt2"], cells=["c3"], n_samples=2)
    assert one.shape == (1, 1)
    signal = trained.get_normalized_expression("adt")
    assert np.corrcoef(foreground.rank(axis=1).to_numpy().ravel(), signal.rank(axis=1).to_numpy().ravel())[0, 1] > 0.3
    lacking = MultiVI(Mosaic.from_mudata(data, {"rna": "nb"}))
    for call, message in [
        (lambda: trained.get_region_factors("rna"), "modality 'rna' has no region factors"),
        (lambda: trained.get_protein_foreground_probability("rna"), "modality 'rna' has no foreground"),
        (lambda: trained.get_normalized_expression(batch=[]), "list of batches to average over is empty"),
        (lambda: lacking.get_region_factors(), "none has a likelihood 'bernoulli'"),
        (lambda: lacking.get_protein_foreground_probability(), "none has a likelihood 'nb_mixture'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_inference_from_some_modalities_only(trained, mosaic):
    both = mosaic.obs_names[mosaic.patterns == "rna+adt"]
    from_rna = trained.get_imputed_values("adt", both, encode=["rna"], n_samples=3).mean
    assert not np.allclose(from_rna, trained.get_imputed_values("adt", both, n_samples=3).mean)
    with pytest.raises(ValueError, match="none of the modalities to infer from"):
        trained.get_imputed_values("adt", encode=["rna"])


def test_wrong_questions_get_a_sentence(trained, mosaic):
    for call, error, message in [
        (lambda: trained.get_latent_representation(modality="protein"), KeyError, "no modality 'protein'"),
        (
            lambda: trained.get_normalized_expression("rna", features=["CD4"]),
            ValueError,
            "'CD4' is not in modality",
        ),
        (lambda: trained.get_normalized_expression("rna", ["nobody"]), ValueError, "'nobody' is not in the mosaic"),
        (lambda: trained.get_normalized_expression("rna", batch="z"), ValueError, "no batch 'z'"),
        (lambda: trained.get_imputed_values("rna", n_samples=0), ValueError, "from 1 to"),
        (lambda: trained.get_imputed_values("rna", n_samples=2, quantiles=[2.0]), ValueError, "from 0 to 1"),
        (lambda: trained.get_imputed_values("rna", []), ValueError, "cells must be .*; found none"),
        (lambda: MultiVI(mosaic.schema).train(1), ValueError, "has no data"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_asking_changes_nothing(trained):
    state = {k: v.clone() for k, v in trained.model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trained.get_imputed_values("adt", n_samples=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, state[k]) for k, v in trained.model.state_dict().items())


# Keeping


def test_save_and_load_give_the_same_answers(trained, data, tmp_path):
    trained.save(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"weights.safetensors", "model.json"}
    loaded = MultiVI.load(tmp_path / "model", data)
    pd.testing.assert_frame_equal(loaded.get_latent_representation(), trained.get_latent_representation())
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        trained.save(tmp_path / "model")
    trained.save(tmp_path / "model", overwrite=True)


def test_load_in_another_process(trained, data, tmp_path):
    trained.save(tmp_path / "model")
    data.write(tmp_path / "data.h5mu")
    script = (
        "import sys, mudata; from pyromosaic import MultiVI\n"
        f"model = MultiVI.load({str(tmp_path / 'model')!r}, mudata.read_h5mu({str(tmp_path / 'data.h5mu')!r}))\n"
        f"model.get_latent_representation().to_csv({str(tmp_path / 'z.csv')!r})\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    z = pd.read_csv(tmp_path / "z.csv", index_col=0)
    np.testing.assert_allclose(z, trained.get_latent_representation(), atol=1e-5)


def test_load_puts_features_in_order_and_refuses_others(trained, data, tmp_path):
    trained.save(tmp_path / "model")
    mixed = {
        name: adata[::-1, np.random.default_rng(0).permutation(adata.n_vars)].copy() for name, adata in data.mod.items()
    }
    loaded = MultiVI.load(tmp_path / "model", mixed)
    pd.testing.assert_frame_equal(
        loaded.get_latent_representation().sort_index(), trained.get_latent_representation().sort_index(), atol=1e-5
    )
    mixed["rna"].var_names = [f"other{i}" for i in range(30)]
    with pytest.raises(
        ValueError, match="modality 'rna': the data have none of the 30 features of the model.*'other0'"
    ):
        MultiVI.load(tmp_path / "model", mixed)
    mixed = {name: adata.copy() for name, adata in data.mod.items()}
    for adata in mixed.values():
        adata.obs["batch"] = "new"
    with pytest.raises(ValueError, match="modality 'rna'.*'new'"):
        MultiVI.load(tmp_path / "model", mixed)


def test_damaged_and_foreign_files_are_refused(trained, tmp_path):
    trained.save(tmp_path / "good")

    def broken(change) -> None:
        target = tmp_path / "bad"
        trained.save(target, overwrite=True)
        change(target)
        with pytest.raises(ValueError, match="bad"):
            MultiVI.load(target)

    def edit(**changes):
        return lambda d: (d / "model.json").write_text(json.dumps(json.loads((d / "model.json").read_text()) | changes))

    broken(lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-100]))
    broken(lambda d: (d / "weights.safetensors").write_bytes(b"PK not a safetensors file at all"))
    broken(lambda d: (d / "weights.safetensors").unlink())
    broken(lambda d: (d / "model.json").write_text((d / "model.json").read_text()[:50]))
    broken(lambda d: (d / "model.json").write_text("[1, 2]"))
    broken(edit(**{"class": "DiagVI"}))
    broken(edit(format=99))
    broken(edit(options={"n_latent": 7}))
    broken(edit(options={"no_such_option": 7}))
    broken(edit(schema={"rna": {}}))


def test_objects_are_given_again_at_load(mosaic, tmp_path):
    class Wide(torch.nn.Module):
        def forward(self, minibatch):
            return pyro.distributions.StudentT(5.0, torch.zeros(len(minibatch), 1, 4), 1.0).to_event(1)

    model = small(mosaic, prior=Wide())
    model.train(1, **QUIET)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="pass prior=<object> to load"):
        MultiVI.load(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", prior=Wide())
    loaded.mosaic = mosaic
    pd.testing.assert_frame_equal(loaded.get_latent_representation(), model.get_latent_representation())
