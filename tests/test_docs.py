"""What the documentation shows runs, on few cells: the Python of each page and notebook, in one namespace."""

import re
import shlex
import subprocess
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest

import pyromosaic
from pyromosaic import checks
from pyromosaic.models import MosaicModel

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The Python blocks of a page, in Markdown each behind so many empty lines that errors name the page's line."""
    if page.suffix == ".ipynb":
        return [cell.source for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == "code"]
    text = page.read_text()
    return ["\n" * text.count("\n", 0, match.start(1)) + match.group(1) for match in BLOCK.finditer(text)]


#: Packages that a page is about and that neither the package nor its tests need (the extra "ecosystem").
NEEDED = {"ecosystem": ("scanpy", "igraph", "scib_metrics", "cellmapper"), "arviz": ("arviz",)}


def run(page):
    """Execute a page and return its namespace."""
    for package in NEEDED.get(page.stem, ()):
        pytest.importorskip(package, exc_type=ImportError)
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)
    return namespace


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
PAGES = [page for page in PAGES if "_build" not in page.parts and blocks(page)]


@pytest.fixture
def workshop(monkeypatch, tmp_path, quick_umap):
    """A folder of its own, figures without a screen, a quarter of the packaged cells, and long runs cut short."""

    def at_most(home, name, **ends):
        function = getattr(home, name)
        monkeypatch.setattr(
            home, name, lambda *a, **o: function(*a, **o | {k: min(o.get(k, end), end) for k, end in ends.items()})
        )

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    whole, hide, train = pyromosaic.pbmc_mosaic, pyromosaic.hide, MosaicModel.train
    monkeypatch.setattr(pyromosaic, "pbmc_mosaic", lambda: whole()[::4].copy())
    monkeypatch.setattr(pyromosaic, "hide", lambda mdata, n, **o: hide(mdata, {k: v // 4 for k, v in n.items()}, **o))
    monkeypatch.setattr(
        MosaicModel, "train", lambda model, n_epochs=None, **o: train(model, min(n_epochs or 5, 5), **o)
    )
    at_most(checks, "predictive_check", n_samples=9)
    at_most(checks, "simulation_based_calibration", n_samples=9, n_steps=5)
    at_most(checks, "imputation_ranks", n_samples=9)
    at_most(checks, "held_out_log_likelihood", n_samples=20)
    yield
    plt.close("all")


# Few cells: a feature may never vary, and no label be sure.
@pytest.mark.filterwarnings("ignore:.*links are left out, because one of their features never varies")
@pytest.mark.filterwarnings("ignore:it is not clear that the links match the right cells")
@pytest.mark.filterwarnings("ignore:it is not sure that the right cells")
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide")
@pytest.mark.filterwarnings(
    "ignore:::scanpy", "ignore:::scib_metrics", "ignore:::cellmapper", "ignore:::jax", "ignore:::arviz"
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_page_runs(page, workshop, request):
    if page.suffix == ".ipynb" and "GSE126074" in page.read_text():
        request.getfixturevalue("geo_files")
    assert run(page)


def test_the_readme_says_first_what_a_reader_looks_for():
    """What it is, a figure, two commands, ten lines of Python, three claims with commands, losses with commands."""
    text = (ROOT / "README.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == [
        *("Try it", "Ten lines of Python", "What sets it apart", "Where it loses", "Learn more", "Cite")
    ]
    opening = text.split("\n## ")[0].split("\n\n")
    assert len(opening[1].split(". ")) == 2 and opening[2].startswith("![")
    commands = COMMANDS.findall(sections["Try it"])
    assert len(commands) == 2 and "pyromosaic demo" in commands[0] and "pytest" in commands[1]
    (python,) = BLOCK.findall(sections["Ten lines of Python"])
    assert len([line for line in python.splitlines() if line.strip()]) <= 10
    _, *claims = re.split(r"^\*\*\d\. ", sections["What sets it apart"], flags=re.MULTILINE)
    assert len(claims) == 3
    for claim in claims:
        said, block = claim.split("```bash")
        assert re.search(r"\d", said) and "docs/" in said and "python " in block
    _, _, *losses = [line.split("|")[1:-1] for line in sections["Where it loses"].splitlines() if line.startswith("|")]
    assert len(losses) > 5
    for case, figure, command in losses:
        assert case.strip() and re.search(r"\d", figure)
        assert ".py" in command or "the same" in command
    assert "CITATION.cff" in sections["Cite"]


def test_inference_data_of_a_prior_of_ones_own_takes_fifteen_lines(workshop):
    block = blocks(ROOT / "docs" / "how_to" / "arviz.md")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    namespace = {"__name__": "arviz"}
    exec(compile(block, "arviz.md", "exec"), namespace)
    data = namespace["data"]
    assert type(data).__name__ in ("DataTree", "InferenceData")
    assert data["posterior"]["z"].sizes["cell"] == 50 and data["posterior"]["z"].sizes["draw"] == 100


COMMANDS = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def scripts():
    """Every call of a benchmark on a page, as words."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in COMMANDS.findall(page.read_text()) if "_build" not in page.parts else ():
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if len(words) > 1 and words[0] == "python":
                    yield pytest.param(words[1], words[2:], id=f"{page.stem}: {line}")


@pytest.mark.parametrize(("script", "words"), list(scripts()))
def test_commands_name_scripts_and_options_that_exist(script, words):
    text = (ROOT / "benchmarks" / Path(script).name).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
    for option in words:
        if option.startswith("--"):
            switch = option.replace("--no-", "--", 1)  # of argparse.BooleanOptionalAction
            assert f'"{option}"' in text or f'"{switch}", action=argparse.BooleanOptionalAction' in text


def test_commands_are_shell():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in COMMANDS.findall(page.read_text()) if "_build" not in page.parts else ():
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
