// llama-csp.h - prune the KV cache of a llama_context per layer and KV head (Cross-Self Pruning, arXiv 2412.04652).
//
// Boundary: this library is mechanism. It tags KV cells with a modality, keeps the last queries of every layer in a
// ring (the observation window), computes attention scores of that window, and moves the rows of the cells that stay.
// What stays and when is the caller's decision; llama_csp_select() offers the CSP rule for callers without one.
//
// Terms
//   cell       one KV entry, shared by all layers. Cells are in token order: cell 0 holds the first token.
//   window     the last queries of every layer; they vote on the cells that they saw.
//   softmax n  p = exp(x) / (n + sum exp(x)); n = 0 is the ordinary softmax. A sink logit s of the model's own
//              (gpt-oss) is part of attention and of scores: p = exp(x) / (n + exp(s) + sum exp(x)).
//   cache      of the layers with full attention. Sliding windows and recurrent states beside it are left alone.
//   sequence   has a stream of cells of its own (kv_unified = false), and is observed, scored, pruned and saved on its
//              own. A unified cache has one stream: it is pruned while it holds a single sequence, of any seq_id.
//   After llama_csp_keep() cell j holds another token in every (layer, head); llama_csp_cells() tells which.
//
// Conventions
//   - Arrays are row-major, last index fastest. n_layer counts the layers of the cache, in model order.
//   - Arrays belong to the caller; nothing passed in is kept after the call returns.
//   - Functions return LLAMA_CSP_OK or a negative status. On failure nothing has changed, except where said, and
//     llama_csp_last_error() holds one line that names the reason. No function aborts the process.
//   - A llama_csp is used from the thread that uses its llama_context; nothing here is locked.
//   - Without a llama_csp a context computes bit for bit what it computes in upstream llama.cpp.

#ifndef LLAMA_CSP_H
#define LLAMA_CSP_H

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum llama_csp_status {
    LLAMA_CSP_OK              = 0,
    LLAMA_CSP_ERR_ARGUMENT    = -1, // an argument is out of range
    LLAMA_CSP_ERR_UNSUPPORTED = -2, // this model, cache or backend cannot be pruned
    LLAMA_CSP_ERR_STATE       = -3, // the cache is not in a state that allows the call
    LLAMA_CSP_ERR_MEMORY      = -4, // an allocation failed
    LLAMA_CSP_ERR_COMPUTE     = -5, // a backend failed to compute; after keep: the sequence has been removed
};

// Modality tags. Values up to LLAMA_CSP_MODALITY_MAX - 1 are free for callers.
enum llama_csp_modality {
    LLAMA_CSP_MODALITY_AUTO  = -1, // tokens are text, embeddings are images
    LLAMA_CSP_MODALITY_TEXT  = 0,
    LLAMA_CSP_MODALITY_IMAGE = 1,
    LLAMA_CSP_MODALITY_AUDIO = 2,
    LLAMA_CSP_MODALITY_MAX   = 8,
};

struct llama_csp;

struct llama_csp_params {
    int32_t n_window;   // queries kept per layer, >= 1
    int32_t n_modality; // modalities that scores tell apart, 2 .. LLAMA_CSP_MODALITY_MAX
};

struct llama_csp_info {
    int32_t n_layer;   // layers of the cache
    int32_t n_head;    // query heads
    int32_t n_head_kv; // KV heads
    int32_t n_modality;
    int32_t n_cell_max; // size of a stream
    int32_t n_cell;     // cells in use in the stream of the sequence
    int32_t n_kept;     // of these, cells left by the last keep; cells >= n_kept hold the same token in every head
    int32_t n_window;   // queries in the window now
};

// n_window 32, n_modality 3
LLAMA_API struct llama_csp_params llama_csp_default_params(void);

// Attach to a context; *csp is set to NULL on failure. The context keeps working as before, and records its window from
// the next llama_decode on. One llama_csp per context. Free it before the context.
LLAMA_API int32_t llama_csp_init(struct llama_context * ctx, struct llama_csp_params params, struct llama_csp ** csp);

