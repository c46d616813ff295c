#!/usr/bin/env bash
# torch 2.13.0, umap-learn 0.5.12, numba 0.68.1 (Python 3.11), on a machine with two cores or more: torch.set_num_threads(1),
# then a UMAP of 100 points: torch.get_num_threads() is the number of cores. numba's OpenMP layer sets the number for the
# OpenMP runtime that both share. What is trained afterwards in the same process runs on other threads than it was told,
# several times slower where several such processes share a machine. NUMBA_NUM_THREADS=1 prevents it.
set -euo pipefail
test "$(nproc)" -ge 2 || { echo "one core only: nothing to see"; exit 0; }
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
"$folder/env/bin/pip" install -q torch==2.13.0 umap-learn==0.5.12 numba==0.68.1
cat > "$folder/draw.py" <<'PYTHON'
import numpy as np, torch, umap
torch.set_num_threads(1)
before = torch.get_num_threads()
umap.UMAP(n_epochs=5).fit_transform(np.random.default_rng(0).normal(size=(100, 5)))
print(before, torch.get_num_threads())
PYTHON
unset OMP_NUM_THREADS NUMBA_NUM_THREADS
free=$("$folder/env/bin/python" -W ignore "$folder/draw.py") held=$(NUMBA_NUM_THREADS=1 "$folder/env/bin/python" -W ignore "$folder/draw.py")
echo "threads of torch before and after: $free; with NUMBA_NUM_THREADS=1: $held"
test "$free" = "1 $(nproc)" && test "$held" = "1 1"
