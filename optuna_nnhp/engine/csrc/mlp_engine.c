/* Trains and evaluates multilayer perceptrons, one member of a cohort after the other.
 *
 * A small network's step is some ten microseconds of arithmetic, less than calling torch once for
 * each of its operations costs. Here a member's whole round is one call, and its weights stay in
 * the cache. What is computed is what `networks/mlp.py`, `hyperparameters/` and `training/cohort.py`
 * compute with torch, which is the oracle in the tests; `engine/mlp.py` fills the structures.
 * Threads take members in turn; only
 * two that share a member's steps wait for each other.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define MAX_LAYERS 64
#define MAX_RUNS (4 * (MAX_LAYERS + 1))
#define MANY_SPINS 20000     /* some tens of microseconds */
#define NORM_EPSILON 1e-5    /* networks/layers.py */
#define RUNNING_MOMENTUM 0.1 /* networks/layers.py */
#define ADAM_EPSILON 1e-8    /* hyperparameters/optimizer.py */
#define SURE 1e-7            /* hyperparameters/loss.py */

/* In the order of `engine/mlp.py`. */
enum { NO_NORM, BATCH_NORM, LAYER_NORM };
enum { CROSS_ENTROPY, MSE, MAE, HUBER };
enum { SGD, NESTEROV, ADAM, RMSPROP };

/* Where a layer's parameters begin in a member's row; -1 for those it has not. */
struct Layer {
    int64_t weight, bias, scale, shift;
    void *running_mean, *running_var; /* of all members, (k, padded) */
};

/* What the members have in common. */
struct Network {
    const void *x; /* (n, inputs) */
    const void *y; /* (n,), int64 labels or numbers */
    int64_t inputs, outputs, padded, depth, parameters;
    int64_t batch, steps, examples; /* of a round, or in evaluation of the data */
    int32_t norm, training, is_double;
    int32_t halves; /* sums over inputs are those of two halves, as a team has them */
    struct Layer layers[MAX_LAYERS + 1];
};

/* One network, and its round. */
struct Member {
    void *weights, *first, *second; /* (parameters,) each */
    float *steps;                   /* updates so far */
    const int64_t *widths;          /* true units of each hidden layer */
    const int64_t *rows;            /* numbers of the round's examples */
    const double *rates;            /* of the round's steps */
    void *outputs;                  /* (examples, outputs), in evaluation */
    int64_t begin, end;             /* the examples that are evaluated */
    uint64_t key;                   /* of the round's noise */
    int64_t place, done;
    double loss_sum;
    double dropout, momentum, squared_decay, weight_decay, l1, clip_norm;
    double smoothing, gamma, delta;
    int32_t activation, optimizer, loss, decoupled;
};

/* Two threads that share the steps of one member. */
#define LINE 8 /* numbers in a line of the cache: each has its own */
struct Team {
    _Atomic int64_t met[2 * LINE];
    double loss[2], squares[2];
    int64_t stop;
    _Atomic int64_t given_up; /* by Python: the other one will not come */
};

struct Job {
    const struct Network *network;
    struct Member *members;
    int64_t count;
    _Atomic int64_t next;
    struct Team *team; /* if there is one member only, for two threads */
};

/* Wait for the other one; false if it will not come. It is busy with as much as this one; but the
 * system may have taken its core away, then there is no use in spinning. */
static int meet(struct Team *team, int half) {
    int64_t turn = atomic_fetch_add(&team->met[half * LINE], 1) + 1;
    for (int spins = 0; atomic_load(&team->met[(1 - half) * LINE]) < turn; spins++) {
        if (spins <= MANY_SPINS) continue;
        if (atomic_load(&team->given_up)) return 0;
        sched_yield();
    }
    return 1;
}

/* Parts of a batch or of the network: the first half, the second, or all of it. */
enum { WHOLE = 2 };
struct Range {
    long first, end;
};
static struct Range part_of(long n, int part) {
    return part == WHOLE ? (struct Range){0, n}
         : part == 0     ? (struct Range){0, n / 2}
                         : (struct Range){n / 2, n};
}

/* Pieces of a member's row that hold true weights of a part: runs of a length, ld apart. */
struct Runs {
    long first, end, ld, length;
    int decayed;
};

static int true_weights(const struct Network *net, const struct Member *me, int part,
                        struct Runs *out) {
    int count = 0;
    for (int layer = 0; layer <= net->depth; layer++) {
        const struct Layer *at = net->layers + layer;
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs;
        long ld = hidden ? net->padded : net->outputs;
        struct Range some = part_of(layer ? me->widths[layer - 1] : net->inputs, part);
        long first = at->weight + some.first * ld, size = (some.end - some.first) * ld;
        if (size && width == ld) /* without gaps: one run */
            out[count++] = (struct Runs){first, first + 1, size, size, 1};
        else if (size)
            out[count++] = (struct Runs){first, first + size, ld, width, 1};
        int64_t vectors[] = {at->bias, hidden ? at->scale : -1, hidden ? at->shift : -1};
        some = part_of(width, part);
        for (int i = 0; i < 3 && some.end > some.first; i++)
            if (vectors[i] >= 0)
                out[count++] = (struct Runs){vectors[i] + some.first, vectors[i] + some.first + 1,
                                             width, some.end - some.first, 0};
    }
    return count;
}

/* A step's examples, as places in the round's order. */
static struct Range batch_of(const struct Network *net, int64_t step) {
    const long first = step * net->batch, left = net->examples - first;
    return (struct Range){first, first + (left < net->batch ? left : net->batch)};
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Keys of noise: splitmix64, a key for each step and layer; see `training/noise.py`. */
static uint64_t step_key(uint64_t key, int64_t step) {
    return key + (uint64_t)step * 0x9e3779b97f4a7c15u;
}

static uint32_t draw_key(uint64_t key, int layer) {
    uint64_t z = key + (uint64_t)layer * 0xd1342543de82ef95u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)(z >> 32);
}

#define PARTS "mlp_parts.h"
#include "machines.h"

typedef void (*run_type)(struct Job *, double, void *, int);
static run_type run_float = run_float_any, run_double = run_double_any;

/* ---- What Python calls, by ctypes: see `engine/mlp.py` ---- */

/* Choose the instruction set; whether Python's structures are as large as these. */
EXPORT int32_t engine_start(int64_t network, int64_t member, int64_t team, int64_t job) {
    switch (machine()) {
#ifdef HAS_MORE
    case AVX2: run_float = run_float_avx2, run_double = run_double_avx2; break;
    case AVX512: run_float = run_float_avx512, run_double = run_double_avx512; break;
#endif
    }
    return network == sizeof(struct Network) && member == sizeof(struct Member) &&
           team == sizeof(struct Team) && job == sizeof(struct Job);
}

/* Numbers of memory that a thread needs. */
EXPORT int64_t engine_memory(const struct Network *net) {
    return net->is_double ? cut_double_any(net, net->batch, 0, &(struct Space_double_any){0})
                          : cut_float_any(net, net->batch, 0, &(struct Space_float_any){0});
}

/* Take members until there are none left, or for so many seconds; `half` is a thread's place in a
 * team, whose memory is shared. */
EXPORT void engine_run(struct Job *job, double seconds, void *memory, int32_t half) {
    (job->network->is_double ? run_double : run_float)(job, now() + seconds, memory, half);
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_mlp_engine", "Called by ctypes: see engine/mlp.py.", -1,
    NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__mlp_engine(void) { return PyModule_Create(&module); }
