"""What the documentation shows runs: the Python blocks of each page, in order, in one namespace."""

import re
from functools import partial
from pathlib import Path

import matplotlib
import pytest

from pyromosaic import checks
from pyromosaic.models import MosaicModel

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The Python blocks of a Markdown page, each behind so many empty lines that errors name the page's line."""
    text = page.read_text()
    return ["\n" * text.count("\n", 0, match.start(1)) + match.group(1) for match in BLOCK.finditer(text)]


def run(page):
    """Execute a page and return its namespace."""
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts and blocks(page)]


@pytest.fixture
def workshop(monkeypatch, tmp_path):
    """A folder of its own, figures without a screen, and long runs cut short."""
    train = MosaicModel.train
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        MosaicModel, "train", lambda model, n_epochs=150, **o: train(model, n_epochs if n_epochs <= 100 else 2, **o)
    )
    for name in ("simulation_based_calibration", "imputation_ranks"):
        short = partial(getattr(checks, name), n_samples=9, **({"n_steps": 5} if name.startswith("sim") else {}))
        monkeypatch.setattr(checks, name, short)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_page_runs(page, workshop):
    assert run(page)
