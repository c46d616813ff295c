"""Training shows one bar with the time left, wherever it runs; callbacks and loggers of Lightning work beside it."""

import sys

import lightning.pytorch as lightning
import nbformat
import pandas as pd
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from nbclient import NotebookClient
from terminal import on_terminal

from pyromosaic import Mosaic, MultiVI, progress, simulate
from pyromosaic.progress import Bar, watched

QUICK = {"accelerator": "cpu", "batch_size": 32}


def made():
    return MultiVI(Mosaic.from_mudata(simulate(120, {"rna": 20, "adt": 5}, seed=0)[0]), n_latent=2, n_hidden=8)


class Line(Bar):
    """A bar that is not seen and remembers what it was told."""

    made = []
    done = total = 0

    def __init__(self, task, total):
        self.said, self.total = [task], total
        self.made.append(self)

    def advance(self, n_steps=1):
        self.done += n_steps

    def say(self, task, note=""):
        self.said.append(f"{task} ({note})" if note else task)

    def __exit__(self, *error):
        pass


@pytest.fixture
def lines(monkeypatch):
    """The bars that were made."""
    monkeypatch.setattr(Line, "made", [])
    monkeypatch.setattr(progress, "Bar", Line)
    return Line.made


TRAINING = """
from pyromosaic import Mosaic, MultiVI, simulate
model = MultiVI(Mosaic.from_mudata(simulate(120, {"rna": 20, "adt": 5}, seed=0)[0]), n_latent=2, n_hidden=8)
model.train(12, accelerator="cpu", batch_size=32)
"""


def test_a_terminal_has_one_line_for_the_whole_run():
    got = on_terminal([sys.executable, "-W", "ignore", "-c", TRAINING])
    states = [state for state in got.replace("\r\n", "\n").split("\r") if state]
    assert got.count("\n") == 1 and got.endswith("\n"), "the line is written over, and left once"
    assert any("Training, epoch " in state and " of 12" in state and "ELBO -" in state for state in states)
    assert all(" left" in state and "%|" in state and len(state.strip()) <= 90 for state in states)
    assert "Training, widths of posteriors: 100%" in states[-1]
    shares = [int(state.split("%|")[0].split()[-1]) for state in states]
    assert shares == sorted(shares)


def test_a_log_gets_no_line_of_a_short_run_and_a_line_a_minute_of_a_long_one(capsys, monkeypatch):
    made().train(3, **QUICK)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "MINUTE", 1e-9)
    made().train(2, sleep_steps=0, **QUICK)
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err
    assert "Training, epoch 2 of 2: 100%" in err.splitlines()[-1]


