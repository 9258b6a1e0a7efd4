#!/usr/bin/env bash
# Build with Vulkan, run the tests and the benchmark on the first GPU, and add the results to docs/gpu.md:
#
#     tools/gpu/vulkan.sh
#
# Needs Vulkan headers with VK_EXT_layer_settings, glslc and the CMake package of SPIRV-Headers: the Vulkan SDK 1.3.275
# or newer has them all (source its setup-env.sh first). Debian 12 has headers 1.3.239, which are too old. And a Vulkan
# driver, a C++17 compiler and python3 with venv. DEVICE=Vulkan1 names another GPU.
set -euo pipefail

fail() {
    echo "tools/gpu/vulkan.sh: $1: install the Vulkan SDK 1.3.275 or newer and source its setup-env.sh" >&2
    exit 1
}
command -v glslc >/dev/null || fail 'no glslc on PATH'
version=$("${CXX:-c++}" ${VULKAN_SDK:+"-I$VULKAN_SDK/include"} -E -P -x c++ - 2>/dev/null <<<'
#include <vulkan/vulkan_core.h>
#ifdef VK_EXT_layer_settings
new enough
#else
VK_HEADER_VERSION
#endif') || fail 'no Vulkan headers'
version=$(tail -1 <<<"$version")
[ "$version" = 'new enough' ] || fail "the Vulkan headers, 1.3.$version, do not know VK_EXT_layer_settings"

exec "$(dirname "$0")/check.sh" "${DEVICE:-Vulkan0}" -DGGML_VULKAN=ON
