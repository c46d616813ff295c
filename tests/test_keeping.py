"""Saved models are read whole, or refused in one sentence before anything is built; the old one stays until then."""

import errno
import json
import os
import shutil
import time
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pyromosaic
from pyromosaic import Mosaic, MultiVI, simulate
from pyromosaic.models import keeping
from pyromosaic.train import files, folders

QUIET = {"progress_bar": False, "accelerator": "cpu", "batch_size": 64}


@pytest.fixture(scope="module")
def model():
    model = MultiVI(Mosaic.from_mudata(simulate(60, {"rna": 30, "adt": 5}, seed=1)[0], batch_key="batch"), n_latent=3)
    model.train(2, **QUIET)
    return model


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder, digest=False, **changes):
    """Change entries of the description; None takes one away. By default as before there were digests."""
    content = json.loads((folder / "model.json").read_text()) | changes
    gone = [key for key, value in changes.items() if value is None] + ([] if digest else ["digest", "weights"])
    (folder / "model.json").write_text(json.dumps({k: v for k, v in content.items() if k not in gone}))


def refused(folder, message):
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        MultiVI.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert time.monotonic() - began < 5


def weights(change):
    """A copy of the weights in which some are others."""

    def changed(folder):
        tensors = load_file(folder / "weights.safetensors")
        tensors = {name: value.clone() for name, value in tensors.items()}
        name = next(name for name, value in tensors.items() if value.ndim == 2)
        change(tensors, name)
        save_file(tensors, folder / "weights.safetensors")
        edit(folder)

    return changed


def becomes(change):
    return weights(lambda tensors, name: tensors.update({name: change(tensors[name])}))


