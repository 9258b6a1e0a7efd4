// llama-csp-hooks.h - the functions that patched upstream files call. patches/README.md lists the call sites.
// Upstream calls them only where a llama_csp is attached: without one nothing here runs.

#pragma once

#include "llama.h"

#include <cstdint>

struct ggml_tensor;
struct llama_csp;
struct llama_ubatch;
struct llm_graph_context;

// Top of llm_graph_context::build_attn_mha: record the last queries of a layer whose keys lie in the cache, and return
// the sink logits for the attention of this layer (`sinks` where the softmax is ordinary).
//   q: [head_dim, n_head, n_token] after RoPE, k: view of the cache
ggml_tensor * llama_csp_build_attn(const llm_graph_context & graph,
                                   ggml_tensor *             q,
                                   const ggml_tensor *       k,
                                   ggml_tensor *             sinks,
                                   float                     kq_scale,
                                   int                       il);

// End of llama_kv_cache::apply_ubatch: token i of the ubatch went to cells[i]. Also called by upstream's dry runs.
void llama_csp_apply_ubatch(llama_csp * csp, const llama_ubatch & ubatch, const uint32_t * cells);

// llama_kv_cache::clear
void llama_csp_clear(llama_csp * csp);

// The C wrappers llama_memory_*: may positions [p0, p1) be removed? May cells be copied or shifted? Logs where not.
bool llama_csp_allow_rm(const llama_csp * csp, llama_pos p0, llama_pos p1);
bool llama_csp_allow_edit(llama_csp * csp, const char * name); // where they may, the window starts anew
bool llama_csp_pruned(const llama_csp * csp);

// mtmd_init_from_file: was the text model opened with no_alloc? Then the encoder's weights are not read either.
LLAMA_API bool llama_csp_no_alloc(const llama_model * model);
