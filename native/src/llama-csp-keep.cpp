// llama-csp-keep.cpp - move the rows of the kept cells to the front of the cache, byte for byte.

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-csp-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

namespace {

// One stream of a K or V tensor, and the cells that each of its heads keeps.
struct rows {
    ggml_tensor *   t;
    size_t          offset; // of the stream, in bytes
    int64_t         n_head;
    int64_t         head_dim;
    int64_t         n_cell_max;
    bool            transposed; // element (cell, i) at i*n_cell_max + cell
    const int32_t * cells;      // [n_head][n_keep], ascending
    int64_t         n_keep;
    int64_t         n_cell;

    size_t head_size() const { return ggml_row_size(t->type, head_dim); } // bytes of one head in one cell
    size_t cell_size() const { return t->nb[1]; }
};

// [cell][head][head_dim]: cells ascend, so no row is overwritten before it has been read.
void move_on_host(const rows & r, char * data) {
    const size_t head_size = r.head_size();
    const size_t cell_size = r.cell_size();

    int64_t first = r.n_keep; // cells before it stay where they are, in every head
    for (int64_t h = 0; h < r.n_head; ++h) {
        int64_t j = 0;
        while (j < first && r.cells[h * r.n_keep + j] == j) {
            ++j;
        }
        first = j;
    }
    for (int64_t j = first; j < r.n_keep; ++j) {
        char * dst = data + j * cell_size;
        for (int64_t h = 0; h < r.n_head; ++h) {
            const int64_t cell = r.cells[h * r.n_keep + j];
            if (cell != j) {
                memcpy(dst + h * head_size, data + cell * cell_size + h * head_size, head_size);
            }
        }
    }
}

// [head][head_dim][cell]: four elements are read before they are written together, for every cells[j] >= j
template <typename T> void move_transposed_on_host(const rows & r, T * data) {
    for (int64_t h = 0; h < r.n_head; ++h) {
        const int32_t * cells = r.cells + h * r.n_keep;
        int64_t         first = 0;
        while (first < r.n_keep && cells[first] == first) {
            ++first;
        }
        for (int64_t i = 0; i < r.head_dim; ++i) {
            T *     row = data + (h * r.head_dim + i) * r.n_cell_max;
            int64_t j   = first;
            for (; j + 4 <= r.n_keep; j += 4) {
                const T kept[4] = { row[cells[j]], row[cells[j + 1]], row[cells[j + 2]], row[cells[j + 3]] };
                memcpy(row + j, kept, sizeof(kept));
            }
            for (; j < r.n_keep; ++j) {
                row[j] = row[cells[j]];
            }
        }
    }
}

void move_in_buffer(const rows & r, char * data) {
    if (!r.transposed) {
        move_on_host(r, data);
    } else if (ggml_type_size(r.t->type) == 2) {
        move_transposed_on_host(r, reinterpret_cast<uint16_t *>(data));
    } else {
        move_transposed_on_host(r, reinterpret_cast<uint32_t *>(data));
    }
}

// The whole stream travels to the host and back: for what a device cannot gather.
void move_through_host(const rows & r) {
    const size_t      size = r.transposed ? r.t->nb[2] : r.n_cell * r.cell_size();
    std::vector<char> data(size);
    ggml_backend_tensor_get(r.t, data.data(), r.offset, size);
    move_in_buffer(r, data.data());
    ggml_backend_tensor_set(r.t, data.data(), r.offset, size);
}

// Gathers the rows into a buffer of the device and copies them back, as 32-bit integers: no value is converted.
void move_on_device(const rows & r, ggml_backend_t backend, ggml_gallocr_t alloc) {
    constexpr size_t max_nodes = 8;

    ggml_context_ptr ctx{ ggml_init({ max_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(max_nodes, false),
                                      nullptr, /*.no_alloc =*/true }) };
    if (!ctx) {
        throw std::bad_alloc();
    }
    const int64_t n_word = r.head_size() / sizeof(int32_t);

    const auto view_as_words = [&](int64_t n_row) {
        ggml_tensor * view = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_word, n_row);
        view->view_src     = r.t;
        view->view_offs    = r.offset;
        view->op           = GGML_OP_VIEW;
        view->src[0]       = r.t;
        ggml_backend_view_init(view);
        return view;
    };
    ggml_tensor * index = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, r.n_head * r.n_keep);
    ggml_set_input(index);
    ggml_tensor * kept = ggml_get_rows(ctx.get(), view_as_words(r.n_head * r.n_cell), index);
    ggml_tensor * back = ggml_cpy(ctx.get(), kept, view_as_words(r.n_head * r.n_keep));

    ggml_cgraph * graph = ggml_new_graph_custom(ctx.get(), max_nodes, false);
    ggml_build_forward_expand(graph, back);
    if (!ggml_gallocr_alloc_graph(alloc, graph)) {
        throw std::bad_alloc();
    }

    std::vector<int32_t> index_data(r.n_head * r.n_keep);
    for (int64_t j = 0; j < r.n_keep; ++j) {
        for (int64_t h = 0; h < r.n_head; ++h) {
            index_data[j * r.n_head + h] = r.cells[h * r.n_keep + j] * r.n_head + h;
        }
    }
    ggml_backend_tensor_set(index, index_data.data(), 0, ggml_nbytes(index));
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(std::string(ggml_backend_name(backend)) + " failed to move the kept rows");
    }
}

} // namespace

