// llama-csp-score-host.cpp - scores on the CPU. Keys times queries is a matrix product with few columns (the window):
// the columns lie in vector registers, so that nothing is summed across lanes until the votes are counted. ggml's
// kernels, made for one column or for many, reach about half of this speed here.
//
// Compiled for the machine where the build is (GGML_NATIVE), like ggml's own kernels.

#include "llama-csp-score-host.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#include <immintrin.h>
#define CSP_VECTORS
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define CSP_VECTORS
#endif

#ifndef CSP_VECTORS

bool llama_csp_host_scores_available() {
    return false;
}

void llama_csp_host_scores(const llama_csp_host_head &, int32_t, float *) {}

void llama_csp_host_norms(const llama_csp_host_head &, float *) {}

#else

namespace {

// Vectors of the machine, and the cells whose products fit into its registers at a time.
#if defined(__AVX512F__)
constexpr int N_LANE = 16;
constexpr int N_TILE = 8;
#elif defined(__AVX2__)
constexpr int N_LANE = 8;
constexpr int N_TILE = 3;
#else
constexpr int N_LANE = 4;
constexpr int N_TILE = 3;
#endif
constexpr int N_QUERY = 32; // queries at a time
constexpr int N_VEC   = N_QUERY / N_LANE;
constexpr int N_AHEAD = 8;  // cells to prefetch
constexpr int N_BLOCK = 64; // cells whose sum is rounded apart from the others

typedef float   vec __attribute__((vector_size(N_LANE * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(N_LANE * sizeof(int32_t))));

struct row { // one value for each query
    vec v[N_VEC];
};

inline __attribute__((always_inline)) vec splat(float x) {
    return x - vec{};
}

// exp for x <= 0; relative error below 2e-7, 0 below -87
inline __attribute__((always_inline)) vec exp_negative(const vec & x) {
    const vec magic = splat(12582912.0f); // 1.5*2^23: adding it rounds to an integer, in the low bits
    const vec c     = x < -87.0f ? splat(-87.0f) : x;
    const vec z     = c * 1.44269504f + magic;
    const vec n     = z - magic;
    const vec r     = (c - n * 0.693145752f) - n * 1.42860677e-6f;
    vec       p     = r * 1.38888889e-3f + 8.33333333e-3f;
    p               = p * r + 4.16666667e-2f;
    p               = p * r + 1.66666667e-1f;
    p               = p * r + 0.5f;
    p               = p * r * r + (r + 1.0f);
    const vec y     = (vec) ((ivec) p + ((ivec) z << 23));
    return x < -87.0f ? vec{} : y;
}

inline void to_float(const char * src, bool is_f16, int64_t n, float * dst) {
    if (!is_f16) {
        memcpy(dst, src, n * sizeof(float));
        return;
    }
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (src + 2 * i))));
    }
#endif
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (src + 2 * i))));
    }
    for (; i < n; ++i) {
        uint16_t half;
        memcpy(&half, src + 2 * i, sizeof(half));
        dst[i] = _cvtsh_ss(half);
    }
#else
    for (; i < n; ++i) {
        __fp16 half;
        memcpy(&half, src + 2 * i, sizeof(half));
        dst[i] = half;
    }
#endif
}

// Products of n cells with all queries: out[cell] = sum over i of k[cell][i] * q[i]
template <int n>
inline __attribute__((always_inline)) void multiply(const float * k, const row * q, int64_t head_dim, row * out) {
    vec sum[n][N_VEC] = {};
    for (int64_t i = 0; i < head_dim; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < n; ++c) {
#pragma GCC unroll 8
            for (int v = 0; v < N_VEC; ++v) {
                sum[c][v] += q[i].v[v] * k[c * head_dim + i];
            }
        }
    }
    for (int c = 0; c < n; ++c) {
        memcpy(out[c].v, sum[c], sizeof(sum[c]));
    }
}

struct scratch {
    std::vector<float> k; // [N_TILE][head_dim]
    std::vector<row>   q; // [head_dim]
    std::vector<row>   x; // [n_cell]
};

