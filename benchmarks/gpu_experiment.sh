#!/usr/bin/env bash
# All that a GPU has to show, in at most 6 minutes on an H100, most important first.
#
#     bash benchmarks/gpu_experiment.sh          # results in $OUT/results.jsonl, messages in $OUT/log
#
# Each result is written at once, and a part that fails or takes too long does not end the others. PyTorch's two peers
# (peer.py) take part where torch and transformers are installed: "peer" is the official algorithm, "lean_peer" the best
# a PyTorch user could do.
#
# OUT=FOLDER       where results go (default: runs/gpu)
# BUDGET=SECONDS   for all parts together (default: 345)
# PYTHON=PROGRAM   Python to use (default: python)
# QUICK=1          a tiny model, to try the script

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=${OUT:-runs/gpu} BUDGET=${BUDGET:-345} PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
work=$(mktemp -d) failed=0 steps=200
trap 'rm -rf "$work"' EXIT
check=("$PYTHON" benchmarks/gpu_check.py) train=("$PYTHON" benchmarks/train_step.py) decode=("$PYTHON" benchmarks/generate.py)
if [ -n "${QUICK:-}" ]; then
  tiny=(--layers 2 --width 64 --heads 2 --vocabulary 500 --runs 1) steps=5
  check+=("${tiny[@]}") train+=("${tiny[@]}") decode+=("${tiny[@]}")
else
  train+=(--runs 3) decode+=(--runs 3)
fi
train_alone=("${train[@]}")
if "$PYTHON" -c "import torch, transformers" 2>>"$OUT/log"; then
  train+=(--peer --lean-peer) decode+=(--peer --peer-examples 1 --lean-peer)
fi

# part NAME SECONDS COMMAND...: run a part, for at most so long and at most as long as is left
part() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) status
  shift 2
  limit=$((limit < left ? limit : left))
  if [ "$limit" -lt 5 ]; then
    printf '{"part": "%s", "skipped": true}\n' "$name" | tee -a "$OUT/results.jsonl"
    return
  fi
  printf '{"part": "%s", "at_second": %d}\n' "$name" "$SECONDS" | tee -a "$OUT/results.jsonl"
  timeout "$limit" "$@" 2>>"$OUT/log" | tee -a "$OUT/results.jsonl"
  status=${PIPESTATUS[0]}
  if [ "$status" != 0 ]; then
    printf '{"part": "%s", "status": %d}\n' "$name" "$status" | tee -a "$OUT/results.jsonl"
    tail -n 5 "$OUT/log"
    failed=$((failed + (status != 124)))
  fi
}

# graph NAME KEYS...: train args/graph_NAME.yaml
graph() {
  local name=$1
  shift
  part "graph $name" 90 "$PYTHON" run.py "args/graph_$name.yaml" "save_path=$work" "$@"
}

part smoke 40 "${check[@]}" smoke
for precision in float32 tf32 bf16; do
  part "fidelity $precision" 60 "${check[@]}" fidelity --precision "$precision"
done
for precision in float32 tf32 bf16; do
  part "train 32 $precision" 80 "${train[@]}" --batch 32 --precision "$precision"
done
part "decode float32" 60 "${decode[@]}" --batch 32
for precision in float32 tf32 bf16; do
  part "train 64 $precision" 40 "${train_alone[@]}" --batch 64 --precision "$precision"
done
for precision in float32 bf16; do
  part "train 32 $precision, not compiled" 40 env MLX_DISABLE_COMPILE=1 "${train_alone[@]}" --batch 32 --precision "$precision"
done
if [ "${#train[@]}" != "${#train_alone[@]}" ]; then # 64 items of two processes fit into 141 GB, of three they do not
  part "train 64 bf16 beside the lean peer" 40 "${train_alone[@]}" --lean-peer --batch 64 --precision bf16
fi
part "steps bf16" 130 "${check[@]}" steps --steps "$steps" --precision bf16
# The graph task's Coconut from fresh weights to its end
part "graph data" 20 "$PYTHON" preprocessing/graphs.py
graph chains
graph cot num_epochs=1 "load_model_path=$work/graph-chains/checkpoint_1"
graph coconut "load_model_path=$work/graph-cot/checkpoint_1"
part "graph accuracy" 10 grep -h '"eval/acc"' "$work/graph-coconut/metrics.jsonl"
part "steps float32" 60 "${check[@]}" steps --steps "$((steps / 5))"
printf '{"parts_that_failed": %d, "seconds": %d}\n' "$failed" "$SECONDS" | tee -a "$OUT/results.jsonl"
exit $((failed > 0))
