"""What is published: the README on PyPI, the project's pages, the recipe for conda, one version everywhere."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import pyromosaic

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)]+)\)")
ADDRESS = "https://example.org/owner/pyromosaic"
#: Names of packages that differ on conda-forge.
CONDA = {"torch": "pytorch", "torch_geometric": "pytorch_geometric", "matplotlib": "matplotlib-base"}


@pytest.fixture
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def publish():
    """What PyPI gets, for an address of the repository."""
    pytest.importorskip("hatchling", reason="it comes with the extra 'test'")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def metadata(repository):
        written = {}
        module.PublishedMetadata(str(ROOT), {"repository": repository}).update(written)
        return written

    return metadata


def linked(text):
    """The targets of a page's links, without its code."""
    return LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def test_links_of_the_readme_lead_to_files():
    paths = [path for path in linked((ROOT / "README.md").read_text()) if not path.startswith(("https:", "#"))]
    assert len(paths) > 5
    assert not [path for path in paths if not (ROOT / path.split("#")[0]).exists()]


@pytest.mark.parametrize("repository", [ADDRESS, ADDRESS + "/"])
def test_on_pypi_every_link_is_absolute(publish, repository):
    here, there = (ROOT / "README.md").read_text(), publish(repository)["readme"]["text"]
    assert len(linked(there)) == len(linked(here))
    assert not [path for path in linked(there) if not path.startswith(("https:", "#"))]
    assert f"]({ADDRESS}/raw/HEAD/docs/images/pbmc_integrated.png)" in there
    urls = publish(repository)["urls"]
    assert {"Repository", "Issues", "Documentation", "Changelog"} == set(urls)
    assert not [url for url in urls.values() if not url.startswith(ADDRESS)]
    for page in ("Documentation", "Changelog"):
        assert (ROOT / urls[page].removeprefix(f"{ADDRESS}/blob/HEAD/")).is_file()


def test_without_an_address_no_link_is_broken(publish, project):
    metadata = publish("")
    assert metadata["urls"] == {}
    assert not [path for path in linked(metadata["readme"]["text"]) if not path.startswith(("https:", "#"))]
    assert "![" not in metadata["readme"]["text"]
    address = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    assert address == "" or re.fullmatch(r"https://\S+[^/]", address)


def test_one_version():
    version = pyromosaic.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f'version: "{version}"' in (ROOT / "conda" / "recipe.yaml").read_text()


def test_the_recipe_needs_what_the_package_needs(project):
    recipe = (ROOT / "conda" / "recipe.yaml").read_text()
    run = set(re.findall(r"^    - (.+)$", recipe.split("  run:\n")[1].split("  run_constraints:\n")[0], re.MULTILINE))
    needed = {
        re.sub(r"^[\w-]+", lambda name: CONDA.get(name.group(), name.group()), requirement).replace(">=", " >=")
        for requirement in project["project"]["dependencies"]
    }
    assert run - {"python >=${{ python_min }}"} == needed
    assert f'python_min: "{project["project"]["requires-python"].removeprefix(">=")}"' in recipe
    for name, home in project["project"]["scripts"].items():
        assert f"- {name} = {home}" in recipe


def test_the_recipe_renders():
    rattler = pytest.importorskip("rattler_build", reason="continuous integration installs py-rattler-build")
    (variant,) = rattler.Stage0Recipe.from_file(str(ROOT / "conda" / "recipe.yaml")).render()
    content = variant.recipe.to_dict() if hasattr(variant.recipe, "to_dict") else variant.recipe().to_dict()
    assert content["package"]["version"] == pyromosaic.__version__
    assert content["build"]["noarch"] == "python"
