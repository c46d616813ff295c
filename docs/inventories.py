"""Names of other libraries that the documentation links to, for builds without a network.

`intersphinx` asks the libraries' own sites first. Where it cannot reach them, it reads the inventories that `write`
makes from this table: the kind of each object, its name, and the page that describes it ("$" stands for the name).
"""

import zlib
from pathlib import Path

SITES = {
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "mudata": "https://mudata.readthedocs.io/stable/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
_ALGORITHMS, _PRIMITIVES = "inference_algos.html#$", "primitives.html#$"
NAMES = {
    "anndata": {
        "class": {"anndata.AnnData": "generated/$.html#$"},
        "function": {"anndata.io.read_h5ad": "generated/$.html#$"},
    },
    "mudata": {
        "class": {"mudata.MuData": "generated/$.html#$"},
        "function": {"mudata.read_h5mu": "generated/$.html#$"},
    },
    "pyro": {
        "class": {
            "pyro.infer.predictive.Predictive": _ALGORITHMS,
            "pyro.infer.svi.SVI": _ALGORITHMS,
            "pyro.infer.trace_elbo.Trace_ELBO": _ALGORITHMS,
            "pyro.infer.trace_mean_field_elbo.TraceMeanField_ELBO": _ALGORITHMS,
            "pyro.nn.module.PyroModule": "nn.html#$",
            "pyro.nn.module.PyroParam": "nn.html#$",
            "pyro.nn.module.PyroSample": "nn.html#$",
            "pyro.primitives.plate": _PRIMITIVES,
        },
        "function": {
            "pyro.poutine.handlers.do": "poutine.html#$",
            "pyro.poutine.handlers.mask": "poutine.html#$",
            "pyro.poutine.handlers.scale": "poutine.html#$",
            "pyro.poutine.handlers.trace": "poutine.html#$",
            "pyro.primitives.factor": _PRIMITIVES,
            "pyro.primitives.module": _PRIMITIVES,
            "pyro.primitives.sample": _PRIMITIVES,
        },
    },
    "scanpy": {
        "function": {
            f"scanpy.{name}": "api/generated/$.html#$"
            for name in (
                "pl.umap",
                "pp.neighbors",
                "pp.normalize_total",
                "tl.leiden",
                "tl.paga",
                "tl.rank_genes_groups",
                "tl.umap",
            )
        }
    },
    "torch": {
        "class": {
            "torch.Tensor": "tensors.html#$",
            "torch.nn.Dropout": "generated/$.html#$",
            "torch.nn.Linear": "generated/$.html#$",
            "torch.nn.Module": "generated/$.html#$",
        },
        "function": {"torch.save": "generated/$.html#$"},
    },
}


HEADER = """# Sphinx inventory version 2
# Project: {}
# Version:
# The remainder of this file is compressed using zlib.
"""


def write(folder: Path) -> dict[str, tuple[str, tuple[str | None, str]]]:
    """Write the inventories; returns the mapping for `intersphinx`."""
    folder.mkdir(parents=True, exist_ok=True)
    for library, kinds in NAMES.items():
        lines = "".join(
            f"{name} py:{kind} 1 {page.replace('$', name)} -\n"
            for kind, pages in kinds.items()
            for name, page in pages.items()
        )
        (folder / f"{library}.inv").write_bytes(HEADER.format(library).encode() + zlib.compress(lines.encode()))
    return {library: (site, (None, str(folder / f"{library}.inv"))) for library, site in SITES.items()}
