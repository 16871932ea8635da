#!/usr/bin/env bash
# Runs the tests of this folder under compute-sanitizer: memcheck, racecheck, initcheck. Fails on any error.
# usage: tests/sanitizer/run.sh [arguments for pytest, e.g. -k window]
#   COMPUTE_SANITIZER   the tool, default: the one on PATH or of $CUDA_HOME
#   PYTHON              default: python
#   TOOLS               default: "memcheck racecheck initcheck"
# racecheck wants a library built with NVCC_APPEND_FLAGS=-DNSA_EXT_RACECHECK (csrc/cuda/device/ptx.cuh
# says why; name it by NSA_EXT_LIBRARY); with any other it reports races that are none.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")}
python=${PYTHON:-python}
if [ ! -x "$sanitizer" ]; then
  echo "no compute-sanitizer at $sanitizer: set COMPUTE_SANITIZER or CUDA_HOME" >&2
  exit 1
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "no CUDA device for $python" >&2
  exit 1
}

# Every tensor gets an allocation of its own: a read past its end is an error, not its neighbour.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Errors are reported where they happen, and kernels load all at once (racecheck needs that).
export CUDA_MODULE_LOADING=EAGER
failed=()
for tool in ${TOOLS:-memcheck racecheck initcheck}; do
  echo "=== $tool"
  options=(--tool "$tool" --error-exitcode 99 --target-processes all)
  # racecheck is slow and needs our kernels alone; the others must see what torch's kernels write.
  if [ "$tool" = racecheck ]; then options+=(--kernel-name kernel_substring=nsa); fi
  "$sanitizer" "${options[@]}" \
    "$python" -m pytest -q -p no:cacheprovider -m gpu "$here/test_sanitizer.py" "$@" || failed+=("$tool")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "compute-sanitizer found errors: ${failed[*]}" >&2
  exit 1
fi
echo "compute-sanitizer: no errors"
