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

    void set_input(const llama_ubatch *) override {
        std::vector<int64_t> data(ggml_nelements(rows));
        for (size_t s = 0; s < csp->ubatch_streams.size(); ++s) {
            csp->push_queries(csp->streams[csp->ubatch_streams[s]], rows->ne[0], data.data() + s * rows->ne[0]);
        }
        ggml_backend_tensor_set(rows, data.data(), 0, ggml_nbytes(rows));
    }

    // upstream compares the number of tokens, and the sequences where there are several streams; attaching and
    // detaching drop all graphs
    bool can_reuse(const llm_graph_params &) override { return true; }

    llama_csp *   csp;
    ggml_tensor * rows; // [n_row, n_stream of the ubatch] i64, in the ring of a stream
};

ggml_tensor * find_or_add_rows(const llm_graph_context & graph, llama_csp * csp, int64_t n_stream) {
    for (const auto & input : graph.res->inputs) {
        if (auto * found = dynamic_cast<graph_input_csp *>(input.get())) {
            return found->rows;
        }
    }
    const int64_t n_row = std::min<int64_t>(graph.n_tokens / n_stream, csp->n_window);
    ggml_tensor * rows  = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_I64, n_row, n_stream);
    ggml_set_input(rows);
    ggml_set_name(rows, "csp_rows");
    graph.res->add_input(std::make_unique<graph_input_csp>(csp, rows));
    return rows;
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
    const int64_t n_stream = csp->streams.size() == 1 ? 1 : graph.ubatch.n_seqs_unq; // of the ubatch
    if (q->ne[0] == layer->head_dim_k && q->ne[1] == csp->n_head && q->ne[2] == graph.n_tokens &&
        k->ne[3] == n_stream) {
        const int64_t n_token = q->ne[2] / n_stream; // of a stream
        ggml_tensor * rows    = find_or_add_rows(graph, csp, n_stream);

        if (q->nb[0] != sizeof(float) || q->nb[1] != q->ne[0] * sizeof(float)) {
            q = ggml_cont(graph.ctx0, q); // heads are not next to each other
        }
        ggml_tensor * last = ggml_view_3d(graph.ctx0, q, q->ne[0] * q->ne[1], rows->ne[0], n_stream, q->nb[2],
                                          n_token * q->nb[2], (n_token - rows->ne[0]) * q->nb[2]);

        ggml_tensor * ring = layer->ring;
        if (ring->ne[2] != n_stream) {
            const size_t first = k->view_offs / layer->k->nb[2]; // stream
            ring = ggml_view_3d(graph.ctx0, ring, ring->ne[0], ring->ne[1], n_stream, ring->nb[1], ring->nb[2],
                                first * ring->nb[2]);
        }
        ggml_build_forward_expand(graph.gf, ggml_set_rows(graph.ctx0, ring, last, rows));
        layer->kq_scale = kq_scale;
    }
    return csp->use_sinks ? layer->sinks : sinks;
}

void llama_csp_stream::forget_queries(int32_t first) {
    serial = 0;
    for (auto & query : ring) {
        if (query.cell >= first) {
            query = llama_csp_query();
        }
        query.n_seen = std::min(query.n_seen, first);
        serial       = std::max(serial, query.serial + 1); // the next ones take the rows of those that went
    }
}

void llama_csp::push_queries(llama_csp_stream & stream, int64_t n_row, int64_t * rows) {
    const auto & cells = stream.ubatch_cells;
    const auto   last  = std::max_element(cells.begin(), cells.end());

    const bool causal =
        ctx->get_causal_attn() || kv->hparams.non_causal_type == LLAMA_NON_CAUSAL_TYPE_SWA_ONLY; // of other layers
    for (int64_t i = 0; i < n_row; ++i, ++stream.serial) {
        const uint32_t cell = cells[cells.size() - n_row + i];
        const uint32_t seen = causal ? cell : *last;

        rows[i]              = stream.serial % n_window;
        stream.ring[rows[i]] = { stream.serial, (int32_t) cell, (int32_t) seen + 1, stream.cell_tag[cell] };
    }
}
