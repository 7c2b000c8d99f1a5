/* The network and its training, for one precision and one instruction set; see `mlp_engine.c` and,
 * for what it is included with, `mlp_pieces.h`. "ld" is the distance between two rows.
 */

struct NAME(Space) { /* the tensors of one step, in the memory of a thread or a team */
    REAL *grads, *x, *out, *other, *target;
    REAL *partial[2][2]; /* of a team: products of each one's inputs, of this layer and the last */
    REAL *h[MAX_LAYERS], *slope[MAX_LAYERS], *normal[MAX_LAYERS], *rstd[MAX_LAYERS];
};

static int64_t NAME(cut)(const struct Network *net, int64_t rows, REAL *memory,
                         struct NAME(Space) *space) {
    int64_t used = 0;
#define TAKE(name, numbers) \
    do { space->name = memory ? memory + used : 0; used += ((numbers) + 15) / 16 * 16; } while (0)
    int64_t wide = net->padded > net->outputs ? net->padded : net->outputs;
    TAKE(grads, net->training ? net->parameters : 0);
    TAKE(x, net->training ? rows * net->inputs : 0);
    TAKE(out, rows * net->outputs);
    TAKE(other, rows * wide);
    TAKE(target, rows * (int64_t)(sizeof(int64_t) / sizeof(REAL))); /* numbers or labels */
    for (int i = 0; i < 4; i++)
        TAKE(partial[i / 2][i % 2], net->training && net->halves ? rows * wide : 0);
    for (int layer = 0; layer < net->depth; layer++) {
        TAKE(h[layer], rows * net->padded);
        TAKE(slope[layer], rows * net->padded);
        TAKE(normal[layer], net->norm ? rows * net->padded : 0);
        TAKE(rstd[layer], net->norm ? (rows > net->padded ? rows : net->padded) : 0);
    }
#undef TAKE
    return used;
}

/* z (rows, width) = from (rows, size) times w; as the sum of two products where a team would. */
static void NAME(apply)(const struct Network *net, long rows, long width, long size,
                        const REAL *from, const REAL *w, long ld, REAL *z,
                        const struct NAME(Space) *space) {
    const struct Range some = part_of(size, net->halves ? 1 : WHOLE);
    REAL *last = some.first ? space->other : z;
    NAME(multiply)('N', 'N', rows, width, some.end - some.first, from + some.first, size,
                   w + some.first * ld, ld, last, width);
    if (!some.first) return;
    NAME(multiply)('N', 'N', rows, width, some.first, from, size, w, ld, z, width);
    for (long i = 0; i < rows * width; i++) z[i] += last[i];
}

/* Outputs of some examples. */
static void NAME(forward)(const struct Network *net, const struct Member *me, long rows,
                          const REAL *x, uint64_t key, const struct NAME(Space) *space) {
    const REAL *weights = me->weights, *from = x;
    long size = net->inputs;
    for (int layer = 0; layer <= net->depth; layer++) {
        const struct Layer *at = net->layers + layer;
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs;
        long ld = hidden ? net->padded : net->outputs;
        REAL *z = !hidden ? space->out : net->norm ? space->normal[layer] : space->slope[layer];
        NAME(apply)(net, rows, width, size, from, weights + at->weight, ld, z, space);
        if (at->bias >= 0) {
            const REAL *bias = weights + at->bias;
            for (long r = 0; r < rows; r++)
                for (long j = 0; j < width; j++) z[r * width + j] += bias[j];
        }
        if (!hidden) return;
        REAL *h = space->h[layer], *slope = space->slope[layer];
        if (net->norm == BATCH_NORM)
            NAME(batch_norm)(net, me, layer, rows, width, z, slope, space->rstd[layer],
                             space->other);
        else if (net->norm == LAYER_NORM)
            NAME(layer_norm)(net, me, layer, rows, width, z, slope, space->rstd[layer]);
        NAME(activate)(me->activation, rows * width, slope, h);
        if (net->training && me->dropout > 0)
            for (long r = 0; r < rows; r++)
                NAME(drop)(r, 0, width, me->dropout, draw_key(key, layer), h + r * width,
                           slope + r * width);
        from = h;
        size = width;
    }
}

