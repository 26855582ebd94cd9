#!/usr/bin/env bash
# Makes one virtual environment per peer under PEERS_HOME, with pinned versions; safe to run again.
#
#   setup.sh [llama|ct2|ort|ov|hf|aiperf|vllm|llama-server ...]        no argument: the first five
#
# The hf environment is made beside each of the first five: it holds the converters and the reference. The others are for
# benchmarks/serving: its client, and servers. PYTHON chooses the interpreter.
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
    case $peer in
    llama | ct2 | ort | ov | hf | aiperf | vllm | llama-server) ;;
    *) fail "unknown peer '$peer'; expected llama, ct2, ort, ov, hf, aiperf, vllm or llama-server" ;;
    esac
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

# llama-server, from the source that the llama environment's library is compiled from. Nothing is downloaded while it is built.
llama_server() {
    local source=$home/build/llama_cpp_python-$llama_version venv=$home/venvs/llama-server log=$home/build/llama-server.log
    if [ "$(cat "$venv/installed.txt" 2>/dev/null)" = "llama_cpp_python==$llama_version" ]; then say "llama-server: up to date"; return; fi
    command -v cmake >/dev/null || fail "llama-server needs cmake: apt install cmake (Debian, Ubuntu)"
    command -v "${CXX:-g++}" >/dev/null || fail "llama-server needs a C++ compiler: apt install g++ (Debian, Ubuntu)"
    if [ ! -d "$source" ]; then
        "$python" -m pip download -qq --disable-pip-version-check --no-deps --no-binary llama_cpp_python \
            -d "$home/build" "llama_cpp_python==$llama_version" || fail "pip could not download llama.cpp's source"
        tar xzf "$source.tar.gz" -C "$home/build" && rm "$source.tar.gz"
    fi
    say "llama-server: compiling with $jobs jobs (log: $log)"
    cp "$here/amxfix.h" "$home/build/amxfix.h"
    local flags="-include $home/build/amxfix.h"
    { cmake -S "$source/vendor/llama.cpp" -B "$source/server" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
        -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_OPENSSL=OFF -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" &&
        cmake --build "$source/server" --target llama-server -j "$jobs"; } >"$log" 2>&1 ||
        { tail -n 30 "$log" >&2; fail "llama-server could not be compiled (see $log)"; }
    mkdir -p "$venv/bin"
    cp "$source/server/bin/llama-server" "$venv/bin/"
    echo "llama_cpp_python==$llama_version" >"$venv/installed.txt"
    rm -r "$source"
    say "llama-server: done"
}

for peer in "$@"; do
    case $peer in aiperf | vllm | llama-server) ;; *) install hf torch_first; break ;; esac
done
for peer in "$@"; do
    case $peer in
    llama-server) llama_server ;;
    vllm) install vllm torch_first ;;
    llama) install llama llama_wheel ;;
    ov) install ov; install ov-export torch_first ;;
    hf) ;;
    *) install "$peer" ;;
    esac
done
