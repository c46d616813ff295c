"""Shared parts of the benchmarks: arguments, one process per run, a table, and the same figures as JSON."""

import argparse
import json
import logging
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Figures = dict[str, float]


def model_options(text: str) -> dict[str, Any]:
    """Options of a model from JSON; ``{"part": "Anchors", "arguments": {...}}`` is a part of the package."""
    from pyromosaic.described import from_json
    from pyromosaic.models.keeping import PARTS

    options: dict[str, Any] = from_json(json.loads(text), PARTS)
    return options


def arguments(description: str) -> argparse.ArgumentParser:
    """Parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .h5mu file; by default the packaged PBMC mosaic")
    parser.add_argument("--links", type=Path, help="table of linked features (.csv), for models that use one")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each system")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=False, help="also run scvi-tools")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser


def read(options: argparse.Namespace) -> Any:
    """Read the MuData to use; exit with a sentence if a modality lacks the column of labels that figures need."""
    from mudata import read_h5mu

    from pyromosaic import pbmc_mosaic

    whole = pbmc_mosaic() if options.data is None else read_h5mu(options.data)
    for name, adata in whole.mod.items():
        if options.label_key not in adata.obs:
            raise SystemExit(
                f"modality {name!r} has no column {options.label_key!r} with the labels of cells; pass the name of the "
                f"column as --label-key (columns: {', '.join(map(str, adata.obs.columns)) or 'none'})"
            )
    return whole


@dataclass
class Cost:
    """Cost of training: wall seconds, and the largest resident memory (MB) of the process until its end."""

    seconds: float = float("nan")
    peak_mb: float = float("nan")


@contextmanager
def measured_cost() -> Any:
    """Measure wall time and peak memory of the block."""
    cost = Cost()
    start = time.perf_counter()
    yield cost
    cost.seconds = time.perf_counter() - start
    cost.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def quiet() -> None:
    """Keep warnings and Lightning's messages out of the tables."""
    import lightning.pytorch  # noqa: F401  importing it sets its log level

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def isolated(function: Callable[..., Figures], *args: Any) -> Figures:
    """Run in a fresh process, so that peak memory is that of the run."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def report(title: str, runs: Mapping[str, list[Figures]], settings: Mapping[str, Any], path: Path | None) -> None:
    """Print mean ± standard deviation over seeds of every figure of every system, and write all runs as JSON."""
    table = Table("figure", *runs, title=title)
    systems = list(runs)
    if len(systems) == 2:
        table.add_column(f"{systems[0]} / {systems[1]}")
    names = list(dict.fromkeys(name for figures in runs.values() for run in figures for name in run))
    for name in names:
        values = {s: np.array([run[name] for run in runs[s] if name in run], dtype=float) for s in systems}
        cells = [f"{v.mean():.4g} ± {v.std():.2g}" if len(v) else "–" for v in values.values()]
        if len(systems) == 2:
            first, second = values.values()
            cells.append(f"{first.mean() / second.mean():.3f}" if len(first) and len(second) and second.mean() else "–")
        table.add_row(name, *cells)
    Console(width=120).print(table)
    if path is not None:
        content = {"title": title, "settings": {k: str(v) for k, v in settings.items()}, "runs": runs}
        path.write_text(json.dumps(content, indent=1))
