// llama-csp-memory.cpp - where the memory of a context goes, as its allocators count it.

#include "llama-csp-hooks.h"
#include "llama-csp-impl.h"
#include "llama-ext.h"
#include "llama-model.h"

#include <exception>

int32_t llama_csp_get_memory(const llama_context * ctx, llama_csp_memory_info * info) {
    if (ctx == nullptr || info == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "ctx or info is NULL");
    }
    llama_csp_memory_info sum = {};
    try {
        for (const auto & [buft, size] : llama_get_memory_breakdown(ctx)) {
            ggml_backend_dev_t dev      = ggml_backend_buft_get_device(buft);
            const bool         host     = ggml_backend_buft_is_host(buft);
            const bool         repacked = !host && dev && ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
            if (host || repacked) {
                (host ? sum.weights : sum.repacked) += size.model;
                sum.kv += size.context;
                sum.compute += size.compute;
            } else {
                sum.device_weights += size.model;
                sum.device_kv += size.context;
                sum.device_compute += size.compute;
            }
        }
    } catch (const std::exception & error) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the memory of the context cannot be counted: %s", error.what());
    }
    *info = sum;
    return LLAMA_CSP_OK;
}

int32_t llama_csp_is_plain(const llama_model * model, const char * tensor) {
    if (model == nullptr || tensor == nullptr) {
        return 0;
    }
    for (const auto & [name, data] : model->tensors_by_name) {
        if (name == tensor && data->buffer != nullptr && ggml_backend_buffer_is_host(data->buffer)) {
            return 1;
        }
    }
    return 0;
}

bool llama_csp_no_alloc(const llama_model * model) {
    return model != nullptr && model->hparams.no_alloc;
}
