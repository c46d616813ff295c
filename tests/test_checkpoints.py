"""Checkpoints: a resumed run is the run, a kill loses none, and nothing in a file is run."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as lightning
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import nn

from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.guidance import GuidanceGraph
from pyromosaic.train import checkpoints
from pyromosaic.train.checkpoints import FORM, Packed, newest, read

QUIET = {"progress_bar": False, "accelerator": "cpu", "batch_size": 64}
STOPPING = {"learning_rate": 0.05, "kl_warmup_epochs": 0, "schedule": "constant", "validation": 0.3}
pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")


class Interrupt(Callback):
    """Ctrl-C at the second step of an epoch, or its first if it has but one."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, plan, outputs, batch, step) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


class Rates(Callback):
    """The learning rate of each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_start(self, trainer, plan) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def multivi(**options):
    mdata, _ = simulate(150, {"rna": 30, "adt": 6}, seed=1)
    return MultiVI(Mosaic.from_mudata(mdata, batch_key="batch"), n_latent=3, **options)


def contrastive():
    mdata, _ = simulate(150, {"rna": 30}, treated=0.5, seed=1)
    return ContrastiveVI(Mosaic.from_mudata(mdata).with_cohorts("condition", background="control"), n_latent=3)


def linked(kind, **options):
    mdata, truth = simulate(150, {"rna": 30, "adt": 10}, links={"adt": 0.8}, types=3, seed=1)
    mosaic = Mosaic.from_anndata({name: adata.copy() for name, adata in mdata.mod.items()})
    ends = [(("rna", row.gene), (row.modality, row.feature)) for row in truth.links.itertuples()]
    return kind(mosaic, GuidanceGraph.from_edges(mosaic, ends, sign=truth.links["sign"]), **options)


MODELS = {
    "multivi": multivi,
    "adversary": lambda: multivi(adversary=1.0),
    "contrastive": contrastive,
    "diagvi": lambda: linked(DiagVI),
    "scmodal": lambda: linked(ScModal, refresh_every=2),
}


def state(model) -> list[torch.Tensor]:
    return [*model.model.state_dict().values(), *model.guide.state_dict().values()]


def assert_same(one, other) -> None:
    """To the last bit."""
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))
    latents = one.get_latent_representation(), other.get_latent_representation()
    pd.testing.assert_frame_equal(*latents, check_exact=True)
    for a, b in zip(vars(one.split).values(), vars(other.split).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_the_run(name, tmp_path, capsys):
    whole, first, second = (MODELS[name]() for _ in range(3))
    whole.train(8, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        first.train(8, checkpoint_dir=tmp_path, callbacks=[Interrupt(5)], **QUIET)
    second.train(8, resume_from=tmp_path, checkpoint_dir=tmp_path, **QUIET)
    assert f"{tmp_path / 'last.ckpt'}, after 5 of 8 epochs" in capsys.readouterr().err
    assert_same(whole, second)
    third = MODELS[name]()  # nothing is left to do but what follows training
    third.train(8, resume_from=tmp_path / "last.ckpt", **QUIET)
    assert_same(whole, third)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("at", [1, 4, None])
def test_a_resumed_run_that_stops_early_is_the_run(at, tmp_path):
    options = {"early_stopping": 3, **STOPPING, **QUIET}
    whole, first, second = (multivi() for _ in range(3))
    whole.train(200, **options)
    assert 6 < len(whole.history) < 200
    try:
        first.train(200, checkpoint_dir=tmp_path, callbacks=[Interrupt(at)], **options)
    except KeyboardInterrupt:
        assert at is not None and len(first.history) == at
    second.train(200, resume_from=tmp_path, **options)
    assert_same(whole, second)


def test_a_run_is_resumed_with_workers_and_by_another_optimiser_too(tmp_path):
    def halving(optimiser):
        return torch.optim.lr_scheduler.StepLR(optimiser, 2, 0.5)

    options = {"n_workers": 1, "schedule": halving, "validation": 0.0, **QUIET}
    whole, first, second = (multivi() for _ in range(3))
    whole.train(5, **options)
    with pytest.raises(KeyboardInterrupt):
        first.train(5, checkpoint_dir=tmp_path, callbacks=[Interrupt(3)], **options)
    second.train(5, resume_from=tmp_path, **options)
    assert_same(whole, second)


def test_more_epochs_than_the_run_began_with(tmp_path, capsys):
    """The rate stays where the cosine has ended, and is that of a longer run where it is constant."""
    options = {"kl_warmup_epochs": 0, **QUIET}
    multivi().train(4, checkpoint_dir=tmp_path / "cosine", **options)
    rates, model = Rates(), multivi()
    model.train(7, resume_from=tmp_path / "cosine", callbacks=[rates], **options)
    np.testing.assert_allclose(rates.seen, [3e-3 / 50] * 3)
    assert "the learning rate stays where it was left after the first 4" in capsys.readouterr().err
    assert list(model.history.index) == list(range(7))

    options["schedule"] = "constant"
    whole, second = multivi(), multivi()
    whole.train(7, **options)
    multivi().train(4, checkpoint_dir=tmp_path / "constant", **options)
    second.train(7, resume_from=tmp_path / "constant", **options)
    assert_same(whole, second)


def test_other_settings_and_data_are_refused_and_change_nothing(tmp_path):
    multivi().train(3, checkpoint_dir=tmp_path, **QUIET)
    model = multivi()
    model.train(1, **QUIET)
    before, history, parts = [v.clone() for v in state(model)], model.history, model.split
    for arguments, message in [
        ({"learning_rate": 1e-3}, r"last\.ckpt \(pyromosaic .*\) had learning_rate=0\.003; found 0\.001"),
        ({"schedule": "constant"}, "had schedule='cosine'; found 'constant'"),
        ({"batch_size": 32}, "had batch_size=64; found 32"),
        ({"seed": 1}, "had seed=0; found 1"),
        ({"early_stopping": 5}, "had early_stopping=None; found 5"),
        ({"n_epochs": 2}, "has 3 epochs already; found n_epochs=2"),
        ({"resume_from": tmp_path / "nowhere.ckpt"}, "nowhere.ckpt cannot be taken as a checkpoint: No such file"),
        ({"resume_from": tmp_path / ".."}, "holds no checkpoint"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.train(**{"n_epochs": 3, "resume_from": tmp_path, **QUIET} | arguments)
        assert model.history is history and model.split is parts and not model.guide.training
        assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
    mdata, _ = simulate(150, {"rna": 30, "adt": 6}, seed=1)
    adatas = {name: adata.copy() for name, adata in mdata.mod.items()}
    for adata in adatas.values():
        adata.obs_names = [name.replace("cell", "other") for name in adata.obs_names]
    other = MultiVI(Mosaic.from_anndata(adatas, batch_key="batch", match_cells=True), n_latent=3)
    with pytest.raises(ValueError, match="had other cells; a run is resumed on the same data"):
        other.train(3, resume_from=tmp_path, **QUIET)

    def changed(likelihood="nb", more=0):
        mdata, _ = simulate(150, {"rna": 30, "adt": 6}, seed=1)
        mdata["rna"].X.data[7] += more
        return MultiVI(
            Mosaic.from_mudata(mdata, {"rna": likelihood, "adt": "nb_mixture"}, batch_key="batch"), n_latent=3
        )

    for other, what in [
        (changed("zinb"), r"likelihood of rna='nb'; found 'zinb'\."),
        (changed(more=1), "other measurements of rna"),
    ]:
        with pytest.raises(ValueError, match=f"had {what}"):
            other.train(3, resume_from=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="had model option n_hidden=.*; found 5"):
        multivi(n_hidden=5).train(3, resume_from=tmp_path, **QUIET)


def test_a_checkpoint_is_written_every_epoch_however_rarely_is_validated(tmp_path):
    model = multivi()
    with pytest.raises(KeyboardInterrupt):
        model.train(200, checkpoint_dir=tmp_path, callbacks=[Interrupt(9)], **QUIET)
    assert len(read(tmp_path / "last.ckpt")["run"]["rows"]) == 9
    assert len(model.history) == 9


def test_checkpoints_that_would_take_long_wait_for_a_minute_at_most(tmp_path, monkeypatch):
    now, cost, written = [0.0], [3.0], []

    def write(packed, path):
        written.append(now[0])
        now[0] += cost[0]

    class Clock(Callback):
        def on_train_epoch_start(self, trainer, plan):
            now[0] += 10.0

    monkeypatch.setattr(checkpoints, "monotonic", lambda: now[0])
    monkeypatch.setattr(Packed, "write", write)
    multivi().train(30, checkpoint_dir=tmp_path, callbacks=[Clock()], **QUIET)
    assert (np.diff(written) == 3 + 10).all() and len(written) == 30  # every epoch
    written.clear()
    cost[0] = 15.0
    multivi().train(30, checkpoint_dir=tmp_path, callbacks=[Clock()], **QUIET)
    assert (np.diff(written)[:4] == 15 + 10).all()  # a minute of writing is never too much
    assert np.diff(written).max() <= 15 + 30 and 15 * len(written) <= 10 * 30 + 15  # no longer than training
    written.clear()
    cost[0] = 100.0
    multivi().train(28, checkpoint_dir=tmp_path, callbacks=[Clock()], **QUIET)
    assert (np.diff(written)[:-1] == 100 + 60).all() and len(written) == 6
    written.clear()
    with pytest.raises(KeyboardInterrupt):
        multivi().train(30, checkpoint_dir=tmp_path, callbacks=[Clock(), Interrupt(3)], **QUIET)
    assert len(written) == 2  # what waits is written if training is left


def test_a_second_run_in_the_folder_takes_it_over(tmp_path):
    multivi().train(3, checkpoint_dir=tmp_path, **QUIET)
    model = multivi()
    with pytest.warns(UserWarning, match="is of an earlier run and is replaced after the first epoch"):
        model.train(1, checkpoint_dir=tmp_path, **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert len(newest(tmp_path)[1]["run"]["rows"]) == 1


def test_of_a_folder_the_newest_whole_checkpoint_is_taken(tmp_path):
    multivi().train(4, checkpoint_dir=tmp_path, **QUIET)
    last, before = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert len(read(before)["run"]["rows"]) < 4
    last.write_bytes(last.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cut off or damaged"):
        newest(last)
    model = multivi()
    with pytest.warns(UserWarning, match=r"last.ckpt cannot be taken.*damaged; .*previous.ckpt is taken"):
        model.train(4, resume_from=tmp_path, **QUIET)
    before.write_bytes(b"")
    with pytest.raises(ValueError, match=r"last.ckpt.*previous.ckpt"):
        newest(tmp_path)


def test_a_full_disk_costs_no_checkpoint_and_no_training(tmp_path, monkeypatch):
    full, write = [False], checkpoints.replaced

    def replaced(contents):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(contents)

    class Fill(Callback):
        def on_train_epoch_start(self, trainer, plan):
            full[0] = trainer.current_epoch >= 2

    monkeypatch.setattr(checkpoints, "replaced", replaced)
    monkeypatch.setattr(checkpoints, "monotonic", lambda: 0.0)  # every epoch's is written
    model = multivi()
    with pytest.warns(UserWarning, match=r"last\.ckpt could not be written \(No space left on device\)"):
        model.train(4, checkpoint_dir=tmp_path, callbacks=[Fill()], **QUIET)
    assert len(model.history) == 4 and len(newest(tmp_path)[1]["run"]["rows"]) == 2
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="checkpoints cannot be written into"):
        multivi().train(1, checkpoint_dir=tmp_path / "file" / "folder", **QUIET)


# Kills


def _write_for_ever(folder: Path) -> None:
    content = {"noise": torch.randn(400_000)}
    for i in range(1_000_000):
        Packed(content | {"i": i}).write(folder / "last.ckpt")


@pytest.mark.parametrize("place", ["same", "/dev/shm"])
def test_a_kill_while_writing_leaves_a_whole_checkpoint(place, tmp_path):
    if place != "same" and not os.access(place, os.W_OK):
        pytest.skip("there is no other file system")
    generator = np.random.default_rng(0)
    with TemporaryDirectory(dir=tmp_path if place == "same" else place) as folder:
        for _ in range(4):
            process = get_context("fork").Process(target=_write_for_ever, args=(Path(folder),))
            with warnings.catch_warnings(action="ignore"):
                process.start()
            while not Path(folder, "last.ckpt").exists():
                time.sleep(0.01)
            time.sleep(generator.uniform(0.0, 0.1))
            process.kill()
            process.join()
            assert read(Path(folder, "last.ckpt"))["noise"].shape == (400_000,)
        checkpoints.clear_drafts(Path(folder, "last.ckpt"))
        assert os.listdir(folder) == ["last.ckpt"]


SCRIPT = """
import sys, warnings, torch
torch.set_num_threads(1)
from lightning.pytorch.callbacks import LambdaCallback
from pyromosaic import Mosaic, MultiVI, simulate
say = LambdaCallback(on_train_epoch_start=lambda trainer, plan: print(trainer.current_epoch, flush=True))
mosaic = Mosaic.from_mudata(simulate(150, {"rna": 30, "adt": 6}, seed=1)[0], batch_key="batch")
model = MultiVI(mosaic, n_latent=3)
try:
    model.train(1000, batch_size=64, checkpoint_dir=sys.argv[1], callbacks=[say], progress_bar=False, accelerator="cpu")