/* The outputs of some rows become their loss's gradient; returns their part of the mean loss. */
static double NAME(loss)(const struct Network *net, const struct Member *me, struct Range some,
                         long batch, const int64_t *row, const struct NAME(Space) *space) {
    const long first = some.first, rows = some.end - first;
    REAL *out = space->out + first * net->outputs;
    if (me->loss == CROSS_ENTROPY) {
        int64_t *label = (int64_t *)space->target + first;
        for (long r = 0; r < rows; r++) label[r] = ((const int64_t *)net->y)[row[first + r]];
        return NAME(cross_entropy)(me, rows, batch, net->outputs, label, out);
    }
    REAL *target = space->target + first;
    for (long r = 0; r < rows; r++) target[r] = ((const REAL *)net->y)[row[first + r]];
    return NAME(errors)(me, rows, batch, target, out);
}

/* Gradients of a layer's weights, for a part of its inputs, and of its biases, for a part of its
 * units. `from` has that part's first input, in rows of `ld_from`; d is the gradient of what the
 * layer computed. */
static void NAME(layer_grads)(const struct Network *net, const struct Member *me, int layer,
                              int part, long rows, const REAL *from, long ld_from, const REAL *d,
                              REAL *grads) {
    const struct Layer *at = net->layers + layer;
    int hidden = layer < net->depth;
    long width = hidden ? me->widths[layer] : net->outputs;
    long ld = hidden ? net->padded : net->outputs;
    struct Range some = part_of(layer ? me->widths[layer - 1] : net->inputs, part);
    if (some.end > some.first)
        NAME(multiply)('T', 'N', some.end - some.first, width, rows, from, ld_from, d, width,
                       grads + at->weight + some.first * ld, ld);
    if (at->bias < 0) return;
    some = part_of(width, part);
    REAL *bias = grads + at->bias;
    for (long j = some.first; j < some.end; j++) bias[j] = 0;
    for (long r = 0; r < rows; r++)
        for (long j = some.first; j < some.end; j++) bias[j] += d[r * width + j];
}

/* All gradients, from that of the outputs. Those of what each layer computed take the place of the
 * slopes. */
static void NAME(backward)(const struct Network *net, const struct Member *me, long rows,
                           const struct NAME(Space) *space) {
    const REAL *weights = me->weights;
    for (int layer = net->depth; layer >= 0; layer--) {
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs;
        long size = layer ? me->widths[layer - 1] : net->inputs;
        const REAL *d = hidden ? space->slope[layer] : space->out;
        NAME(layer_grads)(net, me, layer, WHOLE, rows, layer ? space->h[layer - 1] : space->x,
                          size, d, space->grads);
        if (!layer) return;
        REAL *back = space->other, *slope = space->slope[layer - 1];
        NAME(multiply)('N', 'T', rows, size, width, d, width,
                       weights + net->layers[layer].weight, hidden ? net->padded : net->outputs,
                       back, size);
        for (long i = 0; i < rows * size; i++) slope[i] *= back[i];
        if (net->norm)
            NAME(norm_backward)(net, me, layer - 1, rows, size, space->normal[layer - 1],
                                space->rstd[layer - 1], slope, space->grads);
    }
}

/* ---- Regularization and update of a part of the network ---- */

/* Adds the slope of L1; returns the sum of the gradients' squares, if it is wanted. */
static double NAME(regularize)(const struct Network *net, const struct Member *me, int part,
                               REAL *restrict g) {
    const REAL *w = me->weights, l1 = me->l1;
    struct Runs all[MAX_RUNS], *end = all + true_weights(net, me, part, all);
    double squares = 0;
    for (struct Runs *p = all; p < end; p++)
        for (long at = p->first; at < p->end; at += p->ld) {
            if (l1 > 0 && p->decayed)
                for (long i = at; i < at + p->length; i++)
                    g[i] += l1 * (REAL)((w[i] > 0) - (w[i] < 0));
            if (me->clip_norm == HUGE_VAL) continue;
            REAL sum = 0;
            _Pragma("omp simd reduction(+ : sum)")
            for (long i = at; i < at + p->length; i++) sum += g[i] * g[i];
            squares += sum;
        }
    return squares;
}

struct NAME(Rule) { /* the numbers of one step's update */
    REAL scale, coupled, shrink, b1, c1, b2, c2, rate, step, second; /* c = 1 - b */
};

