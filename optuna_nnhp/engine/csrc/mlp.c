/* The compiled engine for multilayer perceptrons: trains and evaluates the members of a cohort.
 *
 * One step of a small network is about ten microseconds of arithmetic, less than one call of torch
 * for each of its operations costs. Here a member's whole round is one call, and its weights stay in
 * the core's cache. The results are those of `networks/mlp.py`, `hyperparameters/` and
 * `training/cohort.py`, which compute the same with torch; the tests compare both. `engine/mlp.py`
 * fills the structures. Each thread takes the next member when it has finished one; only the two
 * threads of a team wait for each other.
 *
 * The network's code is in `mlp_template.h`, compiled once for each precision and instruction set.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "export.h"
#include "layout.h"

#define MAX_LAYERS 64
#define MAX_SEGMENTS (4 * (MAX_LAYERS + 1))
#define MAX_SPINS 20000            /* about 50 microseconds */
#define NORM_EPSILON 1e-5          /* networks/layers.py */
#define RUNNING_MOMENTUM 0.1       /* networks/layers.py */
#define ADAM_EPSILON 1e-8          /* hyperparameters/optimizer.py */
#define MIN_ERROR_PROBABILITY 1e-7 /* hyperparameters/loss.py */

/* In the order of the names in engine/mlp.py. */
enum { NO_NORM, BATCH_NORM, LAYER_NORM };
enum { CROSS_ENTROPY, MSE, MAE, HUBER };
enum { SGD, NESTEROV, ADAM, RMSPROP };

/* Where a layer's parameters begin in a member's row of parameters; -1 for those it lacks. */
struct Layer {
    int64_t weight, bias, norm_weight, norm_bias;
    void *running_mean, *running_var; /* (k, padded): of all members */
};

/* What all members share. */
struct Network {
    const void *x; /* (n, inputs) */
    const void *y; /* (n,): int64 labels or targets */
    int64_t inputs, outputs, padded, depth, parameters;
    int64_t batch, steps, examples; /* of a round; in evaluation, of the data */
    int32_t norm, training, is_double;
    int32_t split_sums; /* sum each half of a layer's inputs for itself, as a team does */
    struct Layer layers[MAX_LAYERS + 1];
};

/* One network, and what it does in this round. */
struct Member {
    void *weights, *exp_avg, *exp_avg_sq; /* (parameters,) each */
    float *updates;                       /* how many updates the weights have had */
    const int64_t *widths;                /* units of each hidden layer, without padding */
    const int64_t *rows;                  /* row numbers of the round's examples */
    const double *rates;                  /* learning rate of each step of the round */
    void *outputs;                        /* (examples, outputs): result of an evaluation */
    int64_t begin, end;                   /* range of the examples to evaluate */
    uint64_t key;                         /* of the round's dropout noise */
    int64_t index;                        /* of the member in its cohort */
    int64_t steps_done;                   /* in this round */
    double loss_sum;
    double dropout, momentum, beta2, weight_decay, l1, clip_norm;
    double smoothing, gamma, delta;
    int32_t activation, optimizer, loss, decoupled;
};

/* Two threads that share the steps of one member. */
#define CACHE_LINE_NUMBERS 8 /* each thread's counter is in a cache line of its own */
struct Team {
    _Atomic int64_t arrivals[2 * CACHE_LINE_NUMBERS];
    double loss[2], squares[2];
    int64_t stop;
    _Atomic int64_t aborted; /* set by Python if one thread has failed */
};

/* The members that the threads share out among themselves. */
struct Job {
    const struct Network *network;
    struct Member *members;
    int64_t count;
    _Atomic int64_t next; /* the first member that no thread has taken */
    struct Team *team;    /* NULL, or the team that trains the only member */
};

/* Wait until the team's other thread has come to the same point. Return 0 if it has failed. Both
 * threads have about the same amount of work, so the wait is short; but if the system gives the other
 * thread's core to another process, this thread lets others run too. */
static int wait_for_partner(struct Team *team, int half) {
    int64_t arrival = atomic_fetch_add(&team->arrivals[half * CACHE_LINE_NUMBERS], 1) + 1;
    for (int spins = 0; atomic_load(&team->arrivals[(1 - half) * CACHE_LINE_NUMBERS]) < arrival;
         spins++) {
        if (spins <= MAX_SPINS) continue;
        if (atomic_load(&team->aborted)) return 0;
        sched_yield();
    }
    return 1;
}

/* A part of a batch or of a layer: 0 is the first half, 1 the second. */
enum { WHOLE = 2 };

struct Range {
    long first, end;
};

static struct Range range_of_part(long n, int part) {
    return part == WHOLE ? (struct Range){0, n}
           : part == 0   ? (struct Range){0, n / 2}
                         : (struct Range){n / 2, n};
}

/* Pieces of a member's row of parameters that hold no padding: they begin at first, first + ld, ...
 * before end, and have `length` numbers each. */
struct Segments {
    long first, end, ld, length;
    int is_weight;
};

