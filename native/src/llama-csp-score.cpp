// llama-csp-score.cpp - what the window looked at: attention rows of the last queries, summed per modality.
//
// Keys in host memory go through the kernel of llama-csp-score-host.cpp, others through a graph on their backend.

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-csp-impl.h"
#include "llama-csp-score-host.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <new>
#include <stdexcept>
#include <string>

namespace {

// env: LLAMA_CSP_SCORES, to test every way on one machine
enum class score_way { AUTOMATIC, GRAPH, GRAPH_PORTABLE };

score_way wanted_way() {
    const char * value = getenv("LLAMA_CSP_SCORES");
    if (value == nullptr) {
        return score_way::AUTOMATIC;
    }
    return std::string(value) == "graph-portable" ? score_way::GRAPH_PORTABLE : score_way::GRAPH;
}

// The queries that vote: the last n_obs that still have a cell. Rows of the ring.
std::vector<int32_t> find_voters(const llama_csp_stream & stream, int32_t n_obs) {
    const auto &         ring = stream.ring;
    std::vector<int32_t> rows;
    for (size_t r = 0; r < ring.size(); ++r) {
        if (stream.votes(ring[r])) {
            rows.push_back(r);
        }
    }
    std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return ring[a].serial > ring[b].serial; });
    rows.resize(std::min<size_t>(rows.size(), n_obs));
    return rows;
}

//
// on the host
//

bool scores_on_host(const llama_csp_layer & layer) {
    return llama_csp_host_scores_available() && ggml_backend_buffer_is_host(layer.k->buffer) &&
           ggml_backend_buffer_is_host(layer.ring->buffer) &&
           (layer.k->type == GGML_TYPE_F16 || layer.k->type == GGML_TYPE_F32);
}

// One KV head of a layer; scores: [n_modality][n_cell]
void score_head_on_host(const llama_csp &            csp,
                        const llama_csp_stream &     stream,
                        const llama_csp_layer &      layer,
                        const std::vector<int32_t> & voters,
                        int64_t                      h,
                        float                        softmax_n,
                        float *                      scores) {
    const int64_t n_gqa    = csp.n_head / csp.n_head_kv;
    const int64_t head_dim = layer.head_dim_k;
    const size_t  n_query  = voters.size() * n_gqa;

    llama_csp_host_head head;
    head.k = (const char *) layer.k->data + stream.index * layer.k->nb[2] + h * ggml_row_size(layer.k->type, head_dim);
    head.k_stride = layer.k->nb[1];
    head.k_is_f16 = layer.k->type == GGML_TYPE_F16;
    head.head_dim = head_dim;
    head.n_cell   = stream.n_cell();
    head.scale    = layer.kq_scale;
    head.weight   = 1.0f / n_gqa;

    const auto * ring = (const float *) ((const char *) layer.ring->data + stream.index * layer.ring->nb[2]);

    std::vector<float> q(n_query * head_dim);
    for (int64_t i = 0; i < n_gqa; ++i) {
        for (const int32_t r : voters) {
            const float * src = ring + (r * csp.n_head + h * n_gqa + i) * head_dim;
            float *       dst = q.data() + head.q.size() * head_dim;
            for (int64_t d = 0; d < head_dim; ++d) {
                dst[d] =
                    head.k_is_f16 ? ggml_fp16_to_fp32(ggml_fp32_to_fp16(src[d])) : src[d]; // as attention rounds it
            }
            head.q.push_back(dst);
            head.n_seen.push_back(std::min(stream.ring[r].n_seen, stream.n_cell()));
            head.tag.push_back(stream.ring[r].tag);
            head.sink.push_back(layer.sink_logit(h * n_gqa + i, softmax_n));
        }
    }
    llama_csp_host_scores(head, csp.n_modality, scores);
}

//
// on a backend
//

// Cells that a graph reads, masked from n_cell on: the fast matrix kernels want multiples of 4 to 16.
int64_t padded_cells(const llama_csp_stream & stream) {
    return std::min<int64_t>(GGML_PAD(stream.n_cell(), 64), stream.cell_tag.size());
}

// ggml-rpc claims that its servers support everything, whatever they are.
bool is_rpc(ggml_backend_t backend) {
    return std::string(ggml_backend_reg_name(ggml_backend_dev_backend_reg(ggml_backend_get_device(backend)))) == "RPC";
}

struct score_graph {
    ggml_context_ptr ctx;
    ggml_cgraph *    graph = nullptr;
    ggml_tensor *    mask  = nullptr; // [n_pad, n_window]: 0 where a query saw the cell, else -inf
    ggml_tensor *    sinks = nullptr; // [n_head]: sink logits, or null
    ggml_tensor *    votes = nullptr; // [n_modality, n_vote, n_head_kv], or [n_vote, n_modality, n_head_kv]
    ggml_tensor *    out   = nullptr; // [n_pad, n_modality, n_head_kv]
};

