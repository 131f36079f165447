#!/usr/bin/env bash
# Everything native under the address and undefined-behaviour sanitizers: the C++ tests as they are, then the
# Python tests that reach the core, with an instrumented module in an environment of its own.
# usage: scripts/asan.sh PYTHON [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

bin=$(dirname "$python")
out=$PWD/build/asan
# A leak report at exit would name what Python and torch keep until then, so leaks are not looked for.
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:check_initialization_order=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

overlay=$("$python" scripts/overlay_env.py "$out/env")
"$overlay" -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation \
  --force-reinstall -Cbuild-dir="$out/native" -Ccmake.build-type=RelWithDebInfo -Cinstall.strip=false \
  -Ccmake.define.INTERFUSE_SANITIZE=address,undefined -Ccmake.define.INTERFUSE_CUDA=OFF \
  -Ccmake.define.INTERFUSE_TESTS=ON .
"$bin/ctest" --test-dir "$out/native" --output-on-failure

# The interpreter is not instrumented, so the sanitizer's runtime must be in the process before the module is.
preload=$("${CXX:-g++}" -print-file-name=libasan.so):$("${CXX:-g++}" -print-file-name=libubsan.so)
if [ $# -eq 0 ]; then
  set -- -m "native and not slow"
fi
# The AVX-512 kernels are not instrumented (cmake/Core.cmake).
LD_PRELOAD=$preload INTERFUSE_ISA=avx2 INTERFUSE_UNDER_SANITIZERS=1 "$overlay" -m pytest -p no:cacheprovider "$@"
