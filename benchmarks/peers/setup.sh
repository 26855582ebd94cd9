#!/usr/bin/env bash
# Makes one virtual environment per peer under PEERS_HOME, with pinned versions; safe to run again.
#
#   setup.sh [llama|ct2|ort|ov|hf ...]        no argument: all of them
#
# The hf environment is always made: it holds the converters and the reference. PYTHON chooses the interpreter.
# Where it fails, the last line on stderr says why.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${PEERS_HOME:-$HOME/.cache/belle-peers}
python=${PYTHON:-python3}
llama_version=0.3.36
jobs=$(nproc)

say() { echo "[$(date +%T)] $*"; }
fail() { echo "$*" >&2; exit 1; }

case $home in *[[:space:]]*) fail "PEERS_HOME must not contain spaces, because it ends up in CFLAGS: '$home'" ;; esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "the peers need Python 3.11 or later, and '$python' is not: set PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "'$python' cannot make virtual environments: apt install python3-venv (Debian, Ubuntu)"
[ $# -gt 0 ] || set -- llama ct2 ort ov hf
for peer in "$@"; do
    case $peer in llama | ct2 | ort | ov | hf) ;; *) fail "unknown peer '$peer'; expected llama, ct2, ort, ov or hf" ;; esac
done
mkdir -p "$home"/{build,venvs,wheels,models,engines} || fail "cannot write to PEERS_HOME ($home)"

pip_install() {
    local venv=$1
    shift
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" ||
        fail "pip could not install into $venv: check the network, pip's configuration and the room on the disk"
}

# install NAME [step before the pinned packages...]: an environment whose stamp matches its requirements is left alone.
install() {
    local name=$1 venv=$home/venvs/$1 pins=$here/requirements/$1.txt
    shift
    if cmp -s "$pins" "$venv/installed.txt"; then say "$name: up to date"; return; fi
    local free
    free=$(df -Pm "$home" | awk 'NR == 2 {print $4}')
    [ "$free" -ge 3000 ] || fail "an environment needs up to 3 GB on the disk of $home, where $free MB are free"
    say "$name: installing"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "'$python' could not make the environment $venv"
    for step in "$@"; do "$step" "$venv" "$pins"; done
    # --no-deps: the pins are complete, and optimum-intel's torchvision must not come in.
    pip_install "$venv" --no-deps -r "$pins"
    cp "$pins" "$venv/installed.txt"
    say "$name: $(du -sm "$venv" | cut -f1) MB"
}

# torch comes with its dependencies: where pip only finds the CUDA build, it needs its libraries to import.
torch_first() { pip_install "$1" -c "$2" torch; }

# llama.cpp is compiled here with amxfix.h. --no-cache-dir: pip would otherwise reuse a wheel it once built without it.
llama_wheel() {
    local wheels=("$home"/wheels/llama_cpp_python-"$llama_version"-*.whl)
    if [ ! -e "${wheels[0]}" ]; then
        command -v "${CXX:-g++}" >/dev/null || fail "llama.cpp needs a C++ compiler: apt install g++ (Debian, Ubuntu)"
        say "llama: compiling llama.cpp with $jobs jobs (log: $home/build/llama.log)"
        cp "$here/amxfix.h" "$home/build/amxfix.h"
        CFLAGS="${CFLAGS:-} -include $home/build/amxfix.h" CXXFLAGS="${CXXFLAGS:-} -include $home/build/amxfix.h" \
            CMAKE_BUILD_PARALLEL_LEVEL=$jobs "$1/bin/python" -m pip wheel -v --no-cache-dir --no-deps \
            --no-binary llama_cpp_python "llama_cpp_python==$llama_version" -w "$home/wheels" >"$home/build/llama.log" 2>&1 ||
            { tail -n 30 "$home/build/llama.log" >&2; fail "llama.cpp could not be compiled (see $home/build/llama.log)"; }
        wheels=("$home"/wheels/llama_cpp_python-"$llama_version"-*.whl)
    fi
    pip_install "$1" --no-deps "${wheels[0]}"
}

install hf torch_first
for peer in "$@"; do
    case $peer in
    llama) install llama llama_wheel ;;
    ov) install ov; install ov-export torch_first ;;
    hf) ;;
    *) install "$peer" ;;
    esac
done
