// llama-csp.cpp - attach, tag cells, report them, and save what the state of llama.cpp does not know.

#include "llama-csp-hooks.h"
#include "llama-csp-impl.h"
#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
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

// The cache of the full-attention layers, or null where there is none. By typeid: a kind of memory that derives from one
// of these would not be understood.
static llama_kv_cache * find_cache(llama_memory_i & memory) {
    if (typeid(memory) == typeid(llama_kv_cache)) {
        return static_cast<llama_kv_cache *>(&memory);
    }
    if (typeid(memory) == typeid(llama_kv_cache_iswa)) {
        return static_cast<llama_kv_cache_iswa &>(memory).get_base();
    }
    if (typeid(memory) == typeid(llama_memory_hybrid)) {
        return static_cast<llama_memory_hybrid &>(memory).get_mem_attn();
    }
    if (typeid(memory) == typeid(llama_memory_hybrid_iswa)) {
        return static_cast<llama_memory_hybrid_iswa &>(memory).get_mem_attn()->get_base();
    }
    return nullptr;
}

std::string llama_csp::unsupported(llama_context * ctx, llama_kv_cache ** kv) {
    llama_memory_i * memory = ctx->get_memory();

    if (memory == nullptr) {
        return "the model has no KV cache";
    }
    *kv = find_cache(*memory);
    if (*kv == nullptr) {
        return "the model's memory holds no KV cache of full attention (it is recurrent or for sparse attention)";
    }

    const auto & cache   = **kv;
    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;

    if (memory->csp != nullptr) {
        return "the context is already attached";
    }
    if (cache.other != nullptr) {
        return "the KV cache is shared with another context";
    }
    if (cache.layers.empty()) {
        return "no layer has full attention";
    }
    if (cache.layers.size() != cache.map_layer_ids.size()) {
        return "layers reuse the KV cache of other layers";
    }
    if (cache.swa_type != LLAMA_SWA_TYPE_NONE) {
        return "sliding-window attention";
    }
    if (hparams.is_mla() || hparams.dsv4_hc_mult > 0) {
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
    streams(kv->n_stream) {
    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;

    for (size_t s = 0; s < streams.size(); ++s) {
        streams[s].index = s;
        streams[s].cells = &kv->v_cells[s];
        streams[s].ring.resize(n_window);
        streams[s].cell_tag.resize(kv->get_size(), LLAMA_CSP_MODALITY_TEXT);
    }
    for (const auto & kv_layer : kv->layers) {
        const int64_t head_dim_k = hparams.n_embd_head_k(kv_layer.il);
        const int64_t head_dim_v = hparams.n_embd_head_v(kv_layer.il);

        ggml_context_ptr layer_ctx{ ggml_init({ 2 * ggml_tensor_overhead(), nullptr, /*.no_alloc =*/true }) };
        if (!layer_ctx) {
            throw std::bad_alloc();
        }
        ggml_tensor * q_ring =
            ggml_new_tensor_3d(layer_ctx.get(), GGML_TYPE_F32, head_dim_k * n_head, n_window, streams.size());
        ggml_tensor * sinks = ggml_new_tensor_1d(layer_ctx.get(), GGML_TYPE_F32, n_head);
        ggml_format_name(q_ring, "csp_ring_l%u", kv_layer.il);
        ggml_format_name(sinks, "csp_sinks_l%u", kv_layer.il);

        auto *                  buft = ggml_backend_buffer_get_type(kv_layer.k->buffer);
        ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors_from_buft(layer_ctx.get(), buft) };
        if (!buf) {
            throw std::bad_alloc();
        }
        ggml_backend_buffer_clear(buf.get(), 0); // rows that hold no query yet are read as zeros

        std::vector<float> model_sinks;
        if (const ggml_tensor * own = model.layers[kv_layer.il].attn_sinks) {
            model_sinks.resize(n_head);
            ggml_backend_tensor_get(own, model_sinks.data(), 0, n_head * sizeof(float));
        }
        layers.push_back({ (int32_t) kv_layer.il, kv_layer.k, kv_layer.v, q_ring, sinks, head_dim_k, head_dim_v,
                           std::move(model_sinks), 0.0f });
        ctxs.push_back(std::move(layer_ctx));
        bufs.push_back(std::move(buf));
    }

    use_huge_pages();
    attach(this);
}

llama_csp::~llama_csp() {
    ctx->synchronize();
    attach(nullptr);
}

void llama_csp::attach(llama_csp * csp) {
    ctx->get_memory()->csp = csp; // asked by the C wrappers
    kv->csp                = csp; // tells what happens to the cells: a part of the memory, or all of it
    ctx->cparams.csp       = csp;
    drop_graphs();
}

float llama_csp_layer::sink_logit(int64_t head, float n) const {
    const double own   = model_sinks.empty() ? -INFINITY : model_sinks[head];
    const double added = std::log((double) n);
    const double max   = std::max(own, added);
    return max == -INFINITY ? -INFINITY : max + std::log(std::exp(own - max) + std::exp(added - max));
}

void llama_csp::drop_graphs() {
    ctx->sched_need_reserve = true;
}

bool llama_csp::v_is_transposed() const {
    return kv->v_trans;
}

void llama_csp::finish_copies() {
    if (!kv->sc_info.empty()) {
        ctx->memory_update(/*optimize =*/false);
    }
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
    if (params.n_window < 1 || params.n_window > (int32_t) ctx->n_ctx_seq()) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_window is %d, allowed are 1 .. %u (cells of a sequence)",
                              params.n_window, ctx->n_ctx_seq());
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

void llama_csp_apply_ubatch(llama_csp *                                csp,
                            const llama_ubatch &                       ubatch,
                            const std::vector<llama_seq_id> &          strm,
                            const std::vector<std::vector<uint32_t>> & idxs) {
    const int32_t automatic = ubatch.token ? LLAMA_CSP_MODALITY_TEXT : LLAMA_CSP_MODALITY_IMAGE;

    csp->ubatch_streams = strm;
    for (size_t s = 0; s < strm.size(); ++s) {
        auto & stream = csp->streams[strm[s]];

        stream.ubatch_cells = idxs[s];
        stream.forget_queries(*std::min_element(idxs[s].begin(), idxs[s].end()));
        for (const uint32_t cell : idxs[s]) {
            stream.cell_tag[cell] = stream.modality == LLAMA_CSP_MODALITY_AUTO ? automatic : stream.modality;
            if ((int32_t) cell < stream.n_last_kept) {
                stream.n_last_kept = 0; // upstream only fills empty cells: the kept ones have been removed before
            }
        }
    }
}

void llama_csp_clear(llama_csp * csp) {
    for (auto & stream : csp->streams) {
        std::fill(stream.cell_tag.begin(), stream.cell_tag.end(), LLAMA_CSP_MODALITY_TEXT); // of restored cells
        stream.n_last_kept = 0;
        stream.forget_queries(0);
    }
}

bool llama_csp_allow_rm(const llama_csp * csp, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && csp->find_stream(seq_id) == nullptr) {
        return true; // upstream answers
    }
    for (const auto & stream : csp->streams) {
        const int32_t n_kept = stream.n_kept();
        const auto &  cells  = *stream.cells;
        if (n_kept == 0 || (seq_id >= 0 && !cells.seq_has(0, seq_id))) {
            continue;
        }
        const llama_pos last   = cells.pos_get(n_kept - 1);
        const bool      behind = p0 > last;
        const bool      all    = p0 <= 0 && (p1 < 0 || p1 > cells.seq_pos_max(cells.seq_get(0)));
        if (!behind && !all) {
            LLAMA_LOG_ERROR("%s: positions [%d, %d) touch pruned cells (up to position %d)\n", __func__, p0, p1, last);
            return false;
        }
    }
    return true;
}

