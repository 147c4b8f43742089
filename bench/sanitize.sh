#!/usr/bin/env bash
# The compiled kernels under compute-sanitizer: memcheck finds accesses out of bounds or misaligned, racecheck races in
# shared memory.
#
# What runs is a selection, because either tool makes a program many times slower: the tests with the marker `sanitize`,
# which start every kernel of csrc, in bfloat16 and on odd shapes, too. It is made for less than a minute; no GPU has timed
# it yet. Further arguments go to pytest, where the last -k counts: with -k triton the other backend's kernels run.
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
    compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes all \
        python -m pytest -q -m "gpu and sanitize" -k cuda "${@:2}" tests/kernels
}
# Without PyTorch's cache every tensor is an allocation of its own, whose end memcheck knows.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 check memcheck "$@"
check racecheck "$@"
