#!/usr/bin/env bash
# The kernels' GPU tests under compute-sanitizer: memcheck finds accesses out of bounds or misaligned, racecheck races in
# shared memory. Further arguments go to pytest (-k moments, say).
set -euo pipefail
cd "$(dirname "$0")/.."

cannot() {
    echo "bench/sanitize.sh: $1" >&2
    exit 2
}
command -v compute-sanitizer >/dev/null || cannot "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || cannot "PyTorch sees no GPU here"

check() {
    echo "== $1"
    compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes all python -m pytest -q -m gpu "${@:2}" tests/kernels
}
# Without PyTorch's cache every tensor is an allocation of its own, whose end memcheck knows; a graph cannot be captured so.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 check memcheck -k "not captured" "$@"
check racecheck "$@"
