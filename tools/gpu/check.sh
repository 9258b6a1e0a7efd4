#!/usr/bin/env bash
# What cuda.sh and vulkan.sh have in common: tools/gpu/check.sh DEVICE [CMake options]
#
# Builds into build/gpu/DEVICE, runs tests/native on the device (and on the CPU and an RPC server, as always), then
# tools/bench_evict.py, and appends both results to docs/gpu.md. DEVICE is ggml's name, as CUDA0; CPU proves the script.
set -euo pipefail
cd "$(dirname "$0")/../.."

readonly device=$1
shift
readonly folder=$PWD/build/gpu/$device
readonly python=$folder/venv/bin/python
mkdir -p "$folder"

python3 -m venv "$folder/venv"
CMAKE_ARGS="${CMAKE_ARGS:-} $*" "$python" -m pip install ./native '.[test]'

status=0
EDGE_CSP_TEST_DEVICE=$device "$python" -m pytest tests/native -q | tee "$folder/tests.txt" || status=1
"$python" tools/bench_evict.py --device "$device" | tee "$folder/bench.txt" || status=1

{
    printf '\n## %s, %s\n\n' "$device" "$(date -u +%F)"
    printf 'edge-csp %s, `%s`:\n\n' "$(git rev-parse --short HEAD)" "$*"
    grep -E '^(FAILED|ERROR)|[0-9]+ (passed|failed)' "$folder/tests.txt" | sed 's/^/    /'
    echo
    sed 's/^/    /' "$folder/bench.txt"
} >>docs/gpu.md
echo "appended to docs/gpu.md"
exit "$status"
