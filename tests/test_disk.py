"""Measurements that stay in files: the same rows as in memory, and minibatches of blocks that are read at once."""

import os

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pyromosaic import Mosaic
from pyromosaic.data import loader, loaders, measured
from pyromosaic.data.disk import check_whole
from pyromosaic.data.matrix import Matrix


@pytest.fixture(params=["csr", "dense"])
def both(request, tmp_path):
    """The same counts in memory and on disk."""
    counts = np.random.default_rng(0).poisson(0.7, (500, 30)).astype(np.float32)
    counts[:, 0] += 1
    x = sparse.csr_matrix(counts) if request.param == "csr" else counts
    names = pd.DataFrame(index=[f"cell{i}" for i in range(500)]), pd.DataFrame(index=[f"gene{i}" for i in range(30)])
    anndata.AnnData(x, *names).write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    yield anndata.AnnData(x, *names), backed
    backed.file.close()


def dense(block):
    return block.toarray() if sparse.issparse(block) else block


def test_rows_are_those_in_memory(both):
    here, there = (Matrix(adata.X) for adata in both)
    columns = Matrix(both[1].X, np.array([4, 2]))
    for rows in ([], [3], [7, 7, 2], [499, 0, 250], list(range(40, 90)), list(range(0, 500, 40))):
        rows = np.array(rows, dtype=np.int64)
        for _ in range(2):  # also when other rows, and then these, are held
            assert (dense(there[rows]) == dense(here[rows])).all() and there[rows].dtype == here[rows].dtype
            assert (dense(columns[rows]) == dense(here[rows])[:, [4, 2]]).all()
            there.hold(rows[:1] if there.disk.held[1] is None else rows)


def test_minibatches_are_blocks_of_neighbours_that_are_read_at_once(both, monkeypatch):
    monkeypatch.setattr(loaders, "BLOCK", 20)
    monkeypatch.setattr(loaders, "N_HELD", 100)
    memory, disk = (Mosaic.from_anndata({"rna": adata}, {"rna": "nb"}) for adata in both)
    cells = np.delete(np.arange(500), np.arange(0, 500, 7))
    reads, matrix = [], disk.modalities["rna"].matrix
    read = matrix.disk._read
    monkeypatch.setattr(matrix.disk, "_read", lambda rows: reads.append(len(rows)) or read(rows))
    minibatches = loader(disk, cells, 32, seed=0)
    orders = []
    for _ in range(2):
        found = list(minibatches)
        orders.append(np.concatenate([m.index.numpy() for m in found]))
        assert sorted(orders[-1]) == list(cells)
        for minibatch in found:
            same = measured(memory, minibatch.index.numpy()).observed["rna"]
            assert (minibatch.observed["rna"].dense_counts() == same.dense_counts()).all()
    assert len(reads) < len(found) and sum(reads) == 2 * len(cells)  # each cell is read once an epoch
    assert (orders[0] != orders[1]).any()
    assert len(np.unique(orders[0][:32] // 20)) > 2  # a minibatch mixes blocks


@pytest.mark.parametrize("options", [{}, {"libver": "latest"}, {"libver": "latest", "userblock_size": 2048}])
def test_the_end_of_a_file_is_where_its_header_says(tmp_path, options):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", **options) as file:
        file["x"] = np.arange(5000.0)
    n = path.stat().st_size
    check_whole(path)
    with open(path, "ab") as file:
        file.write(b"more")
    check_whole(path)
    for left in (n - 1, n // 2, options.get("userblock_size", 0) + 40):
        os.truncate(path, left)
        with pytest.raises(OSError, match=f"^only {left:,} of its [0-9,]+ bytes are left$") as error:
            check_whole(path)
        assert left < 64 + options.get("userblock_size", 0) or f"its {n:,} bytes" in str(error.value)
    (tmp_path / "b").write_bytes(b"text" * 3000)
    for other in (tmp_path / "b", tmp_path, tmp_path / "none", ""):
        check_whole(other)


def test_a_file_that_is_cut_off_while_it_is_open_is_not_read(both, tmp_path):
    matrix = Matrix(both[1].X)
    matrix[np.arange(3)]
    n = (tmp_path / "a.h5ad").stat().st_size
    os.truncate(tmp_path / "a.h5ad", n - 1)
    for read in (lambda: matrix[np.arange(3)], lambda: matrix.hold(np.arange(3)), lambda: Matrix(both[1].X)):
        with pytest.raises(OSError, match=rf"a.h5ad \(only {n - 1:,} of its {n:,} bytes are left\); .*restore"):
            read()