void score_queries(const llama_csp_host_head & head,
                   size_t                      first,
                   size_t                      n_query,
                   int32_t                     n_modality,
                   scratch &                   tmp,
                   float *                     scores) {
    const int64_t n_cell   = head.n_cell;
    const int64_t head_dim = head.head_dim;

    // columns without a query see the first cell, and have no vote
    int32_t n_seen[N_QUERY];
    std::fill(n_seen, n_seen + N_QUERY, 1);
    std::fill(tmp.q.begin(), tmp.q.end(), row());
    for (size_t j = 0; j < n_query; ++j) {
        n_seen[j] = head.n_seen[first + j];
        for (int64_t i = 0; i < head_dim; ++i) {
            tmp.q[i].v[j / N_LANE][j % N_LANE] = head.q[first + j][i];
        }
    }
    ivec seen[N_VEC];
    memcpy(seen, n_seen, sizeof(n_seen));
    const int32_t all_seen = *std::min_element(n_seen, n_seen + N_QUERY);

    // products and their maximum
    const size_t k_size = head_dim * (head.k_is_f16 ? 2 : 4);
    row          max;
    for (vec & m : max.v) {
        m = splat(-INFINITY);
    }
    for (int64_t cell = 0; cell < n_cell; cell += N_TILE) {
        const int64_t n = std::min<int64_t>(N_TILE, n_cell - cell);
        for (int64_t c = 0; c < n; ++c) {
            const char * k = head.k + (cell + c) * head.k_stride;
            if (cell + c + N_AHEAD <
                n_cell) { // the keys of a head lie pages apart: the hardware does not see them coming
                for (size_t i = 0; i < k_size; i += 64) {
                    __builtin_prefetch(k + N_AHEAD * head.k_stride + i);
                }
            }
            to_float(k, head.k_is_f16, head_dim, tmp.k.data() + c * head_dim);
        }
        row x[N_TILE];
        multiply<N_TILE>(tmp.k.data(), tmp.q.data(), head_dim, x); // beyond n: of older keys, not used
        for (int64_t c = 0; c < n; ++c) {
            for (int v = 0; v < N_VEC; ++v) {
                vec y = x[c].v[v] * head.scale;
                if (cell + c >= all_seen) {
                    y = seen[v] > (int32_t) (cell + c) ? y : splat(-INFINITY);
                }
                max.v[v]             = y > max.v[v] ? y : max.v[v];
                tmp.x[cell + c].v[v] = y;
            }
        }
    }

    // softmax
    row sink, total;
    for (int j = 0; j < N_QUERY; ++j) {
        sink.v[j / N_LANE][j % N_LANE] = j < (int) n_query ? head.sink[first + j] : -INFINITY;
    }
    for (int v = 0; v < N_VEC; ++v) {
        max.v[v]   = max.v[v] > sink.v[v] ? max.v[v] : sink.v[v];
        total.v[v] = exp_negative(sink.v[v] - max.v[v]);
    }
    for (int64_t begin = 0; begin < n_cell; begin += N_BLOCK) {
        row sum = {};
        for (int64_t cell = begin; cell < std::min(n_cell, begin + N_BLOCK); ++cell) {
            for (int v = 0; v < N_VEC; ++v) {
                const vec p      = exp_negative(tmp.x[cell].v[v] - max.v[v]);
                tmp.x[cell].v[v] = p;
                sum.v[v] += p;
            }
        }
        for (int v = 0; v < N_VEC; ++v) {
            total.v[v] += sum.v[v];
        }
    }

    // votes
    for (int32_t m = 0; m < n_modality; ++m) {
        row votes = {};
        for (size_t j = 0; j < n_query; ++j) {
            if (head.tag[first + j] == m) {
                votes.v[j / N_LANE][j % N_LANE] = head.weight;
            }
        }
        if (std::none_of(head.tag.begin() + first, head.tag.begin() + first + n_query,
                         [&](int32_t tag) { return tag == m; })) {
            continue;
        }
        for (int v = 0; v < N_VEC; ++v) {
            votes.v[v] = votes.v[v] / total.v[v];
        }
        for (int64_t cell = 0; cell < n_cell; ++cell) {
            vec sum = tmp.x[cell].v[0] * votes.v[0];
            for (int v = 1; v < N_VEC; ++v) {
                sum += tmp.x[cell].v[v] * votes.v[v];
            }
            float score = 0.0f;
            for (int lane = 0; lane < N_LANE; ++lane) {
                score += sum[lane];
            }
            scores[m * n_cell + cell] += score;
        }
    }
}

} // namespace

bool llama_csp_host_scores_available() {
    return true;
}

void llama_csp_host_scores(const llama_csp_host_head & head, int32_t n_modality, float * scores) {
    scratch tmp;
    tmp.k.resize(N_TILE * head.head_dim);
    tmp.q.resize(head.head_dim);
    tmp.x.resize(head.n_cell);

    std::fill(scores, scores + n_modality * head.n_cell, 0.0f);
    for (size_t first = 0; first < head.q.size(); first += N_QUERY) {
        score_queries(head, first, std::min<size_t>(N_QUERY, head.q.size() - first), n_modality, tmp, scores);
    }
}

void llama_csp_host_norms(const llama_csp_host_head & head, float * norms) {
    const int64_t      n_vec = (head.head_dim + N_LANE - 1) / N_LANE;
    std::vector<float> key(n_vec * N_LANE, 0.0f);
    for (int64_t cell = 0; cell < head.n_cell; ++cell) {
        to_float(head.k + cell * head.k_stride, head.k_is_f16, head.head_dim, key.data());
        vec sum = {};
        for (int64_t i = 0; i < n_vec; ++i) {
            vec x;
            memcpy(&x, key.data() + i * N_LANE, sizeof(x));
            sum += x * x;
        }
        float total = 0.0f;
        for (int lane = 0; lane < N_LANE; ++lane) {
            total += sum[lane];
        }
        norms[cell] = std::sqrt(total);
    }
}

#endif
