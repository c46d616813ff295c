#!/usr/bin/env bash
# mudata 0.3.10 warns at every MuData(...): "Set mudata.set_options(pull_on_update=False) to adopt the new behaviour".
# Code that follows this advice fails under mudata 0.4.1, which has no set_options: AttributeError. Neither the old nor the
# new release accepts the other's way; a program for both has to ask whether the function exists.
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

cat > "$folder/columns.py" <<'PYTHON'
import warnings, anndata, mudata, numpy as np, pandas as pd
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    obs = pd.DataFrame({"batch": ["a", "b"]}, index=["cell1", "cell2"])
    data = mudata.MuData({"rna": anndata.AnnData(np.ones((2, 3), "float32"), obs=obs)})
advice = any("mudata.set_options(pull_on_update=False)" in str(w.message) for w in caught)
print("advised:", advice, "| exists:", hasattr(mudata, "set_options"), "| columns of the whole:", list(data.obs))
PYTHON
old=$("$folder/old/bin/python" "$folder/columns.py") new=$("$folder/new/bin/python" "$folder/columns.py")
printf '0.3.10 %s\n0.4.1  %s\n' "$old" "$new"
test "$old" = "advised: True | exists: True | columns of the whole: ['rna:batch']"
test "$new" = "advised: False | exists: False | columns of the whole: []"
