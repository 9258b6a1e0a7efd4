// llama-csp.cpp - attach, tag cells, report them, and save what the state of llama.cpp does not know.

#include "llama-csp-hooks.h"
#include "llama-csp-impl.h"
#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <typeinfo>

//
// errors, threads
//

static thread_local char last_error[512] = "";

int32_t llama_csp_fail(int32_t status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return status;
}

const char * llama_csp_last_error(void) {
    return last_error;
}

void llama_csp_parallel(size_t n, int32_t n_thread, const std::function<void(size_t)> & fn) {
    const size_t step = std::clamp<size_t>(n_thread, 1, std::max<size_t>(n, 1));

    std::mutex         mutex;
    std::exception_ptr failure;

    const auto work = [&](size_t first) {
        try {
            for (size_t i = first; i < n; i += step) {
                fn(i);
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            failure = std::current_exception();
        }
    };

    std::vector<std::thread> threads;
    size_t                   started = 1;
    try {
        threads.reserve(step - 1);
        for (; started < step; ++started) {
            threads.emplace_back(work, started);
        }
    } catch (const std::exception &) {
        // no more threads to be had: this one does their part
    }
    work(0);
    for (; started < step; ++started) {
        work(started);
    }
    for (auto & thread : threads) {
        thread.join();
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
}

//
// attach
//

std::string llama_csp::unsupported(llama_context * ctx, llama_kv_cache ** kv) {
    llama_memory_i * memory = ctx->get_memory();

    if (memory == nullptr) {
        return "the model has no KV cache";
    }
    if (typeid(*memory) != typeid(llama_kv_cache)) {
        return "the model's memory is not a plain KV cache (sliding-window, sparse-attention, hybrid or recurrent)";
    }
    *kv = static_cast<llama_kv_cache *>(memory);

    const auto & cache   = **kv;
    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;

    if (memory->csp != nullptr) {
        return "the context is already attached";
    }
    if (cache.other != nullptr) {
        return "the KV cache is shared with another context";
    }
    if (cache.n_stream != 1) {
        return "the KV cache has " + std::to_string(cache.n_stream) + " streams (set kv_unified or n_seq_max = 1)";
    }
    if (cache.layers.empty()) {
        return "the KV cache has no layers";
    }
    if (cache.layers.size() != cache.map_layer_ids.size()) {
        return "layers reuse the KV cache of other layers";
    }
    if (cache.swa_type != LLAMA_SWA_TYPE_NONE) {
        return "sliding-window attention";
    }
    if (hparams.is_mla()) {
        return "multi-head latent attention (MLA)";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return "ALiBi";
    }
    if (hparams.n_rel_attn_bkts > 0 || llama_model_has_encoder(&model)) {
        return "an encoder or relative position biases";
    }
    if (hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        return "logit soft-capping";
    }
    if (hparams.ple_n_heads > 0) {
        return "n-gram input embeddings";
    }

    const uint32_t il0 = cache.layers[0].il;
    for (const auto & layer : cache.layers) {
        if (hparams.n_head(layer.il) != hparams.n_head(il0) || hparams.n_head_kv(layer.il) != hparams.n_head_kv(il0)) {
            return "the number of heads varies between layers";
        }
        if (model.layers[layer.il].attn_sinks != nullptr) {
            return "the model has attention sinks of its own";
        }
        if (layer.k == nullptr || layer.v == nullptr) {
            return "layer " + std::to_string(layer.il) + " has no K or no V cache";
        }
    }
    return "";
}

llama_csp::llama_csp(llama_context * ctx, llama_kv_cache * kv, llama_csp_params params) :
    ctx(ctx),
    kv(kv),
    n_window(params.n_window),
    n_modality(params.n_modality),
    n_head(ctx->get_model().hparams.n_head(kv->layers[0].il)),
    n_head_kv(ctx->get_model().hparams.n_head_kv(kv->layers[0].il)),
    ring(params.n_window),
    cell_tag(kv->get_size(), LLAMA_CSP_MODALITY_TEXT) {
    const auto & hparams = ctx->get_model().hparams;

    for (const auto & kv_layer : kv->layers) {
        const int64_t head_dim_k = hparams.n_embd_head_k(kv_layer.il);
        const int64_t head_dim_v = hparams.n_embd_head_v(kv_layer.il);

        ggml_context_ptr layer_ctx{ ggml_init({ 2 * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }) };
        if (!layer_ctx) {
            throw std::bad_alloc();
        }
        ggml_tensor * q_ring = ggml_new_tensor_2d(layer_ctx.get(), GGML_TYPE_F32, head_dim_k * n_head, n_window);
        ggml_tensor * sinks  = ggml_new_tensor_1d(layer_ctx.get(), GGML_TYPE_F32, n_head);
        ggml_format_name(q_ring, "csp_ring_l%u", kv_layer.il);
        ggml_format_name(sinks, "csp_sinks_l%u", kv_layer.il);

        auto *                  buft = ggml_backend_buffer_get_type(kv_layer.k->buffer);
        ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors_from_buft(layer_ctx.get(), buft) };
        if (!buf) {
            throw std::bad_alloc();
        }
        ggml_backend_buffer_clear(buf.get(), 0); // rows that hold no query yet are read as zeros

        layers.push_back(
            { (int32_t) kv_layer.il, kv_layer.k, kv_layer.v, q_ring, sinks, head_dim_k, head_dim_v, 0.0f });
        ctxs.push_back(std::move(layer_ctx));
        bufs.push_back(std::move(buf));
    }

    kv->csp          = this;
    ctx->cparams.csp = this;
    drop_graphs(); // they record no window
}

llama_csp::~llama_csp() {
    ctx->synchronize();
    kv->csp          = nullptr;
    ctx->cparams.csp = nullptr;
    drop_graphs();
}

void llama_csp::drop_graphs() {
    ctx->sched_need_reserve = true;
}

llama_csp_params llama_csp_default_params(void) {
    return { /*.n_window =*/32, /*.n_modality =*/3 };
}

int32_t llama_csp_init(llama_context * ctx, llama_csp_params params, llama_csp ** csp) {
    if (csp == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp is NULL");
    }
    *csp = nullptr;
    if (ctx == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "ctx is NULL");
    }
    if (params.n_window < 1 || params.n_window > (int32_t) ctx->n_ctx()) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_window is %d, allowed are 1 .. %u (n_ctx)", params.n_window,
                              ctx->n_ctx());
    }
    if (params.n_modality < 2 || params.n_modality > LLAMA_CSP_MODALITY_MAX) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_modality is %d, allowed are 2 .. %d", params.n_modality,
                              LLAMA_CSP_MODALITY_MAX);
    }

    llama_kv_cache *  kv     = nullptr;
    const std::string reason = llama_csp::unsupported(ctx, &kv);
    if (!reason.empty()) {
        return llama_csp_fail(LLAMA_CSP_ERR_UNSUPPORTED, "this model or context cannot be pruned: %s", reason.c_str());
    }

    try {
        *csp = new llama_csp(ctx, kv, params);
    } catch (const std::exception &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory for a window of %d queries", params.n_window);
    }
    return LLAMA_CSP_OK;
}