except KeyboardInterrupt:
    print("interrupted", len(model.history), model.guide.training)
    raise SystemExit(5)
finally:
    print("left", model.guide.training, flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 5)])
def test_signals_leave_a_checkpoint_and_a_true_exit_code(number, code, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]

    def heard() -> None:  # a test run in the background may have been told to ignore it
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        for line in process.stdout:
            if line.strip() == "5":
                process.send_signal(number)
                break
        rest = process.stdout.read()
    assert process.returncode == code
    assert "left False" in rest
    done = len(newest(tmp_path)[1]["run"]["rows"])
    assert done >= 5
    if number == signal.SIGINT:
        assert f"interrupted {done} False" in rest


def test_however_training_is_left_the_model_is_that_of_a_whole_epoch(tmp_path):
    """Without the sleep phase, which comes after the last epoch."""
    model, again = multivi(), multivi()
    with pytest.raises(KeyboardInterrupt):
        model.train(6, callbacks=[Interrupt(3)], schedule="constant", kl_warmup_epochs=0, **QUIET)
    options = {"schedule": "constant", "kl_warmup_epochs": 0, "check_val_every_n_epoch": 1, "sleep_steps": 0}
    again.train(3, **options, **QUIET)
    assert_same(model, again)
    assert not model.model.training and not model.guide.training

    class Terminated(Interrupt):
        def on_train_batch_start(self, trainer, plan, batch, step) -> None:
            if trainer.current_epoch == self.epoch:
                raise SystemExit(143)

    before, history, parts = [v.clone() for v in state(model)], model.history, model.split
    for callback in (Interrupt(0), Terminated(0), Terminated(2)):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            model.train(6, seed=3, callbacks=[callback], **QUIET)
        assert model.history is history and model.split is parts
        assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
        assert not model.model.training and not model.guide.training