// Detach and free. NULL is allowed. A pruned cache stays usable; its true positions and tags are forgotten.
LLAMA_API void llama_csp_free(struct llama_csp * csp);

// One line about the last failure on this thread, never NULL; valid until the next failure on this thread.
LLAMA_API const char * llama_csp_last_error(void);

LLAMA_API int32_t llama_csp_get_info(const struct llama_csp * csp, llama_seq_id seq_id, struct llama_csp_info * info);

// Tag of the cells that the following llama_decode calls fill for a sequence: LLAMA_CSP_MODALITY_AUTO (at init) or
// 0 .. n_modality - 1.
LLAMA_API int32_t llama_csp_set_modality(struct llama_csp * csp, llama_seq_id seq_id, int32_t modality);

// n of the softmax in attention itself, >= 0 and finite; 0 restores the ordinary softmax.
//   softmax_n: f32 [1] for all heads (n_value = 1) or f32 [n_layer][n_head] (n_value = n_layer*n_head)
LLAMA_API int32_t llama_csp_set_softmax_n(struct llama_csp * csp, const float * softmax_n, size_t n_value);

// Attention mass that every cell got from the last min(n_obs, window) queries, per modality of the query, averaged over
// the query heads of a KV head and summed over the queries. A query votes on the cells that it saw.
// The layers layer .. layer + n_layer - 1: one after the other, the scores of a large cache need not lie in memory at once.
//   softmax_n: n of the scoring softmax (the published method: 1)
//   scores:    f32 [n_layer][n_head_kv][n_modality][n_cell], n_value floats
LLAMA_API int32_t llama_csp_scores(struct llama_csp * csp,
                                   llama_seq_id       seq_id,
                                   int32_t            layer,
                                   int32_t            n_layer,
                                   int32_t            n_obs,
                                   float              softmax_n,
                                   float *            scores,
                                   size_t             n_value);

enum llama_csp_rows {
    LLAMA_CSP_ROWS_K = 0, // with the rotation of their positions
    LLAMA_CSP_ROWS_V = 1,
};

// Lengths of the rows of K or V of some layers, as they are in the cache.
//   norms: f32 [n_layer][n_head_kv][n_cell], n_value floats
LLAMA_API int32_t llama_csp_norms(struct llama_csp * csp,
                                  llama_seq_id       seq_id,
                                  int32_t            layer,
                                  int32_t            n_layer,
                                  int32_t            kind,
                                  float *            norms,
                                  size_t             n_value);

// Read or write K or V of one layer. Writing rounds to the type of the cache; values have to be finite.
//   rows: f32 [n_head_kv][n_cell][head_dim], n_value floats
LLAMA_API int32_t llama_csp_get_rows(struct llama_csp * csp,
                                     llama_seq_id       seq_id,
                                     int32_t            layer,
                                     int32_t            kind,
                                     float *            rows,
                                     size_t             n_value);
LLAMA_API int32_t llama_csp_set_rows(struct llama_csp * csp,
                                     llama_seq_id       seq_id,
                                     int32_t            layer,
                                     int32_t            kind,
                                     const float *      rows,
                                     size_t             n_value);

struct llama_csp_select_params {
    int32_t k_self;   // cells taken by the votes of their own modality
    int32_t k_cross;  // cells taken by the votes of all other modalities
    int32_t n_recent; // last cells, always kept
    int32_t n_sink;   // first cells, always kept; charged to k_self and k_cross, like pinned cells
};