void llama_csp_free(llama_csp * csp) {
    delete csp;
}

//
// hooks: tags, and what may be removed
//

void llama_csp_apply_ubatch(llama_csp * csp, const llama_ubatch & ubatch, const uint32_t * cells) {
    const uint8_t automatic = ubatch.token ? LLAMA_CSP_MODALITY_TEXT : LLAMA_CSP_MODALITY_IMAGE;
    const uint8_t tag       = csp->modality == LLAMA_CSP_MODALITY_AUTO ? automatic : (uint8_t) csp->modality;

    csp->ubatch_cells.assign(cells, cells + ubatch.n_tokens);
    csp->forget_queries(*std::min_element(cells, cells + ubatch.n_tokens));
    for (const uint32_t cell : csp->ubatch_cells) {
        csp->cell_tag[cell] = tag;
        if ((int32_t) cell < csp->n_last_kept) {
            csp->n_last_kept = 0; // upstream only fills empty cells: the kept ones have been removed before
        }
    }
}

void llama_csp_clear(llama_csp * csp) {
    csp->n_last_kept = 0;
    csp->forget_queries(0);
}

bool llama_csp_allow_rm(const llama_csp * csp, llama_pos p0, llama_pos p1) {
    const int32_t n_kept = csp->n_kept();
    if (n_kept == 0) {
        return true;
    }
    const auto &    cells  = csp->kv_cells();
    const llama_pos last   = cells.pos_get(n_kept - 1);
    const bool      behind = p0 > last;
    const bool      all    = p0 <= 0 && (p1 < 0 || p1 > cells.seq_pos_max(cells.seq_get(0)));
    if (!behind && !all) {
        LLAMA_LOG_ERROR("%s: positions [%d, %d) touch pruned cells (up to position %d)\n", __func__, p0, p1, last);
    }
    return behind || all;
}

