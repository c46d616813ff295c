"""Read a result and a model that another Python wrote, and hold them against a reference: read.py WRITER REFERENCE."""

import sys
from pathlib import Path

import mudata
import numpy as np

from pyromosaic import MultiVI, hide

writer, reference = map(Path, sys.argv[1:])
result, expected = (mudata.read_h5mu(folder / "result.h5mu") for folder in (writer, reference))
metrics, others = (read.uns["pyromosaic"]["metrics"] for read in (result, expected))
difference = max(abs(metrics[name] - others[name]) for name in others)
assert metrics.keys() == others.keys() and difference < 0.01, (metrics, others)

# The cells that the model was trained on, of which the result holds the latent space as the writer computed it.
measured = mudata.MuData({name: result[name] for name in ("rna", "adt")})
measured.obs["batch"] = result.obs["batch"]
shown, _ = hide(measured, {"rna": 200, "adt": 200}, seed=0)
model = MultiVI.load(writer / "model", shown)
latent = model.get_latent_representation().loc[result.obs_names].to_numpy()
error = np.abs(latent - result.obsm["X_multivi"]).max()
assert error < 1e-5 * np.abs(latent).max(), error
print(f"{sys.version.split()[0]} reads {writer}: metrics within {difference:.4f}, latent space within {error:.1e}")
