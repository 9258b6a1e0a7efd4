// Every function of llama-csp.h from C11: NULL is answered with a status and a reason, and changes nothing.

#include "llama-csp.h"

#include <stdio.h>
#include <string.h>

static int n_failed = 0;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            ++n_failed;                                                                                                \
        }                                                                                                              \
    } while (0)

// refused as a wrong argument, with this reason
#define CHECK_REFUSED(call, reason)                                                                                    \
    do {                                                                                                               \
        CHECK((call) == LLAMA_CSP_ERR_ARGUMENT);                                                                       \
        CHECK(strcmp(llama_csp_last_error(), reason) == 0);                                                            \
    } while (0)

int main(void) {
    const struct llama_csp_params        params = llama_csp_default_params();
    const struct llama_csp_select_params share  = { .k_self = 1, .k_cross = 1, .n_recent = 1, .n_sink = 0 };

    struct llama_csp *    csp  = (struct llama_csp *) &n_failed; // overwritten by a failing init
    struct llama_csp_info info = { 0 };

    float   scores[1] = { 0.0f };
    int32_t cells[1]  = { 0 };
    uint8_t bytes[1]  = { 0 };

    CHECK(llama_csp_last_error() != NULL && strlen(llama_csp_last_error()) == 0);
    CHECK(params.n_window == 32 && params.n_modality == 3);

    CHECK_REFUSED(llama_csp_init(NULL, params, NULL), "csp is NULL");
    CHECK_REFUSED(llama_csp_init(NULL, params, &csp), "ctx is NULL");
    CHECK(csp == NULL);

    CHECK_REFUSED(llama_csp_get_info(NULL, 0, &info), "csp or info is NULL");
    CHECK_REFUSED(llama_csp_set_modality(NULL, 0, LLAMA_CSP_MODALITY_AUTO), "csp is NULL");
    CHECK_REFUSED(llama_csp_set_softmax_n(NULL, scores, 1), "csp or softmax_n is NULL");
    CHECK_REFUSED(llama_csp_scores(NULL, 0, 0, 1, 1, 1.0f, scores, 1), "csp or scores is NULL");
    CHECK_REFUSED(llama_csp_select(NULL, 0, 0, 1, share, scores, NULL, cells, 1), "csp, scores or cells is NULL");
    CHECK_REFUSED(llama_csp_keep(NULL, 0, cells, 1), "csp or cells is NULL");
    CHECK_REFUSED(llama_csp_cells(NULL, 0, 0, 1, cells, bytes, 1), "csp is NULL");
    CHECK_REFUSED(llama_csp_state_set_data(NULL, 0, bytes, 1), "csp or src is NULL");

    CHECK(llama_csp_state_get_size(NULL, 0) == 0);
    CHECK(llama_csp_state_get_data(NULL, 0, bytes, 1) == 0);
    CHECK(strcmp(llama_csp_last_error(), "csp or dst is NULL") == 0);
    llama_csp_free(NULL);

    return n_failed == 0 ? 0 : 1;
}
