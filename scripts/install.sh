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
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# torch first, by itself: on a machine without a GPU it must not bring gigabytes of CUDA libraries along.
torch=$(grep '^torch==' constraints.txt)
if ! pip freeze 2>/dev/null | grep -q "^$torch\(+\|$\)"; then
    if [ -n "${TORCH_INDEX:-}" ]; then
        set -- --index-url "$TORCH_INDEX"
    elif nvidia-smi -L >/dev/null 2>&1; then
        set --
    elif pip install --dry-run --quiet --report - --constraint constraints.txt "$torch" 2>/dev/null | grep -q '"name": "\(nvidia-\|cuda-\|triton\)'; then
        set -- --index-url https://download.pytorch.org/whl/cpu
    else
        set --
    fi
    pip install --quiet --constraint constraints.txt "$@" "$torch"
fi
pip install --quiet --constraint constraints.txt --editable ".${extra:+[$extra]}"