score_graph build_score_graph(const llama_csp &        csp,
                              const llama_csp_stream & stream,
                              const llama_csp_layer &  layer,
                              ggml_backend_t           backend,
                              bool                     use_sinks,
                              score_way                way) {
    constexpr size_t max_nodes   = 32;
    const bool       is_portable = way == score_way::GRAPH_PORTABLE;
    const bool       is_unknown  = way == score_way::AUTOMATIC && is_rpc(backend);

    score_graph g;
    g.ctx.reset(ggml_init({ max_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(max_nodes, false), nullptr,
                            /*.no_alloc =*/true }));
    if (!g.ctx) {
        throw std::bad_alloc();
    }
    ggml_context * ctx = g.ctx.get();

    const int64_t n_pad    = padded_cells(stream);
    const int64_t n_vote   = csp.n_window * (csp.n_head / csp.n_head_kv);
    const int64_t head_dim = layer.head_dim_k;

    const auto new_input = [&](int64_t ne0, int64_t ne1, int64_t ne2) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2);
        ggml_set_input(t);
        return t;
    };
    const auto heads_of = [&](ggml_tensor * t, int64_t n_row, int64_t n_head) { // [head_dim, n_row, n_head]
        const size_t head_size = ggml_row_size(t->type, head_dim);
        return ggml_view_3d(ctx, t, head_dim, n_row, n_head, t->nb[1], head_size, stream.index * t->nb[2]);
    };

    // the attention rows of the window, [n_pad, n_window, n_head], by the operations that attention itself uses
    ggml_tensor * k = heads_of(layer.k, n_pad, csp.n_head_kv);
    ggml_tensor * q = heads_of(layer.ring, csp.n_window, csp.n_head);
    ggml_tensor * p = ggml_mul_mat(ctx, k, q);
    if (ggml_is_quantized(k->type) && (is_portable || !ggml_backend_supports_op(backend, p))) { // Vulkan
        p = ggml_mul_mat(ctx, ggml_cast(ctx, k, GGML_TYPE_F32), q);
    }
    ggml_prec_set_acc(p, GGML_PREC_F32);
    g.mask = new_input(n_pad, csp.n_window, 1);
    p      = ggml_soft_max_ext(ctx, p, g.mask, layer.kq_scale, 0.0f);
    if (use_sinks) {
        g.sinks = new_input(csp.n_head, 1, 1);
        ggml_soft_max_add_sinks(p, g.sinks);
    }

    // sum over the queries of a modality and mean over the heads of a group: one contraction with the votes
    p       = ggml_reshape_3d(ctx, p, n_pad, n_vote, csp.n_head_kv);
    g.votes = new_input(csp.n_modality, n_vote, csp.n_head_kv);
    g.out   = ggml_out_prod(ctx, p, g.votes);
    if (is_portable || is_unknown || !ggml_backend_supports_op(backend, g.out)) { // Metal
        g.votes = new_input(n_vote, csp.n_modality, csp.n_head_kv);
        g.out   = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, p)), g.votes);
    }
    ggml_set_output(g.out);

    g.graph = ggml_new_graph_custom(ctx, max_nodes, false);
    ggml_build_forward_expand(g.graph, g.out);
    return g;
}

// The inputs of score_graph.
struct score_inputs {
    std::vector<float> mask;    // [n_window][n_pad]
    std::vector<float> votes;   // [n_head_kv][n_vote][n_modality]
    std::vector<float> votes_t; // [n_head_kv][n_modality][n_vote]

    score_inputs(const llama_csp & csp, const llama_csp_stream & stream, const std::vector<int32_t> & voters) {
        const int64_t n_pad  = padded_cells(stream);
        const int64_t n_gqa  = csp.n_head / csp.n_head_kv;
        const int64_t n_vote = csp.n_window * n_gqa;

        mask.assign(n_pad * csp.n_window, -INFINITY);
        votes.assign(csp.n_head_kv * n_vote * csp.n_modality, 0.0f);
        votes_t.assign(votes.size(), 0.0f);

        for (int64_t r = 0; r < csp.n_window; ++r) {
            mask[r * n_pad] = 0.0f; // a row must not be masked altogether, also where it does not vote
        }
        for (const int64_t r : voters) {
            const auto & query = stream.ring[r];
            std::fill_n(mask.begin() + r * n_pad, std::min(query.n_seen, stream.n_cell()), 0.0f);
            for (int64_t h = 0; h < csp.n_head_kv; ++h) {
                for (int64_t i = r; i < n_vote; i += csp.n_window) {
                    votes[(h * n_vote + i) * csp.n_modality + query.tag]   = 1.0f / n_gqa;
                    votes_t[(h * csp.n_modality + query.tag) * n_vote + i] = 1.0f / n_gqa;
                }
            }
        }
    }
};

void set_input(ggml_tensor * t, const std::vector<float> & data) {
    ggml_backend_tensor_set(t, data.data(), 0, data.size() * sizeof(float));
}

