// llama-csp-rows.cpp - rows of the cache as floats: for policies that look at more than scores.

#include "ggml-cpp.h"
#include "llama-csp-impl.h"
#include "llama-csp-score-host.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace {

// K or V of a layer in one stream.
struct cell_rows {
    ggml_tensor * t;
    size_t        offset; // of the stream, in bytes
    int64_t       n_head;
    int64_t       head_dim;
    int64_t       n_cell_max;
    int64_t       n_cell;
    bool          transposed; // element (cell, i) at i*n_cell_max + cell

    size_t head_size() const { return ggml_row_size(t->type, head_dim); }
    // bytes from the first cell to the last
    size_t size() const { return transposed ? t->nb[2] : n_cell * t->nb[1]; }
};

cell_rows rows_of(const llama_csp & csp, const llama_csp_stream & stream, int32_t layer, bool is_v) {
    const auto &  l = csp.layers[layer];
    ggml_tensor * t = is_v ? l.v : l.k;
    return { t,
             stream.index * t->nb[2],
             csp.n_head_kv,
             is_v ? l.head_dim_v : l.head_dim_k,
             (int64_t) stream.cell_tag.size(),
             stream.n_cell(),
             is_v && csp.v_is_transposed() };
}

// The bytes of the rows: where they lie on the host, or a copy of them.
const char * read_bytes(const cell_rows & r, std::vector<char> & copy) {
    if (ggml_backend_buffer_is_host(r.t->buffer)) {
        return static_cast<const char *>(r.t->data) + r.offset;
    }
    copy.resize(r.size());
    ggml_backend_tensor_get(r.t, copy.data(), r.offset, copy.size());
    return copy.data();
}

float element(ggml_type type, const char * data, int64_t i) { // transposed caches are not quantised
    switch (type) {
        case GGML_TYPE_F32:
            return reinterpret_cast<const float *>(data)[i];
        case GGML_TYPE_F16:
            return ggml_fp16_to_fp32(reinterpret_cast<const ggml_fp16_t *>(data)[i]);
        default:
            return ggml_bf16_to_fp32(reinterpret_cast<const ggml_bf16_t *>(data)[i]);
    }
}

void set_element(ggml_type type, char * data, int64_t i, float value) {
    switch (type) {
        case GGML_TYPE_F32:
            reinterpret_cast<float *>(data)[i] = value;
            break;
        case GGML_TYPE_F16:
            reinterpret_cast<ggml_fp16_t *>(data)[i] = ggml_fp32_to_fp16(value);
            break;
        default:
            reinterpret_cast<ggml_bf16_t *>(data)[i] = ggml_fp32_to_bf16(value);
    }
}

// One head in one cell; row: [head_dim]
void read_row(const cell_rows & r, const char * data, int64_t head, int64_t cell, float * row) {
    if (r.transposed) {
        for (int64_t i = 0; i < r.head_dim; ++i) {
            row[i] = element(r.t->type, data, (head * r.head_dim + i) * r.n_cell_max + cell);
        }
        return;
    }
    const char * src = data + cell * r.t->nb[1] + head * r.head_size();
    if (r.t->type == GGML_TYPE_F32) {
        memcpy(row, src, r.head_size());
    } else {
        ggml_get_type_traits(r.t->type)->to_float(src, row, r.head_dim);
    }
}

void write_row(const cell_rows & r, char * data, int64_t head, int64_t cell, const float * row) {
    if (r.transposed) {
        for (int64_t i = 0; i < r.head_dim; ++i) {
            set_element(r.t->type, data, (head * r.head_dim + i) * r.n_cell_max + cell, row[i]);
        }
        return;
    }
    char * dst = data + cell * r.t->nb[1] + head * r.head_size();
    if (r.t->type == GGML_TYPE_F32) {
        memcpy(dst, row, r.head_size());
    } else {
        ggml_quantize_chunk(r.t->type, row, dst, 0, 1, r.head_dim, nullptr);
    }
}

// Lengths of the rows of one head; norms: [n_cell]
void head_norms(const cell_rows & r, const char * data, int64_t head, float * norms) {
    if (r.transposed) { // cells lie next to each other
        std::fill(norms, norms + r.n_cell, 0.0f);
        for (int64_t i = head * r.head_dim; i < (head + 1) * r.head_dim; ++i) {
            for (int64_t cell = 0; cell < r.n_cell; ++cell) {
                const float x = element(r.t->type, data, i * r.n_cell_max + cell);
                norms[cell] += x * x;
            }
        }
        std::transform(norms, norms + r.n_cell, norms, [](float sum) { return std::sqrt(sum); });
        return;
    }
    if (llama_csp_host_scores_available() && (r.t->type == GGML_TYPE_F16 || r.t->type == GGML_TYPE_F32)) {
        llama_csp_host_head keys = {};

        keys.k        = data + head * r.head_size();
        keys.k_stride = r.t->nb[1];
        keys.k_is_f16 = r.t->type == GGML_TYPE_F16;
        keys.head_dim = r.head_dim;
        keys.n_cell   = r.n_cell;
        return llama_csp_host_norms(keys, norms);
    }
    std::vector<float> row(r.head_dim);
    for (int64_t cell = 0; cell < r.n_cell; ++cell) {
        read_row(r, data, head, cell, row.data());
        float sum = 0.0f;
        for (const float x : row) {
            sum += x * x;
        }
        norms[cell] = std::sqrt(sum);
    }
}

