"""Draw the plate diagrams of the models: ``python docs/plates.py`` writes docs/images/plates_*.svg.

Sites, plates and arrows are those of the models' own traces on a minibatch; nothing is drawn by hand.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import autograd

IMAGES = Path(__file__).parent / "images"
ROW, GAP, PAD, HEIGHT = 1.05, 0.3, 0.24, 0.72


@dataclass
class Site:
    """A sample site: its distribution, plates from the outside in, and the sites that its distribution depends on."""

    name: str
    distribution: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]
    observed: bool

    @property
    def width(self) -> float:
        """Of its ellipse."""
        return 0.5 + max(0.09 * len(self.name), 0.064 * len(self.distribution))


@dataclass
class Block:
    """The sites of one outermost plate: latent ones above and beside those that are observed."""

    plates: list[str]
    alone: list[Site]
    nested: list[Site]
    at: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """All of them."""
        return [*self.alone, *self.nested]

    @property
    def widths(self) -> tuple[float, float]:
        """Of the latent and of the observed sites."""
        inner = [s for s in self.nested if not s.observed]
        return max(_width(self.alone), _width(inner)), _width([s for s in self.nested if s.observed])

    @property
    def width(self) -> float:
        """Of the outermost plate."""
        latent, observed = self.widths
        return latent + observed + GAP * (latent > 0 < observed) + 2 * PAD * len(self.plates)

    @property
    def n_rows(self) -> int:
        """Rows of ellipses."""
        return bool(self.alone) + bool(self.nested)

    def place(self, left: float, top: float, mirrored: bool) -> None:
        """Give each site a place; observed ones stand on the side that faces the middle of the figure."""
        latent, observed = self.widths
        start = left + PAD * len(self.plates)
        sides = (start + observed + GAP * (observed > 0), start) if mirrored else (start, start + latent + GAP)
        hidden, seen = ([s for s in self.nested if s.observed is o] for o in (False, True))
        below = top - (ROW + PAD if self.alone else 0)
        for row, x, space, y in (
            (self.alone, sides[0], latent, top),
            (hidden, sides[0], latent, below),
            (seen, sides[1] if latent else start, observed, below),
        ):
            x += (space - _width(row)) / 2
            for site in row:
                self.at[site.name] = (x + site.width / 2, y)
                x += site.width + GAP


def _width(row: list[Site]) -> float:
    return sum(s.width for s in row) + GAP * max(0, len(row) - 1)


class Leaves(Messenger):
    """Effect handler: values of latent sites become leaves, so that gradients tell what depends on them."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["value"] = msg["value"].detach().requires_grad_()


def sites(model: Any, minibatch: Any) -> list[Site]:
    """The sites of a model."""
    with Leaves():
        trace = poutine.trace(model).get_trace(minibatch)
    nodes = {k: n for k, n in trace.nodes.items() if n["type"] == "sample" and not site_is_subsample(n)}
    latent = [name for name, node in nodes.items() if not node["is_observed"]]
    found = []
    for name, node in nodes.items():
        mean, parents = node["fn"].mean, ()
        if mean.requires_grad:
            values = [nodes[k]["value"] for k in latent]
            gradients = autograd.grad(mean.sum(), values, retain_graph=True, allow_unused=True)
            parents = tuple(k for k, gradient in zip(latent, gradients, strict=True) if gradient is not None)
        base = node["fn"]
        while hasattr(base, "base_dist"):
            base = base.base_dist
        plates = tuple(frame.name for frame in sorted(node["cond_indep_stack"], key=lambda frame: frame.dim))
        found.append(Site(name, type(base).__name__, plates, parents, node["is_observed"]))
    return found


def blocks(found: list[Site]) -> list[list[Block]]:
    """The outermost plates in rows: each below those that its sites depend on."""
    by_name = {s.name: s for s in found}
    outer = {s.plates[0]: [t for t in found if t.plates[0] == s.plates[0]] for s in found}

    def depth(plate: str) -> int:
        above = {by_name[p].plates[0] for s in outer[plate] for p in s.parents} - {plate}
        return 1 + max(map(depth, above), default=-1)

    rows: list[list[Block]] = [[] for _ in range(1 + max(map(depth, outer)))]
    for plate, members in outer.items():
        nested = [s for s in members if len(s.plates) > 1 or s.observed]
        inner = sorted({p for s in nested for p in s.plates[1:]})
        rows[depth(plate)].append(Block([plate, *inner], [s for s in members if s not in nested], nested))
    return rows


