"""Commands that align, contrast and link say what Python says; options from files, subsets, devices, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import matplotlib.image
import mudata
import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, cli, linkage, metrics
from pyromosaic.cli.options import Device
from pyromosaic.links import GuidanceGraph

pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links", "ignore:it is not clear that")
NAME = [sys.executable, "-m", "pyromosaic"]


def run(*words, code=0):
    outcome = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert outcome.exit_code == code, outcome.output
    return outcome


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def apart(folder):
    """Cells with one modality each, with batches and linked features."""
    words = ("--cells", 90, "--features", "rna=30", "--features", "adt=12", "--types", 2)
    run("simulate", "data.h5mu", "--unpaired", "--links", "links.csv", *words)
    return mudata.read_h5mu("data.h5mu")


@pytest.fixture
def paired(folder):
    words = ("--cells", 90, "--features", "rna=30", "--features", "adt=12", "--types", 2)
    run("simulate", "data.h5mu", "--links", "links.csv", *words)
    return mudata.read_h5mu("data.h5mu")


def latent_of(path, name):
    mdata = mudata.read_h5mu(path)
    return pd.DataFrame(mdata.obsm[name], mdata.obs_names)


@pytest.mark.parametrize("cls", [DiagVI, ScModal])
def test_align_writes_what_the_model_says_and_its_model_is_used_again(apart, folder, cls):
    name = cls.__name__.lower()
    run(
        *("align", "data.h5mu", "--method", name, "--links", "links.csv", "--out", "out.h5mu", "--model", "model"),
        *("--epochs", 2, "--batch-key", "batch", "--label-key", "celltype", "--n-latent", 4, "--metrics", "m.json"),
    )
    mosaic = Mosaic.from_mudata(apart, batch_key="batch")  # training does not see labels
    links = pd.read_csv("links.csv")[["rna", "adt", "sign"]]
    model = cls(mosaic, GuidanceGraph.from_table(mosaic, links), n_latent=4)
    model.train(2, progress_bar=False, accelerator="cpu")
    expected = model.get_latent_representation()
    np.testing.assert_allclose(latent_of("out.h5mu", f"X_{name}").loc[expected.index], expected, rtol=1e-3, atol=1e-4)
    found = mudata.read_h5mu("out.h5mu")
    protein = model.get_imputed_values("adt")
    assert found["adt_imputed"].n_obs == 90
    np.testing.assert_allclose(found["adt_imputed"].X, protein.mean.loc[found.obs_names], rtol=1e-2, atol=1e-3)
    record = json.loads((folder / "m.json").read_text())
    assert record["command"] == "align" and record["options"]["method"] == name
    assert record["metrics"]["label_transfer_rna_to_adt"] == pytest.approx(
        metrics.label_transfer_accuracy(
            *(
                part
                for which in ("rna", "adt")
                for part in (
                    expected[mosaic.patterns == which],
                    mosaic.words("celltype")[mosaic.patterns == which],
                )
            )
        )
    )
    run("query", "model", "data.h5mu", "--out", "again.h5mu", "--no-impute")
    pd.testing.assert_frame_equal(latent_of("again.h5mu", f"X_{name}"), latent_of("out.h5mu", f"X_{name}"))


def test_cells_with_both_modalities_are_taken_apart_and_judged_by_their_pairs(paired, folder):
    words = ("--links", "links.csv", "--epochs", 2, "--metrics", "m.json", "--no-impute", "--model", "model")
    said = run("align", "data.h5mu", *words, "--out", "out.h5mu").stderr
    assert "note: 30 cells have more than one modality; each of their measurements is a cell of its own" in said
    found = mudata.read_h5mu("out.h5mu")
    assert found.n_obs == 120 and {"rna:cell0", "adt:cell89"} & set(found.obs_names)
    latent = latent_of("out.h5mu", "X_diagvi")
    both = sorted(set(paired["rna"].obs_names) & set(paired["adt"].obs_names))
    assert set(found.obs.loc[[f"rna:{cell}" for cell in both], "cell"]) == set(both)
    assert found.obs.loc["rna:" + both[0], "celltype"] == paired.obs.loc[both[0], "celltype"]
    value = json.loads((folder / "m.json").read_text())["metrics"]["foscttm_rna_adt"]
    assert value == pytest.approx(
        metrics.foscttm(*(latent.loc[[f"{name}:{cell}" for cell in both]].to_numpy() for name in ("rna", "adt")))
    )
    run("query", "model", "data.h5mu", "--out", "again.h5mu", "--no-impute")
    pd.testing.assert_frame_equal(latent_of("again.h5mu", "X_diagvi"), latent)


def test_links_may_come_from_names_of_features_or_positions_of_genes(folder):
    run("simulate", "data.h5mu", "--unpaired", "--cells", 60, "--features", "rna=20", "--features", "atac=60")
    mdata = mudata.read_h5mu("data.h5mu")
    said = run("align", "data.h5mu", "--out", "o.h5mu", code=2).stderr
    assert said.startswith("error: ") and said.count("\n") == 1
    mdata["atac"].var_names = [f"chr1:{1000 * i + 1}-{1000 * i + 500}" for i in range(60)]
    mdata.update()
    mdata.write("data.h5mu")
    genes = pd.DataFrame({"gene": mdata["rna"].var_names, "chromosome": "chr1", "start": range(0, 60_000, 3000)})
    genes = genes.assign(end=genes["start"] + 1500, strand="+")
    genes.to_csv("genes.csv", index=False)
    run("align", "data.h5mu", "--genes", "genes.csv", "--out", "o.h5mu", "--epochs", 1, "--model", "model")
    model = DiagVI.load("model")
    assert model.graph.linked()["rna"] == 20 and len(model.graph.links("rna", "atac")) >= 20
    genes.assign(start="here").to_csv("wrong.csv", index=False)
    said = run("align", "data.h5mu", "--genes", "wrong.csv", "--out", "p.h5mu", code=2).stderr
    assert said == "error: --genes wrong.csv: column 'start' must have a number in each row; found 'here'\n"
    said = run("align", "data.h5mu", "--genes", "nowhere.csv", "--out", "p.h5mu", code=2).stderr
    assert said == "error: --genes nowhere.csv cannot be read as a table: No such file or directory\n"
    words = ("--genes", "genes.csv", "--links", "genes.csv")
    assert "give one of them" in run("align", "data.h5mu", *words, "--out", "p.h5mu", code=2).stderr


def test_contrast_writes_what_the_model_says(folder, quick_umap):
    run("simulate", "data.h5mu", "--treated", 0.5, "--cells", 90, "--features", "rna=30")
    words = ("--condition", "condition", "--background", "control", "--model", "model", "--figure", "f.png")
    run("contrast", "data.h5mu", *words, "--out", "out.h5mu", "--epochs", 2, "--effects", "effects.csv")
    mosaic = Mosaic.from_mudata(mudata.read_h5mu("data.h5mu")).with_cohorts("condition", background="control")
    model = ContrastiveVI(mosaic)
    model.train(2, progress_bar=False, accelerator="cpu")
    for kind in ("background", "salient"):
        expected = model.get_latent_representation(representation=kind)
        found = latent_of("out.h5mu", f"X_contrastivevi_{kind}")
        np.testing.assert_allclose(found.loc[expected.index], expected, rtol=1e-3, atol=1e-4)
    found = mudata.read_h5mu("out.h5mu")
    assert {"X_contrastivevi_background_umap", "X_contrastivevi_salient_umap"} <= set(found.obsm)
    np.testing.assert_allclose(
        found.obs["salient_evidence"], model.contrast_scores()["evidence"].loc[found.obs_names], rtol=1e-2, atol=1e-2
    )
    table = pd.read_csv("effects.csv", index_col="feature")
    pd.testing.assert_frame_equal(
        table.drop(columns="modality"), model.salient_effect(), check_dtype=False, check_names=False, rtol=1e-2
    )
    assert (folder / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert 0 < found.uns["pyromosaic"]["metrics"]["cohort_enrichment"] < 2
    run("query", "model", "out.h5mu", "--out", "again.h5mu", "--no-impute", "--figure", "q.png")
    again = latent_of("again.h5mu", "X_contrastivevi_salient")
    pd.testing.assert_frame_equal(again, latent_of("out.h5mu", "X_contrastivevi_salient"))
    said = run("contrast", "data.h5mu", *words[:2], "--background", "none", "--out", "p.h5mu", code=2).stderr
    assert said == "error: column 'condition' has no value 'none'; it has 'control', 'treated'\n"


def test_link_writes_what_the_linkage_says(apart, folder):
    run("link", "data.h5mu", "--links", "links.csv", "--out", "out.h5mu", "--table", "t.csv", "--metrics", "m.json")
    mosaic = Mosaic.from_mudata(apart)
    found = linkage.cca(mosaic, ("rna", "adt"), pd.read_csv("links.csv")[["rna", "adt", "sign"]])
    scores = pd.concat(found.scores.values())
    np.testing.assert_allclose(latent_of("out.h5mu", "X_linked").loc[scores.index], scores, rtol=1e-4, atol=1e-4)
    pd.testing.assert_frame_equal(pd.read_csv("t.csv"), found.feature_links(), check_dtype=False)
    best = max(max(rounds) for rounds in found.agreement.values())
    assert json.loads((folder / "m.json").read_text())["metrics"]["link_agreement"] == pytest.approx(best)
    pd.read_csv("t.csv").head(3).to_csv("few.csv", index=False)
    assert "links takes" not in run("check", "data.h5mu").output
    apart.mod["other"] = apart["adt"].copy()
    apart["other"].obs_names = [f"x{i}" for i in range(apart["adt"].n_obs)]
    apart["other"].var_names = [f"o{i}" for i in range(12)]
    mudata.MuData(dict(apart.mod)).write("three.h5mu")
    said = run("link", "three.h5mu", "--out", "p.h5mu", code=2).stderr
    assert said == "error: link takes data with two modalities; found rna, adt, other. For more, use align\n"


def test_a_linkage_is_kept_and_gives_scores_to_other_cells(apart, folder):
    words = ("--links", "links.csv", "--batch-key", "batch", "--label-key", "celltype")
    run("link", "data.h5mu", *words, "--out", "out.h5mu", "--model", "linked")
    kept = linkage.Linkage.load("linked")
    np.testing.assert_allclose(
        latent_of("out.h5mu", "X_linked").loc[kept.scores["adt"].index], kept.scores["adt"], rtol=1e-5, atol=1e-6
    )
    run("query", "linked", "data.h5mu", "--out", "again.h5mu", "--label-key", "celltype", "--figure", "f.png")
    one, again = latent_of("out.h5mu", "X_linked"), latent_of("again.h5mu", "X_linked")
    np.testing.assert_allclose(again.loc[one.index], one, rtol=1e-4, atol=1e-4)
    record = mudata.read_h5mu("again.h5mu").uns["pyromosaic"]
    assert record["options"]["trained"] == "linked" and "label_transfer_rna_to_adt" in record["metrics"]
    mudata.MuData({"adt": apart["adt"][:20].copy()}).write("few.h5mu")  # one modality
    run("query", "linked", "few.h5mu", "--out", "few_out.h5mu")
    few = latent_of("few_out.h5mu", "X_linked")
    np.testing.assert_allclose(few, one.loc[few.index], rtol=1e-4, atol=1e-4)
    assert list(mudata.read_h5mu("few_out.h5mu").mod) == ["adt"], "nothing is imputed"
    for part in (apart, *apart.mod.values()):
        part.obs["batch"] = "later"
    apart.write("later.h5mu")
    assert "later" in run("query", "linked", "later.h5mu", "--out", "later_out.h5mu", code=2).stderr
    run("query", "linked", "later.h5mu", "--out", "later_out.h5mu", "--average-batches")
    said = run("differential", "linked", "data.h5mu", "--groupby", "celltype", "--out", "t.csv", code=2).stderr
    assert said == (
        "error: linked holds an object of class Linkage; this command takes MultiVI, ContrastiveVI, DiagVI, ScModal\n"
    )
    said = run("link", "data.h5mu", *words, "--out", "p.h5mu", "--model", "linked", code=2).stderr
    assert said == "error: linked exists; pass --overwrite to replace it\n"


# Options from a file


def test_options_of_a_file_are_defaults_and_the_command_line_comes_first(paired, folder):
    (folder / "run.toml").write_text(
        'data = "data.h5mu"\nout = "out.h5mu"\nepochs = 3\nn-latent = 2\nbatch_key = "batch"\nimpute = false\n'
        'cells = "celltype==type0"\n[likelihood]\nadt = "nb"\n'
    )
    run("integrate", "--config", "run.toml", "--n-latent", 4)
    record = mudata.read_h5mu("out.h5mu").uns["pyromosaic"]["options"]
    assert (record["epochs"], record["n_latent"], record["batch_key"], record["impute"]) == (3, 4, "batch", False)
    assert record["likelihood"] == {"rna": "nb", "adt": "nb"} and "config" not in record
    run("integrate", "--config", "run.toml", "--impute", "--likelihood", "rna=zinb", "--overwrite", "--epochs", 1)
    found = mudata.read_h5mu("out.h5mu")
    assert found.uns["pyromosaic"]["options"]["likelihood"] == {"rna": "zinb", "adt": "nb_mixture"}
    assert "rna_imputed" in found.mod and found.obs["celltype"].nunique() == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch = 3", "the command has no option 'epoch'; it has data, out, "),
        ("epochs = true", "epochs must be text or a number; found True"),
        ("epochs = [3]", "epochs must be text or a number; found [3]"),
        ("impute = 'no'", "impute must be true or false; found 'no'"),
        ("cells = 3", "cells must be text or a list of texts; found 3"),
        ("config = 'other.toml'", "the command has no option 'config'"),
        ("batch-key = 'a'\nbatch_key = 'b'", "has 'batch-key' twice, with - and with _; keep one"),
        ("epochs = ", "is not TOML: "),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_file_of_options_is_refused_in_one_sentence(paired, folder, text, sentence):
    if text is not None:
        (folder / "run.toml").write_text(text)
    said = run("integrate", "data.h5mu", "--out", "out.h5mu", "--config", "run.toml", code=2).stderr
    assert said.startswith("error: --config run.toml") and sentence in said and said.count("\n") == 1


# Cells and features


def test_cells_and_features_are_chosen_by_names_and_by_columns(paired, folder):
    paired["rna"].var["variable"] = np.arange(30) < 10
    paired["adt"].var["kind"] = ["a", "b", "c"] * 4
    paired.write("data.h5mu")
    some = paired.obs_names[::2]
    (folder / "cells.txt").write_text("\n".join(some) + "\n\n")
    run(
        *("integrate", "data.h5mu", "--out", "out.h5mu", "--epochs", 1, "--model", "model"),
        *("--cells", "cells.txt", "--cells", "batch==batch0", "--features", "rna=variable==True"),
        *("--features", "adt=kind==a,b"),
    )
    found = mudata.read_h5mu("out.h5mu")
    assert set(found.obs_names) == set(some) & set(paired.obs_names[paired.obs["batch"] == "batch0"])
    assert found["rna"].n_vars == 30, "the result has all features"
    assert found["rna_imputed"].var["feature"].tolist() == [f"rna_{i}" for i in range(10)]
    assert found["adt_imputed"].n_vars == 8
    assert list(MultiVI.load("model").schema["rna"].features) == [f"rna_{i}" for i in range(10)]
    said = run("query", "model", "data.h5mu", "--out", "q.h5mu").stderr  # which chooses the features of the model
    assert "note: rna: 20 features that the model does not know are left out" in said
    assert mudata.read_h5mu("q.h5mu")["rna_imputed"].n_vars == 10
    said = run("check", "data.h5mu", "--cells", "celltype==type0", "--features", "rna=variable==false", code=2).stderr
    assert said.strip().endswith("no feature of rna has the value 'false'; there are 'False', 'True'")


def test_a_modality_of_no_chosen_cell_is_left_out(paired, folder):
    alone = [cell for cell in paired["rna"].obs_names if cell not in set(paired["adt"].obs_names)]
    (folder / "cells.txt").write_text("\n".join(alone))
    outcome = run("check", "data.h5mu", "--cells", "cells.txt")
    assert "none of the chosen cells has adt; it is left out" in outcome.stderr
    assert outcome.stdout.startswith("Mosaic of 30 cells\n  rna: 30 cells")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cells", "celltype"], "--cells celltype: give COLUMN==VALUE, or a file with one name a line; there is no"),
        (["--cells", "kind==B"], "--cells kind==B: there is no column 'kind'"),
        (["--cells", "celltype==B"], "--cells celltype==B: no cell has the value 'B'; there are 'type0', 'type1'"),
        (["--cells", "names.txt"], "--cells names.txt: 2 of 2 names are no cell: 'one', 'two'"),
        (["--cells", "celltype==type0", "--cells", "celltype==type1"], "no cell is left"),
        (["--features", "genes.txt"], "--features genes.txt: give MODALITY=FILE or MODALITY=COLUMN==VALUE"),
        (["--features", "atac=names.txt"], "--features atac=names.txt: there is no modality 'atac'; found rna, adt"),
        (["--features", "rna=names.txt"], "2 of 2 names are no feature of rna: 'one', 'two'"),
    ],
)
def test_wrong_cells_and_features_are_refused(paired, folder, words, sentence):
    (folder / "names.txt").write_text("one\ntwo\n")
    said = run("integrate", "data.h5mu", "--out", "out.h5mu", *words, code=2).stderr
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert not (folder / "out.h5mu").exists()


# Epochs, devices, metrics


def test_epochs_are_chosen_by_the_model_if_they_are_auto(paired, monkeypatch):
    asked, train = [], MultiVI.train

    def short(model, n_epochs, **options):
        asked.append(n_epochs)
        train(model, 1, **options)

    monkeypatch.setattr(MultiVI, "train", short)
    for words in ([], ["--epochs", "auto"], ["--epochs", "7"]):
        run("integrate", "data.h5mu", "--out", "out.h5mu", "--overwrite", *words)
    assert asked == [None, None, 7]
    said = run("integrate", "data.h5mu", "--out", "p.h5mu", "--epochs", "0", code=2).stderr
    assert "must be a whole number from 1, or auto" in " ".join(said.replace("│", "").split())


def test_a_device_is_used_or_refused(paired, monkeypatch):
    assert {device.value for device in Device} == {"auto", "cpu", "gpu", "cuda", "mps"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for words in (
        ["integrate", "data.h5mu", "--accelerator", "gpu"],
        ["query", "model", "data.h5mu", "--device", "cuda"],
    ):
        said = run(*words, "--out", "out.h5mu", code=2).stderr
        assert said == "error: --device cuda: PyTorch finds no such device here; there is cpu\n"
    asked, train = [], MultiVI.train
    monkeypatch.setattr(MultiVI, "train", lambda model, n, **o: asked.append(o["accelerator"]) or train(model, 1, **o))
    run("integrate", "data.h5mu", "--out", "out.h5mu", "--device", "cpu")
    run("integrate", "data.h5mu", "--out", "out.h5mu", "--overwrite")
    assert asked == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--devices", 2], {"devices": 2, "strategy": "ddp_spawn"}),
        (["--devices", "auto"], {"devices": "auto"}),  # one processor
        (["--devices", 2, "--strategy", "ddp"], {"devices": 2, "strategy": "ddp"}),
        (["--num-nodes", 2], {"num_nodes": 2, "strategy": "ddp_spawn"}),
        (["--batch-size", 32], {"batch_size": 32}),
    ],
)
def test_several_processes_are_asked_for(paired, monkeypatch, words, options):
    asked, train = [], MultiVI.train

    def alone(model, n, **given):
        asked.append({name: given[name] for name in given if name not in ("seed", "checkpoint_dir", "resume_from")})
        train(model, 1)

    monkeypatch.setattr(MultiVI, "train", alone)
    run("integrate", "data.h5mu", "--out", "out.h5mu", "--device", "cpu", *words)
    assert asked == [{"accelerator": "cpu"} | options]


def test_several_processes_that_are_stopped_leave_nothing(paired, folder, monkeypatch):
    def stopped(model, n, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr(MultiVI, "train", stopped)
    there = sorted(folder.iterdir())
    said = run("integrate", "data.h5mu", "--out", "out.h5mu", "--device", "cpu", "--devices", 2, code=130).stderr
    assert said == "interrupted; nothing was written\n" and sorted(folder.iterdir()) == there


def test_more_devices_than_there_are_are_refused(paired, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    words = ("--out", "out.h5mu", "--device", "cuda", "--devices", 2)
    said = run("integrate", "data.h5mu", *words, code=2).stderr
    assert said == "error: --devices 2: PyTorch finds 1 NVIDIA GPU here\n"


def test_of_several_processes_the_first_writes(paired, folder, monkeypatch):
    """As the second of two that torchrun has started."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(MultiVI, "train", lambda model, n, **given: asked.append(given.get("strategy")))
    there = sorted(folder.iterdir())
    outcome = run("integrate", "data.h5mu", "--out", "out.h5mu", "--model", "model")
    assert asked == [None] and outcome.stdout == "" and sorted(folder.iterdir()) == there