bool llama_csp_pruned(const llama_csp * csp) {
    return csp->n_kept() > 0;
}

bool llama_csp_allow_edit(llama_csp * csp, const char * name) {
    if (llama_csp_pruned(csp)) {
        LLAMA_LOG_ERROR("%s: refused: %d cells are pruned\n", name, csp->n_kept());
        return false;
    }
    csp->forget_queries(0); // their rotation does not fit shifted keys
    return true;
}

//
// cells
//

llama_kv_cells & llama_csp::kv_cells() const {
    return kv->v_cells[0];
}

int32_t llama_csp::n_cell() const {
    return kv_cells().get_used();
}

int32_t llama_csp::n_kept() const {
    return kv_cells().is_empty(0) ? 0 : n_last_kept; // kept cells go all at once
}

int32_t llama_csp::check_sequence() const {
    const auto & cells = kv_cells();
    if (cells.get_used() == 0) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cache is empty");
    }
    if (cells.used_max_p1() != cells.get_used() || cells.get_has_shift()) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cache has holes or pending shifts");
    }
    const auto & seqs = cells.seq_get_all(0);
    for (uint32_t i = 0; i < cells.get_used(); ++i) {
        if (seqs.count() != 1 || cells.seq_get_all(i) != seqs) {
            return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cache holds more than one sequence (cell %u)", i);
        }
        if (i > 0 && cells.pos_get(i) < cells.pos_get(i - 1)) {
            return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cells are not in token order (cell %u)", i);
        }
    }
    return LLAMA_CSP_OK;
}

llama_pos llama_csp::pos_at(size_t row, int32_t cell) const {
    return cell < n_last_kept ? kept_pos[row * n_last_kept + cell] : kv_cells().pos_get(cell);
}

uint8_t llama_csp::tag_at(size_t row, int32_t cell) const {
    return cell < n_last_kept ? kept_tag[row * n_last_kept + cell] : cell_tag[cell];
}

void llama_csp::synchronize() const {
    ctx->synchronize();
    for (const auto & [backend, set_n_threads] : ctx->set_n_threads_fns) {
        set_n_threads(backend, n_thread());
    }
}

int32_t llama_csp::n_thread() const {
    return ctx->cparams.n_threads_batch;
}

ggml_backend_t llama_csp::backend_of(const ggml_tensor * t) const {
    auto * buft = ggml_backend_buffer_get_type(t->buffer);
    for (const auto & backend : ctx->backends) {
        if (ggml_backend_get_device(backend.get()) == ggml_backend_buft_get_device(buft)) {
            return backend.get();
        }
    }
    return ctx->backend_cpu;
}

int32_t llama_csp_get_info(const llama_csp * csp, llama_csp_info * info) {
    if (csp == nullptr || info == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or info is NULL");
    }
    const int32_t n_cell = csp->n_cell();
    const auto    valid  = [&](const llama_csp_query & q) { return q.serial >= 0 && q.cell < n_cell; };

    *info = {
        /*.n_layer    =*/(int32_t) csp->layers.size(),
        /*.n_head     =*/csp->n_head,
        /*.n_head_kv  =*/csp->n_head_kv,
        /*.n_modality =*/csp->n_modality,
        /*.n_cell_max =*/(int32_t) csp->kv->get_size(),
        /*.n_cell     =*/n_cell,
        /*.n_kept     =*/csp->n_kept(),
        /*.n_window   =*/(int32_t) std::count_if(csp->ring.begin(), csp->ring.end(), valid),
    };
    return LLAMA_CSP_OK;
}