# What is read


class Marker:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_objects_are_refused_and_nothing_runs(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"state_dict": {}, "run": Marker(marker)}, tmp_path / "torch.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(Marker(marker)))
    (tmp_path / "disguised.ckpt").write_bytes(FORM + b"0" * 64 + b"\n" + pickle.dumps(Marker(marker)))
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder").mkdir()
    for source, message in [
        (tmp_path / "torch.ckpt", "not of the form"),
        (tmp_path / "pickle.ckpt", "not of the form"),
        (tmp_path / "disguised.ckpt", "damaged"),
        (tmp_path / "pipe.ckpt", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "folder", "holds no checkpoint"),
        ("https://example.org/last.ckpt", "on this machine; found the address https"),
        ("s3://bucket/last.ckpt", "on this machine; found the address s3"),
        ("registry:model", "No such file"),
        ("last", "No such file"),
    ]:
        with pytest.raises(ValueError, match=message) as refused:
            multivi().train(2, resume_from=source, **QUIET)
        assert "\n" not in str(refused.value)
    assert not marker.exists()


def test_a_foreign_object_is_not_written(tmp_path):
    class Odd(Callback):
        def state_dict(self):
            return {"odd": object()}

    with pytest.raises(TypeError, match="tensors, numbers, strings, lists and dictionaries alone; found object"):
        multivi().train(1, checkpoint_dir=tmp_path, callbacks=[Odd()], **QUIET)