// The CSP rule, for some of the layers. Every row keeps exactly n_keep = min(n_cell, k_self + k_cross + n_recent) cells: recent, sink and pinned
// ones, then the best of each ranking. A cell that both rankings want is kept once and the place goes to the next best;
// a ranking that runs out of cells with a score > 0 passes its places to the other. Ties go to the earlier cell.
//   scores: as from llama_csp_scores(); pinned: u8 [n_layer][n_head_kv][n_cell], or NULL
//   cells:  i32 [n_layer][n_head_kv][n_keep], ascending; n_value ints
LLAMA_API int32_t llama_csp_select(const struct llama_csp *       csp,
                                   llama_seq_id                   seq_id,
                                   int32_t                        layer,
                                   int32_t                        n_layer,
                                   struct llama_csp_select_params params,
                                   const float *                  scores,
                                   const uint8_t *                pinned,
                                   int32_t *                      cells,
                                   size_t                         n_value);

// Keep n_keep cells per layer and KV head, 1 <= n_keep <= n_cell. Rows are moved byte for byte to the cells 0 .. n_keep - 1,
// positions go on counting from where they were, and the window starts anew.
//   cells: i32 [n_layer][n_head_kv][n_keep], ascending and without repeats; every row holds the last cell, n_cell - 1
// After this, removing or shifting positions inside the kept cells is refused by llama_memory_seq_*, and so is copying
// them within their stream; a copy to the stream of another sequence is pruned like the original. (On a cache that is
// not pruned these work as always.) The window of a sequence starts anew where it was copied to, or shifted.
LLAMA_API int32_t llama_csp_keep(struct llama_csp * csp, llama_seq_id seq_id, const int32_t * cells, int32_t n_keep);

// True position and tag of the token in every cell of some layers. Either pointer may be NULL.
//   pos: i32 [n_layer][n_head_kv][n_cell]; tag: u8 [n_layer][n_head_kv][n_cell]; n_value elements each
LLAMA_API int32_t llama_csp_cells(const struct llama_csp * csp,
                                  llama_seq_id             seq_id,
                                  int32_t                  layer,
                                  int32_t                  n_layer,
                                  int32_t *                pos,
                                  uint8_t *                tag,
                                  size_t                   n_value);

// Positions and tags as bytes, to be stored beside llama_state_seq_get_data() and restored after llama_state_seq_set_data()
// into an otherwise empty cache. get returns the bytes written (0 on failure), set refuses bytes that do not fit the cache.
LLAMA_API size_t  llama_csp_state_get_size(const struct llama_csp * csp, llama_seq_id seq_id);
LLAMA_API size_t  llama_csp_state_get_data(const struct llama_csp * csp,
                                           llama_seq_id             seq_id,
                                           uint8_t *                dst,
                                           size_t                   size);
LLAMA_API int32_t llama_csp_state_set_data(struct llama_csp * csp,
                                           llama_seq_id       seq_id,
                                           const uint8_t *    src,
                                           size_t             size);

// Bytes that a context and its model take.
struct llama_csp_memory_info {
    size_t weights;        // in host memory as they are in the file; mapped, if the model is
    size_t repacked;       // rearranged for the instructions of this CPU; a mapped model keeps both
    size_t kv;             // KV cache and recurrent state
    size_t compute;        // scratch of the graphs
    size_t device_weights; // the same on GPUs and RPC servers
    size_t device_kv;
    size_t device_compute;
};

// Needs no llama_csp. A model opened with no_alloc tells what it would take: nothing is read or allocated but metadata.
LLAMA_API int32_t llama_csp_get_memory(const struct llama_context * ctx, struct llama_csp_memory_info * info);

// On Linux weights in memory of their own (repacked, or read without mmap) move to huge pages: a decode step reads all of them,
// and takes less time so on CPUs. Needs no llama_csp; the weights are copied once. Elsewhere, and where the system has no huge
// pages, nothing happens. Caches get them in llama_csp_init().
LLAMA_API int32_t llama_csp_use_huge_pages(const struct llama_model * model);

// 1 if a tensor of the model lies in host memory as it is in the file, 0 if it is repacked, on a device or unknown.
LLAMA_API int32_t llama_csp_is_plain(const struct llama_model * model, const char * tensor);

#ifdef __cplusplus
}
#endif

#endif // LLAMA_CSP_H