int32_t llama_csp_set_modality(llama_csp * csp, int32_t modality) {
    if (csp == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp is NULL");
    }
    if (modality != LLAMA_CSP_MODALITY_AUTO && (modality < 0 || modality >= csp->n_modality)) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "modality is %d, allowed are -1 (automatic) and 0 .. %d",
                              modality, csp->n_modality - 1);
    }
    csp->modality = modality;
    return LLAMA_CSP_OK;
}

int32_t llama_csp_set_softmax_n(llama_csp * csp, const float * softmax_n, size_t n_value) {
    if (csp == nullptr || softmax_n == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or softmax_n is NULL");
    }
    const size_t n_head = csp->n_head;
    const size_t n_all  = csp->layers.size() * n_head;
    if (n_value != 1 && n_value != n_all) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_value is %zu, allowed are 1 and %zu (n_layer*n_head)", n_value,
                              n_all);
    }
    for (size_t i = 0; i < n_value; ++i) {
        if (!(softmax_n[i] >= 0.0f) || !std::isfinite(softmax_n[i])) {
            return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "softmax_n[%zu] is %g, allowed are finite values >= 0", i,
                                  softmax_n[i]);
        }
    }

    csp->ctx->synchronize();
    std::vector<float> logits(n_head); // ln n; -inf where n = 0, which adds exp(-inf) = 0 to the denominator
    for (size_t i = 0; i < csp->layers.size(); ++i) {
        for (size_t h = 0; h < n_head; ++h) {
            logits[h] = std::log(softmax_n[n_value == 1 ? 0 : i * n_head + h]);
        }
        ggml_backend_tensor_set(csp->layers[i].sinks, logits.data(), 0, n_head * sizeof(float));
    }

    const bool use_sinks = std::any_of(softmax_n, softmax_n + n_value, [](float n) { return n > 0.0f; });
    if (use_sinks != csp->use_sinks) {
        csp->use_sinks = use_sinks;
        csp->drop_graphs(); // they have the other softmax
    }
    return LLAMA_CSP_OK;
}

int32_t llama_csp_cells(const llama_csp * csp, int32_t * pos, uint8_t * tag, size_t n_value) {
    if (csp == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp is NULL");
    }
    const size_t n_cell = csp->n_cell();
    if (n_value != csp->n_row() * n_cell) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_value is %zu, needed are %zu (n_layer*n_head_kv*n_cell)",
                              n_value, csp->n_row() * n_cell);
    }
    if (n_cell == 0) {
        return LLAMA_CSP_OK;
    }
    if (const int32_t status = csp->check_sequence()) {
        return status;
    }
    for (size_t row = 0; row < csp->n_row(); ++row) {
        for (size_t cell = 0; cell < n_cell; ++cell) {
            if (pos) {
                pos[row * n_cell + cell] = csp->pos_at(row, cell);
            }
            if (tag) {
                tag[row * n_cell + cell] = csp->tag_at(row, cell);
            }
        }
    }
    return LLAMA_CSP_OK;
}

//
// state
//

namespace {

// Followed by kept_pos i32 [n_row][n_kept], kept_tag u8 [n_row][n_kept], cell_tag u8 [n_cell - n_kept].
struct state_header {
    char    magic[8];
    int32_t n_layer;
    int32_t n_head_kv;
    int32_t n_cell;
    int32_t n_kept;
};

constexpr char STATE_MAGIC[8] = { 'c', 's', 'p', 's', 't', 'a', 't', '1' };

size_t state_size(const state_header & h) {
    return sizeof(h) + (size_t) h.n_layer * h.n_head_kv * h.n_kept * (sizeof(int32_t) + 1) + (h.n_cell - h.n_kept);
}

state_header make_header(const llama_csp & csp) {
    state_header h = { {}, (int32_t) csp.layers.size(), csp.n_head_kv, csp.n_cell(), csp.n_kept() };
    memcpy(h.magic, STATE_MAGIC, sizeof(h.magic));
    return h;
}

} // namespace

