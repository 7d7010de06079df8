#!/usr/bin/env bash
# Pre-train CLOC on all GPUs of this machine.  Run again to resume; a rank that dies is restarted from the newest
# checkpoint, up to three times.
#   recipes/node.sh vit_b16 --data.train 'shards:/data/pairs/{00000..09999}.tar?sidecar=vesl' --out runs/b16
#   GPUS=4 recipes/node.sh vit_l14_336 --sharding fsdp --micro-batch-size 64 ...
#   GPUS=2 recipes/node.sh tiny --device cpu --out runs/two_processes        # no GPU: two processes
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if [[ $gpus -lt 1 ]]; then
    echo "recipes/node.sh: no GPU found; GPUS=2 recipes/node.sh PRESET --device cpu runs two processes" >&2
    exit 1
fi
# numeric libraries would take all cores for every rank
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / gpus > 0 ? $(nproc) / gpus : 1))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or ranks that are started again find addresses of the dead ones
exec .venv/bin/torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 --shutdown-timeout 120 \
    -m opencloc train "$@"
