// What upstream's tests/test-llama-archs.cpp uses of its common.h. Models are written without any batch.

#pragma once

#include "llama.h"

inline void common_init() {}

struct common_batch {
    explicit common_batch(llama_context *) { GGML_ABORT("not used to write models"); }

    void add(llama_token, llama_pos, llama_seq_id, bool) {}

    void clear() {}

    llama_batch_ext * get() { return nullptr; }
};