bool llama_csp_allow_cp(llama_csp * csp, llama_seq_id src, llama_seq_id dst) {
    const auto * from = csp->find_stream(src);
    auto *       to   = csp->find_stream(dst);
    if (from == nullptr || to == nullptr) {
        return true; // upstream answers
    }
    if (from == to) { // cells of the one would belong to the other as well
        return src == dst || llama_csp_allow_shift(csp, src, __func__);
    }
    to->cell_tag    = from->cell_tag;
    to->n_last_kept = from->n_last_kept;
    to->kept_pos    = from->kept_pos;
    to->kept_tag    = from->kept_tag;
    to->forget_queries(0);
    return true;
}

bool llama_csp_allow_shift(llama_csp * csp, llama_seq_id seq_id, const char * name) {
    auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return true; // upstream answers
    }
    if (stream->n_kept() > 0) {
        LLAMA_LOG_ERROR("%s: refused: %d cells are pruned\n", name, stream->n_kept());
        return false;
    }
    stream->forget_queries(0); // their rotation does not fit shifted keys
    return true;
}

bool llama_csp_pruned(const llama_csp * csp) {
    return std::any_of(csp->streams.begin(), csp->streams.end(), [](const auto & s) { return s.n_kept() > 0; });
}

//
// cells
//

llama_csp_stream * llama_csp::find_stream(llama_seq_id seq_id) {
    return seq_id < 0 || seq_id >= (int32_t) kv->n_seq_max ? nullptr : &streams[kv->seq_to_stream[seq_id]];
}

