#!/bin/sh
# Make .venv and install steer_heal into it with pinned versions. usage: scripts/install.sh [EXTRA]
#   PYTHON       the interpreter, 3.11 to 3.13 (default python3)
#   TORCH_INDEX  a package index to take torch from, such as https://download.pytorch.org/whl/cu128
set -eu
extra=${1:-}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
    echo "steer_heal needs Python 3.11 to 3.13; $python is $("$python" -V 2>&1). Choose one with PYTHON=..." >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
[ -z "${PYTHON:-}" ] || [ "$("$python" -V)" = "$(.venv/bin/python -V)" ] || {
    echo ".venv holds $(.venv/bin/python -V), not $("$python" -V): remove it first" >&2
    exit 2
}
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# torch first, by itself: on a machine without a GPU it must not bring gigabytes of CUDA libraries along.
torch=$(grep '^torch==' constraints.txt)
index=${TORCH_INDEX:-}
if [ -z "$index" ] && ! nvidia-smi -L >/dev/null 2>&1 &&
    pip install --dry-run --ignore-installed --quiet --report - "$torch" 2>/dev/null | grep -q '"name": "\(nvidia-\|cuda-\)'; then
    index=https://download.pytorch.org/whl/cpu
fi
wanted="$torch from ${index:-the default index}"
if [ "$(cat .venv/.torch 2>/dev/null)" != "$wanted" ]; then
    if [ -n "$index" ]; then # torch alone from there; what it needs comes from the usual index below
        pip install --quiet --force-reinstall --no-deps --index-url "$index" "$torch"
    else
        pip install --quiet --constraint constraints.txt "$torch"
    fi
    echo "$wanted" >.venv/.torch
fi
pip install --quiet --constraint constraints.txt --editable ".${extra:+[$extra]}"
