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

// A layer of the cache. ggml shapes, fastest dimension first; the last dimension is the stream.
struct llama_csp_layer {
    int32_t       il;    // index in the model
    ggml_tensor * k;     // [head_dim_k*n_head_kv, n_cell_max, n_stream]
    ggml_tensor * v;     // the same, or transposed: element (cell, i) of a stream at i*n_cell_max + cell
    ggml_tensor * ring;  // [head_dim_k*n_head, n_window, n_stream] f32, the last queries after RoPE
    ggml_tensor * sinks; // [n_head] f32, sink logits of the softmax in attention; used where `use_sinks`
    int64_t       head_dim_k;
    int64_t       head_dim_v;

    std::vector<float> model_sinks; // [n_head], the model's own sink logits s; or empty
    float              kq_scale;    // 0 until the layer has been built with a window

    float sink_logit(int64_t head, float n) const; // ln(n + exp(s)); -inf adds nothing to the softmax
};

// A query in the ring.
struct llama_csp_query {
    int64_t serial = -1; // order of arrival; -1: row is empty
    int32_t cell   = 0;  // its own cell
    int32_t n_seen = 0;  // it saw the cells [0, n_seen)
    uint8_t tag    = 0;
};

// What is known of the sequence in one stream of the cache. A unified cache has one stream, for any one sequence.
struct llama_csp_stream {
    int32_t   n_cell() const;                             // cells in use
    int32_t   n_kept() const;                             // cells that hold another token in every head
    int32_t   check_sequence(llama_seq_id seq_id) const;  // status: its cells are in token order, without holes
    bool      votes(const llama_csp_query & query) const; // it is recorded, and its cell is still there
    llama_pos pos_at(size_t row, int32_t cell) const;
    uint8_t   tag_at(size_t row, int32_t cell) const;

    void forget_queries(int32_t first); // of the cells from first on: these are empty, or filled anew

    int32_t          index; // in the cache
    llama_kv_cells * cells; // upstream's

    std::vector<llama_csp_query> ring; // [n_window]
    int64_t                      serial = 0;
    std::vector<uint32_t>        ubatch_cells; // cells of the ubatch in flight

    int32_t              modality = LLAMA_CSP_MODALITY_AUTO; // of the cells to come
    std::vector<uint8_t> cell_tag;                           // [n_cell_max], for cells >= n_kept
    int32_t              n_last_kept = 0;                    // n_keep of the last keep; see n_kept()
    std::vector<int32_t> kept_pos;                           // [n_row][n_last_kept]
    std::vector<uint8_t> kept_tag;                           // [n_row][n_last_kept]
};

struct llama_csp {
    // Attaches to ctx, or throws std::bad_alloc.
    llama_csp(llama_context * ctx, llama_kv_cache * kv, llama_csp_params params);
    ~llama_csp();

    // Why a context cannot be pruned, or "" where it can; *kv is set to the cache of its full-attention layers.
    static std::string unsupported(llama_context * ctx, llama_kv_cache ** kv);

    // The stream of a sequence, or null where there is no such sequence.
    llama_csp_stream *       find_stream(llama_seq_id seq_id);
    const llama_csp_stream * find_stream(llama_seq_id seq_id) const;
    int32_t                  no_such_sequence(llama_seq_id seq_id) const; // status of a call that names it
    int32_t                  check_layers(int32_t layer, int32_t n_layer) const;

    // window (llama-csp-window.cpp): rows of the ring for the last n_row queries of a stream of the ubatch
    void push_queries(llama_csp_stream & stream, int64_t n_row, int64_t * rows);

    // scores (llama-csp-score.cpp)
    int32_t compute_scores(const llama_csp_stream & stream,
                           int32_t                  layer,
                           int32_t                  n_layer,
                           int32_t                  n_obs,
                           float                    softmax_n,
                           float *                  scores);

    // rows (llama-csp-keep.cpp)
    void move_rows(const llama_csp_stream & stream, const int32_t * cells, int32_t n_keep); // throws on failure
    void move_cells(llama_csp_stream & stream, const int32_t * cells, int32_t n_keep);

    // rows of per-head arrays: layer*n_head_kv + head
    size_t n_row() const { return layers.size() * n_head_kv; }

    void attach(llama_csp * csp); // this, or null
    void drop_graphs();           // the next decode builds new ones
    void use_huge_pages() const;
    bool v_is_transposed() const;
    void finish_copies(); // between streams: llama_memory_seq_cp leaves them to the next decode

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

    bool use_sinks = false;

    std::vector<llama_csp_stream> streams;        // [n_stream]
    std::vector<llama_seq_id>     ubatch_streams; // indices of the streams in flight, in the order of the ubatch
};

// Sets the message of llama_csp_last_error() and returns status.
#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
int32_t llama_csp_fail(int32_t status, const char * format, ...);

// Calls fn(i) for i in [0, n) on up to n_thread threads.
void llama_csp_parallel(size_t n, int32_t n_thread, const std::function<void(size_t)> & fn);
