"""Use the installed package where the repository is not: simulate, train, and read what was packed."""

import sys
from importlib.metadata import metadata
from pathlib import Path

import pyromosaic
from pyromosaic import Mosaic, MultiVI, pbmc_mosaic, protein_gene_links, simulate

home = Path(pyromosaic.__file__).parent
assert home.is_relative_to(sys.prefix), home
assert (home / "py.typed").exists()
said = metadata("pyromosaic")
assert said["Description-Content-Type"] == "text/markdown" and said.get_payload().startswith("# pyromosaic")
assert pbmc_mosaic().n_obs == 1600 and len(protein_gene_links()) == 240

mdata, _ = simulate(60, {"rna": 20, "adt": 5}, seed=0)
model = MultiVI(Mosaic.from_mudata(mdata))
model.train(n_epochs=2, sleep_steps=1)
assert model.get_latent_representation().notna().all(axis=None)
print(f"pyromosaic {said['Version']} works from {home}")
