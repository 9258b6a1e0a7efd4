// llama-csp-window.cpp - the observation window: record the last queries of every layer, and score cells with them.

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-csp-hooks.h"
#include "llama-csp-impl.h"
#include "llama-graph.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <new>
#include <stdexcept>

//
// record
//

namespace {

// Ring rows of the queries of a ubatch, one input per graph.
class graph_input_csp : public llm_graph_input_i {
  public:
    graph_input_csp(llama_csp * csp, ggml_tensor * rows) : csp(csp), rows(rows) {}

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
    ggml_tensor * rows = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I64, std::min<int64_t>(graph.n_tokens, csp->n_window));
    ggml_set_input(rows);
    ggml_set_name(rows, "csp_rows");
    return static_cast<graph_input_csp *>(graph.res->add_input(std::make_unique<graph_input_csp>(csp, rows)));
}

} // namespace

ggml_tensor * llama_csp_build_attn(
        const llm_graph_context & graph, ggml_tensor * q, const ggml_tensor * k, ggml_tensor * sinks, float kq_scale, int il) {
    llama_csp * csp = graph.cparams.csp;

    const auto layer = std::find_if(csp->layers.begin(), csp->layers.end(), [&](const llama_csp_layer & l) { return l.il == il; });
    if (layer == csp->layers.end() || k->view_src != layer->k) {
        return sinks; // attention over something else than this cache
    }
    if (q->ne[0] == layer->head_dim_k && q->ne[1] == csp->n_head && q->ne[2] == graph.n_tokens) {
        const auto *  input = find_or_add_input(graph, csp);
        const int64_t n_row = input->rows->ne[0];

        ggml_tensor * last = ggml_view_3d(graph.ctx0, q, q->ne[0], q->ne[1], n_row, q->nb[1], q->nb[2], (q->ne[2] - n_row)*q->nb[2]);
        if (!ggml_is_contiguous(last)) {
            last = ggml_cont(graph.ctx0, last);
        }
        last = ggml_reshape_2d(graph.ctx0, last, q->ne[0]*q->ne[1], n_row);
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

        rows[i]             = serial % n_window;
        ring[rows[i]]       = { serial, (int32_t) cell, (int32_t) seen + 1, cell_tag[cell] };
    }
}

//
// score
//

namespace {

// Cells that a graph reads, masked from n_cell on: the fast matrix kernels want multiples of 4 to 16.
int64_t padded_cells(const llama_csp & csp) {
    return std::min<int64_t>(GGML_PAD(csp.n_cell(), 64), csp.kv->get_size());
}

// The graph that scores one layer.
struct score_graph {
    ggml_context_ptr ctx;
    ggml_cgraph *    graph = nullptr;
    ggml_tensor *    mask  = nullptr; // [n_pad, n_window]: 0 where a query saw the cell, else -inf
    ggml_tensor *    sinks = nullptr; // [n_head]: ln n, or null
    ggml_tensor *    votes = nullptr; // [n_modality, n_vote, n_head_kv], or [n_vote, n_modality, n_head_kv]
    ggml_tensor *    out   = nullptr; // [n_cell, n_modality, n_head_kv]
};

// Heads that are scored at a time: all on a device; on the host few enough for their attention rows to stay in the cache
// of a core.
int64_t heads_at_a_time(const llama_csp & csp, const llama_csp_layer & layer, int64_t n_row) {
    constexpr int64_t max_values = 1 << 18; // 1 MiB

    if (!ggml_backend_buffer_is_host(layer.k->buffer)) {
        return csp.n_head_kv;
    }
    return std::clamp<int64_t>(max_values/(n_row*padded_cells(csp)), 1, csp.n_head_kv);
}

score_graph build_score_graph(const llama_csp & csp, const llama_csp_layer & layer, ggml_backend_t backend, bool use_sinks) {
    const int64_t n_cell   = csp.n_cell();
    const int64_t n_pad    = padded_cells(csp);
    const int64_t n_gqa    = csp.n_head/csp.n_head_kv;
    const int64_t n_vote   = csp.n_window*n_gqa;
    const int64_t head_dim = layer.head_dim_k;
    const int64_t n_step   = heads_at_a_time(csp, layer, n_vote);
    const size_t  n_nodes  = 16*(2 + (csp.n_head_kv + n_step - 1)/n_step);

    score_graph g;
    g.ctx.reset(ggml_init({ n_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false), nullptr, /*.no_alloc =*/ true }));
    if (!g.ctx) {
        throw std::bad_alloc();
    }
    ggml_context * ctx = g.ctx.get();
    g.graph            = ggml_new_graph_custom(ctx, n_nodes, false);

