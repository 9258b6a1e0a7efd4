// What upstream's tests/test-llama-archs.cpp uses of its log.h, so that upstream's `common` library need not be built.

#pragma once

#include "ggml.h"

#include <cstdio>

#define LOG_LEVEL_DEBUG 5
#define LOG_LEVEL_ERROR 1

#define LOG(...)     printf(__VA_ARGS__)
#define LOG_INF(...) printf(__VA_ARGS__)
#define LOG_ERR(...) fprintf(stderr, __VA_ARGS__)

inline void common_log_set_verbosity_thold(int) {}

inline int common_log_get_verbosity(ggml_log_level level) {
    return level == GGML_LOG_LEVEL_ERROR ? LOG_LEVEL_ERROR : LOG_LEVEL_DEBUG;
}

inline int * common_log_main() {
    return nullptr;
}

inline void common_log_flush(int *) {}
