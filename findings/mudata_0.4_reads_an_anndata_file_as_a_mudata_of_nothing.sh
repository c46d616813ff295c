#!/usr/bin/env bash
# mudata 0.4.1: read_h5mu of an AnnData file (an .h5ad that was given the ending .h5mu) returns a MuData that has its cells
# and no modality. The one warning, "The HDF5 file was not created by muon", also comes for good files of other writers.
# mudata 0.3.10 raises TypeError. So a wrong path shows only where something asks for a modality.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python() {
    for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        if "$candidate" -c "" 2>/dev/null; then echo "$candidate"; return; fi
    done
    echo "needs Python $1" >&2
    return 1
}
"$(python 3.11)" -m venv "$folder/old" && "$folder/old/bin/pip" install -q mudata==0.3.10 anndata==0.12.19 pandas==2.3.3
"$(python 3.13)" -m venv "$folder/new" && "$folder/new/bin/pip" install -q mudata==0.4.1 anndata==0.13.4 pandas==3.1.1

cat > "$folder/read.py" <<'PYTHON'
import sys, warnings, anndata, mudata, numpy as np
anndata.AnnData(np.ones((5, 3), "float32")).write_h5ad(sys.argv[1])
try:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = mudata.read_h5mu(sys.argv[1])
    said = [w for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    print(type(data).__name__, list(data.mod), data.n_obs, *(str(w.message).split(",")[0][:37] for w in said))
except TypeError:
    print("TypeError")
PYTHON
old=$("$folder/old/bin/python" -W ignore "$folder/read.py" "$folder/old.h5mu")
new=$("$folder/new/bin/python" -W ignore "$folder/read.py" "$folder/new.h5mu")
printf '0.3.10 %s\n0.4.1  %s\n' "$old" "$new"
test "$old" = "TypeError"
test "$new" = "MuData [] 5 The HDF5 file was not created by muon"