const llama_csp_stream * llama_csp::find_stream(llama_seq_id seq_id) const {
    return const_cast<llama_csp *>(this)->find_stream(seq_id);
}

int32_t llama_csp::no_such_sequence(llama_seq_id seq_id) const {
    return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "seq_id is %d, allowed are 0 .. %u (n_seq_max - 1)", seq_id,
                          kv->n_seq_max - 1);
}

int32_t llama_csp::check_layers(int32_t layer, int32_t n_layer) const {
    const int32_t n_all = layers.size();
    if (layer < 0 || n_layer < 1 || n_layer > n_all - layer) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "layers %d + %d: the cache has the layers 0 .. %d", layer,
                              n_layer, n_all - 1);
    }
    return LLAMA_CSP_OK;
}

int32_t llama_csp_stream::n_cell() const {
    return cells->get_used();
}

int32_t llama_csp_stream::n_kept() const {
    return cells->is_empty(0) ? 0 : n_last_kept; // kept cells go all at once
}

bool llama_csp_stream::votes(const llama_csp_query & query) const {
    return query.serial >= 0 && query.cell < n_cell();
}

int32_t llama_csp_stream::check_sequence(llama_seq_id seq_id) const {
    if (cells->get_used() == 0) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cache is empty (sequence %d)", seq_id);
    }
    if (cells->used_max_p1() != cells->get_used() || cells->get_has_shift()) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cache has holes or pending shifts (sequence %d)", seq_id);
    }
    const auto & seqs = cells->seq_get_all(0);
    for (uint32_t i = 0; i < cells->get_used(); ++i) {
        if (seqs.count() != 1 || cells->seq_get_all(i) != seqs) {
            return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cache holds more than one sequence (cell %u)", i);
        }
        if (i > 0 && cells->pos_get(i) < cells->pos_get(i - 1)) {
            return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cells are not in token order (sequence %d, cell %u)",
                                  seq_id, i);
        }
    }
    if (!seqs.test(seq_id)) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE, "the cache holds sequence %d, not %d", cells->seq_get(0), seq_id);
    }
    return LLAMA_CSP_OK;
}

llama_pos llama_csp_stream::pos_at(size_t row, int32_t cell) const {
    return cell < n_last_kept ? kept_pos[row * n_last_kept + cell] : cells->pos_get(cell);
}

uint8_t llama_csp_stream::tag_at(size_t row, int32_t cell) const {
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

int32_t llama_csp_get_info(const llama_csp * csp, llama_seq_id seq_id, llama_csp_info * info) {
    if (csp == nullptr || info == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or info is NULL");
    }
    const auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return csp->no_such_sequence(seq_id);
    }
    const auto votes = [&](const llama_csp_query & query) { return stream->votes(query); };

    *info = {
        /*.n_layer    =*/(int32_t) csp->layers.size(),
        /*.n_head     =*/csp->n_head,
        /*.n_head_kv  =*/csp->n_head_kv,
        /*.n_modality =*/csp->n_modality,
        /*.n_cell_max =*/(int32_t) csp->kv->get_size(),
        /*.n_cell     =*/stream->n_cell(),
        /*.n_kept     =*/stream->n_kept(),
        /*.n_window   =*/(int32_t) std::count_if(stream->ring.begin(), stream->ring.end(), votes),
    };
    return LLAMA_CSP_OK;
}