def test_a_notebook_stores_one_output_of_a_run():
    cells = [nbformat.v4.new_code_cell(text) for text in (TRAINING, "model.train(30, accelerator='cpu')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    for cell in notebook.cells:
        outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        (shown,) = outputs  # and warnings, if any, in stderr
        assert shown.output_type == "display_data"
        assert "100%" in shown.data["text/plain"] and " left" in shown.data["text/plain"]


def test_the_bar_counts_every_step_of_training_and_of_the_sleep_phase(lines):
    model = made()
    model.train(6, sleep_steps=10, **QUICK)
    (line,) = lines
    n_steps = 6 * -(-len(model.split.train) // 32)
    assert line.done == line.total == n_steps + 10
    assert [text.split(" (")[0] for text in line.said] == [
        *("Training", *(f"Training, epoch {i} of 6" for i in range(1, 7))),
        "Training, widths of posteriors",
    ]


@pytest.mark.parametrize("options", [{"early_stopping": 1}, {"max_steps": 5}, {"limit_train_batches": 2}])
def test_a_run_that_is_shorter_than_expected_ends_at_its_end(lines, options):
    model = made()
    model.train(40, learning_rate=0.1, schedule="constant", sleep_steps=0, **options, **QUICK)
    (line,) = lines
    assert line.done == line.total < 40 * 4


def test_a_resumed_run_begins_where_it_was_left(lines, tmp_path):
    made().train(2, checkpoint_dir=tmp_path, sleep_steps=0, **QUICK)
    for n_epochs in (4, 4):  # the second has nothing left to train
        made().train(n_epochs, checkpoint_dir=tmp_path, resume_from=tmp_path, sleep_steps=0, **QUICK)
        assert lines[-1].done == lines[-1].total == 16
    assert lines[1].said[1].startswith("Training, epoch 3 of 4 (ELBO -")


def test_no_bar_beside_one_of_lightning_and_none_if_it_is_not_wanted(lines, capsys):
    made().train(1, progress_bar=False, **QUICK)
    assert not lines and capsys.readouterr() == ("", "")
    made().train(1, callbacks=[TQDMProgressBar()], sleep_steps=0, **QUICK)
    assert not lines
    with pytest.raises(ValueError, match="progress_bar must be True, False or a Bar; found 'yes'"):
        made().train(1, progress_bar="yes")


def test_a_bar_is_left_by_an_error(capsys, monkeypatch):
    monkeypatch.setattr(progress, "MINUTE", 0.0)

    class Stop(lightning.Callback):
        def on_train_epoch_start(self, trainer, plan):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made().train(4, callbacks=[Stop()], sleep_steps=0, **QUICK)
    assert "25%" in capsys.readouterr().err.splitlines()[-1]
    assert not list(progress._Tqdm._instances)


def test_who_watches_is_told_of_every_cell_once():
    model, done = made(), []
    with watched(done.append):
        model.get_latent_representation()
        assert sum(done) == 120
        model.get_imputed_values("adt", cells=["cell3", "cell4"], n_samples=2)
        assert sum(done) == 122
    model.get_latent_representation()
    assert sum(done) == 122


# Lightning's callbacks and loggers


@pytest.mark.parametrize("with_ours", [True, False])
def test_a_checkpoint_callback_of_the_user_works_beside_ours(with_ours, tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="validation_elbo", mode="max", save_top_k=1)
    last = ModelCheckpoint(tmp_path / "last")
    ours = {"checkpoint_dir": tmp_path / "ours"} if with_ours else {}
    model = made()
    model.train(4, callbacks=[best, last], progress_bar=False, **ours, **QUICK)
    assert (tmp_path / "ours" / "last.ckpt").exists() == with_ours
    row = model.history["validation_elbo"].idxmax()
    (file,) = (tmp_path / "best").iterdir()
    assert file.name.startswith(f"epoch={row}-") and float(best.best_model_score) == pytest.approx(
        model.history["validation_elbo"].max()
    )
    (file,) = (tmp_path / "last").iterdir()
    again = made()
    again.train(4, resume_from=file, progress_bar=False, **QUICK)  # a run may go on from it, also without them
    pd.testing.assert_frame_equal(again.history, model.history)
    assert again.get_latent_representation().equals(model.get_latent_representation())


def test_a_checkpoint_callback_in_a_long_run_is_at_the_end_of_epochs(tmp_path):
    """From 40 epochs validation cells are not looked at in each; Lightning would save before an epoch's end."""
    model, again = made(), made()
    options = {"callbacks": [ModelCheckpoint(tmp_path)], "sleep_steps": 0, "progress_bar": False}
    model.train(40, **options, **QUICK | {"batch_size": 128})
    (file,) = tmp_path.iterdir()
    again.train(40, resume_from=file, **options, **QUICK | {"batch_size": 128})
    assert again.get_latent_representation().equals(model.get_latent_representation())


def test_a_logger_gets_one_row_an_epoch(tmp_path):
    model = made()
    model.train(7, logger=CSVLogger(tmp_path), progress_bar=False, sleep_steps=0, **QUICK)
    (file,) = tmp_path.rglob("metrics.csv")
    table = pd.read_csv(file)
    assert table["epoch"].tolist() == list(range(7))
    assert set(table) == {*model.history.columns, "epoch", "step"}
    for name in ("train_elbo", "validation_elbo", "kl_weight"):
        assert table[name].to_numpy() == pytest.approx(model.history[name].to_numpy(), rel=1e-6)


def test_what_callbacks_monitor_is_there(tmp_path):
    seen = {}

    class Look(lightning.Callback):
        monitor = "validation_elbo"

        def on_train_end(self, trainer, plan):
            seen.update(trainer.callback_metrics)

    made().train(2, callbacks=[Look()], progress_bar=False, sleep_steps=0, **QUICK)
    assert {"train_elbo", "train_objective", "validation_elbo", "validation_reconstruction"} <= set(seen)
