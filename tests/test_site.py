"""The site: the check that reads it finds faults, and the names that it links to exist."""

import importlib.util
import zlib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check():
    return script(ROOT / ".ci" / "site.py").main


@pytest.fixture
def inventories():
    return script(ROOT / "docs" / "inventories.py")


@pytest.fixture
def folder(tmp_path):
    """A site of two pages, to which a test adds what is wrong."""

    def site(inside):
        page = "<html><body><article><h1 id='a'>A</h1>{}</article></body></html>"
        (tmp_path / "other.html").write_text(page.format(""))
        (tmp_path / "index.html").write_text(page.format(inside))
        return tmp_path

    return site


def test_a_good_page_has_no_fault(check, folder):
    good = """<a href="other.html#a">there</a> <a href="#a">up</a> <a href="https://pyro.ai">outside</a>
    <span class="math">\\(\\sigma\\)</span> <code>\\frac</code> <a href="other.html"><code>MultiVI</code></a>"""
    assert check(folder(good)) == 0


@pytest.mark.parametrize(
    "inside",
    [
        '<a href="gone.html">gone</a>',
        '<a href="other.html#gone">gone</a>',
        '<a href="#gone">gone</a>',
        '<img src="gone.png">',
        '<script src="https://cdn.example.org/x.js"></script>',
        "The width \\sigma of z",
        "<code>MultiVI</code>",
    ],
)
def test_a_fault_is_found(check, folder, inside, capsys):
    assert check(folder(inside)) == 1
    assert "index.html: " in capsys.readouterr().out


def test_a_style_that_fetches_is_found(check, folder):
    site = folder("")
    (site / "x.css").write_text("@font-face { src: url('https://fonts.example.org/a.woff') }")
    assert check(site) == 1


def test_inventories_name_what_exists(inventories, tmp_path):
    mapping = inventories.write(tmp_path)
    for library, (site, (first, file)) in mapping.items():
        assert site.startswith("https://") and site.endswith("/") and first is None
        lines = zlib.decompress(Path(file).read_bytes().split(b"zlib.\n")[1]).decode().splitlines()
        assert lines
        for line in lines:
            name, kind, _, page, _ = line.split(" ")
            assert kind in ("py:class", "py:function") and "$" not in page and page.endswith(f"#{name}")
            if library != "scanpy":  # not installed for the tests
                parts = name.split(".")
                at = next(n for n in range(len(parts) - 1, 0, -1) if importable(".".join(parts[:n])))
                found = import_module(".".join(parts[:at]))
                for part in parts[at:]:
                    found = getattr(found, part)
                assert isinstance(found, type) == (kind == "py:class")


def importable(name):
    try:
        import_module(name)
    except ImportError:
        return False
    return True
