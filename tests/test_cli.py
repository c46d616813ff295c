import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from unittest.mock import Mock

import matplotlib

matplotlib.use("Agg")

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from lightning.pytorch.callbacks import Callback
from scipy import sparse
from scipy.stats import spearmanr
from terminal import on_terminal
from typer.testing import CliRunner

import pyromosaic
from pyromosaic import Mosaic, MultiVI, cli
from pyromosaic.data.tables import kept_apart
from pyromosaic.train.checkpoints import newest

N = 90
CELLS = pd.Index([f"cell{i}" for i in range(N)])


@pytest.fixture(scope="module")
def data():
    """90 cells of two kinds: 30 with RNA only, 30 with antibodies only, 30 with both; atac in all but the last 20."""
    generator = np.random.default_rng(0)
    kind = np.arange(N) % 2
    rates = generator.gamma(1.0, 4.0, (2, 12))
    obs = pd.DataFrame({"donor": np.where(np.arange(N) % 3 == 0, "d1", "d2"), "type": np.where(kind, "B", "NK")}, CELLS)
    obs.loc[CELLS[:5], "type"] = "unknown"

    def modality(name, cells, n_features):
        counts = generator.poisson(rates[kind][cells, :n_features] + 0.5).astype(np.float32)
        var = pd.DataFrame({"length": np.arange(n_features)}, [f"{name}{i}" for i in range(n_features)])
        return AnnData(sparse.csr_matrix(counts), obs=obs.iloc[cells].copy(), var=var)

    # The second modality is stored in another order of cells than the whole.
    modalities = {"rna": modality("gene", np.arange(60), 12), "adt": modality("protein", np.arange(N - 1, 29, -1), 7)}
    with kept_apart():
        mdata = mudata.MuData(modalities)
        mdata.obs["site"] = np.arange(mdata.n_obs)
    return mdata


@pytest.fixture
def folder(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kept_apart():
        data.write("data.h5mu")
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("training began")

    monkeypatch.setattr(MultiVI, "train", train)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def integrate(*arguments, epochs=1):
    return run("integrate", "data.h5mu", "--out", "result.h5mu", "--epochs", epochs, *arguments)


@contextmanager
def strict():
    """Any ambiguity in a file is an error; only what libraries say of themselves is not."""
    with warnings.catch_warnings(), kept_apart():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="anndata|mudata")
        warnings.filterwarnings("ignore", message="Transforming to str index")  # anndata 0.12.0, of an empty one
        yield


def read(path):
    with strict():
        return mudata.read_h5mu(path)


def test_integrate_writes_what_the_model_says(folder, data):
    outcome = integrate(
        *("--batch-key", "donor", "--label-key", "type", "--n-latent", 4, "--seed", 3, "--batch-size", 40), epochs=2
    )
    assert outcome.exit_code == 0, outcome.output
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", "result.h5mu"]
    result = read("result.h5mu")

    mosaic = Mosaic.from_mudata(data, batch_key="donor")  # labels make no difference
    model = MultiVI(mosaic, n_latent=4, seed=3)
    model.train(2, seed=3, batch_size=40, progress_bar=False)
    latent = model.get_latent_representation()
    np.testing.assert_allclose(result.obsm["X_multivi"], latent.loc[result.obs_names], rtol=1e-4, atol=1e-5)

    assert list(result.mod) == ["rna", "adt", "rna_imputed", "adt_imputed"]
    for name in ("rna", "adt"):
        imputed, expected = result[f"{name}_imputed"], model.get_imputed_values(name, seed=3)
        assert imputed.obs_names.equals(result.obs_names)
        assert list(imputed.var["feature"]) == list(data[name].var_names)
        assert list(imputed.var_names) == [f"{name}_imputed:{feature}" for feature in data[name].var_names]
        assert list(imputed.var["length"]) == list(data[name].var["length"])
        for values, frame in ((imputed.X, expected.mean), (imputed.layers["sd"], expected.sd)):
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, frame.loc[result.obs_names], rtol=1e-3, atol=1e-5)
        assert (result[name].X != data[name].X).nnz == 0
        assert result[name].obs_names.equals(data[name].obs_names)
        pd.testing.assert_frame_equal(result[name].obs.astype(str), data[name].obs.astype(str))
    assert list(result.obs["site"]) == list(data.obs["site"])
    assert "hidden_modality" not in result.obs

    record = result.uns["pyromosaic"]
    assert record["version"] == pyromosaic.__version__
    assert record["options"]["batch_key"] == "donor"
    assert record["options"]["seed"] == 3
    assert record["options"]["likelihood"] == {"rna": "nb", "adt": "nb_mixture"}
    assert "layer" not in record["options"]
    assert set(record["metrics"]) == {
        *("modality_enrichment", "label_purity", "label_transfer_rna_to_adt", "label_transfer_adt_to_rna")
    }
    assert "Modality enrichment" in outcome.output
    assert f"{record['metrics']['label_purity']:.3f}" in outcome.output