void llama_csp::move_rows(const llama_csp_stream & stream, const int32_t * cells, int32_t n_keep) {
    std::vector<rows> host;
    std::vector<rows> device;
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto &    layer = layers[i];
        const int32_t * first = cells + i * n_head_kv * n_keep;
        for (const bool is_v : { false, true }) {
            ggml_tensor * t = is_v ? layer.v : layer.k;
            const rows    r = { t,
                                stream.index * t->nb[2],
                                n_head_kv,
                                is_v ? layer.head_dim_v : layer.head_dim_k,
                                kv->get_size(),
                                is_v && kv->v_trans,
                                first,
                                n_keep,
                                stream.n_cell() };
            (ggml_backend_buffer_is_host(t->buffer) ? host : device).push_back(r);
        }
    }

    synchronize();

    llama_csp_parallel(host.size(), n_thread(), [&](size_t i) {
        move_in_buffer(host[i], static_cast<char *>(host[i].t->data) + host[i].offset);
    });

    ggml_gallocr_ptr alloc;
    ggml_backend_t   alloc_backend = nullptr;
    for (const auto & r : device) {
        if (r.transposed || r.head_size() % sizeof(int32_t) != 0) {
            move_through_host(r);
            continue;
        }
        ggml_backend_t backend = backend_of(r.t);
        if (backend != alloc_backend) {
            alloc.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
            alloc_backend = backend;
        }
        move_on_device(r, backend, alloc.get());
    }
}

// Cell j now stands for another token in every head. Upstream needs one position per cell: the largest over the heads
// ascends with j, lies before every new token, and ends with the position of the last token.
void llama_csp::move_cells(llama_csp_stream & stream, const int32_t * cells, int32_t n_keep) {
    auto &       kv_cells = *stream.cells;
    const auto   last     = kv_cells.ext_get(stream.n_cell() - 1);
    const auto   seq_id   = kv_cells.seq_get(0);
    const size_t n_value  = n_row() * n_keep;

    std::vector<int32_t> pos(n_value);
    std::vector<uint8_t> tag(n_value);
    for (size_t row = 0; row < n_row(); ++row) {
        for (int32_t j = 0; j < n_keep; ++j) {
            const size_t i = row * n_keep + j;
            pos[i]         = stream.pos_at(row, cells[i]);
            tag[i]         = stream.tag_at(row, cells[i]);
        }
    }

    kv_cells.reset();
    for (int32_t j = 0; j < n_keep; ++j) {
        llama_pos max = -1;
        for (size_t row = 0; row < n_row(); ++row) {
            max = std::max(max, pos[row * n_keep + j]);
        }
        kv_cells.pos_set(j, max);
        kv_cells.seq_add(j, seq_id);
    }
    kv_cells.ext_set(n_keep - 1, last); // the place in the picture, where the last token belongs to one
    kv->v_heads[stream.index] = n_keep;

    stream.kept_pos    = std::move(pos);
    stream.kept_tag    = std::move(tag);
    stream.n_last_kept = n_keep;
    stream.forget_queries(0);
}

int32_t llama_csp_keep(llama_csp * csp, llama_seq_id seq_id, const int32_t * cells, int32_t n_keep) {
    if (csp == nullptr || cells == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or cells is NULL");
    }
    auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return csp->no_such_sequence(seq_id);
    }
    if (const int32_t status = stream->check_sequence(seq_id)) {
        return status;
    }
    const int32_t n_cell = stream->n_cell();
    if (n_keep < 1 || n_keep > n_cell) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_keep is %d, allowed are 1 .. %d (cells in use)", n_keep,
                              n_cell);
    }
    for (size_t row = 0; row < csp->n_row(); ++row) {
        const int32_t * list = cells + row * n_keep;
        for (int32_t j = 0; j < n_keep; ++j) {
            if (list[j] < 0 || list[j] >= n_cell || (j > 0 && list[j] <= list[j - 1])) {
                return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "cells[%zu][%d] is %d: lists ascend within 0 .. %d", row,
                                      j, list[j], n_cell - 1);
            }
        }
        if (list[n_keep - 1] != n_cell - 1) {
            return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "cells[%zu] ends with %d: every list keeps the last cell, %d",
                                  row, list[n_keep - 1], n_cell - 1);
        }
    }
    if (n_keep == n_cell) {
        return LLAMA_CSP_OK; // every cell stays: nothing to do, and the window stays too
    }
    try {
        csp->finish_copies();
        csp->move_rows(*stream, cells, n_keep);
        csp->move_cells(*stream, cells, n_keep);
    } catch (const std::exception & e) {
        csp->ctx->get_memory()->seq_rm(seq_id, -1, -1); // rows are half moved
        return llama_csp_fail(LLAMA_CSP_ERR_COMPUTE, "%s; sequence %d has been removed", e.what(), seq_id);
    }
    return LLAMA_CSP_OK;
}
