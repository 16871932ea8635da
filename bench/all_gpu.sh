#!/usr/bin/env bash
# Measures everything that the GPU figures need, about six minutes on an H100; draws nothing.
#
#   bench/all_gpu.sh [FOLDER]      results into FOLDER, default bench/results
#   QUICK=1 bench/all_gpu.sh DIR   a rehearsal: few lengths, few repeats, about a minute and a half
#   STEPS="micro decode" ...       some of: micro operator window peers layer decode selection
#
# Needs nsa_ext with its CUDA kernels, and for the step micro the module nsa_bench (bench/micro.py
# says how to build it) in $MODULE, default build/cpp/bench/cpp. Every step runs under a time limit;
# a step that fails is reported, the others still run. Where there is no git, NSA_EXT_COMMIT names
# the commit.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-bench/results}
module=${MODULE:-build/cpp/bench/cpp}
python=${PYTHON:-python3}
steps=${STEPS:-micro operator window peers layer decode selection}
checkpoint=${CHECKPOINT:-runs/bench/nsa.pt}
export PYTHONUNBUFFERED=1
# A library named by hand goes with the Python sources here; else nsa_ext is installed.
if [ -n "${NSA_EXT_LIBRARY:-}" ]; then export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"; fi

lengths="1024 2048 4096 8192 16384 32768 65536 131072 262144"
layer_lengths="4096 16384 65536"
peer_lengths="16384 65536"
decode_lengths="8192 16384 32768 65536 131072"
micro_lengths=8k,16k,32k,64k
long=64k seconds=2 micro_seconds=0.3 train=300
if [ "${QUICK:-0}" = 1 ]; then
  lengths="1024 4096 16384" layer_lengths="4096" peer_lengths="4096" decode_lengths="8192" micro_lengths=4k,16k
  long=16k seconds=0.3 micro_seconds=0.1 train=20
fi

failed=0
limited() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "=== $name: $*"
  if timeout --kill-after=10 "$limit" "$@"; then
    echo "=== $name: done in $((SECONDS - started)) s"
  else
    echo "=== $name: FAILED ($?) after $((SECONDS - started)) s"
    failed=1
  fi
}
wants() { [[ " $steps " == *" $1 "* ]]; }

micro=("$python" bench/micro.py --module "$module" --repeats 10 --max-seconds "$micro_seconds")
real=(--checkpoint "$checkpoint" --train-steps "$train")

if wants micro; then
  limited micro 100 "${micro[@]}" --output "$out/micro.json" --lengths "$micro_lengths"
  limited micro_patterns 60 "${micro[@]}" --output "$out/micro_patterns.json" \
    forward select compressed_select selected selected_bwd backward --lengths "$long" \
    --patterns coherent,groups --no-ceilings
  limited micro_cold 40 "${micro[@]}" --output "$out/micro_cold.json" \
    compress compressed_select selected window decode --lengths "$long" --l2 cold \
    --no-ceilings --no-breakdown
  limited micro_dims 60 "${micro[@]}" --output "$out/micro_dims.json" \
    forward backward --lengths "$long" --dims 64,192:128 --no-ceilings --no-breakdown
  limited micro_decode 30 "${micro[@]}" --output "$out/micro_decode.json" \
    decode --lengths 16k,64k --batches 1,8,32 --no-ceilings
fi
if wants operator; then
  limited operator 300 "$python" bench/run.py operator --output "$out/gpu.json" \
    --inputs random coherent real --lengths $lengths --max-seconds "$seconds" "${real[@]}"
fi
if wants window; then # flex attention compiles anew for every length
  limited window 80 "$python" bench/run.py window --output "$out/window.json" \
    --inputs random --lengths $layer_lengths --max-seconds "$seconds"
fi
if wants peers; then  # flash-linear-attention, where it is installed
  limited peers 60 "$python" bench/run.py operator --output "$out/peers.json" --impl fla \
    --inputs random --lengths $peer_lengths --max-seconds "$seconds"
fi
if wants selection; then
  limited selection 60 "$python" bench/real.py --output "$out/selection.json" \
    --lengths 8192 65536 "${real[@]}"
fi
if wants layer; then
  limited layer 60 "$python" bench/run.py layer --output "$out/layer.json" \
    --inputs random --lengths $layer_lengths --max-seconds "$seconds"
fi
if wants decode; then
  limited decode 60 "$python" bench/run.py decode --output "$out/decode.json" \
    --inputs random --lengths $decode_lengths --max-seconds "$seconds"
fi
exit $failed
