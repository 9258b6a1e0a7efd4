// llama-csp-hooks.h - the functions that patched upstream files call. patches/README.md lists the call sites.
// Upstream calls them only where a llama_csp is attached: without one nothing here runs.

#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

struct ggml_tensor;
struct llama_csp;
struct llama_ubatch;
struct llm_graph_context;

// Top of llm_graph_context::build_attn_mha: record the last queries of a layer whose keys lie in the cache, and return
// the sink logits for the attention of this layer (`sinks` where nothing is added to them).
//   q: [head_dim, n_head, n_token] after RoPE, tokens in the order of the streams; k: view of the cache
ggml_tensor * llama_csp_build_attn(const llm_graph_context & graph,
                                   ggml_tensor *             q,
                                   const ggml_tensor *       k,
                                   ggml_tensor *             sinks,
                                   float                     kq_scale,
                                   int                       il);

// End of llama_kv_cache::apply_ubatch: the tokens of the ubatch went to the cells idxs[s] of the streams strm[s], one
// stream after the other. Also called by upstream's dry runs.
void llama_csp_apply_ubatch(llama_csp *                                csp,
                            const llama_ubatch &                       ubatch,
                            const std::vector<llama_seq_id> &          strm,
                            const std::vector<std::vector<uint32_t>> & idxs);

// llama_kv_cache::clear
void llama_csp_clear(llama_csp * csp);

// The C wrappers llama_memory_*: may positions [p0, p1) of a sequence (-1: of all) be removed? May a sequence be
// copied, its positions be shifted? They log where not, and follow where they may.
bool llama_csp_allow_rm(const llama_csp * csp, llama_seq_id seq_id, llama_pos p0, llama_pos p1);
bool llama_csp_allow_cp(llama_csp * csp, llama_seq_id src, llama_seq_id dst);
bool llama_csp_allow_shift(llama_csp * csp, llama_seq_id seq_id, const char * name);
bool llama_csp_pruned(const llama_csp * csp);
