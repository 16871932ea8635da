#!/usr/bin/env bash
# Measures everything that the GPU figures need; draws nothing.
#
#   bench/all_gpu.sh [FOLDER]             results into FOLDER, default bench/results
#   PROFILE=short bench/all_gpu.sh ...    what the figures need at fewer lengths
#   PROFILE=quick bench/all_gpu.sh ...    a rehearsal
#   STEPS="micro decode" ...              some of: micro operator decode selection layer window peers
#   LIMIT=200 ...                         ends after so many seconds; what is measured by then stays
#
# On an H100 with a warm file cache: about six and a half minutes, two and a half, one and a half.
# Needs nsa_ext with its CUDA kernels, and for the step micro the module nsa_bench (bench/micro.py
# says how to build it) in $MODULE, default build/cpp/bench/cpp. Every step runs under a time limit;
# a step that fails is reported, the others still run. Where there is no git, NSA_EXT_COMMIT names
# the commit.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-bench/results}
module=${MODULE:-build/cpp/bench/cpp}
python=${PYTHON:-python3}
checkpoint=${CHECKPOINT:-runs/bench/nsa.pt}
profile=${PROFILE:-full}
export PYTHONUNBUFFERED=1
# A library named by hand goes with the Python sources here; else nsa_ext is installed.
if [ -n "${NSA_EXT_LIBRARY:-}" ]; then export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"; fi

case $profile in
  full)
    steps="micro operator decode selection layer window peers"
    lengths="1024 2048 4096 8192 16384 32768 65536 131072 262144"
    decode_lengths="8192 16384 32768 65536 131072" few_lengths="4096 16384 65536"
    selection_lengths="8192 65536" micro_lengths=8k,16k,32k,64k long=64k
    seconds=2 micro_seconds=0.3 train=300
    ;;
  short)
    steps="micro operator decode selection layer"
    lengths="1024 4096 8192 16384 32768 65536"
    decode_lengths="16384 65536" few_lengths="4096 16384"
    selection_lengths="8192 65536" micro_lengths=8k,16k,32k,64k long=64k
    seconds=0.5 micro_seconds=0.15 train=100
    ;;
  quick)
    steps="micro operator decode selection layer window"
    lengths="1024 4096" decode_lengths="8192" few_lengths="4096"
    selection_lengths="8192" micro_lengths=4k,16k long=16k
    seconds=0.2 micro_seconds=0.1 train=20
    ;;
  *)
    echo "all_gpu.sh: PROFILE is full, short or quick, not $profile" >&2
    exit 2
    ;;
esac
steps=${STEPS:-$steps}

failed=0
limited() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS left=$((${LIMIT:-3600} - SECONDS))
  shift 2
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  if [ "$limit" -lt 5 ]; then
    echo "=== $name: LEFT OUT, no time"
    failed=1
    return
  fi
  echo "=== $name: $*"
  if timeout --kill-after=5 "$limit" "$@"; then
    echo "=== $name: done in $((SECONDS - started)) s"
  else
    echo "=== $name: FAILED ($?) after $((SECONDS - started)) s"
    failed=1
  fi
}
wants() { [[ " $steps " == *" $1 "* ]]; }

micro=("$python" bench/micro.py --module "$module" --repeats 10 --max-seconds "$micro_seconds")
run=("$python" bench/run.py --max-seconds "$seconds")
real=(--checkpoint "$checkpoint" --train-steps "$train")

if wants micro; then
  limited micro 100 "${micro[@]}" --output "$out/micro.json" --lengths "$micro_lengths"
  limited micro_patterns 60 "${micro[@]}" --output "$out/micro_patterns.json" \
    forward compressed_select selected selected_bwd backward --lengths "$long" \
    --patterns coherent,groups --no-ceilings
  limited micro_decode 30 "${micro[@]}" --output "$out/micro_decode.json" \
    decode --lengths 16k,64k --batches 1,8,32 --l2 warm,cold --no-ceilings
  if [ "$profile" = full ]; then
    limited micro_cold 40 "${micro[@]}" --output "$out/micro_cold.json" \
      compress compressed_select selected window --lengths "$long" --l2 cold \
      --no-ceilings --no-breakdown
    limited micro_dims 60 "${micro[@]}" --output "$out/micro_dims.json" \
      forward backward --lengths "$long" --dims 64,192:128 --no-ceilings --no-breakdown
  fi
fi
if wants operator; then
  limited operator 300 "${run[@]}" operator --output "$out/gpu.json" \
    --inputs random coherent real --lengths $lengths "${real[@]}"
fi
if wants decode; then
  limited decode 90 "${run[@]}" decode --output "$out/decode.json" --inputs random \
    --lengths $decode_lengths
fi
if wants selection; then
  limited selection 60 "$python" bench/real.py --output "$out/selection.json" \
    --lengths $selection_lengths "${real[@]}"
fi
if wants layer; then
  limited layer 60 "${run[@]}" layer --output "$out/layer.json" --inputs random \
    --lengths $few_lengths
fi
if wants window; then # flex attention compiles anew for every length
  limited window 90 "${run[@]}" window --output "$out/window.json" --inputs random \
    --lengths $few_lengths
fi
if wants peers; then # flash-linear-attention, where it is installed
  limited peers 90 "${run[@]}" operator --output "$out/peers.json" --impl fla --inputs random \
    --lengths $few_lengths
fi
exit $failed
