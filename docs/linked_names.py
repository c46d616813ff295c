"""A name in code type links to what it names: objects of the package, and of libraries that `intersphinx` knows."""

import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

import pyromosaic

NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", re.DOTALL)
#: Of objects in inventories.
KINDS = ("py:class", "py:function", "py:method", "py:attribute", "py:module", "py:data", "py:exception", "py:property")
#: What pages call things: the class of a variable, and short names of modules.
CALLED = {
    "mdata": "mudata.MuData",
    "model": "pyromosaic.models.MosaicModel",
    "mosaic": "pyromosaic.data.Mosaic",
    "poutine": "pyro.poutine",
    "sc": "scanpy",
}


def home(name: str) -> str | None:
    """The full name under which an object is defined."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:n]))
            for part in parts[n:]:
                found = getattr(found, part)
            return f"{found.__module__}.{found.__qualname__}"
        except (ImportError, AttributeError):
            continue
    return None


def candidates(text: str, known: list[str]) -> list[str]:
    """Full names that a name may stand for, the likeliest first."""
    name = text.removesuffix("()")
    first, _, rest = name.partition(".")
    dotted = f".{rest}" if rest else ""
    found = [name, f"pyromosaic.{name}"]
    if first in pyromosaic._HOME:
        found.append(f"pyromosaic.{pyromosaic._HOME[first]}.{name}")
    if first in CALLED and rest:
        found += [CALLED[first] + dotted, *([f"pyromosaic.models.MultiVI{dotted}"] if first == "model" else [])]
    if "_" in name or name[0].isupper() or name != text:  # another word in small letters is rarely a name
        found += [f"pyromosaic.models.{model}.{name}" for model in ("MosaicModel", "MultiVI")]
        ends = [full for full in known if full.endswith(f".{name}")]
        found += ends if len(ends) == 1 else []
    return found


class LinkedNames(SphinxPostTransform):
    """Make references of literals that name an object."""

    default_priority = 20  # after Sphinx has resolved its own references
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Of one page."""
        own = self.env.get_domain("py").objects
        inventory = InventoryAdapter(self.env).main_inventory
        outside = {name: item.uri for kind in KINDS for name, item in inventory.get(kind, {}).items()}
        known = [name for name, entry in own.items() if not entry.aliased]
        known += [name for name in outside if name.startswith(("pyro.", "anndata.", "mudata."))]
        for literal in list(self.document.findall(nodes.literal)):
            name = NAME.fullmatch(literal.astext())
            if not name or self.is_linked(literal):
                continue
            full = candidates(name[1] + "()" * literal.astext().endswith("()"), known)
            homes = [home(each) for each in full if not each.startswith("pyromosaic.")]
            target = next((each for each in [*full, *homes] if each in own or each in outside), None)
            if target in own and own[target].docname != self.env.docname:
                page, node = own[target].docname, own[target].node_id
                literal.replace_self(
                    make_refnode(self.app.builder, self.env.docname, page, node, literal.deepcopy(), target)
                )
            elif target in outside:
                literal.replace_self(
                    nodes.reference("", "", literal.deepcopy(), internal=False, refuri=outside[target], reftitle=target)
                )

    @staticmethod
    def is_linked(node: nodes.Node) -> bool:
        """Whether it is inside a link or a heading, or the name of what a page describes."""
        while (node := node.parent) is not None:
            if isinstance(node, nodes.reference | nodes.title | addnodes.desc_signature):
                return True
        return False


def setup(app: Any) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.add_post_transform(LinkedNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
