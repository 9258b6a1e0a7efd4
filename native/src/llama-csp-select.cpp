// llama-csp-select.cpp - the CSP rule: two rankings, each with its own share of the cells. No model, no cache.

#include "llama-csp-impl.h"

#include <algorithm>
#include <new>

namespace {

// Ranks cells by score, best first; ties go to the earlier cell. Cells with a score of 0 are not ranked.
struct ranking {
    const float * score;

    // adds up to n_take unkept cells to kept, returns how many
    int32_t take(int32_t n_take, std::vector<uint8_t> & kept, std::vector<int32_t> & candidates) const {
        candidates.clear();
        for (int32_t cell = 0; cell < (int32_t) kept.size(); ++cell) {
            if (!kept[cell] && score[cell] > 0.0f) {
                candidates.push_back(cell);
            }
        }
        n_take = std::min<int32_t>(n_take, candidates.size());

        const auto better = [&](int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; };
        std::nth_element(candidates.begin(), candidates.begin() + n_take, candidates.end(), better);
        for (int32_t i = 0; i < n_take; ++i) {
            kept[candidates[i]] = 1;
        }
        return n_take;
    }
};

void select_row(const llama_csp_stream &        stream,
                int32_t                         n_modality,
                const llama_csp_select_params & params,
                size_t                          row,
                const float *                   scores,
                const uint8_t *                 pinned,
                int32_t *                       cells,
                int32_t                         n_keep) {
    const int32_t n_cell = stream.n_cell();

    std::vector<float>   self(n_cell);
    std::vector<float>   cross(n_cell, 0.0f);
    std::vector<uint8_t> kept(n_cell, 0);
    std::vector<int32_t> candidates;
    int32_t              n_place = n_keep;

    for (int32_t cell = 0; cell < n_cell; ++cell) {
        const int32_t tag = stream.tag_at(row, cell);
        for (int32_t m = 0; m < n_modality; ++m) {
            const float score = scores[m * n_cell + cell];
            if (m == tag) {
                self[cell] = score;
            } else {
                cross[cell] += score;
            }
        }
        kept[cell] = cell < params.n_sink || cell >= n_cell - params.n_recent || (pinned && pinned[cell]);
        n_place -= kept[cell];
    }

    const int64_t k_past  = (int64_t) params.k_self + params.k_cross;
    const int32_t k_cross = k_past == 0 ? 0 : (int32_t) (params.k_cross * (int64_t) n_place / k_past);
    const int32_t k_self  = n_place - k_cross;

    const ranking by_self  = { self.data() };
    const ranking by_cross = { cross.data() };

    n_place -= by_self.take(k_self, kept, candidates);
    n_place -= by_cross.take(k_cross, kept, candidates);
    n_place -= by_cross.take(n_place, kept, candidates); // where self ran out of cells
    n_place -= by_self.take(n_place, kept, candidates);  // where cross ran out of cells

    for (int32_t cell = 0; cell < n_cell; ++cell) {
        if (!kept[cell] && n_place > 0) { // nobody voted for it
            --n_place;
            kept[cell] = 1;
        }
        if (kept[cell]) {
            *cells++ = cell;
        }
    }
}

} // namespace

int32_t llama_csp_select(const llama_csp *       csp,
                         llama_seq_id            seq_id,
                         int32_t                 layer,
                         int32_t                 n_layer,
                         llama_csp_select_params params,
                         const float *           scores,
                         const uint8_t *         pinned,
                         int32_t *               cells,
                         size_t                  n_value) {
    if (csp == nullptr || scores == nullptr || cells == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp, scores or cells is NULL");
    }
    const auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return csp->no_such_sequence(seq_id);
    }
    if (const int32_t status = csp->check_layers(layer, n_layer)) {
        return status;
    }
    if (params.k_self < 0 || params.k_cross < 0 || params.n_recent < 1 || params.n_sink < 0) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT,
                              "k_self %d, k_cross %d, n_recent %d, n_sink %d: allowed are values >= 0, n_recent >= 1",
                              params.k_self, params.k_cross, params.n_recent, params.n_sink);
    }
    if (const int32_t status = stream->check_sequence(seq_id)) {
        return status;
    }
    const int64_t n_cell = stream->n_cell();
    const int64_t n_keep = std::min<int64_t>(n_cell, (int64_t) params.k_self + params.k_cross + params.n_recent);
    const size_t  n_row  = (size_t) n_layer * csp->n_head_kv;
    if (n_value != n_row * n_keep) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_value is %zu, needed are %zu (n_layer*n_head_kv*n_keep)",
                              n_value, n_row * (size_t) n_keep);
    }
    for (size_t row = 0; row < n_row; ++row) {
        int64_t n_protected = 0;
        for (int64_t cell = 0; cell < n_cell; ++cell) {
            n_protected +=
                cell < params.n_sink || cell >= n_cell - params.n_recent || (pinned && pinned[row * n_cell + cell]);
        }
        if (n_protected > n_keep) {
            return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT,
                                  "row %zu: %lld recent, sink and pinned cells, but a budget of %lld", row,
                                  (long long) n_protected, (long long) n_keep);
        }
    }
    try {
        llama_csp_parallel(n_row, csp->n_thread(), [&](size_t row) {
            select_row(*stream, csp->n_modality, params, (size_t) layer * csp->n_head_kv + row,
                       scores + row * csp->n_modality * n_cell, pinned ? pinned + row * n_cell : nullptr,
                       cells + row * n_keep, n_keep);
        });
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory to rank %lld cells", (long long) n_cell);
    }
    return LLAMA_CSP_OK;
}
