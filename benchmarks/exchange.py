"""What a benchmark gives a peer, and what it takes back, as files.

`ask` runs a script of benchmarks/peers by the interpreter of the peer's environment, and the script calls `answer`. The
folder between them has, for each modality, ``<name>.shown.npz`` and ``<name>.hidden.npz`` (sparse counts), and
``given.json`` with all else. The peer writes ``result.npz``.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy import sparse

Answer = dict[str, Any]


@dataclass
class Counts:
    """Counts of one modality, cells × features, with the names of cells and features, and the cells' batches."""

    counts: Any
    cells: list[str]
    features: list[str]
    batch: list[str]

    @classmethod
    def of(cls, adata: Any, batch_key: str) -> "Counts":
        """The counts of an AnnData."""
        batch = adata.obs[batch_key].astype(str).tolist()
        return cls(sparse.csr_matrix(adata.X), list(adata.obs_names), list(adata.var_names), batch)


@dataclass
class Given:
    """What a peer is given.

    Parameters
    ----------
    cells
        All cells of the mosaic.
    shown
        What the peer may learn from, by modality.
    hidden
        Measurements to predict, by modality; their cells are cells of the mosaic that have another modality.
    seed
        Seed of the peer.
    epochs
        Length of training in the peer's own unit; None for the length that its authors recommend.
    """

    cells: list[str]
    shown: Mapping[str, Counts]
    hidden: Mapping[str, Counts]
    seed: int
    epochs: int | None


def ask(interpreter: str, system: str, given: Given) -> Answer:
    """What a peer answers: the arrays of `answer`, processor ``seconds`` and ``memory`` (MB).

    If the peer fails, its last words are shown, and there is nothing but NaN for seconds and memory.
    """
    here = Path(__file__).parent
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        content = {"cells": given.cells, "seed": given.seed, "epochs": given.epochs}
        for kind, tables in (("shown", given.shown), ("hidden", given.hidden)):
            content[kind] = {}
            for name, table in tables.items():
                sparse.save_npz(folder / f"{name}.{kind}.npz", table.counts)
                content[kind][name] = {"cells": table.cells, "features": table.features, "batch": table.batch}
        (folder / "given.json").write_text(json.dumps(content))
        # -P, so that a script may have the name of the package that it imports.
        command = [interpreter, "-P", here / "peers" / f"{system}.py", folder]
        environment = os.environ | {"PYTHONPATH": str(here)}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            print(system, ran.stderr[-2000:], file=sys.stderr)
            return {"seconds": float("nan"), "memory": float("nan")}
        with np.load(folder / "result.npz") as found:
            return dict(found)


def answer(fit: Callable[[Given], Answer]) -> None:
    """Run a peer on the folder of the command line, and write its result, processor seconds and memory (from Linux).

    `fit` returns any of ``latent`` (all cells of the mosaic, in order), ``hidden_<name>`` and ``imputed_<name>``
    (hidden cells, as in `Result` of baselines.py).
    """
    folder = Path(sys.argv[1])
    content = json.loads((folder / "given.json").read_text())
    for kind in ("shown", "hidden"):
        for name, own in content[kind].items():
            content[kind][name] = Counts(sparse.csr_matrix(sparse.load_npz(folder / f"{name}.{kind}.npz")), **own)
    start = time.process_time()
    result = fit(Given(**content))
    seconds = time.process_time() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["VmHWM"].split()[0]) / 1024  # ru_maxrss is that of the benchmark, if that is larger
    np.savez(folder / "result.npz", seconds=seconds, memory=memory, **result)


def logged(name: str, table: Counts) -> np.ndarray:
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
