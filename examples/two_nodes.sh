#!/usr/bin/env bash
# Train on two machines with torchrun. Here both are this one; on two, type what `node` does on each, with HEAD the
# first one's name or address on both.
#
#     layerwise plan examples/train.py:build_model --input 1,8,8 --cluster local-2 --batch 64 --all-devices -o plan.json
#     bash examples/two_nodes.sh plan.json --epochs 2
set -euo pipefail
script=$(dirname "$0")/train.py
node() {
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id digits \
        --rdzv-endpoint "${HEAD:-127.0.0.1}:${PORT:-29400}" "$script" "$@"
}
node "$@" &
other=$!
node "$@"
wait "$other"