int32_t llama_csp_set_modality(llama_csp * csp, llama_seq_id seq_id, int32_t modality) {
    if (csp == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp is NULL");
    }
    auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return csp->no_such_sequence(seq_id);
    }
    if (modality != LLAMA_CSP_MODALITY_AUTO && (modality < 0 || modality >= csp->n_modality)) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "modality is %d, allowed are -1 (automatic) and 0 .. %d",
                              modality, csp->n_modality - 1);
    }
    stream->modality = modality;
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
    std::vector<float> logits(n_head);
    for (size_t i = 0; i < csp->layers.size(); ++i) {
        for (size_t h = 0; h < n_head; ++h) {
            logits[h] = csp->layers[i].sink_logit(h, softmax_n[n_value == 1 ? 0 : i * n_head + h]);
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

int32_t llama_csp_cells(const llama_csp * csp,
                        llama_seq_id      seq_id,
                        int32_t           layer,
                        int32_t           n_layer,
                        int32_t *         pos,
                        uint8_t *         tag,
                        size_t            n_value) {
    if (csp == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp is NULL");
    }
    const auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return csp->no_such_sequence(seq_id);
    }
    if (const int32_t status = csp->check_layers(layer, n_layer)) {
        return status;
    }
    const size_t n_cell = stream->n_cell();
    const size_t n_row  = (size_t) n_layer * csp->n_head_kv;
    if (n_value != n_row * n_cell) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "n_value is %zu, needed are %zu (n_layer*n_head_kv*n_cell)",
                              n_value, n_row * n_cell);
    }
    if (n_cell == 0) {
        return LLAMA_CSP_OK;
    }
    if (const int32_t status = stream->check_sequence(seq_id)) {
        return status;
    }
    for (size_t row = 0; row < n_row; ++row) {
        for (size_t cell = 0; cell < n_cell; ++cell) {
            if (pos) {
                pos[row * n_cell + cell] = stream->pos_at((size_t) layer * csp->n_head_kv + row, cell);
            }
            if (tag) {
                tag[row * n_cell + cell] = stream->tag_at((size_t) layer * csp->n_head_kv + row, cell);
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

state_header make_header(const llama_csp & csp, const llama_csp_stream & stream) {
    state_header h = { {}, (int32_t) csp.layers.size(), csp.n_head_kv, stream.n_cell(), stream.n_kept() };
    memcpy(h.magic, STATE_MAGIC, sizeof(h.magic));
    return h;
}

} // namespace

size_t llama_csp_state_get_size(const llama_csp * csp, llama_seq_id seq_id) {
    const auto * stream = csp == nullptr ? nullptr : csp->find_stream(seq_id);
    return stream == nullptr ? 0 : state_size(make_header(*csp, *stream));
}

size_t llama_csp_state_get_data(const llama_csp * csp, llama_seq_id seq_id, uint8_t * dst, size_t size) {
    if (csp == nullptr || dst == nullptr) {
        llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or dst is NULL");
        return 0;
    }
    const auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        csp->no_such_sequence(seq_id);
        return 0;
    }
    const state_header h = make_header(*csp, *stream);
    if (size < state_size(h)) {
        llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "size is %zu, needed are %zu bytes", size, state_size(h));
        return 0;
    }
    if (h.n_cell > 0 && stream->check_sequence(seq_id) != LLAMA_CSP_OK) {
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
    put(stream->kept_pos.data(), n_value * sizeof(int32_t));
    put(stream->kept_tag.data(), n_value);
    put(stream->cell_tag.data() + h.n_kept, h.n_cell - h.n_kept);
    return state_size(h);
}

int32_t llama_csp_state_set_data(llama_csp * csp, llama_seq_id seq_id, const uint8_t * src, size_t size) {
    if (csp == nullptr || src == nullptr) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "csp or src is NULL");
    }
    auto * stream = csp->find_stream(seq_id);
    if (stream == nullptr) {
        return csp->no_such_sequence(seq_id);
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
    if (h.n_cell != stream->n_cell() || h.n_kept < 0 || h.n_kept > h.n_cell) {
        return llama_csp_fail(LLAMA_CSP_ERR_STATE,
                              "state has %d cells (%d kept), the cache %d: restore the sequence first", h.n_cell,
                              h.n_kept, stream->n_cell());
    }
    if (size != state_size(h)) {
        return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "state has %zu bytes, needed are %zu", size, state_size(h));
    }
    if (h.n_cell > 0) {
        if (const int32_t status = stream->check_sequence(seq_id)) {
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
            if (max != stream->cells->pos_get(j)) {
                return llama_csp_fail(LLAMA_CSP_ERR_STATE, "state does not belong to this sequence (cell %d)", j);
            }
        }
        if (std::any_of(tag, src + size, [&](uint8_t t) { return t >= csp->n_modality; })) {
            return llama_csp_fail(LLAMA_CSP_ERR_ARGUMENT, "state has a tag above %d (n_modality - 1)",
                                  csp->n_modality - 1);
        }
        stream->kept_tag.assign(tag, tag + n_value);
        stream->kept_pos = std::move(pos);
        std::copy(tag + n_value, src + size, stream->cell_tag.begin() + h.n_kept);
        stream->n_last_kept = h.n_kept;
    } catch (const std::bad_alloc &) {
        return llama_csp_fail(LLAMA_CSP_ERR_MEMORY, "no memory for a state of %zu bytes", size);
    }
    stream->forget_queries(0);
    return LLAMA_CSP_OK;
}
