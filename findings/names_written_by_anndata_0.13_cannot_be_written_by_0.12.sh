#!/usr/bin/env bash
# anndata 0.13.4 with pandas 3.1.1 (Python 3.13) writes obs_names as "nullable-string-array". anndata 0.12.19 with pandas
# 2.3.3 (Python 3.11) reads that file, as dtype "string", and cannot write what it has just read: RuntimeError. The same
# names as plain Python strings are written. So a file that went through a colleague's newer Python is read-only for code
# on the older one, and the error comes at the end of the work. Remedy: anndata.settings.allow_write_nullable_strings.
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
"$(python 3.13)" -m venv "$folder/new" && "$folder/new/bin/pip" install -q anndata==0.13.4 pandas==3.1.1
"$(python 3.11)" -m venv "$folder/old" && "$folder/old/bin/pip" install -q anndata==0.12.19 pandas==2.3.3

"$folder/new/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys, anndata, h5py, numpy as np, pandas as pd
path = sys.argv[1] + "/data.h5ad"
anndata.AnnData(np.ones((2, 3), "float32"), obs=pd.DataFrame(index=["cell1", "cell2"])).write_h5ad(path)
kind = h5py.File(path)["obs/_index"].attrs["encoding-type"]
print("written by 0.13 as", kind)
assert kind == "nullable-string-array"
PYTHON

"$folder/old/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys, anndata
data = anndata.read_h5ad(sys.argv[1] + "/data.h5ad")
print("read by 0.12 as", data.obs_names.dtype)
assert str(data.obs_names.dtype) == "string"
try:
    data.write_h5ad(sys.argv[1] + "/again.h5ad")
except RuntimeError as error:
    print("RuntimeError:", str(error).split(",")[0])
    assert "allow_write_nullable_strings" in str(error)
else:
    raise SystemExit("0.12 writes it now")
with anndata.settings.override(allow_write_nullable_strings=True):
    data.write_h5ad(sys.argv[1] + "/again.h5ad")
data.obs_names = data.obs_names.astype(object)
data.var_names = data.var_names.astype(object)
data.write_h5ad(sys.argv[1] + "/plain.h5ad")
print("written with the setting, and with names as objects")
PYTHON
