// llama-csp-window.cpp - the observation window: record the last queries of every layer.

#include "llama-context.h"
#include "llama-csp-hooks.h"
#include "llama-csp-impl.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <memory>

namespace {

// Ring rows of the queries of a ubatch, one input per graph.
class graph_input_csp : public llm_graph_input_i {
public:
    graph_input_csp(llama_csp * csp, ggml_tensor * rows) :
        csp(csp),
        rows(rows) {}

    void set_input(const llama_ubatch * ubatch) override {
        std::vector<int64_t> data(rows->ne[0]);
        csp->push_queries(*ubatch, rows->ne[0], data.data());
        ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
    }

    // the shape depends on the number of tokens only, which upstream compares; attaching and detaching drop all graphs
    bool can_reuse(const llm_graph_params &) override { return true; }

    llama_csp *   csp;
    ggml_tensor * rows; // [n_row] i64
};

graph_input_csp * find_or_add_input(const llm_graph_context & graph, llama_csp * csp) {
    for (const auto & input : graph.res->inputs) {
        if (auto * found = dynamic_cast<graph_input_csp *>(input.get())) {
            return found;
        }
    }
    ggml_tensor * rows =
        ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I64, std::min<int64_t>(graph.n_tokens, csp->n_window));
    ggml_set_input(rows);
    ggml_set_name(rows, "csp_rows");
    return static_cast<graph_input_csp *>(graph.res->add_input(std::make_unique<graph_input_csp>(csp, rows)));
}

} // namespace

ggml_tensor * llama_csp_build_attn(const llm_graph_context & graph,
                                   ggml_tensor *             q,
                                   const ggml_tensor *       k,
                                   ggml_tensor *             sinks,
                                   float                     kq_scale,
                                   int                       il) {
    llama_csp * csp = graph.cparams.csp;

    const auto layer =
        std::find_if(csp->layers.begin(), csp->layers.end(), [&](const llama_csp_layer & l) { return l.il == il; });
    if (layer == csp->layers.end() || k->view_src != layer->k) {
        return sinks; // attention over something else than this cache
    }
    if (q->ne[0] == layer->head_dim_k && q->ne[1] == csp->n_head && q->ne[2] == graph.n_tokens) {
        const auto *  input = find_or_add_input(graph, csp);
        const int64_t n_row = input->rows->ne[0];

        ggml_tensor * last =
            ggml_view_3d(graph.ctx0, q, q->ne[0], q->ne[1], n_row, q->nb[1], q->nb[2], (q->ne[2] - n_row) * q->nb[2]);
        if (!ggml_is_contiguous(last)) {
            last = ggml_cont(graph.ctx0, last);
        }
        last = ggml_reshape_2d(graph.ctx0, last, q->ne[0] * q->ne[1], n_row);
        ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, layer->ring, last, input->rows));
        layer->kq_scale = kq_scale;
    }
    return csp->use_sinks ? layer->sinks : sinks;
}

void llama_csp::forget_queries(int32_t first) {
    serial = 0;
    for (auto & query : ring) {
        if (query.cell >= first) {
            query = llama_csp_query();
        }
        query.n_seen = std::min(query.n_seen, first);
        serial       = std::max(serial, query.serial + 1); // the next ones take the rows of those that went
    }
}

void llama_csp::push_queries(const llama_ubatch & ubatch, int64_t n_row, int64_t * rows) {
    const auto last = std::max_element(ubatch_cells.begin(), ubatch_cells.end());
    for (int64_t i = 0; i < n_row; ++i, ++serial) {
        const uint32_t cell = ubatch_cells[ubatch.n_tokens - n_row + i];
        const uint32_t seen = ctx->get_causal_attn() ? cell : *last;

        rows[i]       = serial % n_window;
        ring[rows[i]] = { serial, (int32_t) cell, (int32_t) seen + 1, cell_tag[cell] };
    }
}