/* List the segments of a part of the network. Return how many there are. */
static int list_segments(const struct Network *network, const struct Member *member, int part,
                         struct Segments *out) {
    int count = 0;
    for (int layer = 0; layer <= network->depth; layer++) {
        const struct Layer *starts = network->layers + layer;
        int is_hidden = layer < network->depth;
        long width = is_hidden ? member->widths[layer] : network->outputs;
        long ld = is_hidden ? network->padded : network->outputs;
        struct Range range =
            range_of_part(layer ? member->widths[layer - 1] : network->inputs, part);
        long first = starts->weight + range.first * ld, size = (range.end - range.first) * ld;
        if (size && width == ld) /* no padding: one segment */
            out[count++] = (struct Segments){first, first + 1, size, size, 1};
        else if (size)
            out[count++] = (struct Segments){first, first + size, ld, width, 1};
        int64_t vectors[] = {starts->bias, is_hidden ? starts->norm_weight : -1,
                             is_hidden ? starts->norm_bias : -1};
        range = range_of_part(width, part);
        for (int i = 0; i < 3 && range.end > range.first; i++)
            if (vectors[i] >= 0)
                out[count++] =
                    (struct Segments){vectors[i] + range.first, vectors[i] + range.first + 1,
                                      width, range.end - range.first, 0};
    }
    return count;
}

/* Return the range of a step's examples in `rows`. */
static struct Range batch_range(const struct Network *network, int64_t step) {
    const long first = step * network->batch, left = network->examples - first;
    return (struct Range){first, first + (left < network->batch ? left : network->batch)};
}

static double monotonic_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Keys of dropout noise for a step, and for a layer of it (splitmix64): see networks/noise.py. */
static uint64_t step_key(uint64_t key, int64_t step) {
    return key + (uint64_t)step * 0x9e3779b97f4a7c15u;
}

static uint32_t layer_key(uint64_t key, int layer) {
    uint64_t z = key + (uint64_t)layer * 0xd1342543de82ef95u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

#define TEMPLATE "mlp_template.h"
#include "instruction_sets.h"

typedef void (*run_job_type)(struct Job *, double, void *, int);
static run_job_type run_job_float = run_job_float_any, run_job_double = run_job_double_any;

/* ---- Called from Python by ctypes, see engine/mlp.py ---- */

/* Choose the code for this processor. Called once, before anything else. */
EXPORT void mlp_select_instruction_set(void) {
    switch (detect_instruction_set()) {
#ifdef HAS_AVX
    case AVX2:
        run_job_float = run_job_float_avx2, run_job_double = run_job_double_avx2;
        break;
    case AVX512:
        run_job_float = run_job_float_avx512, run_job_double = run_job_double_avx512;
        break;
#endif
    }
}

/* Return the layout of all structures that Python fills. */
EXPORT const struct FieldLayout *mlp_layout(void) {
    static const struct FieldLayout fields[] = {
        STRUCTURE(Layer),           FIELD(Layer, weight),
        FIELD(Layer, bias),         FIELD(Layer, norm_weight),
        FIELD(Layer, norm_bias),    FIELD(Layer, running_mean),
        FIELD(Layer, running_var),  STRUCTURE(Network),
        FIELD(Network, x),          FIELD(Network, y),
        FIELD(Network, inputs),     FIELD(Network, outputs),
        FIELD(Network, padded),     FIELD(Network, depth),
        FIELD(Network, parameters), FIELD(Network, batch),
        FIELD(Network, steps),      FIELD(Network, examples),
        FIELD(Network, norm),       FIELD(Network, training),
        FIELD(Network, is_double),  FIELD(Network, split_sums),
        FIELD(Network, layers),     STRUCTURE(Member),
        FIELD(Member, weights),     FIELD(Member, exp_avg),
        FIELD(Member, exp_avg_sq),  FIELD(Member, updates),
        FIELD(Member, widths),      FIELD(Member, rows),
        FIELD(Member, rates),       FIELD(Member, outputs),
        FIELD(Member, begin),       FIELD(Member, end),
        FIELD(Member, key),         FIELD(Member, index),
        FIELD(Member, steps_done),  FIELD(Member, loss_sum),
        FIELD(Member, dropout),     FIELD(Member, momentum),
        FIELD(Member, beta2),       FIELD(Member, weight_decay),
        FIELD(Member, l1),          FIELD(Member, clip_norm),
        FIELD(Member, smoothing),   FIELD(Member, gamma),
        FIELD(Member, delta),       FIELD(Member, activation),
        FIELD(Member, optimizer),   FIELD(Member, loss),
        FIELD(Member, decoupled),   STRUCTURE(Team),
        FIELD(Team, arrivals),      FIELD(Team, loss),
        FIELD(Team, squares),       FIELD(Team, stop),
        FIELD(Team, aborted),       STRUCTURE(Job),
        FIELD(Job, network),        FIELD(Job, members),
        FIELD(Job, count),          FIELD(Job, next),
        FIELD(Job, team),           END_OF_LAYOUT,
    };
    return fields;
}

/* Return how many numbers of memory a thread needs. */
EXPORT int64_t mlp_workspace_size(const struct Network *network) {
    return network->is_double ? partition_workspace_double_any(network, network->batch, 0,
                                                               &(struct Workspace_double_any){0})
                              : partition_workspace_float_any(network, network->batch, 0,
                                                              &(struct Workspace_float_any){0});
}

/* Train or evaluate members until none is left, for at most so many seconds. `half` is 0 or 1 for the
 * two threads of a team, which share the memory. */
EXPORT void mlp_run(struct Job *job, double seconds, void *memory, int32_t half) {
    const double deadline = monotonic_seconds() + seconds;
    (job->network->is_double ? run_job_double : run_job_float)(job, deadline, memory, half);
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_mlp_engine",
    .m_doc = "Called by ctypes, see engine/mlp.py.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__mlp_engine(void) { return PyModule_Create(&module); }
