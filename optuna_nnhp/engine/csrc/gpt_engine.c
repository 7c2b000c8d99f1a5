/* Gradients of GPTs, and what a text costs them in nats, for some windows of a text.
 *
 * A small GPT's step is some twenty operations a layer, which take several times as long as their
 * arithmetic when each goes through memory and through torch. Here all that a few windows need
 * stays in a core's cache; threads share out members and halves of their windows, and no two of
 * them wait for each other. What is computed is what `networks/gpt.py` computes with torch, which
 * is the oracle in the tests; `engine/gpt.py` fills the structures.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define MAX_LAYERS 96
#define NORM_EPSILON 1e-5 /* networks/transformer.py */
#define LOGITS 16384      /* numbers that are computed at once */
#define STRIP 32          /* rows of attention that are computed at once */
/* Of Newton and Schulz's iteration: hyperparameters/muon.py. */
#define MUON_EPSILON 1e-7
#define MUON_A 3.4445
#define MUON_B (-4.7750)
#define MUON_C 2.0315
#define MUON_ITERATIONS 5

/* In the order of `engine/gpt.py`. */
enum { LAYER, LAYER_GAIN, RMS };
enum { FF_RELU2, FF_GELU, FF_SWIGLU };

/* Where a block's parameters begin in a member's row; -1 for those it has not. */
struct Block {
    int64_t qkv, out, up, down, gain1, gain2;
};

/* What the members have in common. */
struct Gpt {
    const int64_t *x, *y; /* the text, and each token's next one */
    const void *turns;    /* (length, head_size): cosine and sine of each pair; or NULL */
    int64_t vocabulary, layers, heads, head_size, inner, parameters;
    int64_t length, windows; /* tokens of a window; windows of a step */
    int64_t embedding, position, head, gain;
    double attention_scale, head_scale, logit_cap;
    int32_t norm, feed_forward, qk_norm, shift, training, is_double;
    struct Block blocks[MAX_LAYERS];
};

/* Some windows of one member. */
struct Task {
    const void *weights;
    void *grads;            /* (parameters,), in training */
    const int64_t *starts;  /* of all windows, in the text */
    const uint32_t *keys;   /* of the noise of each dropout, in turn; NULL for none */
    int64_t first, end;     /* which windows */
    double dropout, loss;   /* nats, of all tokens of these windows */
};

struct Job {
    const struct Gpt *gpt;
    struct Task *tasks;
    int64_t count;
    _Atomic int64_t next;
};

/* Matrices, one after the other, which become orthogonal. */
struct Stack {
    void *matrices; /* (count, rows, columns) */
    int64_t count, rows, columns, is_double;
    _Atomic int64_t next;
};

#define PARTS "gpt_parts.h"
#include "machines.h"

typedef void (*run_type)(struct Job *, void *);
typedef void (*straighten_type)(struct Stack *, void *);
static run_type run_float = run_float_any, run_double = run_double_any;
static straighten_type straighten_float = straighten_float_any;
static straighten_type straighten_double = straighten_double_any;

/* ---- What Python calls, by ctypes: see `engine/gpt.py` ---- */

/* Choose the instruction set; whether Python's structures are as large as these. */
EXPORT int32_t gpt_start(int64_t gpt, int64_t task, int64_t job, int64_t stack) {
    switch (machine()) {
#ifdef HAS_MORE
    case AVX2:
        run_float = run_float_avx2, run_double = run_double_avx2;
        straighten_float = straighten_float_avx2, straighten_double = straighten_double_avx2;
        break;
    case AVX512:
        run_float = run_float_avx512, run_double = run_double_avx512;
        straighten_float = straighten_float_avx512, straighten_double = straighten_double_avx512;
        break;
#endif
    }
    return gpt == sizeof(struct Gpt) && task == sizeof(struct Task) && job == sizeof(struct Job) &&
           stack == sizeof(struct Stack);
}

/* Numbers of memory that a thread needs. */
EXPORT int64_t gpt_memory(const struct Gpt *gpt) {
    return gpt->is_double ? cut_double_any(gpt, NULL, &(struct Space_double_any){0})
                          : cut_float_any(gpt, NULL, &(struct Space_float_any){0});
}

/* Take tasks until there are none left. */
EXPORT void gpt_run(struct Job *job, void *memory) {
    (job->gpt->is_double ? run_double : run_float)(job, memory);
}

/* Take matrices until there are none left; memory is for one and two squares. */
EXPORT void gpt_straighten(struct Stack *stack, void *memory) {
    (stack->is_double ? straighten_double : straighten_float)(stack, memory);
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_gpt_engine", "Called by ctypes: see engine/gpt.py.", -1,
    NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__gpt_engine(void) { return PyModule_Create(&module); }