size_t llama_csp_state_get_size(const llama_csp * csp) {
    return csp == nullptr ? 0 : state_size(make_header(*csp));
}

size_t llama_csp_state_get_data(const llama_csp * csp, uint8_t * dst, size_t size) {
    if (csp == nullptr || dst == nullptr) {
        llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or dst is NULL");
        return 0;
    }
    const state_header h = make_header(*csp);
    if (size < state_size(h)) {
        llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "size is %zu, needed are %zu bytes", size, state_size(h));
        return 0;
    }
    const auto put = [&](const void * src, size_t n) {
        if (n > 0) {
            memcpy(dst, src, n);
            dst += n;
        }
    };
    const size_t n_value = csp->n_row() * h.n_kept;
    put(&h, sizeof(h));
    put(csp->kept_pos.data(), n_value * sizeof(int32_t));
    put(csp->kept_tag.data(), n_value);
    put(csp->cell_tag.data() + h.n_kept, h.n_cell - h.n_kept);
    return state_size(h);
}

int32_t llama_csp_state_set_data(llama_csp * csp, const uint8_t * src, size_t size) {
    if (csp == nullptr || src == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or src is NULL");
    }
    state_header h;
    if (size < sizeof(h)) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "state is truncated: %zu bytes", size);
    }
    memcpy(&h, src, sizeof(h));
    if (memcmp(h.magic, STATE_MAGIC, sizeof(h.magic)) != 0) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "not a csp state, or of another version");
    }
    if (h.n_layer != (int32_t) csp->layers.size() || h.n_head_kv != csp->n_head_kv) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "state of another model: %d layers x %d KV heads, here %zu x %d",
                              h.n_layer, h.n_head_kv, csp->layers.size(), csp->n_head_kv);
    }
    if (h.n_cell != csp->n_cell() || h.n_kept < 0 || h.n_kept > h.n_cell) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE,
                              "state has %d cells (%d kept), the cache %d: restore the sequence first", h.n_cell,
                              h.n_kept, csp->n_cell());
    }
    if (size != state_size(h)) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "state has %zu bytes, needed are %zu", size, state_size(h));
    }
    if (h.n_cell > 0) {
        if (const int32_t status = csp->check_sequence()) {
            return status;
        }
    }

    const size_t n_value = csp->n_row() * h.n_kept;
    try {
        std::vector<int32_t> pos(n_value);
        const uint8_t *      tag = src + sizeof(h) + n_value * sizeof(int32_t);
        if (n_value > 0) {
            memcpy(pos.data(), src + sizeof(h), n_value * sizeof(int32_t));
        }
        for (int32_t j = 0; j < h.n_kept; ++j) {
            llama_pos max = -1;
            for (size_t row = 0; row < csp->n_row(); ++row) {
                const size_t i = row * h.n_kept + j;
                if (pos[i] < (j > 0 ? pos[i - 1] : 0)) {
                    return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT,
                                          "state has positions that do not ascend (row %zu, cell %d)", row, j);
                }
                max = std::max(max, pos[i]);
            }
            if (max != csp->kv_cells().pos_get(j)) {
                return llama_csp_fail(LLAMA_CSP_ERR_STATE, "state does not belong to this sequence (cell %d)", j);
            }
        }
        if (std::any_of(tag, src + size, [&](uint8_t t) { return t >= csp->n_modality; })) {
            return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "state has a tag above %d (n_modality - 1)",
                                  csp->n_modality - 1);
        }
        csp->kept_tag.assign(tag, tag + n_value);
        csp->kept_pos = std::move(pos);
        std::copy(tag + n_value, src + size, csp->cell_tag.begin() + h.n_kept);
        csp->n_last_kept = h.n_kept;
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory for a state of %zu bytes", size);
    }
    csp->forget_queries(0);
    return LLAMA_CSP_OK;
}
