"""Full disks, folders that cannot be written into, and files that vanish: one sentence, and nothing is lost."""

import errno
import os
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pyromosaic import Mosaic, MultiVI, simulate
from pyromosaic.data.matrix import Matrix
from pyromosaic.train import files
from pyromosaic.train.checkpoints import newest, read

QUIET = {"progress_bar": False, "accelerator": "cpu", "batch_size": 64}
FAILURES = {errno.ENOSPC: "No space left on device", errno.EROFS: "Read-only file system", errno.ESTALE: "Stale file"}


class At(Callback):
    """Do something at the start of an epoch."""

    def __init__(self, epoch, act):
        self.epoch, self.act = epoch, act

    def on_train_epoch_start(self, trainer, plan):
        if trainer.current_epoch == self.epoch:
            self.act()


def multivi(mosaic=None):
    if mosaic is None:
        mosaic = Mosaic.from_mudata(simulate(150, {"rna": 30, "adt": 6}, seed=1)[0], batch_key="batch")
    return MultiVI(mosaic, n_latent=3)


def assert_same(one, other):
    """To the last bit."""
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)
    states = ([*model.model.state_dict().values(), *model.guide.state_dict().values()] for model in (one, other))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.fixture(scope="module")
def trained():
    model = multivi()
    model.train(4, **QUIET)
    return model