    const auto new_3d = [&](int64_t ne0, int64_t ne1, int64_t ne2) { return ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2); };

    const ggml_tensor * probe    = ggml_out_prod(ctx, new_3d(n_pad, n_vote, n_step), new_3d(csp.n_modality, n_vote, n_step));
    const bool          out_prod = ggml_backend_supports_op(backend, probe) && getenv("LLAMA_CSP_NO_OUT_PROD") == nullptr; // not on Metal

    g.mask  = new_3d(n_pad, csp.n_window, 1);
    g.sinks = use_sinks ? new_3d(csp.n_head, 1, 1) : nullptr;
    g.votes = out_prod ? new_3d(csp.n_modality, n_vote, csp.n_head_kv) : new_3d(n_vote, csp.n_modality, csp.n_head_kv);
    g.out   = new_3d(n_cell, csp.n_modality, csp.n_head_kv);
    for (ggml_tensor * t : { g.mask, g.sinks, g.votes, g.out }) {
        if (t) {
            ggml_set_input(t);
        }
    }
    ggml_set_output(g.out);

    const auto heads_of = [&](ggml_tensor * t, int64_t h, int64_t n) {
        return ggml_view_3d(ctx, t, t->ne[0], t->ne[1], n, t->nb[1], t->nb[2], h*t->nb[2]);
    };
    for (int64_t h = 0; h < csp.n_head_kv; h += n_step) {
        const int64_t n       = std::min(n_step, csp.n_head_kv - h);
        const size_t  k_size  = ggml_row_size(layer.k->type, head_dim);
        const size_t  q_size  = ggml_row_size(layer.ring->type, head_dim);

        // the attention rows of the window, [n_pad, n_window, n*n_gqa], by the operations that attention itself uses
        ggml_tensor * k = ggml_view_3d(ctx, layer.k,    head_dim, n_pad,        n,       layer.k->nb[1],    k_size, h*k_size);
        ggml_tensor * q = ggml_view_3d(ctx, layer.ring, head_dim, csp.n_window, n*n_gqa, layer.ring->nb[1], q_size, h*n_gqa*q_size);
        ggml_tensor * p = ggml_mul_mat(ctx, k, q);
        ggml_prec_set_acc(p, GGML_PREC_F32);
        p = ggml_soft_max_ext(ctx, p, g.mask, layer.kq_scale, 0.0f);
        if (use_sinks) {
            ggml_soft_max_add_sinks(p, ggml_view_1d(ctx, g.sinks, n*n_gqa, h*n_gqa*g.sinks->nb[0]));
        }

        // sum over the queries of a modality and mean over the heads of a group: one contraction with the votes
        ggml_tensor * votes = heads_of(g.votes, h, n);
        p                   = ggml_reshape_3d(ctx, p, n_pad, n_vote, n);
        p = out_prod ? ggml_out_prod(ctx, p, votes) : ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, p)), votes);
        p = ggml_view_3d(ctx, p, n_cell, csp.n_modality, n, p->nb[1], p->nb[2], 0);
        ggml_build_forward_expand(g.graph, ggml_cpy(ctx, p, heads_of(g.out, h, n)));
    }
    return g;
}

void set_input(ggml_tensor * t, const std::vector<float> & data) {
    ggml_backend_tensor_set(t, data.data(), 0, data.size()*sizeof(float));
}

} // namespace

