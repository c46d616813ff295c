#!/usr/bin/env bash
# scanpy 1.11.5 and muon 0.1.9: the same 10x matrix gets other names of features from its folder than from its .h5 file.
# From the folder, names are made unique over all types of features, so that the antibody CD4 beside the gene CD4 becomes
# CD4-1 (it stays CD4 from the .h5), and the gene nan (nanchung of Drosophila) is read as a missing value, not as text. So
# two files of one experiment may not match by name, and nothing is said.
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
"$(python 3.11)" -m venv "$folder/env"
"$folder/env/bin/pip" install -q scanpy==1.11.5 muon==0.1.9 anndata==0.12.19 mudata==0.3.10 pandas==2.3.3 numpy==2.4.6

cat > "$folder/read.py" <<'PYTHON'
import gzip, sys, warnings, h5py, muon, numpy as np
from pathlib import Path
from scipy import io, sparse
warnings.simplefilter("ignore")
folder = Path(sys.argv[1]); mtx = folder / "mtx"; mtx.mkdir()
ids, names = ["FBgn0036414", "FBgn0000001", "CD4_antibody"], ["nan", "CD4", "CD4"]
kinds, cells = ["Gene Expression"] * 2 + ["Antibody Capture"], ["AAACCTGAGAAACCAT-1", "AAACCTGAGAAACCGC-1"]
x = sparse.csc_matrix(np.array([[1, 2], [3, 0], [0, 5]], "int32"))  # features × cells
tables = {"features.tsv": "\n".join(map("\t".join, zip(ids, names, kinds))), "barcodes.tsv": "\n".join(cells)}
for name, text in tables.items():
    with gzip.open(mtx / f"{name}.gz", "wt") as file:
        file.write(text + "\n")
with gzip.open(mtx / "matrix.mtx.gz", "wb") as file:
    io.mmwrite(file, x)
with h5py.File(folder / "a.h5", "w") as file:
    for name, values in {"data": x.data, "indices": x.indices, "indptr": x.indptr, "shape": x.shape, "barcodes": cells,
                         "features/id": ids, "features/name": names, "features/feature_type": kinds,
                         "features/genome": ["BDGP6"] * 2 + [""]}.items():
        values = np.array(values)
        file[f"matrix/{name}"] = values.astype("S") if values.dtype.kind == "U" else values
for read, path in ((muon.read_10x_h5, folder / "a.h5"), (muon.read_10x_mtx, mtx)):
    data = read(str(path), extended=False)
    print(read.__name__, [repr(name) for name in data["rna"].var_names], list(data["prot"].var_names))
PYTHON
mkdir "$folder/data"
found=$("$folder/env/bin/python" -W ignore "$folder/read.py" "$folder/data" 2>/dev/null)
echo "$found"
test "$found" = "read_10x_h5 [\"'nan'\", \"'CD4'\"] ['CD4']
read_10x_mtx ['nan', \"'CD4'\"] ['CD4-1']"
