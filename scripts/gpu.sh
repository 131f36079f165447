#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds with the Python, torch, triton and nvcc that are there (nothing is
# downloaded), runs the GPU tests, some of them again under compute-sanitizer, measures the recurrent kernel's exchange,
# then runs the GPU benchmarks. Results go to out/gpu or to the folder named. Steps may be named to do only those.
# usage: scripts/gpu.sh [PYTHON [FOLDER [build|tests|sanitizer|exchange|OP of the benchmark]...]]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
out=${2:-out/gpu}
ops=(conv_pool linear rnn attention sdpa losses models)
steps=("${@:3}")
[ ${#steps[@]} -gt 0 ] || steps=(build tests sanitizer exchange "${ops[@]}")
mkdir -p "$out"

found=$("$python" - <<'END'
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    sys.exit(f"make gpu needs a CUDA device that torch can use; torch {torch.__version__} sees none.")
print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}", file=sys.stderr)
major, minor = torch.cuda.get_device_capability()
print(Path(torch.__file__).parent / "include", f"{major}{minor}{'a' if major == 9 else ''}-real")
END
)
read -r headers architecture <<<"$found"

build() {
  # torch brings pybind11's headers along, so that CMake and a compiler are all that must be installed.
  cmake -S . -B build/gpu/native -DINTERFUSE_PYTHON=ON -DINTERFUSE_PYBIND11_INCLUDE="$headers" -DINTERFUSE_TESTS=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$architecture" -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" &&
    cmake --build build/gpu/native --parallel "$(nproc)" --target _native interfuse_cuda interfuse_time_exchange &&
    # The package as a wheel would lay it out, without installing anything.
    "$python" scripts/lay_out.py build/gpu/site build/gpu/native
}

tests() {
  "$python" -m pytest -m gpu -p no:cacheprovider --junitxml "$out/tests.xml"
}

# Small shapes of the CUDA C++ kernels; torch's allocator out of the way, so that each tensor has its own bounds.
sanitizer() {
  if ! compute-sanitizer --version >/dev/null 2>&1; then
    echo "compute-sanitizer is not here, so memory accesses and races were not checked." | tee "$out/sanitizer.log"
    return 0
  fi
  local tool failed=0
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest -m gpu -p no:cacheprovider tests/test_rnn_triton.py tests/test_rnn_overlap.py \
      -k "cuda_kernel_agrees and (ragged or deep or bf16) or overlapped" 2>&1 | tee -a "$out/sanitizer.log" || failed=1
  done
  return "$failed"
}

exchange() {
  build/gpu/native/interfuse_time_exchange | tee "$out/exchange.json"
}

export PYTHONPATH=$PWD/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}
failed=0
for step in "${steps[@]}"; do
  case $step in
    build) build ;;  # nothing else means anything without it
    tests | sanitizer | exchange) "$step" || failed=1 ;;
    *) "$python" -m interfuse.bench.gpu --op "$step" --out "$out" || failed=1 ;;
  esac
done
exit "$failed"