// scores: [n_head_kv][n_modality][n_cell]
void score_layer_on_backend(const llama_csp &        csp,
                            const llama_csp_stream & stream,
                            const llama_csp_layer &  layer,
                            ggml_backend_t           backend,
                            ggml_gallocr_t           alloc,
                            const score_inputs &     inputs,
                            float                    softmax_n,
                            score_way                way,
                            float *                  scores) {
    const bool  use_sinks = softmax_n > 0.0f || !layer.model_sinks.empty();
    score_graph g         = build_score_graph(csp, stream, layer, backend, use_sinks, way);
    if (!ggml_gallocr_alloc_graph(alloc, g.graph)) {
        throw std::bad_alloc();
    }
    set_input(g.mask, inputs.mask);
    set_input(g.votes, g.votes->ne[0] == csp.n_modality ? inputs.votes : inputs.votes_t);
    if (g.sinks) {
        std::vector<float> sinks(csp.n_head);
        for (int64_t h = 0; h < csp.n_head; ++h) {
            sinks[h] = layer.sink_logit(h, softmax_n);
        }
        set_input(g.sinks, sinks);
    }
    if (ggml_backend_graph_compute(backend, g.graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(std::string(ggml_backend_name(backend)) + " failed to compute the scores");
    }
    std::vector<float> padded(ggml_nelements(g.out));
    ggml_backend_tensor_get(g.out, padded.data(), 0, ggml_nbytes(g.out));
    const int64_t n_cell = stream.n_cell();
    for (int64_t i = 0; i < (int64_t) csp.n_head_kv * csp.n_modality; ++i) {
        std::copy_n(padded.begin() + i * g.out->ne[0], n_cell, scores + i * n_cell);
    }
}

} // namespace

int32_t llama_csp::compute_scores(const llama_csp_stream & stream,
                                  int32_t                  layer,
                                  int32_t                  n_layer,
                                  int32_t                  n_obs,
                                  float                    softmax_n,
                                  float *                  scores) {
    for (int32_t i = layer; i < layer + n_layer; ++i) {
        if (layers[i].kq_scale == 0.0f) {
            return llama_csp_fail(LLAMA_CSP_ERR_STATE, "layer %d has recorded no queries: decode tokens first",
                                  layers[i].il);
        }
    }
    const auto voters = find_voters(stream, n_obs);
    if (voters.empty()) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the window is empty: decode tokens first");
    }
    const score_way way     = wanted_way();
    const int64_t   n_value = (int64_t) n_modality * stream.n_cell(); // values of one KV head

    synchronize();

    std::vector<size_t>  host_rows;
    std::vector<int32_t> backend_layers;
    for (int32_t i = layer; i < layer + n_layer; ++i) {
        if (way != score_way::AUTOMATIC || !scores_on_host(layers[i])) {
            backend_layers.push_back(i);
            continue;
        }
        for (int32_t h = 0; h < n_head_kv; ++h) {
            host_rows.push_back(i * n_head_kv + h);
        }
    }

    llama_csp_parallel(host_rows.size(), n_thread(), [&](size_t i) {
        const size_t row = host_rows[i];
        score_head_on_host(*this, stream, layers[row / n_head_kv], voters, row % n_head_kv, softmax_n,
                           scores + (row - layer * n_head_kv) * n_value);
    });

    std::map<ggml_backend_t, ggml_gallocr_ptr> allocs; // compute buffers, shared by the layers of a backend
    const score_inputs                         inputs(*this, stream, voters);
    for (const int32_t i : backend_layers) {
        ggml_backend_t backend = backend_of(layers[i].k);
        auto &         alloc   = allocs[backend];
        if (!alloc) {
            alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
        }
        if (!alloc) {
            throw std::bad_alloc();
        }
        score_layer_on_backend(*this, stream, layers[i], backend, alloc.get(), inputs, softmax_n, way,
                               scores + (i - layer) * n_head_kv * n_value);
    }
    return LLAMA_CSP_OK;
}

int32_t llama_csp_scores(llama_csp *  csp,
                         llama_seq_id seq_id,
                         int32_t      layer,
                         int32_t      n_layer,
                         int32_t      n_obs,
                         float        softmax_n,
                         float *      scores,
                         size_t       n_value) {
    if (csp == nullptr || scores == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or scores is NULL");
    }
    const auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return csp->no_such_sequence(seq_id);
    }
    if (const int32_t status = csp->check_layers(layer, n_layer)) {
        return status;
    }
    if (n_obs < 1 || n_obs > csp->n_window) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_obs is %d, allowed are 1 .. %d (n_window)", n_obs,
                              csp->n_window);
    }
    if (!(softmax_n >= 0.0f) || !std::isfinite(softmax_n)) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "softmax_n is %g, allowed are finite values >= 0", softmax_n);
    }
    const size_t needed = (size_t) n_layer * csp->n_head_kv * csp->n_modality * stream->n_cell();
    if (n_value != needed) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT,
                              "n_value is %zu, needed are %zu (n_layer*n_head_kv*n_modality*n_cell)", n_value, needed);
    }
    if (const int32_t status = stream->check_sequence(seq_id)) {
        return status;
    }
    try {
        csp->finish_copies();
        return csp->compute_scores(*stream, layer, n_layer, n_obs, softmax_n, scores);
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory to score %d cells", stream->n_cell());
    } catch (const std::exception & e) {
        return llama_csp_fail(LLAMA_CSP_ERR_COMPUTE, "%s", e.what());
    }
}
