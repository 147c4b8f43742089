#!/usr/bin/env bash
# Run the compiled kernels under compute-sanitizer: memcheck finds out-of-bounds and misaligned accesses, racecheck finds
# races in shared memory.
#
# Both tools slow a program down many times, so only the tests with the marker `sanitize` run. They launch every kernel of
# csrc, also in bfloat16 and on odd shapes. The intended duration is less than a minute, not yet measured on a GPU. Further
# arguments are passed to pytest, where the last -k counts: -k triton runs the Triton kernels instead.
set -euo pipefail
cd "$(dirname "$0")/.."

cannot() {
    echo "bench/sanitize.sh: $1" >&2
    exit 2
}
command -v compute-sanitizer >/dev/null || cannot "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || cannot "PyTorch finds no GPU"

check() {
    echo "== $1"
    compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes all \
        python -m pytest -q -m "gpu and sanitize" -k cuda "${@:2}" tests/kernels
}
# Without PyTorch's caching allocator every tensor has its own allocation, whose bounds memcheck knows.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 check memcheck "$@"
check racecheck "$@"