@contextmanager
def failing(number, monkeypatch):
    """Every file that is written fails when it is flushed."""

    def flush(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", flush)
        yield


@pytest.fixture
def forbidden():
    """A folder with a model and a run, in which an ordinary user may read and not write."""
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        model = multivi()
        model.train(2, checkpoint_dir=folder / "run", **QUIET)
        model.save(folder / "model")
        places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
        for place in places:
            place.chmod(0o555)
        user = os.geteuid()
        if user == 0:  # who may write everywhere
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            for place in places:
                place.chmod(0o755)


# Writing


@pytest.mark.parametrize("number", FAILURES)
def test_a_model_that_cannot_be_written_leaves_the_one_that_is_there(number, trained, tmp_path, monkeypatch):
    multivi().save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with failing(number, monkeypatch):
        for folder in ("model", "new"):
            with pytest.raises(OSError, match=f"^the model cannot be saved in .*{folder}: {FAILURES[number]}"):
                trained.save(tmp_path / folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("number", FAILURES)
def test_a_run_whose_checkpoints_cannot_be_written_goes_on(number, trained, tmp_path, monkeypatch):
    model, away = multivi(), ExitStack()
    fail = At(2, lambda: away.enter_context(failing(number, monkeypatch)))
    with away, pytest.warns(UserWarning, match=rf"last\.ckpt could not be written \({FAILURES[number]}"):
        model.train(4, checkpoint_dir=tmp_path, callbacks=[fail], **QUIET)
    assert_same(model, trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert len(newest(tmp_path)[1]["run"]["rows"]) == 2
    again = multivi()
    again.train(4, resume_from=tmp_path, **QUIET)
    assert_same(again, trained)
    with failing(number, monkeypatch), pytest.raises(OSError, match=f"cannot be written into .*: {FAILURES[number]}"):
        multivi().train(1, checkpoint_dir=tmp_path / "other", **QUIET)


def test_a_folder_of_checkpoints_that_was_removed_is_made_again(trained, tmp_path):
    model = multivi()
    model.train(4, checkpoint_dir=tmp_path / "run", callbacks=[At(2, lambda: rmtree(tmp_path / "run"))], **QUIET)
    assert len(read(tmp_path / "run" / "last.ckpt")["run"]["rows"]) == 4


def test_without_permission(forbidden, trained):
    def content():
        return {path: path.read_bytes() for path in forbidden.rglob("*") if path.is_file()}

    before = content()
    with pytest.raises(PermissionError, match="^the model cannot be saved in .*model: Permission denied$"):
        trained.save(forbidden / "model", overwrite=True)
    with pytest.raises(PermissionError, match="^the model cannot be saved in .*new: Permission denied$"):
        trained.save(forbidden / "new")
    for name in ("run", "other"):
        with pytest.raises(OSError, match=f"^checkpoints cannot be written into .*{name}: Permission denied$"):
            multivi().train(3, checkpoint_dir=forbidden / name, **QUIET)
    assert content() == before
    assert len(MultiVI.load(forbidden / "model").history) == 2
    model = multivi()
    model.train(4, resume_from=forbidden / "run", **QUIET)
    assert len(model.history) == 4


def test_without_permission_to_read(forbidden):
    if os.geteuid() != 65534:
        pytest.skip("only the superuser can give a file to somebody else")
    os.seteuid(0)
    for path in (forbidden / "model" / "weights.safetensors", forbidden / "run" / "last.ckpt"):
        path.chmod(0)
    (forbidden / "run" / "previous.ckpt").unlink(missing_ok=True)
    os.seteuid(65534)
    with pytest.raises(ValueError, match=r"^the weights in .*model .* cannot be read: Permission denied$"):
        MultiVI.load(forbidden / "model")
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be taken as a checkpoint: Permission denied$"):
        multivi().train(3, resume_from=forbidden / "run", **QUIET)


# Reading


def write(path, dense=False):
    adata = simulate(600, {"rna": 300}, seed=1)[0]["rna"]
    if dense:
        adata.X = adata.X.toarray()
    adata.write_h5ad(path)


def backed(path):
    """A model of cells that are in a file."""
    adata = anndata.read_h5ad(path)
    x = h5py.File(path, rdcc_nbytes=0)["X"]  # with nothing kept in memory
    adata.X = x if isinstance(x, h5py.Dataset) else anndata.io.sparse_dataset(x)
    return multivi(Mosaic.from_anndata({"rna": adata}, batch_key="batch"))


@pytest.mark.parametrize("dense", [False, True])
def test_a_file_cut_off_in_mid_epoch_is_named_and_the_run_is_resumed(dense, tmp_path):
    path, run = tmp_path / "cells.h5ad", tmp_path / "run"
    write(path, dense)
    whole, content = backed(path), path.read_bytes()
    whole.train(4, **QUIET)
    path.unlink()
    path.write_bytes(content)
    model = backed(path)
    before = [value.clone() for value in model.guide.state_dict().values()]
    with pytest.raises((ValueError, OSError), match=rf"{path}\b.* restore") as error:
        model.train(4, checkpoint_dir=run, callbacks=[At(2, lambda: os.truncate(path, 4000))], **QUIET)
    assert "\n" not in str(error.value)
    assert not model.guide.training and not len(model.history)
    assert all(torch.equal(a, b) for a, b in zip(model.guide.state_dict().values(), before, strict=True))
    path.unlink()
    path.write_bytes(content)
    again = backed(path)
    again.train(4, resume_from=run, **QUIET)
    assert_same(again, whole)


def test_a_file_that_is_removed_while_it_is_open_costs_nothing(tmp_path):
    write(tmp_path / "cells.h5ad")
    whole, model = backed(tmp_path / "cells.h5ad"), backed(tmp_path / "cells.h5ad")
    whole.train(3, **QUIET)
    model.train(3, callbacks=[At(1, (tmp_path / "cells.h5ad").unlink)], **QUIET)
    assert_same(model, whole)


class Share:
    """A matrix on a network share that is there, or not."""

    format = "csr"

    def __init__(self, matrix, there):
        self.matrix, self.there, self.shape = matrix, there, matrix.shape
        self.store = "share/cells"

    def __getitem__(self, rows):
        if not self.there[0]:
            raise OSError("Can't synchronously read data\n(file read failed: errno = 116)")
        return self.matrix[rows]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_share_that_is_gone_for_a_while_costs_no_whole_epoch(n_workers):
    """The model is that of the last whole epoch, if the share is back when training is left."""
    there = [True]
    model = multivi()
    model.train(2, n_workers=n_workers, **QUIET)
    matrix = model.mosaic.modalities["rna"].matrix
    share = Matrix(Share(matrix.source, there))
    share.marks = matrix.marks
    object.__setattr__(model.mosaic.modalities["rna"], "matrix", share)

    class Back(Callback):
        def on_exception(self, trainer, plan, error):
            there[0] = True

    def leave():
        there[0] = False

    with pytest.raises(OSError, match=r"^measurements cannot be read from share/cells \(Can't synchronously") as error:
        model.train(4, n_workers=n_workers, callbacks=[At(2, leave), Back()], **QUIET)
    assert "\n" not in str(error.value) and "restore the file and open it again" in str(error.value)
    assert list(model.history.index) == [0, 1]
    there[0] = False
    with pytest.raises(OSError, match="cannot be read from share/cells"):
        model.get_latent_representation()
    there[0] = True
    assert np.isfinite(model.get_latent_representation()).all(axis=None)


def test_the_names_of_files(tmp_path):
    adata = simulate(40, {"rna": 20}, seed=1)[0]["rna"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert Matrix(anndata.read_h5ad(tmp_path / "a.h5ad", backed="r").X).file == str(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = np.ones((3, 2))
        assert Matrix(file["x"]).file == str(tmp_path / "b.h5")


def test_training_without_a_bar_takes_no_semaphore(monkeypatch):
    """A process that is killed would leave it behind."""
    taken = []
    monkeypatch.setattr(resource_tracker._resource_tracker, "register", lambda *a: taken.append(a), raising=True)
    model = multivi()
    model.train(1, sleep_steps=2, **QUIET)
    assert taken == [] and "sleep_before" in model.history