// What all of these functions ask first.
int32_t check(const llama_csp *         csp,
              llama_seq_id              seq_id,
              int32_t                   layer,
              int32_t                   n_layer,
              const void *              values,
              const llama_csp_stream ** stream) {
    if (csp == nullptr || values == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or the array of values is NULL");
    }
    *stream = csp->find_stream(seq_id);
    if (*stream == nullptr) {
        return csp->no_such_sequence(seq_id);
    }
    if (const int32_t status = csp->check_layers(layer, n_layer)) {
        return status;
    }
    return (*stream)->check_sequence(seq_id);
}

int32_t check_kind(int32_t kind) {
    if (kind != LLAMA_CSP_ROWS_K && kind != LLAMA_CSP_ROWS_V) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "kind is %d, allowed are %d (K) and %d (V)", kind,
                              LLAMA_CSP_ROWS_K, LLAMA_CSP_ROWS_V);
    }
    return LLAMA_CSP_OK;
}

int32_t check_size(size_t n_value, size_t n_needed, const char * shape) {
    if (n_value != n_needed) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_value is %zu, needed are %zu (%s)", n_value, n_needed, shape);
    }
    return LLAMA_CSP_OK;
}

// K or V of one layer, if all arguments are in range.
int32_t find_rows(const llama_csp * csp,
                  llama_seq_id      seq_id,
                  int32_t           layer,
                  int32_t           kind,
                  const void *      values,
                  size_t            n_value,
                  cell_rows *       r) {
    const llama_csp_stream * stream = nullptr;
    if (const int32_t status = check(csp, seq_id, layer, 1, values, &stream)) {
        return status;
    }
    if (const int32_t status = check_kind(kind)) {
        return status;
    }
    *r = rows_of(*csp, *stream, layer, kind == LLAMA_CSP_ROWS_V);
    return check_size(n_value, r->n_head * r->n_cell * r->head_dim, "n_head_kv*n_cell*head_dim");
}

} // namespace

int32_t llama_csp_norms(llama_csp *  csp,
                        llama_seq_id seq_id,
                        int32_t      layer,
                        int32_t      n_layer,
                        int32_t      kind,
                        float *      norms,
                        size_t       n_value) {
    const llama_csp_stream * stream = nullptr;
    if (const int32_t status = check(csp, seq_id, layer, n_layer, norms, &stream)) {
        return status;
    }
    if (const int32_t status = check_kind(kind)) {
        return status;
    }
    const size_t n_cell = stream->n_cell();
    if (const int32_t status =
            check_size(n_value, (size_t) n_layer * csp->n_head_kv * n_cell, "n_layer*n_head_kv*n_cell")) {
        return status;
    }
    try {
        csp->finish_copies();
        csp->synchronize();
        for (int32_t i = 0; i < n_layer; ++i) {
            const cell_rows   r = rows_of(*csp, *stream, layer + i, kind == LLAMA_CSP_ROWS_V);
            std::vector<char> copy;
            const char *      data = read_bytes(r, copy);
            llama_csp_parallel(r.n_head, csp->n_thread(),
                               [&](size_t head) { head_norms(r, data, head, norms + (i * r.n_head + head) * n_cell); });
        }
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory to read %zu cells", n_cell);
    }
    return LLAMA_CSP_OK;
}

int32_t
llama_csp_get_rows(llama_csp * csp, llama_seq_id seq_id, int32_t layer, int32_t kind, float * rows, size_t n_value) {
    cell_rows r = {};
    if (const int32_t status = find_rows(csp, seq_id, layer, kind, rows, n_value, &r)) {
        return status;
    }
    try {
        csp->finish_copies();
        csp->synchronize();
        std::vector<char> copy;
        const char *      data = read_bytes(r, copy);
        llama_csp_parallel(r.n_head, csp->n_thread(), [&](size_t head) {
            for (int64_t cell = 0; cell < r.n_cell; ++cell) {
                read_row(r, data, head, cell, rows + (head * r.n_cell + cell) * r.head_dim);
            }
        });
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory to read %lld cells", (long long) r.n_cell);
    }
    return LLAMA_CSP_OK;
}

int32_t llama_csp_set_rows(llama_csp *   csp,
                           llama_seq_id  seq_id,
                           int32_t       layer,
                           int32_t       kind,
                           const float * rows,
                           size_t        n_value) {
    cell_rows r = {};
    if (const int32_t status = find_rows(csp, seq_id, layer, kind, rows, n_value, &r)) {
        return status;
    }
    if (!std::all_of(rows, rows + n_value, [](float x) { return std::isfinite(x); })) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "rows hold a value that is not finite");
    }
    try {
        csp->finish_copies();
        csp->synchronize();
        const bool        is_host = ggml_backend_buffer_is_host(r.t->buffer);
        std::vector<char> copy;
        char *            data = const_cast<char *>(read_bytes(r, copy));
        llama_csp_parallel(r.n_head, csp->n_thread(), [&](size_t head) {
            for (int64_t cell = 0; cell < r.n_cell; ++cell) {
                write_row(r, data, head, cell, rows + (head * r.n_cell + cell) * r.head_dim);
            }
        });
        if (!is_host) {
            ggml_backend_tensor_set(r.t, data, r.offset, r.size());
        }
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory to write %lld cells", (long long) r.n_cell);
    }
    return LLAMA_CSP_OK;
}
