// llama-csp-score-host.h - scores of one KV head whose keys lie in host memory.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// The keys of one KV head, and the queries that vote on its cells.
struct llama_csp_host_head {
    const char * k;        // first key
    size_t       k_stride; // bytes from one cell to the next
    bool         k_is_f16; // else f32
    int64_t      head_dim;
    int64_t      n_cell;
    float        scale;  // of q*k
    float        weight; // of every vote

    std::vector<const float *> q;      // [n_query], head_dim values each
    std::vector<int32_t>       n_seen; // [n_query], it saw the cells [0, n_seen), at least one
    std::vector<int32_t>       tag;    // [n_query], its modality
    std::vector<float>         sink;   // [n_query], one more logit of its softmax, or -inf
};

// False where this build has no vector instructions for it: then the graph of the CPU backend is the faster way.
bool llama_csp_host_scores_available();

// scores: [n_modality][n_cell], summed over the queries of a modality
void llama_csp_host_scores(const llama_csp_host_head & head, int32_t n_modality, float * scores);

// Lengths of the keys; norms: [n_cell]
void llama_csp_host_norms(const llama_csp_host_head & head, float * norms);
