#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds with the Python, torch, triton and nvcc that are there (nothing is
# downloaded), runs the GPU tests, then the GPU benchmarks. Results go to out/gpu or to the folder named.
# usage: scripts/gpu.sh [PYTHON [FOLDER]]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
out=${2:-out/gpu}
mkdir -p "$out"

headers=$("$python" - <<'END'
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    sys.exit(f"make gpu needs a CUDA device that torch can use; torch {torch.__version__} sees none.")
print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}", file=sys.stderr)
print(Path(torch.__file__).parent / "include")
END
)

# torch brings pybind11's headers along, so that CMake and a compiler are all that must be installed.
cmake -S . -B build/gpu/native -DINTERFUSE_PYTHON=ON -DINTERFUSE_PYBIND11_INCLUDE="$headers" \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
cmake --build build/gpu/native --parallel "$(nproc)"

# The package as a wheel would lay it out, without installing anything.
"$python" scripts/lay_out.py build/gpu/site build/gpu/native
export PYTHONPATH=$PWD/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}

failed=0
"$python" -m pytest -m gpu -p no:cacheprovider --junitxml "$out/tests.xml" || failed=$?
"$python" -m interfuse.bench.gpu --out "$out" || failed=$?
exit "$failed"
