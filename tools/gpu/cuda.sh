#!/usr/bin/env bash
# Build for one generation of NVIDIA GPUs, run the tests and the benchmark there, and add the results to docs/gpu.md:
#
#     CUDA_ARCH=90 tools/gpu/cuda.sh        # 90: H100; 89: RTX 40; 86: RTX 30; default: the GPU of this machine
#
# Needs the CUDA toolkit (nvcc on PATH, cuBLAS), a driver, a C++17 compiler and python3 with venv. DEVICE=CUDA1 names another GPU.
set -euo pipefail

fail() {
    echo "tools/gpu/cuda.sh: $1" >&2
    exit 1
}
command -v nvcc >/dev/null || fail 'no nvcc on PATH: install the CUDA toolkit'
nvidia-smi --list-gpus >/dev/null 2>&1 || fail 'nvidia-smi lists no GPU: install the driver'
exec "$(dirname "$0")/check.sh" "${DEVICE:-CUDA0}" -DGGML_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCH:-native}"