def changed(content, path, value):
    """A copy of a checkpoint in which one entry is another."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


def test_whole_checkpoints_that_do_not_fit_are_refused(tmp_path):
    multivi().train(2, checkpoint_dir=tmp_path, **QUIET)
    content = read(tmp_path / "last.ckpt")
    name, weight = next((k, v) for k, v in content["state_dict"].items() if v.ndim == 2)
    moment = ("optimizer_states", 0, "state", 0, "exp_avg")
    model = multivi()
    before = [v.clone() for v in state(model)]
    for path, value in [
        ((), {}),
        ((), [1, 2]),
        (("run",), {}),
        (("run", "rows"), 3),
        (("run", "rows"), [1, 2]),
        (("run", "generators"), {"cpu": torch.zeros(3)}),
        (("run", "generators", 0), {"cpu": torch.zeros(3)}),
        (("run", "generators", 0, "order"), {"state": 1}),
        (("run", "n_epochs"), "many"),
        (("run", "n_epochs"), 10**15),
        (("run", "own_optimisers"), [{}]),
        (("state_dict",), {}),
        (("state_dict", name), weight[:1]),
        (("state_dict", name), weight.long()),
        (("state_dict", name), weight * torch.nan),
        (("state_dict", name), "weight"),
        (("optimizer_states",), []),
        (("optimizer_states", 0), {}),
        (moment, torch.zeros(3, 3, 3)),
        (moment, torch.full_like(content["optimizer_states"][0]["state"][0]["exp_avg"], torch.inf)),
        (("lr_schedulers",), None),
        (("loops",), {}),
        (("callbacks",), 3),
        (("pytorch-lightning_version",), "?"),
    ]:
        Packed(changed(content, path, value)).write(tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=r"bad\.ckpt") as refused:
            model.train(3, resume_from=tmp_path / "bad.ckpt", **QUIET)
        assert "\n" not in str(refused.value), path
        assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True)), path
        assert not len(model.history) and not model.guide.training, path


def test_text_nested_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.json, "dumps", lambda value: "[" * 100_000)
    Packed({}).write(tmp_path / "deep.ckpt")
    with pytest.raises(ValueError, match="recursion"):
        read(tmp_path / "deep.ckpt")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_plain_values_are_read_as_they_were(content):
    with TemporaryDirectory() as folder:
        Packed({"content": content}).write(Path(folder, "a"))
        assert repr(read(Path(folder, "a"))["content"]) == repr(content)


def test_tensors_are_read_as_they_were(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tensors = [
        torch.tensor(3),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.randn(3).bfloat16(),
        torch.tensor([torch.inf, torch.nan]),
        shared,
        shared.T,
        shared[0],
        nn.Parameter(torch.ones(2)),
    ]
    Packed({"tensors": tensors}).write(tmp_path / "a")
    for one, other in zip(tensors, read(tmp_path / "a")["tensors"], strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_with_any_byte_changed_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.ckpt"
    Packed({"a": torch.arange(20.0), "b": {"c": 1.5}}).write(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be taken as a checkpoint"):
        read(path)


def test_lightnings_own_checkpoints_are_in_our_form_too(tmp_path):
    multivi().train(
        2,
        checkpoint_dir=tmp_path,
        callbacks=[lightning.callbacks.ModelCheckpoint(tmp_path / "own", monitor="validation_elbo", mode="max")],
        **QUIET,
    )
    (file,) = (tmp_path / "own").iterdir()
    assert json.dumps(sorted(read(file)["run"]["settings"]))


def test_a_checkpoint_that_seems_far_larger_is_refused_before_it_is_read(tmp_path):
    Packed({"a": torch.zeros(3)}).write(tmp_path / "last.ckpt")
    os.truncate(tmp_path / "last.ckpt", 10**9)  # a hole, which takes no room
    began = time.monotonic()
    with pytest.raises(ValueError, match="cut off or damaged"):
        read(tmp_path / "last.ckpt")
    assert time.monotonic() - began < 0.5


def test_a_checkpoint_of_many_values_is_refused_before_they_are_read(tmp_path, monkeypatch):
    multivi().train(2, checkpoint_dir=tmp_path, **QUIET)
    content = read(tmp_path / "last.ckpt")
    Packed(content | {"more": [[]] * 300_000}).write(tmp_path / "last.ckpt")
    (tmp_path / "previous.ckpt").unlink(missing_ok=True)
    loads = json.loads
    monkeypatch.setattr(checkpoints.json, "loads", lambda text: loads(text) if len(text) < 300_000 else pytest.fail())
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be taken.* values, where at most 201,500 are expected"):
        multivi().train(3, resume_from=tmp_path, **QUIET)
