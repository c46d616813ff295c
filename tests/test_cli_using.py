"""Commands that check, simulate and use a saved model say what Python says; the page of commands runs."""

import re
import shlex

import mudata
import numpy as np
import pandas as pd
import pytest
from test_docs import COMMANDS, ROOT
from typer.testing import CliRunner

from pyromosaic import DiagVI, Mosaic, MultiVI, cli, links
from pyromosaic.models import MosaicModel

pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")


def run(*words, code=0):
    outcome = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert outcome.exit_code == code, outcome.output
    return outcome


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with simulated data."""
    monkeypatch.chdir(tmp_path)
    run("simulate", "data.h5mu", "--cells", 90, "--features", "rna=30", "--features", "adt=6", "--types", 2)
    return tmp_path


@pytest.fixture
def model(folder):
    mosaic = Mosaic.from_mudata(mudata.read_h5mu("data.h5mu"), batch_key="batch")
    model = MultiVI(mosaic, n_latent=3)
    model.train(2, progress_bar=False)
    model.save("model")
    return model


def test_every_command_on_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = MosaicModel.train
    monkeypatch.setattr(
        MosaicModel, "train", lambda model, n_epochs=None, **o: train(model, min(n_epochs or 2, 2), **o)
    )
    page = (ROOT / "docs" / "how_to" / "command_line.md").read_text()
    lines = [line for block in COMMANDS.findall(page) for line in block.replace("\\\n", " ").splitlines() if line]
    for name, text in re.findall(r"^```toml\n# (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    used = set()
    for line in lines:
        name, command, *words = shlex.split(line)
        assert name == "pyromosaic"
        run(command, *words)
        used.add(command)
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert named == {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert used == named - {"demo"}  # which has a test of its own
    assert {path.name for path in tmp_path.iterdir()} == {
        *("try.h5mu", "result.h5mu", "mapped.h5mu", "model", "metrics.json", "all.csv", "two.csv", "apart.h5mu"),
        *("links.csv", "aligned.h5mu", "aligned", "linked.h5mu", "candidates.csv", "treated.h5mu", "contrasted.h5mu"),
        *("effects.csv", "some.h5mu", "run.toml", "short.h5mu", "linkage", "scored.h5mu", "open.h5mu", "opened.h5mu"),
    }
    assert not [name for name in mudata.read_h5mu("short.h5mu").mod if name.endswith("_imputed")]


def test_simulated_data(folder):
    mdata = mudata.read_h5mu("data.h5mu")
    assert {name: part.n_vars for name, part in mdata.mod.items()} == {"rna": 30, "adt": 6} and mdata.n_obs == 90
    assert mdata.obs["celltype"].nunique() == 2 and mdata.obs["batch"].nunique() == 2
    again = run("simulate", "data.h5mu", code=2)
    assert again.stderr == "error: data.h5mu exists; pass --overwrite to replace it\n"
    run("simulate", "data.h5mu", "--cells", 30, "--overwrite", "--seed", 1)
    assert mudata.read_h5mu("data.h5mu").n_obs == 30
    for entry in ("rna", "rna=many", "=3", "rna=0"):
        said = run("simulate", "other.h5mu", "--features", entry, code=2).stderr
        assert said == f"error: --features needs MODALITY=N, e.g. rna=200; found {entry!r}\n"
    assert "ends in .h5mu; found x.h5ad" in run("simulate", "x.h5ad", code=2).stderr
    assert {path.name for path in folder.iterdir()} == {"data.h5mu"}


def test_check_shows_the_mosaic_and_what_is_doubtful(folder):
    outcome = run("check", "data.h5mu", "--batch-key", "batch", "--label-key", "celltype")
    mosaic = Mosaic.from_mudata(mudata.read_h5mu("data.h5mu"), batch_key="batch", label_key="celltype")
    assert outcome.stdout.startswith(f"{mosaic}\nCells by modalities:\n")
    assert "  rna+adt: 30\n" in outcome.stdout and outcome.stdout.endswith("The data can be integrated.\n")
    assert outcome.stderr == "" and {path.name for path in folder.iterdir()} == {"data.h5mu"}
    assert run("check", "data.h5mu", "--batch-key", "donor", code=2).stderr.startswith("error: ")
    mdata = mudata.read_h5mu("data.h5mu")
    mdata["rna"].X = mdata["rna"].X * 2.0  # doubtful, because all are multiples
    mdata.write("doubtful.h5mu")
    outcome = run("check", "doubtful.h5mu", "--likelihood", "rna=nb")
    if outcome.stderr:
        assert outcome.stderr.startswith("warning: modality 'rna'") and "with warnings" in outcome.stdout
    mdata["rna"].X = mdata["rna"].X * 0.3
    mdata.write("wrong.h5mu")
    assert "is not a whole number" in run("check", "wrong.h5mu", code=2).stderr


def test_query_writes_what_the_model_says(folder, model):
    new = mudata.read_h5mu("data.h5mu")[:20].copy()
    new.mod.pop("adt")
    new.update()
    new.write("new.h5mu")
    run("query", "model", "new.h5mu", "--out", "out.h5mu")
    found = mudata.read_h5mu("out.h5mu")
    again = MultiVI.load("model")
    data = again.register(mudata.read_h5mu("new.h5mu"))
    np.testing.assert_allclose(
        found.obsm["X_multivi"], again.get_latent_representation(data=data).loc[found.obs_names], rtol=1e-5
    )
    protein = again.get_imputed_values("adt", quantiles=(), data=data)
    np.testing.assert_allclose(found["adt_imputed"].X, protein.mean.loc[found.obs_names], rtol=1e-5)
    np.testing.assert_allclose(found["adt_imputed"].layers["sd"], protein.sd.loc[found.obs_names], rtol=1e-5)
    assert set(found.mod) == {"rna", "rna_imputed", "adt_imputed"}
    run("query", "model", "new.h5mu", "--out", "plain.h5mu", "--no-impute")
    assert set(mudata.read_h5mu("plain.h5mu").mod) == {"rna"}


def test_query_matches_features_by_name(folder, model):
    mdata = mudata.read_h5mu("data.h5mu")
    order = np.random.default_rng(0).permutation(30)
    parts = {"adt": mdata["adt"].copy(), "rna": mdata["rna"][:, order].copy()}
    parts["rna"].var["place"] = order
    mudata.MuData(parts).write("shuffled.h5mu")
    run("query", "model", "shuffled.h5mu", "--out", "shuffled_out.h5mu")
    run("query", "model", "data.h5mu", "--out", "out.h5mu")
    one, other = (mudata.read_h5mu(name)["rna_imputed"] for name in ("shuffled_out.h5mu", "out.h5mu"))
    assert one.var_names.equals(other.var_names) and one.var["place"].tolist() == list(range(30))
    assert one.var["feature"].tolist() == [f"rna_{i}" for i in range(30)]
    np.testing.assert_allclose(one[other.obs_names].X.mean(0), other.X.mean(0), rtol=0.05)


def test_query_of_a_new_batch(folder, model):
    mdata = mudata.read_h5mu("data.h5mu")
    for part in (mdata, *mdata.mod.values()):
        part.obs["batch"] = "later"
    mdata.write("later.h5mu")
    assert "later" in run("query", "model", "later.h5mu", "--out", "out.h5mu", code=2).stderr
    run("query", "model", "later.h5mu", "--out", "out.h5mu", "--average-batches", "--no-impute")


def test_differential_writes_the_table(folder, model):
    outcome = run("differential", "model", "data.h5mu", "--groupby", "celltype", "--group1", "type0", "--out", "t.csv")
    table = pd.read_csv("t.csv", index_col="feature")
    data = model.register(mudata.read_h5mu("data.h5mu"))
    expected = MultiVI.load("model").differential("celltype", "type0", data=data)
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    n = int(expected["is_significant"].sum())
    assert f"type0 vs rest: {n} of 30 features are significant\n" in outcome.stdout
    said = run("differential", "model", "data.h5mu", "--groupby", "kind", "--out", "u.csv", code=2).stderr
    assert said.startswith("error: no obs has a column 'kind'")
    words = ("differential", "model", "data.h5mu", "--groupby", "celltype", "--out", "u.csv")
    assert (
        run(*words, "--modality", "atac", code=2).stderr == "error: the model has no modality 'atac'; it has rna, adt\n"
    )
    assert not (folder / "u.csv").exists()


def test_other_models_and_folders(folder, model):
    table = pd.DataFrame({"rna": [f"rna_{i}" for i in range(6)], "adt": [f"adt_{i}" for i in range(6)]})
    graph = links.GuidanceGraph.from_table(model.mosaic, table)
    DiagVI(Mosaic.from_mudata(mudata.read_h5mu("data.h5mu")), graph, linkage=None).save("linked")
    run("differential", "linked", "data.h5mu", "--groupby", "celltype", "--out", "linked.csv")
    said = run("query", "nowhere", "data.h5mu", "--out", "o.h5mu", code=2).stderr
    assert said.startswith("error: nowhere does not hold a saved model: ")
    said = run("query", "model", "data.h5mu", "--out", "data.h5mu", "--overwrite", code=2).stderr
    assert said == "error: --out data.h5mu is the input or another output; give another name\n"
    said = run("query", "model", "data.h5mu", "--out", "model", code=2).stderr
    assert said == "error: --out needs a file that ends in .h5mu; found model\n"
    assert not list(folder.glob("*.part")) and not (folder / "o.h5mu").exists()