def draw(model: Any, minibatch: Any) -> plt.Figure:
    """The plate diagram of a model."""
    found = sites(model, minibatch)
    rows = blocks(found)
    total = max(sum(b.width for b in row) + GAP * (len(row) - 1) for row in rows)
    y = 0.0
    for row in rows:
        x = (total - sum(b.width for b in row) - GAP * (len(row) - 1)) / 2
        for block in row:
            block.place(x, y, x + block.width / 2 > total / 2 + 0.1)
            x += block.width + GAP
        y -= max(ROW * b.n_rows + 2 * PAD * len(b.plates) for b in row) + GAP
    lowest = min(y for row in rows for block in row for _, y in block.at.values())
    top, bottom = HEIGHT / 2 + PAD + 0.2, lowest - HEIGHT / 2 - 2 * PAD - 0.1
    figure = plt.figure(figsize=(max(total + 0.4, 4.0), top - bottom))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-0.2, total + 0.2), ylim=(bottom, top))
    ax.set_axis_off()
    nodes: dict[str, Ellipse] = {}
    for level, block in ((level, block) for level, row in enumerate(rows) for block in row):
        _plates(ax, block, below=level > 0)
        nodes |= {site.name: _node(ax, site, block.at[site.name]) for site in block.sites}
    for site in found:
        for parent in site.parents:
            arrow = FancyArrowPatch(
                nodes[parent].center,
                nodes[site.name].center,
                patchA=nodes[parent],
                patchB=nodes[site.name],
                arrowstyle="-|>",
                mutation_scale=13,
                color="#333333",
                linewidth=1.1,
                zorder=2,
            )
            ax.add_patch(arrow)
    return figure


def _node(ax: Axes, site: Site, at: tuple[float, float]) -> Ellipse:
    colour = "#cfd8dc" if site.observed else "white"
    node = Ellipse(at, site.width, HEIGHT, facecolor=colour, edgecolor="#222222", zorder=3)
    ax.add_patch(node)
    ax.text(at[0], at[1] + 0.1, site.name, ha="center", va="center", fontsize=11, zorder=4)
    ax.text(at[0], at[1] - 0.17, site.distribution, ha="center", va="center", fontsize=7.5, color="#555555", zorder=4)
    return node


def _plates(ax: Axes, block: Block, below: bool) -> None:
    for level, (plate, colour) in enumerate(zip(block.plates, ("#0072b2", "#d55e00"), strict=False)):
        margin = PAD * (len(block.plates) - level)
        members = [(*block.at[s.name], s.width) for s in (block.nested if level else block.sites)]
        # The name of a plate stands where no arrow comes or goes.
        low = min(y for _, y, _ in members) - HEIGHT / 2 - (1.0 if below else 0.5) * margin
        high = max(y for _, y, _ in members) + HEIGHT / 2 + (0.5 if below else 1.0) * margin
        left = min(x - w / 2 for x, _, w in members) - margin
        right = max(x + w / 2 for x, _, w in members) + margin
        style = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.3, "zorder": 1}
        shape = "round,pad=0,rounding_size=0.12"
        ax.add_patch(FancyBboxPatch((left, low), right - left, high - low, boxstyle=shape, **style))
        y, side = (low + 0.07, "bottom") if below else (high - 0.07, "top")
        ax.text(right - 0.1, y, plate, ha="right", va=side, fontsize=8.5, color=colour)


def main() -> None:
    """Write the figures."""
    from pyromosaic import ContrastiveVI, DiagVI, Mosaic, MultiVI, ScModal, pbmc_mosaic, protein_gene_links, simulate
    from pyromosaic.guidance import GuidanceGraph

    three = Mosaic.from_mudata(simulate(400)[0], batch_key="batch")
    treated = Mosaic.from_mudata(simulate(400, {"rna": 100, "adt": 20}, treated=0.5)[0], batch_key="batch")
    pbmc = Mosaic.from_mudata(pbmc_mosaic(), batch_key="batch")
    table = protein_gene_links().rename(columns={"gene": "rna", "protein": "adt"})
    graph = GuidanceGraph.from_table(pbmc, table, drop_absent=True)
    models = {
        "multivi": MultiVI(three),
        "multivi_options": MultiVI(treated, n_private=4, library="latent"),
        "contrastivevi": ContrastiveVI(treated.with_cohorts("condition", background="control")),
        "diagvi": DiagVI(pbmc, graph),
        "scmodal": ScModal(pbmc, graph),
    }
    plt.rcParams["svg.hashsalt"] = "plates"
    for name, model in models.items():
        data = model._data(None)
        minibatch = next(iter(model.loader(data, np.arange(data.n_cells), 256, seed=0)))
        figure = draw(model.model, minibatch)
        figure.savefig(IMAGES / f"plates_{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