def options(**changes):
    def changed(folder):
        content = json.loads((folder / "model.json").read_text())
        edit(folder, options=content["options"] | changes)

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights(lambda tensors, name: tensors.clear()), "larger than the 0 weights"),
        (weights(lambda tensors, name: tensors.pop(name)), "1 missing"),
        (weights(lambda tensors, name: tensors.update(other=torch.zeros(2))), "'other' of 1 not of the model"),
        (becomes(lambda value: value.long()), "of type torch.int64, expected torch.float32"),
        (becomes(lambda value: value.bool()), "of type torch.bool"),
        (becomes(lambda value: value * torch.nan), "not finite"),
        (becomes(lambda value: value + torch.inf), "not finite"),
        (becomes(lambda value: value[:1]), "has shape"),
        (lambda folder: edit(folder, history=None), "'history' is missing"),
        (lambda folder: edit(folder, objects=None), "'objects' is missing"),
        (lambda folder: edit(folder, objects=[["a"]]), "'objects' is missing or of another type"),
        (lambda folder: edit(folder, options=[1]), "'options' is missing or of another type"),
        (lambda folder: edit(folder, schema={"modalities": 3}), "do not fit together"),
        (lambda folder: edit(folder, history={"data": 3, "columns": []}), "do not fit together"),
        (lambda folder: edit(folder, format=[4]), r"saved in format \[4\] by pyromosaic"),
        (lambda folder: edit(folder, format=99), f"format 99 by pyromosaic {pyromosaic.__version__}"),
        (lambda folder: edit(folder, **{"class": "DiagVI"}), "saved by pyromosaic .* of class DiagVI, not MultiVI"),
        (lambda folder: edit(folder, digest=True, seed=1), "model.json is not as it was saved"),
        (lambda folder: (folder / "model.json").write_text("[" * 100_000), "recursion"),
        (lambda folder: (folder / "model.json").write_text('"text"'), "complete saved model"),
        (lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe\x00"), "complete saved model"),
        (lambda folder: os.truncate(folder / "model.json", 1 << 33), "at most"),
        (options(n_hidden=30_000), "larger than the|must be a whole number"),
        (options(n_latent=30_000), "larger than the|must be a whole number"),
        (options(n_encoder_layers=1_000_000), "larger than the|must be a whole number"),
        (options(n_decoder_layers=1_000_000), "larger than the|must be a whole number"),
        (options(n_hidden="many"), "do not fit together"),
        (options(no_such_option=7), "do not fit together"),
    ],
)
def test_what_is_no_model_is_refused(change, message, saved):
    change(saved)
    refused(saved, message)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_files_alone_are_opened(name, saved):
    (saved / name).unlink()
    refused(saved, "No such file")
    os.mkfifo(saved / name)
    refused(saved, "not a regular file")
    (saved / name).unlink()
    (saved / name).symlink_to("/dev/zero")
    refused(saved, "not a regular file")
    (saved / name).unlink()
    (saved / name).mkdir()
    refused(saved, "not a regular file")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_model_with_any_byte_changed_is_refused_or_the_same(model, saved, data):
    bad = saved.with_name("bad")
    shutil.copytree(saved, bad, dirs_exist_ok=True)
    file = bad / data.draw(st.sampled_from(["model.json", "weights.safetensors"]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        again = MultiVI.load(bad, model.mosaic)
    except ValueError as error:
        assert "bad" in str(error) and "\n" not in str(error)
    else:
        pd.testing.assert_frame_equal(again.history, model.history)
        pd.testing.assert_frame_equal(again.get_latent_representation(), model.get_latent_representation())


def test_an_overwritten_model_stays_until_the_new_one_is_written(model, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = MultiVI(model.mosaic, n_latent=2)
    other.options["odd"] = {1: np.nan, "a": 2}  # JSON has no such keys
    flush, n = os.fsync, [0]

    def full(descriptor):
        n[0] += 1
        if n[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        other.save(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    del other.options["odd"]
    monkeypatch.setattr(folders.json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.save(saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    monkeypatch.undo()
    other.save(saved, overwrite=True)
    assert MultiVI.load(saved).options["n_latent"] == 2


def test_a_kill_between_the_two_files_costs_nothing(model, saved, monkeypatch):
    """The description that belongs to the new weights is found beside them."""
    other, move = MultiVI(model.mosaic, n_latent=2), os.replace

    def killed(draft, path):
        if path.name == "model.json":
            raise KeyboardInterrupt
        move(draft, path)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        other.save(saved, overwrite=True)
    monkeypatch.undo()
    assert MultiVI.load(saved).options["n_latent"] == 2
    other.save(saved, overwrite=True)
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "weights.safetensors"]
    os.replace(saved / "model.json", saved / "kept.json")
    model.save(saved)
    os.replace(saved / "kept.json", saved / "model.json")
    refused(saved, "do not fit together")


def _save_for_ever(model, folder):
    while True:
        model.save(folder, overwrite=True)


def test_kills_while_saving_leave_a_whole_model(model, saved):
    generator = np.random.default_rng(0)
    for _ in range(5):
        process = get_context("fork").Process(target=_save_for_ever, args=(model, saved))
        process.start()
        time.sleep(generator.uniform(0.05, 0.15))
        process.kill()
        process.join()
        MultiVI.load(saved)


def test_the_version_that_saved_is_recorded(saved):
    assert json.loads((saved / "model.json").read_text())["version"] == pyromosaic.__version__


def test_a_loaded_history_has_all_digits(model, saved):
    loaded = MultiVI.load(saved).history
    pd.testing.assert_frame_equal(loaded, model.history, check_exact=True)
    assert not (model.history == model.history.round(10)).all(axis=None)  # some have more than ten digits


def test_weights_that_seem_far_larger_are_refused_before_they_are_read(saved):
    os.truncate(saved / "weights.safetensors", 10**12)  # a hole, which takes no room
    began = time.monotonic()
    with pytest.raises(ValueError, match="weights.safetensors is not as it was written") as error:
        MultiVI.load(saved)
    assert str(saved) in str(error.value) and time.monotonic() - began < 2


def with_header(folder, change, grow):
    """Weights with another header, and a hole at the end, which takes no room."""
    path = folder / "weights.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    change(header, len(tensors))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)
    os.truncate(path, 8 + len(text) + len(tensors) + grow)


@pytest.mark.parametrize("draft", [False, True])
def test_large_weights_that_are_not_the_models_are_refused_unread(draft, saved, monkeypatch):
    """Their names, shapes and types are compared first; also where a killed attempt has left a description."""
    size = 10**10

    def more(header, end):
        header["model.more"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [end, end + size]}

    with_header(saved, more, size)
    if draft:
        shutil.copy(saved / "model.json", saved / ".model.json.abc.part")
    for module, name in ((keeping, "load_file"), (folders, "file_digest")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the weights are read"))
    refused(saved, "'model.more' of 1 not of the model")


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [10**12]},
        {"shape": [-1, -4]},
        {"shape": [1.5]},
        {"shape": "3"},
        {"shape": [0, 10**30]},
        {"dtype": "C64"},
        {"dtype": []},
        {"data_offsets": [0, 10**9]},
        {"data_offsets": [4, 8]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": None},
    ],
)
def test_headers_that_contradict_the_file_are_refused(entry, saved):
    def change(header, end):
        header[next(name for name in header if name != "__metadata__")] |= entry

    with_header(saved, change, 0)
    refused(saved, "weights.safetensors is not as it was written: cut off or damaged")


@pytest.mark.parametrize("junk", ["[" + "1," * 2_000_000 + "1]", " " * 40_000_000 + "1"])
def test_long_descriptions_are_refused_before_they_are_read(junk, saved, monkeypatch):
    text = (saved / "model.json").read_text()
    (saved / "model.json").write_text(f'{text[:-1]}, "more": {junk}}}')
    monkeypatch.setattr(folders.json, "loads", lambda *_: pytest.fail("the description is read"))
    refused(saved, "has at most 33,554,432 bytes and 1,500,000 entries|where at most 33,554,432 are expected")


def test_a_description_that_could_not_be_loaded_is_not_saved(model, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ENTRIES", 10)
    with pytest.raises(ValueError, match="has at most 33,554,432 bytes and 10 entries"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_untrained_model_has_an_empty_history_of_epochs(model, saved, tmp_path):
    untrained = MultiVI(model.schema, n_latent=3)
    untrained.save(tmp_path / "untrained")
    for each in (untrained, MultiVI.load(tmp_path / "untrained")):
        assert each.history.shape == (0, 0) and each.history.index.name == "epoch"
    edit(tmp_path / "untrained", history={"columns": ["index"], "data": []})  # as saved before
    assert MultiVI.load(tmp_path / "untrained").history.shape == (0, 0)
