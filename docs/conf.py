"""Sphinx configuration: ``sphinx-build -W --keep-going docs docs/_build/html``."""

import shutil
from pathlib import Path
from typing import Any

import pyromosaic

HERE = Path(__file__).parent

# Sphinx sees files below docs only. What an earlier build has left would be taken for pages.
for made in ("notebooks", "generated"):
    shutil.rmtree(HERE / made, ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns(".*"))

project = "pyromosaic"
author = "The pyromosaic developers"
copyright = author
version = release = pyromosaic.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"  # a name in single backticks is a link where there is something to link to

# Notebooks are stored with their outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_ignore_module_all = False
autodoc_typehints = "none"  # docstrings say what the arguments are
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "sphinx_book_theme"
html_title = f"pyromosaic {release}"
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has a search field
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"


def skip_foreign(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what classes inherit from other packages."""
    home = getattr(getattr(obj, "fget", obj), "__module__", None)
    return True if isinstance(home, str) and not home.startswith("pyromosaic") else None


def setup(app: Any) -> None:
    """Connect to Sphinx."""
    app.connect("autodoc-skip-member", skip_foreign)
