"""Sphinx configuration: ``sphinx-build -W --keep-going docs docs/_build/html``."""

import shutil
import sys
import tomllib
from importlib.metadata import files
from inspect import Signature, signature
from pathlib import Path
from typing import Any

from sphinx.util.inspect import stringify_signature

import pyromosaic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import inventories  # noqa: E402

# Sphinx sees files below docs only. What an earlier build has left would be taken for pages.
for made in ("notebooks", "generated"):
    shutil.rmtree(HERE / made, ignore_errors=True)
MADE = HERE / "_build" / "made"
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
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_codeautolink",
    "sphinx_copybutton",
    "linked_names",
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
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"  # words that are no names
numpydoc_xref_aliases = {"AnnData": "anndata.AnnData", "MuData": "mudata.MuData"}

# Built without a network too: inventories of other libraries, and MathJax as one file, fonts included.
intersphinx_mapping = inventories.write(MADE)
intersphinx_timeout = 5
intersphinx_disabled_reftypes = ["std:doc"]
(MADE / "static").mkdir(exist_ok=True)
MATHJAX = next(file for file in files("sphinx-mathjax-offline") or () if file.name == "tex-svg.js")
shutil.copy(MATHJAX.locate(), MADE / "static" / "mathjax.js")
mathjax_path = "mathjax.js"
# Names of the package itself, by the pages that describe them.
codeautolink_inventory_map = {
    f"pyromosaic.{name}": f"pyromosaic.{home}.{name}" for name, home in pyromosaic._HOME.items()
}
codeautolink_warn_on_default_parse_fail = False
suppress_warnings = ["codeautolink.match_block"]  # Sphinx takes the flags of doctests off the page

REPOSITORY = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"][
    "custom"
]["repository"]
html_theme = "sphinx_book_theme"
html_title = f"pyromosaic {release}"
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has a search field
    "logo": {"text": f"pyromosaic {release}", "image_light": "_static/logo.svg", "image_dark": "_static/logo.svg"},
    **({"repository_url": REPOSITORY, "use_repository_button": True, "use_issues_button": True} if REPOSITORY else {}),
}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system
html_favicon = "_static/logo.svg"
html_static_path = ["_static", str(MADE / "static")]
html_css_files = ["site.css"]
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"  # the sidebar has no room for them
copybutton_exclude = ".linenos, .gp, .go"


def skip_foreign(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what classes inherit from other packages."""
    home = getattr(getattr(obj, "fget", obj), "__module__", None)
    return True if isinstance(home, str) and not home.startswith("pyromosaic") else None


def of_constructor(app: Any, what: str, name: str, obj: Any, options: Any, found: str, returns: str) -> Any:
    """The arguments of a class that notes them in `__new__` are those of its constructor."""
    if what != "class" or found != "(*args, **kwargs)":
        return None
    arguments = list(signature(obj.__init__).parameters.values())[1:]
    return stringify_signature(Signature(arguments), show_annotation=False), returns


def setup(app: Any) -> None:
    """Connect to Sphinx."""
    app.connect("autodoc-process-signature", of_constructor)
    app.connect("autodoc-skip-member", skip_foreign)
