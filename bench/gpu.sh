#!/usr/bin/env bash
# Check and measure every kernel in one call of at most 9 minutes; a table last.
#   bench/gpu.sh           on a GPU: numerics (float16, bfloat16, float32), then speed and memory against the peers
#   bench/gpu.sh --tiny    without one: the same steps, tiny, in Triton's interpreter
#   bench/gpu.sh attention swiglu    only these kernels (and --no-numerics, --seconds N, --out FILE)
# Needs torch, triton and numpy, nothing installed of graft: the repository is imported as it lies. pytest for the numerics.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
home="$(mktemp -d)"
trap 'rm -rf "$home"' EXIT
ln -s "$root" "$home/graft"
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
python="${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}"
for argument in "$@"; do
    if [ "$argument" = --tiny ]; then export TRITON_INTERPRET=1; fi
done
cd "$home" # not the root: its folder `kernels` would hide the package of that name from bitsandbytes
"$python" "$root/bench/gpu.py" "$@"
