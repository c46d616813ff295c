#!/bin/sh
# Make the environment of one peer, with pinned versions: sh benchmarks/peers/environment.sh mofa .peers/mofa
# Then: python benchmarks/few_pairs.py --peers '{"mofa": ".peers/mofa/bin/python"}'
set -e
here=$(dirname "$0")
${PYTHON:-python3} -m venv "$2"
# The peers' own bounds on Python, torch and numpy exclude versions that run; what they need is listed in full.
"$2/bin/pip" install --quiet --no-deps --ignore-requires-python -r "$here/$1.txt"
"$2/bin/pip" install --quiet -r "$here/$1.needs.txt"
