/* The compiled engine for GPTs: computes the gradients of some windows of a text, and their loss.
 *
 * One step of a small GPT has about twenty operations per layer. When each of them goes through memory
 * and through torch, they take several times as long as their arithmetic. Here everything that a few
 * windows need stays in a core's cache. The threads share out members and halves of a step's windows;
 * no thread waits for another. The results are those of `networks/gpt.py`, which computes the same
 * with torch; the tests compare both. `engine/gpt.py` fills the structures.
 *
 * The network's code is in `gpt_template.h`, compiled once for each precision and instruction set.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "export.h"
#include "layout.h"

#define MAX_LAYERS 96
#define NORM_EPSILON 1e-5 /* networks/transformer.py */
#define MAX_LOGITS 16384  /* logits that are in memory at once */
#define QUERY_ROWS 32     /* queries whose attention weights are in memory at once */
/* Coefficients of the iteration in hyperparameters/muon.py. */
#define MUON_EPSILON 1e-7
#define MUON_A 3.4445
#define MUON_B (-4.7750)
#define MUON_C 2.0315
#define MUON_ITERATIONS 5

/* In the order of the names in engine/gpt.py. */
enum { LAYER, LAYER_GAIN, RMS };
enum { FF_RELU2, FF_GELU, FF_SWIGLU };

/* Where a block's parameters begin in a member's row of parameters; -1 for those it lacks. */
struct Block {
    int64_t qkv, out, up, down, gain1, gain2;
};

/* What all members share. */
struct Gpt {
    const int64_t *x, *y;  /* the tokens of the text, and the next token of each */
    const void *rotations; /* (length, head_size): cosine and sine for each pair; or NULL */
    int64_t vocabulary, layers, heads, head_size, inner, parameters;
    int64_t length, windows; /* tokens of a window; windows of a step */
    int64_t embedding, position, head, gain;
    double attention_scale, head_scale, logit_cap;
    int32_t norm, feed_forward, qk_norm, token_shift, training, is_double;
    struct Block blocks[MAX_LAYERS];
};

/* Some windows of one member. */
struct Task {
    const void *weights;
    void *grads;           /* (parameters,): result, in training */
    const int64_t *starts; /* where each of the step's windows begins in the text */
    const uint32_t *keys;  /* of the noise of each dropout layer; NULL without dropout */
    int64_t first, end;    /* range of this task's windows */
    double dropout;        /* probability */
    double loss;           /* result: the sum over the windows' tokens, in nats */
};

/* The tasks that the threads share out among themselves. */
struct Job {
    const struct Gpt *gpt;
    struct Task *tasks;
    int64_t count;
    _Atomic int64_t next;
};

/* Matrices to make orthogonal. */
struct MatrixStack {
    void *matrices; /* (count, rows, columns) */
    int64_t count, rows, columns, is_double;
    _Atomic int64_t next;
};

#define TEMPLATE "gpt_template.h"
#include "instruction_sets.h"

typedef void (*run_job_type)(struct Job *, void *);
typedef void (*orthogonalize_type)(struct MatrixStack *, void *);
static run_job_type run_job_float = run_job_float_any, run_job_double = run_job_double_any;
static orthogonalize_type orthogonalize_float = orthogonalize_stack_float_any;
static orthogonalize_type orthogonalize_double = orthogonalize_stack_double_any;

/* ---- Called from Python by ctypes, see engine/gpt.py ---- */

/* Choose the code for this processor. Called once, before anything else. */
EXPORT void gpt_select_instruction_set(void) {
    switch (detect_instruction_set()) {
#ifdef HAS_AVX
    case AVX2:
        run_job_float = run_job_float_avx2, run_job_double = run_job_double_avx2;
        orthogonalize_float = orthogonalize_stack_float_avx2;
        orthogonalize_double = orthogonalize_stack_double_avx2;
        break;
    case AVX512:
        run_job_float = run_job_float_avx512, run_job_double = run_job_double_avx512;
        orthogonalize_float = orthogonalize_stack_float_avx512;
        orthogonalize_double = orthogonalize_stack_double_avx512;
        break;
#endif
    }
}

/* Return the layout of all structures that Python fills. */
EXPORT const struct FieldLayout *gpt_layout(void) {
    static const struct FieldLayout fields[] = {
        STRUCTURE(Block),
        FIELD(Block, qkv),
        FIELD(Block, out),
        FIELD(Block, up),
        FIELD(Block, down),
        FIELD(Block, gain1),
        FIELD(Block, gain2),
        STRUCTURE(Gpt),
        FIELD(Gpt, x),
        FIELD(Gpt, y),
        FIELD(Gpt, rotations),
        FIELD(Gpt, vocabulary),
        FIELD(Gpt, layers),
        FIELD(Gpt, heads),
        FIELD(Gpt, head_size),
        FIELD(Gpt, inner),
        FIELD(Gpt, parameters),
        FIELD(Gpt, length),
        FIELD(Gpt, windows),
        FIELD(Gpt, embedding),
        FIELD(Gpt, position),
        FIELD(Gpt, head),
        FIELD(Gpt, gain),
        FIELD(Gpt, attention_scale),
        FIELD(Gpt, head_scale),
        FIELD(Gpt, logit_cap),
        FIELD(Gpt, norm),
        FIELD(Gpt, feed_forward),
        FIELD(Gpt, qk_norm),
        FIELD(Gpt, token_shift),
        FIELD(Gpt, training),
        FIELD(Gpt, is_double),
        FIELD(Gpt, blocks),
        STRUCTURE(Task),
        FIELD(Task, weights),
        FIELD(Task, grads),
        FIELD(Task, starts),
        FIELD(Task, keys),
        FIELD(Task, first),
        FIELD(Task, end),
        FIELD(Task, dropout),
        FIELD(Task, loss),
        STRUCTURE(Job),
        FIELD(Job, gpt),
        FIELD(Job, tasks),
        FIELD(Job, count),
        FIELD(Job, next),
        STRUCTURE(MatrixStack),
        FIELD(MatrixStack, matrices),
        FIELD(MatrixStack, count),
        FIELD(MatrixStack, rows),
        FIELD(MatrixStack, columns),
        FIELD(MatrixStack, is_double),
        FIELD(MatrixStack, next),
        END_OF_LAYOUT,
    };
    return fields;
}

/* Return how many numbers of memory a thread needs. */
EXPORT int64_t gpt_workspace_size(const struct Gpt *gpt) {
    return gpt->is_double
               ? partition_workspace_double_any(gpt, NULL, &(struct Workspace_double_any){0})
               : partition_workspace_float_any(gpt, NULL, &(struct Workspace_float_any){0});
}

/* Compute tasks until none is left. */
EXPORT void gpt_run(struct Job *job, void *memory) {
    (job->gpt->is_double ? run_job_double : run_job_float)(job, memory);
}

/* Orthogonalize matrices until none is left; see `orthogonalize_matrix` for the memory. */
EXPORT void gpt_orthogonalize(struct MatrixStack *stack, void *memory) {
    (stack->is_double ? orthogonalize_double : orthogonalize_float)(stack, memory);
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_gpt_engine",
    .m_doc = "Called by ctypes, see engine/gpt.py.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__gpt_engine(void) { return PyModule_Create(&module); }
