#!/usr/bin/env bash
# Meshes on the GPUs of one machine, by NCCL: tokens a second, MFU, peak memory and the loss beside the first mesh's, a line each.
#   bench/ranks_gpu.sh TOKENS TOKENIZER [OUT]                     on all GPUs, 0.45B parameters (graft data prepare, graft tokenizer train)
#   N=2 DEVICE=cpu STEPS=4 SIZES="n_layers=2 d_model=64 n_heads=4 n_kv_heads=2 max_seq_len=64" bench/ranks_gpu.sh ...   a try without GPUs
# Needs what bench/gpu.sh needs. A mesh that doesn't fit or dies leaves its reason in its line, and the next one goes on.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
tokens="$(realpath "$1")" tokenizer="$(realpath "$2")" out="$(mkdir -p "${3:-runs/ranks_gpu}" && realpath "${3:-runs/ranks_gpu}")"
home="$(mktemp -d)"
trap 'rm -rf "$home"' EXIT
ln -s "$root" "$home/graft"
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
python="${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}"
n="${N:-$(nvidia-smi -L | wc -l)}" device="${DEVICE:-cuda}" steps="${STEPS:-30}" half=$((${N:-$(nvidia-smi -L 2>/dev/null | wc -l)} / 2))
dtype=bfloat16 && [ "$device" = cpu ] && dtype=float32
sizes="${SIZES:-d_model=1280 n_layers=24 n_heads=20 n_kv_heads=4 d_head=64 d_ff=3456 max_seq_len=2048}"
meshes=("dp:$n" "dp:$n zero=1" "dp:$n zero=2" "fsdp:$n" "tp:$n" "pp:$n" "cp:$n")
[ "$half" -gt 1 ] && meshes+=("dp:2,tp:$half" "fsdp:2,tp:$half" "dp:2,pp:$half")
cd "$home"
for mesh in "${meshes[@]}"; do
    name="${mesh//[:, =]/-}"
    keys=(--set "mesh=${mesh%% *}")
    [ "$mesh" != "${mesh%% *}" ] && keys+=(--set "${mesh#* }")
    for size in $sizes; do keys+=(--set "$size"); done
    "$python" -m graft launch --nproc "$n" pretrain --data "$tokens" --tokenizer "$tokenizer" --out "$out/$name" --force --device "$device" \
        --set "steps=$steps" --set "batch_size=$((4 * n))" --set "micro_batch=4" --set "dtype=$dtype" --set eval_every=0 --set checkpoint_every=0 \
        "${keys[@]}" >"$out/$name.log" 2>&1
    "$python" - "$out" "$name" <<'PYTHON'
import json, pathlib, statistics, sys
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
try:
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / name / "summary.json").read_text())
    later = lines[len(lines) // 3 :]
    rate, mfu = (statistics.median(line.get(key) or 0 for line in later) for key in ("tokens_per_s", "mfu"))
    peak = max((value for key, value in summary.items() if key.endswith("peak_bytes") and value), default=0)
    print(f"{name:20} {rate:12,.0f} tokens/s  MFU {mfu:.3f}  peak {peak / 2**30:6.2f} GiB  loss {lines[-1]['loss']:.5f}", flush=True)
except (OSError, ValueError, KeyError):
    print(f"{name:20} failed: {(folder / (name + '.log')).read_text().strip().splitlines()[-1][:200]}", flush=True)
PYTHON
done