int32_t llama_csp::compute_scores(int32_t n_obs, float softmax_n, float * scores) {
    const int64_t n_cell = this->n_cell();
    const int64_t n_pad  = padded_cells(*this);
    const int64_t n_gqa  = n_head/n_head_kv;
    const int64_t n_vote = n_window*n_gqa;

    for (const auto & layer : layers) {
        if (layer.kq_scale == 0.0f) {
            return llama_csp_fail(LLAMA_CSP_ERR_STATE, "layer %d has recorded no queries: decode tokens first", layer.il);
        }
    }

    // the last n_obs queries that still have a cell
    std::vector<int64_t> serials;
    for (const auto & query : ring) {
        if (query.serial >= 0 && query.cell < n_cell) {
            serials.push_back(query.serial);
        }
    }
    if (serials.empty()) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the window is empty: decode tokens first");
    }
    std::sort(serials.begin(), serials.end(), std::greater<>());
    const int64_t oldest = serials[std::min<size_t>(n_obs, serials.size()) - 1];

    // a ring row that does not vote sees cell 0, because a row must not be masked altogether
    std::vector<float> mask(n_pad*n_window, -INFINITY);            // [n_window][n_pad]
    std::vector<float> votes  (n_head_kv*n_vote*n_modality, 0.0f); // [n_head_kv][n_vote][n_modality]
    std::vector<float> votes_t(n_head_kv*n_vote*n_modality, 0.0f); // [n_head_kv][n_modality][n_vote]
    for (int64_t r = 0; r < n_window; ++r) {
        const auto & query = ring[r];
        const bool   voter = query.serial >= oldest && query.cell < n_cell;
        std::fill_n(mask.begin() + r*n_pad, voter ? std::min<int64_t>(query.n_seen, n_cell) : 1, 0.0f);
        for (int64_t h = 0; voter && h < n_head_kv; ++h) {
            for (int64_t i = r; i < n_vote; i += n_window) {
                votes  [(h*n_vote + i)*n_modality + query.tag] = 1.0f/n_gqa;
                votes_t[(h*n_modality + query.tag)*n_vote + i] = 1.0f/n_gqa;
            }
        }
    }
    const std::vector<float> sinks(n_head, std::log(softmax_n));

    synchronize();

    std::map<ggml_backend_t, ggml_gallocr_ptr> allocs; // compute buffers, shared by the layers of a backend
    for (const auto & layer : layers) {
        ggml_backend_t backend = backend_of(layer.k);
        score_graph    g       = build_score_graph(*this, layer, backend, softmax_n > 0.0f);

        auto & alloc = allocs[backend];
        if (!alloc) {
            alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
        }
        if (!alloc || !ggml_gallocr_alloc_graph(alloc.get(), g.graph)) {
            throw std::bad_alloc();
        }
        set_input(g.mask, mask);
        set_input(g.votes, g.votes->ne[0] == n_vote ? votes_t : votes);
        if (g.sinks) {
            set_input(g.sinks, sinks);
        }
        if (ggml_backend_graph_compute(backend, g.graph) != GGML_STATUS_SUCCESS) {
            throw std::runtime_error(std::string(ggml_backend_name(backend)) + " failed to compute the scores");
        }
        ggml_backend_tensor_get(g.out, scores, 0, ggml_nbytes(g.out));
        scores += n_head_kv*n_modality*n_cell;
    }
    return LLAMA_CSP_OK;
}

int32_t llama_csp_scores(llama_csp * csp, int32_t n_obs, float softmax_n, float * scores, size_t n_value) {
    if (csp == nullptr || scores == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or scores is NULL");
    }
    if (n_obs < 1 || n_obs > csp->n_window) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_obs is %d, allowed are 1 .. %d (n_window)", n_obs, csp->n_window);
    }
    if (!(softmax_n >= 0.0f) || !std::isfinite(softmax_n)) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "softmax_n is %g, allowed are finite values >= 0", softmax_n);
    }
    const size_t needed = csp->n_row()*csp->n_modality*csp->n_cell();
    if (n_value != needed) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_value is %zu, needed are %zu (n_layer*n_head_kv*n_modality*n_cell)", n_value, needed);
    }
    if (const int32_t status = csp->check_sequence()) {
        return status;
    }
    try {
        return csp->compute_scores(n_obs, softmax_n, scores);
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory to score %d cells", csp->n_cell());
    } catch (const std::exception & e) {
        return llama_csp_fail(LLAMA_CSP_ERR_COMPUTE, "%s", e.what());
    }
}
