"""What few_pairs.py gives a peer, and what it takes back, as files; run by the interpreter of the peer.

The folder has, for each modality, ``<name>.shown.npz`` and ``<name>.hidden.npz`` (sparse counts), and ``cells.json``
with names of cells and batches. The peer writes ``result.npz``: ``latent`` (all cells of the mosaic in the order of
``cells.json``, empty without one), ``hidden_<name>`` and ``imputed_<name>``, as in `Result` of baselines.py.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse


@dataclass
class Table:
    """Counts of one modality, cells × features, with the names of the cells and their batches."""

    counts: Any
    cells: list[str]
    batch: list[str]


@dataclass
class Given:
    """The mosaic and the hidden measurements by modality, all cells of the mosaic, and the seed."""

    shown: Mapping[str, Table]
    hidden: Mapping[str, Table]
    cells: list[str]
    seed: int


def read(folder: Path) -> Given:
    """What few_pairs.py wrote."""
    content = json.loads((folder / "cells.json").read_text())
    tables: dict[str, dict[str, Table]] = {}
    for kind in ("shown", "hidden"):
        tables[kind] = {
            name: Table(sparse.csr_matrix(sparse.load_npz(folder / f"{name}.{kind}.npz")), own["cells"], own["batch"])
            for name, own in content[kind].items()
        }
    return Given(tables["shown"], tables["hidden"], content["cells"], content["seed"])


def answer(fit: Callable[[Given], Mapping[str, np.ndarray]]) -> None:
    """Run a peer on the folder of the command line, and write its result, processor seconds and memory."""
    folder = Path(sys.argv[1])
    given = read(folder)
    start = time.process_time()
    result = fit(given)
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    np.savez(folder / "result.npz", seconds=seconds, memory=memory, **result)


def logged(name: str, table: Table) -> np.ndarray:
    """Log-normalised RNA, log counts of antibodies, open regions."""
    counts = table.counts.toarray().astype(float)
    if name == "atac":
        return (counts > 0).astype(float)
    if name == "rna":
        counts = 1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.log1p(counts)


def unlogged(name: str, values: np.ndarray) -> np.ndarray:
    """The inverse, as shares of RNA and counts of antibodies."""
    if name == "atac":
        return values
    values = np.maximum(np.expm1(values), 0)
    return values / 1e4 if name == "rna" else values