ONE = ("--epochs", 3, "--batch-size", 16, "--no-impute", "--device", "cpu", "--metrics", "m.json", "--overwrite")


@pytest.mark.slow
@pytest.mark.parametrize("start", [[*NAME], [sys.executable, "-m", "torch.distributed.run", "--standalone"]])
def test_two_processes_train_and_one_writes(paired, folder, start):
    """By the command itself, and by torchrun; the same model as in one process that takes larger steps."""
    words = ["integrate", "data.h5mu", "--out", "out.h5mu", "--model", "model", *map(str, ONE)]
    if start == NAME:
        words += ["--devices", "2"]
    else:
        start = [*start, "--nproc-per-node=2", "-m", "pyromosaic"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    outcome = subprocess.run([*start, *words], capture_output=True, text=True, env=environment, timeout=570)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.count("Wrote out.h5mu") == 1 and outcome.stdout.count("Mosaic of 90 cells") == 1
    model = MultiVI.load("model", mudata.read_h5mu("data.h5mu"))
    assert len(model.history) == 3
    latent = model.get_latent_representation()
    np.testing.assert_allclose(latent_of("out.h5mu", "X_multivi").loc[latent.index], latent, rtol=1e-4, atol=1e-5)
    run(*words[:4], *ONE[:2], "--batch-size", 32, *ONE[4:])
    history = model.history["train_elbo"] if "train_elbo" in model.history else model.history.iloc[:, 0]
    assert np.isfinite(history).all()
    assert sorted(path.name for path in folder.iterdir()) == ["data.h5mu", "links.csv", "m.json", "model", "out.h5mu"]


# Chromatin, results of any size


def test_cut_sites_are_counted_as_fragments(folder):
    run("simulate", "data.h5mu", "--cells", 60, "--features", "rna=20", "--features", "atac=30")
    mdata = mudata.read_h5mu("data.h5mu")
    mdata["atac"].X = mdata["atac"].X * 2
    mdata.write("cut.h5mu")
    words = ("--likelihood", "atac=poisson", "--epochs", 1, "--hide", 5, "--metrics")
    assert "--cut-sites atac" in run("check", "cut.h5mu", *words[:2]).stderr
    run("integrate", "cut.h5mu", *words, "one.json", "--cut-sites", "atac", "--out", "one.h5mu", "--model", "model")
    run("integrate", "data.h5mu", *words, "two.json", "--out", "two.h5mu")
    one, two = mudata.read_h5mu("one.h5mu"), mudata.read_h5mu("two.h5mu")
    np.testing.assert_allclose(one["atac_imputed"].X, two["atac_imputed"].X, rtol=1e-4, atol=1e-5)
    metrics_of = [json.loads((folder / name).read_text())["metrics"] for name in ("one.json", "two.json")]
    assert metrics_of[0] == pytest.approx(metrics_of[1], rel=1e-4)
    assert MultiVI.load("model").schema["atac"].spec.cut_sites
    said = run("check", "cut.h5mu", "--cut-sites", "adt", code=2).stderr
    assert said == "error: --cut-sites adt: there is no modality 'adt'; found rna, atac\n"


def test_what_is_imputed_goes_to_the_file_block_by_block(paired, folder, monkeypatch):
    monkeypatch.setattr("pyromosaic.models.asking.estimate", lambda *_: pytest.fail("a whole table is in memory"))
    monkeypatch.setattr("pyromosaic.tasks.blockwise.CELLS", 32)
    run("integrate", "data.h5mu", "--out", "out.h5mu", "--epochs", 1, "--model", "model", "--hide", 5)
    monkeypatch.undo()
    found = mudata.read_h5mu(folder / "out.h5mu")
    data = MultiVI.load(folder / "model").register(mudata.read_h5mu(folder / "data.h5mu"))
    assert found["rna_imputed"].X.shape == (90, 30) and data.n_cells == 90
    assert (found["rna_imputed"].layers["sd"] > 0).all()


def test_measurements_that_are_in_a_layer_alone_are_written(paired, folder):
    paired["rna"].layers["raw"], paired["adt"].layers["raw"] = paired["rna"].X, paired["adt"].X
    paired["rna"].X = paired["adt"].X = None
    paired.write("layers.h5mu")
    run("integrate", "layers.h5mu", "--layer", "raw", "--out", "out.h5mu", "--epochs", 1)
    assert mudata.read_h5mu("out.h5mu")["rna"].layers["raw"].shape == (60, 30)


def test_metrics_are_json_without_nan(paired, folder):
    """A feature that never varies has no rank correlation."""
    run("integrate", "data.h5mu", "--out", "out.h5mu", "--epochs", 1, "--metrics", "m.json", "--hide", 5)
    record = json.loads((folder / "m.json").read_text(), parse_constant=pytest.fail)
    assert record["metrics"].keys() == mudata.read_h5mu("out.h5mu").uns["pyromosaic"]["metrics"].keys()
    assert record["options"]["hide"] == 5 and record["options"]["data"] == "data.h5mu"
    said = run("integrate", "data.h5mu", "--out", "p.h5mu", "--metrics", "m.json", code=2).stderr
    assert said == "error: m.json exists; pass --overwrite to replace it\n"


def test_a_result_is_taken_by_the_next_command_without_what_was_imputed(paired):
    run("integrate", "data.h5mu", "--out", "out.h5mu", "--epochs", 1, "--model", "model")
    outcome = run("integrate", "out.h5mu", "--out", "again.h5mu", "--epochs", 1)
    assert outcome.stderr.startswith(
        "note: out.h5mu is a result of an earlier run; it is used without rna_imputed, adt_imputed\n"
    )
    one, two = latent_of("out.h5mu", "X_multivi"), latent_of("again.h5mu", "X_multivi")
    np.testing.assert_allclose(two.loc[one.index], one, rtol=1e-4, atol=1e-5)
    run("differential", "model", "out.h5mu", "--groupby", "celltype", "--out", "t.csv", "--figure", "t.png")
    assert matplotlib.image.imread("t.png").shape[1] > matplotlib.image.imread("t.png").shape[0], "a panel for each"
    words = ("differential", "model", "out.h5mu", "--groupby", "celltype", "--out", "u.csv")
    assert run(*words, "--figure", "t.png", code=2).stderr == "error: t.png exists; pass --overwrite to replace it\n"


# Signals, shells


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_query_that_is_stopped_leaves_nothing(paired, folder, number, code):
    run("integrate", "data.h5mu", "--out", "out.h5mu", "--epochs", 1, "--model", "model")
    slow = (
        "import sys, time, pyromosaic.cli.results as r, pyromosaic.cli as c\n"
        "def wait(*a, **o):\n    open('there', 'w').close(); time.sleep(60)\n"
        "r.write = wait\nc.app(sys.argv[1:], prog_name='pyromosaic')"
    )

    def heard():
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    before = sorted(path.name for path in folder.iterdir())
    command = [sys.executable, "-c", slow, "query", "model", "data.h5mu", "--out", "q.h5mu"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        while not (folder / "there").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == code
    assert said == "interrupted; nothing was written\n"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "there"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_are_completed_in_shells(shell):
    words = {"bash": {"COMP_WORDS": "pyromosaic integrate --ba", "COMP_CWORD": "2"}}
    words |= dict.fromkeys(["zsh", "fish"], {"_TYPER_COMPLETE_ARGS": "pyromosaic integrate --ba"})
    environment = os.environ | words[shell] | {"_PYROMOSAIC_COMPLETE": f"complete_{shell}"}
    environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "from pyromosaic.cli import app; app(prog_name='pyromosaic')"
    outcome = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "--batch-key" in outcome.stdout and "--batch-size" in outcome.stdout and "--figure" not in outcome.stdout
    show = os.environ | {"_PYROMOSAIC_COMPLETE": f"source_{shell}"}
    outcome = subprocess.run([sys.executable, "-c", code], env=show, capture_output=True, text=True)
    assert f"complete_{shell}" in outcome.stdout


@pytest.mark.parametrize("name", [command.callback.__name__ for command in cli.app.registered_commands])
def test_help_has_an_example_and_explains_every_option(name):
    text = " ".join(run(name, "--help").stdout.replace("│", " ").split())
    assert f"Example: pyromosaic {name} " in text or name == "demo"
    for parameter in typer.main.get_command(cli.app).commands[name].params:
        assert parameter.name == "help" or len(getattr(parameter, "help", None) or "") > 15, parameter.name


def test_nobody_reads_the_results(paired):
    """A pipe that is closed early, as by `head`, is no fault."""
    words = [*NAME, "check", "data.h5mu"]
    outcome = subprocess.run(
        ["bash", "-c", f"{' '.join(words)} | head -n 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert outcome.stdout == "Mosaic of 90 cells\n" and "Traceback" not in outcome.stderr
