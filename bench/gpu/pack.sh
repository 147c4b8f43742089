#!/usr/bin/env bash
# Pack what a GPU host without a network lacks into the ignored folder .carry, and print the one line to run there.
#
#     bench/gpu/pack.sh [--python PYTHON] [--data DIR] [--rehearse]
#     bench/gpu/pack.sh --list | --help
#
# --python    interpreter whose PyTorch the extension is compiled against, Python 3.11 or newer; python3 by default
# --data      folder with MNIST in torchvision's layout, its files gzipped or not; without it no data set is packed
# --rehearse  also run the line here, with --rehearse, by PYTHON, in a copy without .git and, if unshare is permitted, without
#             a network; the results go to .bench-gpu/packed. PYTHON must be Python 3.12, like the wheels
# --list      print the requirements to pack, and exit
# --help      print this help
#
# The host is Linux on x86-64 with Python 3.12, a copy of the working tree, the packages of `installed`, and a GPU of compute
# capability 8.0 or higher (the extension has code for 8.0, as A100, and 9.0, as H100, and PTX for newer ones). The line goes
# to stdout, everything else to stderr. On the host, set OUT to the folder for the results: the line refuses to run without it.
set -euo pipefail

installed=(
    torch torchvision timm numpy numba scikit-learn torchmetrics safetensors typer rich matplotlib tensorboard
    jinja2
    pytest pytest-xdist hypothesis scipy
)
omitted=(build ruff mypy dfkd-fast) # development tools, and optional packages without which tests are skipped
max_bytes=60000000
max_line=2000 # characters
mnist=(train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)

cannot() {
    echo "bench/gpu/pack.sh: $1" >&2
    exit 2
}

requirements() {
    "$python" - "${installed[@]}" "${omitted[@]}" <<'PYTHON'
import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
    if re.match(r"[\w.-]+", requirement)[0].lower() not in sys.argv[1:]:
        print(requirement)
PYTHON
}

compile_extension() {
    "$python" - "$1" <<'PYTHON'
import runpy
import sys
from pathlib import Path

build = runpy.run_path("kernels/build.py")
try:
    build["compile_extension"](Path(sys.argv[1]))
except build["BuildError"] as error:
    sys.exit(f"bench/gpu/pack.sh: {error}")

import torch

torch.ops.load_library(sys.argv[1])
if not torch.__version__.startswith("2.11."):
    print(f"compiled against PyTorch {torch.__version__}: the host's 2.11 has not been tried", file=sys.stderr)
PYTHON
    # nvcc names symbols after its temporary files: without symbols, equal sources give equal bytes.
    strip "$1"
}

pack_mnist() { # from, to
    mkdir -p "$2"
    local name
    for name in "${mnist[@]}"; do
        if [[ -f $1/$name.gz ]]; then
            cp "$1/$name.gz" "$2"
        else
            gzip -9nc "$1/$name" >"$2/$name.gz"
        fi
    done
}

# As in bench/provenance.py, which needs packages that PYTHON may lack.
commit() {
    local excluded changed
    excluded=$(grep -o ':![^"]*' bench/provenance.py) || cannot "bench/provenance.py: no excluded paths found"
    mapfile -t excluded <<<"$excluded"
    changed=$(git status --porcelain --untracked-files=no -- "${excluded[@]}" 2>/dev/null) || { echo unknown && return; }
    echo "$(git describe --always)${changed:+-dirty}"
}

rehearse() { # line
    local copy="$part/rehearsal" isolated=()
    mkdir -p "$copy/tree" "$copy/tmp"
    git ls-files -z --cached --others --exclude-standard -x "${part##*/}" |
        tar -c --null -T - --ignore-failed-read | tar -x -C "$copy/tree"
    cp -r .carry "$copy/tree"
    if unshare -rn true 2>/dev/null; then
        isolated=(unshare -rn)
    else
        echo "rehearsing with a network: unshare is not permitted here" >&2
    fi
    local out="$PWD/.bench-gpu/packed" # ignored, too
    rm -rf "$out"
    (
        cd "$copy/tree"
        PATH="$(dirname "$python"):$PATH" OUT="$out" TMPDIR="$copy/tmp" "${isolated[@]}" bash -c "$1 --rehearse" >&2
    )
}

python=python3 data='' list='' rehearse=''
while (($#)); do
    case $1 in
        --python | --data)
            [[ -n ${2-} ]] || cannot "$1 needs a value"
            declare "${1#--}=$2"
            shift
            ;;
        --list | --rehearse) declare "${1#--}=yes" ;;
        --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "$0" # the comment above
            exit
            ;;
        *) cannot "$1: must be one of --python, --data, --rehearse, --list, --help" ;;
    esac
    shift
done
program=$(command -v "$python") || cannot "--python $python: no such program"
python=$(realpath -s "$program") # a virtual environment's interpreter is a link
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || true
[[ $version =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || cannot "--python $python: must be Python 3.11 or newer"
[[ -z $rehearse || $version == 3.12 ]] || cannot "--rehearse: requires Python 3.12, like the wheels; --python $python is $version"
for name in "${mnist[@]}"; do
    [[ -z $data || -f $data/MNIST/raw/$name || -f $data/MNIST/raw/$name.gz ]] || cannot "--data $data: has neither MNIST/raw/$name nor $name.gz"
done
[[ -z $data ]] || data=$(realpath "$data")
cd "$(dirname "$0")/../.."

required=$(requirements)
if [[ -n $list ]]; then
    echo "$required"
    exit
fi

part=$(mktemp -d "$PWD/.carry.XXXXXX")
trap 'rm -rf "$part"' EXIT
mkdir "$part/carry"
mapfile -t wheels <<<"$required"
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
"$python" -m pip download -q --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --dest "$part/carry/wheels" "${wheels[@]}"
compile_extension "$part/carry/dfkd_fast_cuda.so"
[[ -z $data ]] || pack_mnist "$data/MNIST/raw" "$part/carry/data/MNIST/raw"

(cd "$part/carry" && du -sbc -- * && ls wheels) >&2
bytes=$(du -sb "$part/carry" | cut -f1)
((bytes <= max_bytes)) || cannot "$bytes bytes are more than $max_bytes"

line=": \"\${OUT:?must name the folder for the results}\""
line+=" && T=\$(mktemp -d) && python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target \"\$T/site\" .carry/wheels/*.whl"
[[ -z $data ]] || line+=" && cp -r .carry/data \"\$T\" && gunzip -r \"\$T/data\""
line+=" && export PYTHONPATH=\"\$T/site\" DFKD_FAST_EXTENSION=\"\$PWD/.carry/dfkd_fast_cuda.so\""
line+=" && python3 -m bench gpu --minutes 9 --commit $(commit)${data:+ --data-root \"\$T/data\"} --out \"\$OUT\""
((${#line} <= max_line)) || cannot "the line has ${#line} characters, more than $max_line"

rm -rf .carry
mv "$part/carry" .carry
[[ -z $rehearse ]] || rehearse "$line"
echo "$line"
