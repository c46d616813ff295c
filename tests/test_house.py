"""How the package is built: imports go one way, files are short, a model's story stands on one screen."""

import ast
from pathlib import Path

import pytest

import pyromosaic

HOME = Path(pyromosaic.__file__).parent
CONTRIBUTING = HOME.parent / "CONTRIBUTING.md"
FILES = sorted(HOME.rglob("*.py"))


def of(file: Path) -> str:
    """The module that a file is."""
    parts = ["pyromosaic", *file.relative_to(HOME).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {of(file) for file in FILES}
HOMES = pyromosaic._HOME  # where the names of the package itself are from


def imported(file: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it but for types alone."""
    tree = ast.parse(file.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{of(file)} has a relative import, which the tests do not follow"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pyromosaic":
            for name in node.names:
                inner = f"{node.module}.{HOMES.get(name.name, name.name) if node.module == 'pyromosaic' else name.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] == "pyromosaic"}
    return found - {"pyromosaic"}  # its version; its other names are looked up in HOMES


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.skipif(not CONTRIBUTING.exists(), reason="the sources alone have the page with the order")
def test_rooms_import_from_those_before_them():
    order = CONTRIBUTING.read_text().split("```text\n")[1].split("```")[0].replace(",", " ").split() + ["__main__"]
    assert {room(module) for module in MODULES - {"pyromosaic"}} <= set(order)
    wrong = [
        f"{of(file)} imports {module}"
        for file in FILES
        if of(file) != "pyromosaic"
        for module in imported(file)
        if room(module) != room(of(file)) and order.index(room(module)) > order.index(room(of(file)))
    ]
    assert not wrong


def test_no_circle_of_files():
    arrows = {of(file): imported(file) for file in FILES if of(file) != "pyromosaic"}
    done: set[str] = set()
    while len(done) < len(arrows):
        free = {module for module, needed in arrows.items() if module not in done and needed <= done}
        assert free, f"a circle among {sorted(set(arrows) - done)}"
        done |= free


@pytest.mark.parametrize("file", FILES, ids=of)
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= 500


def lines(method: ast.FunctionDef, with_docstring: bool) -> int:
    docstring = 0 if with_docstring or ast.get_docstring(method) is None else 1
    hidden = sum(1 + part.end_lineno - part.lineno for part in method.body[:docstring])
    return 1 + method.end_lineno - method.lineno - hidden


def test_each_story_stands_on_one_screen():
    """Every `forward` of the package: of a program with its docstring, of a part of one without."""
    programs, found = set(), {}
    for file in FILES:
        for part in ast.walk(ast.parse(file.read_text())):
            if isinstance(part, ast.ClassDef):
                is_program = "Program" in {ast.unparse(base).split(".")[-1] for base in part.bases}
                for method in part.body:
                    if isinstance(method, ast.FunctionDef) and method.name in ("forward", "model", "guide"):
                        name = f"{of(file)}.{part.name}.{method.name}"
                        found[name] = lines(method, with_docstring=is_program)
                        programs |= {part.name} if is_program else set()
    models = {"MultiVI", "DiagVI", "Contrastive", "ScModal", "VariationalCCA"}
    assert programs == {model + side for model in models for side in ("Model", "Guide")}
    assert {"pyromosaic.measurement.Measurement.forward", "pyromosaic.measurement.MeasurementGuide.forward"} <= set(
        found
    )
    assert {name: n for name, n in found.items() if n > 25} == {}