/* One pass over the memory, with factors of 1 and terms of 0 where something is off. */
static void NAME(update_run)(int optimizer, const struct NAME(Rule) *rule, long n, int decayed,
                             REAL *restrict w, const REAL *restrict g, REAL *restrict m,
                             REAL *restrict v) {
    const REAL scale = rule->scale, coupled = decayed ? rule->coupled : 0;
    const REAL shrink = decayed ? rule->shrink : 1;
    const REAL b1 = rule->b1, b2 = rule->b2, rate = rule->rate;
    const REAL c1 = rule->c1, c2 = rule->c2, step = rule->step, second = rule->second;
#define GRADIENT REAL d = scale * g[i] + coupled * w[i]
    switch (optimizer) {
    case SGD:
        if (b1 > 0) EACH { GRADIENT; m[i] = b1 * m[i] + d; w[i] = shrink * w[i] - rate * m[i]; }
        else EACH { GRADIENT; w[i] = shrink * w[i] - rate * d; }
        break;
    case NESTEROV:
        if (b1 > 0)
            EACH { GRADIENT; m[i] = b1 * m[i] + d; w[i] = shrink * w[i] - rate * (d + b1 * m[i]); }
        else EACH { GRADIENT; w[i] = shrink * w[i] - rate * d; }
        break;
    case ADAM:
        EACH {
            GRADIENT;
            m[i] += c1 * (d - m[i]);
            v[i] = b2 * v[i] + c2 * d * d;
            w[i] = shrink * w[i] - step * m[i] / (SQRT(v[i]) * second + (REAL)ADAM_EPSILON);
        }
        break;
    case RMSPROP:
        EACH {
            GRADIENT;
            v[i] = b2 * v[i] + c2 * d * d;
            m[i] = b1 * m[i] + d / (SQRT(v[i]) + (REAL)ADAM_EPSILON);
            w[i] = shrink * w[i] - rate * m[i];
        }
        break;
    }
#undef GRADIENT
}

/* The t-th update, given the sum of all gradients' squares. */
static void NAME(update)(const struct Network *net, const struct Member *me, int part, double rate,
                         double t, double squares, const REAL *restrict g) {
    REAL *w = me->weights, *m = me->first, *v = me->second;
    struct Runs all[MAX_RUNS], *end = all + true_weights(net, me, part, all);
    double scale = me->clip_norm < HUGE_VAL ? me->clip_norm / (sqrt(squares) + 1e-6) : 1;
    struct NAME(Rule) rule = {
        .scale = scale > 1 ? 1 : scale, /* NaN stays */
        .coupled = me->decoupled ? 0 : me->weight_decay,
        .shrink = me->decoupled ? 1 - rate * me->weight_decay : 1,
        .b1 = me->momentum,
        .c1 = 1 - me->momentum,
        .b2 = me->squared_decay,
        .c2 = 1 - me->squared_decay,
        .rate = rate,
        .step = rate / (1 - pow(me->momentum, t)),
        .second = 1 / sqrt(1 - pow(me->squared_decay, t)),
    };
    for (struct Runs *p = all; p < end; p++)
        for (long at = p->first; at < p->end; at += p->ld)
            NAME(update_run)(me->optimizer, &rule, p->length, p->decayed, w + at, g + at, m + at,
                             v + at);
}

/* ---- Training and evaluation of one member ---- */

/* Steps until the end of the round or of the time. */
static void NAME(train)(const struct Network *net, struct Member *me, double until, REAL *memory) {
    struct NAME(Space) space;
    NAME(cut)(net, net->batch, memory, &space);
    const REAL *data = net->x;
    for (int64_t step = me->done; step < net->steps; step++) {
        const struct Range all = batch_of(net, step);
        const int64_t *row = me->rows + all.first, batch = all.end - all.first;
        for (int64_t r = 0; r < batch; r++)
            memcpy(space.x + r * net->inputs, data + row[r] * net->inputs,
                   net->inputs * sizeof(REAL));
        NAME(forward)(net, me, batch, space.x, step_key(me->key, step), &space);
        me->loss_sum += NAME(loss)(net, me, part_of(batch, WHOLE), batch, row, &space) * batch;
        NAME(backward)(net, me, batch, &space);
        double squares[2];
        for (int i = 0; i < 2; i++) squares[i] = NAME(regularize)(net, me, i, space.grads);
        NAME(update)(net, me, WHOLE, me->rates[step], ++*me->steps, squares[0] + squares[1],
                     space.grads);
        me->done = step + 1;
        if (now() > until) return;
    }
}

/* Outputs for the examples from `begin` to `end`. */
static void NAME(evaluate)(const struct Network *net, struct Member *me, REAL *memory) {
    if (me->done >= net->steps) return;
    struct NAME(Space) space;
    NAME(cut)(net, net->batch, memory, &space);
    const REAL *data = net->x;
    for (int64_t start = me->begin; start < me->end; start += net->batch) {
        int64_t rows = me->end - start;
        if (rows > net->batch) rows = net->batch;
        NAME(forward)(net, me, rows, data + start * net->inputs, 0, &space);
        memcpy((REAL *)me->outputs + start * net->outputs, space.out,
               rows * net->outputs * sizeof(REAL));
    }
    me->done = net->steps;
}