def test_a_result_can_be_selected_from_and_written_again(folder):
    assert integrate().exit_code == 0
    result = read("result.h5mu")
    with strict():
        selected = result[:, ["gene3", "rna_imputed:gene3"]]
        assert {name: a.n_vars for name, a in selected.mod.items() if a.n_vars} == {"rna": 1, "rna_imputed": 1}
        result[result.obs_names[:10]].copy().write("again.h5mu")
    again = read("again.h5mu")
    np.testing.assert_array_equal(again.obsm["X_multivi"], result.obsm["X_multivi"][:10])
    np.testing.assert_array_equal(again["adt_imputed"].X, result["adt_imputed"].X[:10])


def test_hidden_measurements_are_kept_from_training_and_compared(folder, data, quick_umap):
    figures = matplotlib.pyplot.get_fignums()
    outcome = integrate("--hide", 8, "--figure", "deep/er/figure.png", "--seed", 1)
    assert outcome.exit_code == 0, outcome.output
    result = read("result.h5mu")
    hidden = result.obs["hidden_modality"]
    assert hidden.value_counts().to_dict() == {"none": N - 16, "rna": 8, "adt": 8}
    metrics = result.uns["pyromosaic"]["metrics"]
    for name in ("rna", "adt"):
        cells = hidden.index[hidden == name]
        truth = data[name][cells].X.toarray()
        imputed = result[f"{name}_imputed"][cells].X
        assert metrics[f"spearman_{name}"] == pytest.approx(spearmanr(truth.ravel(), imputed.ravel())[0])
        each = [spearmanr(t, i)[0] for t, i in zip(truth.T, imputed.T, strict=True) if np.ptp(t) > 0]
        assert metrics[f"spearman_per_feature_{name}"] == pytest.approx(np.median(each))
    # The model has seen none of it: these cells are imputed as if the data had never held it.
    shown, _ = pyromosaic.hide(data, {"rna": 8, "adt": 8}, seed=1)
    model = MultiVI(Mosaic.from_mudata(shown), seed=1)
    model.train(1, seed=1, progress_bar=False)
    np.testing.assert_allclose(
        result.obsm["X_multivi"], model.get_latent_representation().loc[result.obs_names], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(result.obsm["X_multivi_umap"], result.obsm["X_multivi"][:, :2] + 1, rtol=1e-6)
    assert matplotlib.image.imread("deep/er/figure.png").shape[0] > 500
    assert matplotlib.pyplot.get_fignums() == figures


def test_without_imputation_and_with_a_model(folder):
    outcome = integrate("--no-impute", "--hide", 5, "--model", "model", "--likelihood", "adt=nb", "--n-latent", 3)
    assert outcome.exit_code == 0, outcome.output
    result = read("result.h5mu")
    assert list(result.mod) == ["rna", "adt"]
    assert {"spearman_rna", "spearman_adt"} <= set(result.uns["pyromosaic"]["metrics"])
    shown, _ = pyromosaic.hide(read("data.h5mu"), {"rna": 5, "adt": 5})
    model = MultiVI.load("model", shown)
    assert model.schema["adt"].spec.likelihood == "nb"
    latent = model.get_latent_representation().loc[result.obs_names]
    np.testing.assert_allclose(result.obsm["X_multivi"], latent, rtol=1e-4, atol=1e-5)


def test_accessibility_is_judged_by_detection(folder, data, quick_umap):
    atac = data["adt"].copy()
    atac.X = (atac.X > 4).astype(np.float32)
    counts = data["rna"].copy()
    counts.layers["raw"], atac.layers["raw"] = counts.X.copy(), atac.X.copy()
    counts.X, atac.X = counts.X * 0.5, atac.X * 0.5
    with kept_apart():
        mudata.MuData({"rna": counts, "peak counts": atac}).write("data.h5mu")
    outcome = integrate(
        *("--likelihood", "peak counts=bernoulli", "--layer", "raw", "--hide", 10, "--figure", "figure.pdf")
    )
    assert outcome.exit_code == 0, outcome.output
    metrics = read("result.h5mu").uns["pyromosaic"]["metrics"]
    assert 0 < metrics["auprc_peak counts"] <= 1
    assert "auprc_rna" not in metrics


TO_RESULT = ["integrate", "data.h5mu", "--out", "result.h5mu"]
REFUSALS = [
    (["integrate", "absent.h5mu", "--out", "result.h5mu"], "there is no file absent.h5mu"),
    (["integrate", "notes.txt", "--out", "result.h5mu"], "notes.txt cannot be read; accepted"),
    (["integrate", "notes.h5mu", "--out", "result.h5mu"], "notes.h5mu cannot be read; accepted"),
    (["integrate", "single.h5mu", "--out", "result.h5mu"], "single.h5mu does not say what its features are"),
    (["integrate", "data.h5mu", "--out", "result.h5ad"], "--out needs a file that ends in .h5mu"),
    (["integrate", "data.h5mu", "--out", "data.h5mu", "--overwrite"], "is the input"),
    (["integrate", "data.h5mu", "--out", "there.h5mu"], "there.h5mu exists; pass --overwrite to replace it"),
    (["integrate", "data.h5mu", "--out", "notes.txt/result.h5mu"], "cannot be written"),
    (["integrate", "data.h5mu", "--out", "folder.h5mu"], "is a folder"),
    ([*TO_RESULT, "--figure", "figure.jpeg"], "--figure needs a file that ends in .png or .pdf or .svg"),
    ([*TO_RESULT, "--figure", "there.png"], "there.png exists"),
    ([*TO_RESULT, "--model", "notes.txt"], "is a file"),
    ([*TO_RESULT, "--model", "model"], "model exists"),
    ([*TO_RESULT, "--model", "result.h5mu"], "another output"),
    ([*TO_RESULT, "--likelihood", "rna:nb"], "--likelihood needs MODALITY=NAME, e.g. rna=nb; found 'rna:nb'"),
    ([*TO_RESULT, "--likelihood", "protein=nb"], "there is no modality 'protein'; found rna, adt"),
    ([*TO_RESULT, "--likelihood", "rna=gaussian"], "there is no likelihood 'gaussian'"),
    ([*TO_RESULT, "--batch-key", "plate"], "no obs has a column 'plate'"),
    ([*TO_RESULT, "--label-key", "plate"], "no obs has a column 'plate'"),
    ([*TO_RESULT, "--layer", "raw"], "there is no layer 'raw'"),
    ([*TO_RESULT, "--hide", "40"], "at most 30, the cells with all modalities"),
    ([*TO_RESULT, "--resume"], "--resume needs --checkpoints FOLDER"),
    (["demo", "--resume"], "--resume needs --checkpoints FOLDER"),
    ([*TO_RESULT, "--checkpoints", "notes.txt"], "--checkpoints notes.txt is a file"),
    ([*TO_RESULT, "--checkpoints", "notes.txt/inner"], "--checkpoints notes.txt/inner/last.ckpt cannot be written"),
    ([*TO_RESULT, "--checkpoints", "run"], "run holds checkpoints of another run; pass --resume to go on with it"),
    (["demo", "--checkpoints", "run"], "run holds checkpoints of another run"),
    (["demo", "--out", "there.h5mu"], "there.h5mu exists"),
    (["demo", "--figure", "there.png"], "there.png exists"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS)
def test_refusals_come_before_training_and_leave_nothing(folder, no_training, arguments, sentence):
    for name in ("notes.txt", "notes.h5mu", "there.h5mu", "there.png"):
        (folder / name).write_text("some words")
    AnnData(np.ones((3, 2))).write(folder / "single.h5mu")
    (folder / "folder.h5mu").mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "model.json").write_text("{}")
    (folder / "run").mkdir()
    (folder / "run" / "last.ckpt").write_text("some words")
    before = {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}
    outcome = run(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert isinstance(outcome.exception, SystemExit)
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    assert sentence in line.replace("modality 'rna': ", "")
    assert {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")} == before


def test_modalities_whose_names_say_nothing_or_are_taken(folder, no_training, data):
    with kept_apart():
        mudata.MuData({"first": data["rna"], "adt": data["adt"]}).write("data.h5mu")
    outcome = integrate()
    assert outcome.exit_code == 2
    assert "'first' does not say which likelihood it needs; pass one, e.g. --likelihood first=nb" in outcome.stderr
    with kept_apart():
        mudata.MuData({"rna": data["rna"], "rna_imputed": data["adt"]}).write("data.h5mu")
    outcome = integrate("--likelihood", "rna_imputed=nb")
    assert outcome.exit_code == 2
    assert "already has a modality 'rna_imputed'" in outcome.stderr


def test_hiding_needs_something_to_impute_from(folder, no_training, data):
    with kept_apart():
        mudata.MuData({"rna": data["rna"]}).write("data.h5mu")
    outcome = integrate("--hide", 5)
    assert outcome.exit_code == 2
    assert "at least two modalities" in outcome.stderr


def test_a_folder_that_cannot_be_written_is_refused(folder, no_training, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.outputs, "TemporaryFile", refuse)
    outcome = integrate()
    assert outcome.exit_code == 2
    assert "result.h5mu cannot be written" in outcome.stderr
    assert "Permission denied" in outcome.stderr


def test_a_figure_needs_the_extra(folder, no_training, monkeypatch):
    monkeypatch.setattr(cli.outputs, "find_spec", lambda name: None)
    for outcome in (integrate("--figure", "figure.png"), run("demo")):
        assert outcome.exit_code == 2
        assert "pip install 'pyromosaic[plot]'" in outcome.stderr


def test_one_modality_without_batches_or_labels(folder, data):
    with kept_apart():
        mudata.MuData({"rna": data["rna"]}).write("data.h5mu")
    outcome = integrate()
    assert outcome.exit_code == 0, outcome.output
    result = read("result.h5mu")
    assert list(result.mod) == ["rna", "rna_imputed"]
    assert result.uns["pyromosaic"]["metrics"] == {}


def test_overwrite_replaces_result_figure_and_model(folder, quick_umap):
    outputs = ("--figure", "figure.png", "--model", "model")
    (folder / "result.h5mu").write_text("old")
    (folder / "figure.png").write_text("old")
    (folder / "model").mkdir()
    (folder / "model" / "model.json").write_text("old")
    outcome = integrate(*outputs, "--overwrite")
    assert outcome.exit_code == 0, outcome.output
    assert read("result.h5mu").obsm["X_multivi"].shape == (N, 15)
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    MultiVI.load("model")
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", "figure.png", "model", "result.h5mu"]


def test_a_failure_at_the_end_leaves_nothing_half_written(folder, quick_umap, monkeypatch):
    def full(self, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (folder / "result.h5mu").write_text("old")
    monkeypatch.setattr(mudata.MuData, "write", full)
    outcome = integrate("--figure", "figure.png", "--model", "model", "--overwrite")
    assert outcome.exit_code == 1
    said, _, kept = outcome.stderr.strip().rpartition(". The model, trained for 1 epoch, is in ")
    assert said == "error: result.h5mu cannot be written: [Errno 28] No space left on device"
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", kept, "result.h5mu"]
    assert (folder / "result.h5mu").read_text() == "old"
    MultiVI.load(kept)


def test_a_model_without_a_place_is_kept_if_the_result_cannot_be_written(folder, monkeypatch):
    def refuse(self, path, **options):
        raise TypeError("no way to write this")

    monkeypatch.setattr(mudata.MuData, "write", refuse)
    outcome = integrate()
    assert outcome.exit_code == 1
    kept = outcome.stderr.strip().rpartition(" ")[2]
    assert "no way to write this" in outcome.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", kept]
    assert MultiVI.load(kept).options["n_latent"] == 15


def test_tables_that_cannot_be_written_again_are_refused_before_training(folder, no_training, monkeypatch):
    def refuse(self, path, **options):
        raise RuntimeError("strings of a new kind")

    monkeypatch.setattr(AnnData, "write_h5ad", refuse)
    outcome = integrate()
    assert outcome.exit_code == 2
    assert outcome.stderr.strip() == (
        "error: data.h5mu, the whole: obs, var or uns cannot be written again: strings of a new kind"
    )


def test_names_of_the_newest_kind_are_written_as_they_were_read(folder, data):
    """anndata 0.13 writes names as nullable strings, which 0.11 and 0.12 read but do not write unasked."""
    data = data.copy()
    data["rna"].obs_names = data["rna"].obs_names.astype("string")
    data["rna"].obs["note"] = pd.array(["x", None] * 30, dtype="string")
    with kept_apart(), anndata.settings.override(allow_write_nullable_strings=True):
        data.write("data.h5mu")
    outcome = integrate("--no-impute")
    assert outcome.exit_code == 0, outcome.output
    result = read("result.h5mu")
    assert list(result["rna"].obs_names) == list(data["rna"].obs_names)
    assert result["rna"].obs["note"].isna().tolist() == [False, True] * 30


def test_demo_needs_nothing_and_replaces_its_own_outputs(tmp_path, monkeypatch, quick_umap):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pbmc_integrated.h5mu").write_text("an earlier one")
    (tmp_path / "pbmc_integrated.png").write_text("an earlier one")
    outcome = run("demo", "--epochs", 1)
    assert outcome.exit_code == 0, outcome.output
    result = read("pbmc_integrated.h5mu")
    assert result["rna_imputed"].shape == (1600, 500)
    assert result["adt_imputed"].shape == (1600, 224)
    assert result.obs["hidden_modality"].value_counts().to_dict() == {"none": 1200, "rna": 200, "adt": 200}
    assert set(result.uns["pyromosaic"]["metrics"]) == {
        *("modality_enrichment", "label_purity", "label_transfer_rna_to_adt", "label_transfer_adt_to_rna"),
        *("spearman_rna", "spearman_per_feature_rna", "spearman_adt", "spearman_per_feature_adt"),
    }
    assert result.uns["pyromosaic"]["options"]["batch_key"] == "batch"
    assert (tmp_path / "pbmc_integrated.h5mu").stat().st_size < 30e6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pbmc_integrated.h5mu", "pbmc_integrated.png"]


INTEGRATE = [sys.executable, "-m", "pyromosaic", "integrate", "data.h5mu", "--out", "result.h5mu", "--epochs", "1"]


def test_a_log_has_the_results_only(folder):
    outcome = subprocess.run(INTEGRATE, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert lines[0] == f"Mosaic of {N} cells"
    assert lines[-1] == "Wrote result.h5mu"
    assert len(lines) == 9  # mosaic 3, table 5, output 1


def test_a_terminal_shows_a_bar_for_each_long_phase_beside_results_that_go_elsewhere(folder):
    seen = on_terminal(INTEGRATE, stdout=folder / "results.txt")
    assert (folder / "results.txt").read_text().endswith("Wrote result.h5mu\n")
    lines = [line.split("\r")[-1] for line in seen.replace("\r\n", "\n").strip("\n").split("\n")]
    assert [line.split(":")[0] for line in lines] == [
        "Training, widths of posteriors",
        "Latent space",
        "Writing",
        "Imputing",
    ]
    assert all("100%" in line and "00:00 left" in line for line in lines)


def test_version_and_help():
    assert run("--version").stdout == f"pyromosaic {pyromosaic.__version__}\n"
    for arguments in (["--help"], ["integrate", "--help"], ["demo", "--help"]):
        assert run(*arguments).exit_code == 0


def test_importing_the_command_line_is_quick():
    heavy = "{'torch', 'pyro', 'lightning', 'mudata', 'anndata', 'numpy', 'pandas', 'matplotlib'}"
    check = f"import sys, pyromosaic.cli; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


# Runs that are left


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in the epoch with this number, once."""

    class Interrupt(Callback):
        def __init__(self, epoch):
            self.epoch = epoch

        def on_train_batch_end(self, trainer, plan, outputs, batch, step):
            if trainer.current_epoch == self.epoch:
                raise KeyboardInterrupt

    def at(epoch):
        whole = MultiVI.train

        def train(self, *arguments, callbacks=(), **options):
            monkeypatch.setattr(MultiVI, "train", whole)
            whole(self, *arguments, callbacks=[*callbacks, Interrupt(epoch)], **options)

        monkeypatch.setattr(MultiVI, "train", train)

    return at


def test_a_resumed_command_is_the_command(folder, interrupted):
    assert run("integrate", "data.h5mu", "--out", "whole.h5mu", "--epochs", 5).exit_code == 0
    interrupted(3)
    outcome = integrate("--checkpoints", "deep/run", epochs=5)
    assert outcome.exit_code == 130
    said = outcome.stderr.strip()
    assert said.startswith("interrupted after 3 of 5 epochs. The model, trained for 3 epochs, is in result-model-")
    assert said.endswith(". To go on from deep/run, run the same command with --resume")
    (kept,) = folder.glob("result-model-*")
    assert len(MultiVI.load(kept).history) == 3
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", "deep", kept.name, "whole.h5mu"]
    outcome = integrate("--checkpoints", "deep/run", "--resume", epochs=5)
    assert outcome.exit_code == 0, outcome.output
    assert "after 3 of 5 epochs" in outcome.stderr
    for again in (read("result.h5mu"), None):
        if again is None:  # nothing is left to train
            outcome = integrate("--checkpoints", "deep/run", "--resume", "--overwrite", epochs=5)
            assert outcome.exit_code == 0, outcome.output
            again = read("result.h5mu")
        whole = read("whole.h5mu")
        np.testing.assert_array_equal(again.obsm["X_multivi"], whole.obsm["X_multivi"])
        np.testing.assert_array_equal(again["adt_imputed"].layers["sd"], whole["adt_imputed"].layers["sd"])
        assert again.uns["pyromosaic"]["metrics"] == whole.uns["pyromosaic"]["metrics"]


def test_a_run_is_not_resumed_with_other_data_or_settings(folder, data):
    assert integrate("--checkpoints", "run", epochs=2).exit_code == 0
    (folder / "result.h5mu").write_text("old")
    checkpoint = (folder / "run" / "last.ckpt").read_bytes()

    def refused(*arguments, epochs=2):
        outcome = integrate("--checkpoints", "run", "--resume", "--overwrite", *arguments, epochs=epochs)
        assert outcome.exit_code == 2, outcome.output
        assert outcome.stderr.count("\n") == 1
        assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", "result.h5mu", "run"]
        assert (folder / "result.h5mu").read_text() == "old"
        assert (folder / "run" / "last.ckpt").read_bytes() == checkpoint
        return outcome.stderr

    assert "had model option seed=0; found 3" in refused("--seed", 3)
    assert "had batch_size=256; found 20" in refused("--batch-size", 20)
    assert "had model option n_latent=15; found 4" in refused("--n-latent", 4)
    assert "had likelihood of adt='nb_mixture'; found 'nb'" in refused("--likelihood", "adt=nb")
    assert "had other" in refused("--batch-key", "donor")
    assert "had other cells" in refused("--hide", 5)
    assert "has 2 epochs already; found n_epochs=1" in refused(epochs=1)
    data = data.copy()
    data["rna"].X[2, 3] += 1
    with kept_apart():
        data.write("data.h5mu")
    assert "had other measurements of rna; a run is resumed on the same data" in refused()
    (folder / "run" / "last.ckpt").write_bytes(checkpoint := b"something else")
    (folder / "run" / "previous.ckpt").unlink(missing_ok=True)
    assert "last.ckpt cannot be taken as a checkpoint" in refused()


def test_a_new_run_replaces_checkpoints_only_if_told_to_and_resume_begins_where_there_are_none(folder):
    outcome = integrate("--checkpoints", "run", "--resume")
    assert outcome.exit_code == 0, outcome.output
    assert "there is no checkpoint in run; training begins" in outcome.stderr
    outcome = integrate("--checkpoints", "run", "--seed", 1, "--overwrite")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr == ""


def test_nothing_is_kept_of_a_run_without_a_whole_epoch(folder, interrupted):
    interrupted(0)
    outcome = integrate()
    assert outcome.exit_code == 130
    assert outcome.stderr.strip() == "interrupted before the first epoch was complete"
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu"]


def test_a_model_is_kept_whatever_follows_training(folder, monkeypatch):
    for failure, code, said in [
        (KeyboardInterrupt(), 130, "interrupted after 1 of 1 epochs. The model"),
        (MemoryError("Unable to allocate 8 TiB"), 1, "error: Unable to allocate 8 TiB. The model"),
        (AssertionError("a fault"), 1, "error: a fault. The model"),
    ]:
        monkeypatch.setattr(MultiVI, "get_imputed_values", Mock(side_effect=failure))
        outcome = integrate()
        assert outcome.exit_code == code
        assert outcome.stderr.startswith(said)
        (kept,) = folder.glob("result-model-*")
        assert len(MultiVI.load(kept).history) == 1
        shutil.rmtree(kept)
        assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu"]
    assert isinstance(outcome.exception, AssertionError)  # a fault of the package is shown as such


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_model_and_a_true_exit_code(folder, number, code):
    command = [sys.executable, "-m", "pyromosaic", "integrate", "data.h5mu", "--out", "result.h5mu"]
    command += ["--epochs", "100000", "--checkpoints", "run"]

    def heard():  # a test run in the background may have been told to ignore it
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        while not (folder / "run" / "last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == code, said
    (kept,) = folder.glob("result-model-*")
    done = len(MultiVI.load(kept).history)
    assert said.strip() == (
        f"interrupted after {done} of 100000 epochs. The model, trained for {done} epoch{'s' * (done > 1)}, is in "
        f"{kept.name}. To go on from run, run the same command with --resume"
    )
    # The signal may come between the end of an epoch and its checkpoint.
    assert done - len(newest("run")[1]["run"]["rows"]) in (0, 1)
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", kept.name, "run"]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pyromosaic import cli
from pyromosaic.cli import results
whole = results.add
def add(*arguments):  # from here on the disk is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    whole(*arguments)
results.add = add
cli.app(sys.argv[1:], prog_name="pyromosaic")
"""


def test_a_full_disk_leaves_what_was_there(folder, tmp_path_factory):
    (folder / "result.h5mu").write_text("old")
    command = ["integrate", "data.h5mu", "--out", "result.h5mu", "--epochs", "2", "--checkpoints", "run", "--overwrite"]
    outcome = subprocess.run([sys.executable, "-c", FULL, *command], capture_output=True, text=True)
    assert outcome.returncode == 1, outcome.stderr
    (said,) = outcome.stderr.splitlines()
    assert said.startswith("error: result.h5mu cannot be written: ")
    assert "The model cannot be kept (" in said and "File too large" in said
    assert said.endswith("To go on from run, run the same command with --resume")
    assert sorted(p.name for p in folder.iterdir()) == ["data.h5mu", "result.h5mu", "run"]
    assert (folder / "result.h5mu").read_text() == "old"
    outcome = run(*command, "--resume")
    assert outcome.exit_code == 0, outcome.output


def test_outputs_are_written_beside_their_place_also_through_a_link(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "result.h5mu").symlink_to(elsewhere / "far.h5mu")
    (elsewhere / ".far.h5mu.abc.part").mkdir()  # by an earlier kill
    (elsewhere / "far.h5mu").write_text("old")
    places = []
    write = mudata.MuData.write

    def seen(self, path, **options):
        places.append(path.parent.parent)
        write(self, path, **options)

    monkeypatch.setattr(mudata.MuData, "write", seen)
    assert integrate("--overwrite").exit_code == 0
    assert places == [elsewhere]
    assert [p.name for p in elsewhere.iterdir()] == ["far.h5mu"]
    assert (folder / "result.h5mu").is_symlink()
    assert read("result.h5mu").obsm["X_multivi"].shape == (N, 15)
