// llama-csp-impl.h - the state behind the public API. See llama-csp.h for terms and conventions.

#pragma once

#include "ggml-cpp.h"
#include "llama-csp.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

class llama_kv_cache;
class llama_kv_cells;
struct llama_ubatch;

// A layer of the cache. ggml shapes, fastest dimension first.
struct llama_csp_layer {
    int32_t       il;    // index in the model
    ggml_tensor * k;     // [head_dim_k*n_head_kv, n_cell_max]
    ggml_tensor * v;     // the same, or transposed: element (cell, i) at i*n_cell_max + cell
    ggml_tensor * ring;  // [head_dim_k*n_head, n_window] f32, the last queries after RoPE
    ggml_tensor * sinks; // [n_head] f32, ln n of the softmax in attention; used where `use_sinks`
    int64_t       head_dim_k;
    int64_t       head_dim_v;
    float         kq_scale; // 0 until the layer has been built with a window
};

// A query in the ring.
struct llama_csp_query {
    int64_t serial = -1; // order of arrival; -1: row is empty
    int32_t cell   = 0;  // its own cell
    int32_t n_seen = 0;  // it saw the cells [0, n_seen)
    uint8_t tag    = 0;
};

struct llama_csp {
    // Attaches to ctx, or throws std::bad_alloc.
    llama_csp(llama_context * ctx, llama_kv_cache * kv, llama_csp_params params);
    ~llama_csp();

    // Why a context cannot be pruned, or "" where it can; *kv is set to its cache.
    static std::string unsupported(llama_context * ctx, llama_kv_cache ** kv);

    // window (llama-csp-window.cpp)
    void forget_queries(int32_t first); // of the cells from first on: these are empty, or filled anew
    void push_queries(const llama_ubatch & ubatch, int64_t n_row, int64_t * rows);

    // scores (llama-csp-score.cpp)
    int32_t compute_scores(int32_t n_obs, float softmax_n, float * scores);

    // rows (llama-csp-keep.cpp)
    void move_rows(const int32_t * cells, int32_t n_keep); // throws where a backend fails
    void move_cells(const int32_t * cells, int32_t n_keep);

    // cells (llama-csp.cpp)
    llama_kv_cells & kv_cells() const;

    int32_t   n_cell() const;         // cells in use
    int32_t   n_kept() const;         // cells that hold another token in every head
    int32_t   check_sequence() const; // status: the cells hold one sequence, in token order, without holes
    llama_pos pos_at(size_t row, int32_t cell) const;
    uint8_t   tag_at(size_t row, int32_t cell) const;

    // rows of per-head arrays: layer*n_head_kv + head
    size_t n_row() const { return layers.size() * n_head_kv; }

    void drop_graphs(); // the next decode builds new ones

    // waits for pending work; n_thread is set on every backend
    void           synchronize() const;
    int32_t        n_thread() const;
    ggml_backend_t backend_of(const ggml_tensor * t) const; // computes where t lives

    llama_context *  ctx;
    llama_kv_cache * kv;

    const int32_t n_window;
    const int32_t n_modality;
    const int32_t n_head;
    const int32_t n_head_kv;

    std::vector<llama_csp_layer>         layers;
    std::vector<ggml_context_ptr>        ctxs; // own the ring and sink tensors
    std::vector<ggml_backend_buffer_ptr> bufs;

    int32_t modality  = LLAMA_CSP_MODALITY_AUTO;
    bool    use_sinks = false;

    std::vector<llama_csp_query> ring; // [n_window]
    int64_t                      serial = 0;
    std::vector<uint32_t>        ubatch_cells; // cells of the ubatch in flight

    std::vector<uint8_t> cell_tag;        // [n_cell_max], for cells >= n_kept
    int32_t              n_last_kept = 0; // n_keep of the last keep; see n_kept()
    std::vector<int32_t> kept_pos;        // [n_row][n_last_kept]
    std::vector<uint8_t> kept_tag;        // [n_row][n_last_kept]
};

// Sets the message of llama_csp_last_error() and returns status.
#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
int32_t llama_csp_fail(int32_t status, const char * format, ...);

// Calls fn(i) for i in [0, n) on up to n_thread threads.
void llama_csp_parallel(size_t n, int32_t n_thread, const std::function<void(size_t)> & fn);
