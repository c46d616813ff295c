#!/usr/bin/env bash
# anndata 0.11.0 does not need zarr, and declares no bound on it outside of its extras. Where zarr 3 is installed (by
# xarray users, by another package), `import anndata` ends in ImportError, whatever file one means to read. Without zarr
# the same release imports. anndata 0.12.0 imports beside the same zarr.
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
install() { "$folder/env/bin/pip" install -q "$@"; }
try() { "$folder/env/bin/python" -W ignore -c "
try:
    import anndata
    print('imports')
except ImportError as error:
    print('ImportError', 'zarr' in str(error))"; }
install anndata==0.11.0 pandas==2.2.3 numpy==1.26.4
alone=$(try)
install zarr==3.1.5 numpy==1.26.4
beside=$(try)
install anndata==0.12.0
later=$(try)
printf '0.11.0 alone: %s\n0.11.0 beside zarr 3.1.5: %s\n0.12.0 beside zarr 3.1.5: %s\n' "$alone" "$beside" "$later"
test "$alone" = imports && test "$beside" = "ImportError True" && test "$later" = imports
