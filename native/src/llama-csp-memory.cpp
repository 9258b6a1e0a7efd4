// llama-csp-memory.cpp - where the memory of a context goes, as its allocators count it; and huge pages for the cache.

#include "llama-csp-hooks.h"
#include "llama-csp-impl.h"
#include "llama-context.h"
#include "llama-ext.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <set>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#endif

namespace {

// Huge pages for a buffer in host memory. Where it holds zeros only, its pages are given back and come anew when they are
// written; else they are moved.
void use_huge_pages(ggml_backend_buffer_t buf, bool is_zero) {
#ifdef __linux__
    const uintptr_t page  = sysconf(_SC_PAGESIZE);
    const uintptr_t base  = (uintptr_t) ggml_backend_buffer_get_base(buf);
    const uintptr_t begin = (base + page - 1) / page * page;
    const uintptr_t end   = (base + ggml_backend_buffer_get_size(buf)) / page * page;
    if (begin < end && madvise((void *) begin, end - begin, MADV_HUGEPAGE) == 0) {
        madvise((void *) begin, end - begin, is_zero ? MADV_DONTNEED : MADV_COLLAPSE);
    }
#else
    (void) buf;
    (void) is_zero;
#endif
}

// In memory of its own on the CPU: not on a device, not in the file.
bool is_allocated(ggml_backend_buffer_t buf) {
    auto *             buft = ggml_backend_buffer_get_type(buf);
    ggml_backend_dev_t dev  = ggml_backend_buft_get_device(buft);
    return (dev == nullptr || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU) &&
           strcmp(ggml_backend_buft_name(buft), "CPU_Mapped") != 0;
}

} // namespace

// The rows of a head, and those of a transposed V, lie kilobytes apart: with small pages each of them misses the TLB.
void llama_csp::use_huge_pages() const {
    const bool is_empty = std::all_of(streams.begin(), streams.end(),
                                      [](const llama_csp_stream & stream) { return stream.n_cell() == 0; });

    ctx->synchronize();
    for (const auto & [_, buf] : kv->ctxs_bufs) {
        if (ggml_backend_buffer_get_type(buf.get()) == ggml_backend_cpu_buffer_type()) {
            ::use_huge_pages(buf.get(), is_empty); // upstream fills an empty cache with zeros
        }
    }
}

int32_t llama_csp_use_huge_pages(const llama_model * model) {
    if (model == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "model is NULL");
    }
    std::set<ggml_backend_buffer_t> bufs;
    for (const auto & [_, tensor] : model->tensors_by_name) {
        if (tensor->buffer != nullptr && is_allocated(tensor->buffer)) {
            bufs.insert(tensor->buffer);
        }
    }
    for (auto * buf : bufs) {
        use_huge_pages(buf, /*is_zero =*/false);
    }
    return LLAMA_CSP_OK;
}

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
