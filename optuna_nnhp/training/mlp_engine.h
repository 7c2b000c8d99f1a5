/* The engine for one precision and one instruction set; see `mlp_engine.c`. Included with
 *   REAL             float or double
 *   NAME(x)          x with a suffix of its own
 *   EXP, TANH, ...   functions of a REAL
 * Rows are examples; all matrices are row after row. "ld" is the distance between two rows.
 */

/* ---- Exponentials: loops over these become vector instructions. ---- */

static inline float NAME(fast_exp)(float x) {
    /* 2^n times the Taylor polynomial on |r| <= ln(2) / 2: relative error below 2e-7. */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t i; float f; } scale;
    scale.i = ((int32_t)n + 127) << 23;
    return p * scale.f;
}

static inline float NAME(fast_tanh)(float x) {
    float e = NAME(fast_exp)(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

static inline float NAME(fast_erf)(float x) {
    /* Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7. */
    float a = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return copysignf(1.0f - p * t * NAME(fast_exp)(-a * a), x);
}

/* ---- Activations: their value, and their slope in place of the argument ---- */

#define EACH for (long i = 0; i < n; i++)

static void NAME(activate)(int kind, long n, REAL *restrict x, REAL *restrict y) {
    const REAL leak = (REAL)0.01;
    const REAL alpha = (REAL)1.6732632423543772, scale = (REAL)1.0507009873554805;
    const REAL root_half = (REAL)0.7071067811865476, density = (REAL)0.3989422804014327;
    switch (kind) {
    case ACT_RELU:
        EACH { REAL v = x[i]; y[i] = v < 0 ? 0 : v; x[i] = v <= 0 ? 0 : 1; }
        break;
    case ACT_LEAKY_RELU:
        EACH { REAL v = x[i]; y[i] = v > 0 ? v : leak * v; x[i] = v > 0 ? 1 : leak; }
        break;
    case ACT_TANH:
        EACH { REAL t = TANH(x[i]); y[i] = t; x[i] = 1 - t * t; }
        break;
    case ACT_SIGMOID:
        EACH { REAL s = 1 / (1 + EXP(-x[i])); y[i] = s; x[i] = s * (1 - s); }
        break;
    case ACT_ELU:
        EACH { REAL v = x[i], e = EXP(v < 0 ? v : 0);
               y[i] = v > 0 ? v : e - 1; x[i] = v > 0 ? 1 : e; }
        break;
    case ACT_SELU:
        EACH { REAL v = x[i], e = alpha * EXP(v < 0 ? v : 0);
               y[i] = scale * (v > 0 ? v : e - alpha); x[i] = scale * (v > 0 ? 1 : e); }
        break;
    case ACT_GELU:
        EACH { REAL v = x[i], p = (1 + ERF(v * root_half)) / 2;
               y[i] = v * p; x[i] = p + v * density * EXP(-v * v / 2); }
        break;
    case ACT_SILU:
        EACH { REAL v = x[i], s = 1 / (1 + EXP(-v)); y[i] = v * s; x[i] = s * (1 + v * (1 - s)); }
        break;
    case ACT_MISH: /* tanh(softplus(v)) = n / (n + 2) with n = e (e + 2) and e = exp(v) */
        EACH { REAL v = x[i], e = EXP(v > 20 ? 20 : v), m = e * (e + 2), t = m / (m + 2);
               y[i] = v * t; x[i] = t + v * (1 - t * t) * (e / (1 + e)); }
        break;
    }
}

/* ---- Dropout ---- */

/* Factors 0 and 1 / (1 - p) on activations and slopes; `training/noise.py` has the same noise. */
static void NAME(drop)(long first, long rows, long width, REAL p, uint32_t key, REAL *restrict y,
                       REAL *restrict slope) {
    const REAL kept = 1 / (1 - p);
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < width; j++) {
            uint32_t h = ((uint32_t)(first + r) * ROW_KEY + (uint32_t)j * UNIT_KEY) ^ key;
            h = (h ^ (h >> 16)) * 0x7feb352du;
            h = (h ^ (h >> 15)) * 0x846ca68bu;
            h ^= h >> 16;
            REAL noise = ((REAL)(int32_t)(h >> 9) + (REAL)0.5) * (REAL)(1.0 / 8388608);
            REAL factor = noise < p ? 0 : kept;
            y[r * width + j] *= factor;
            slope[r * width + j] *= factor;
        }
}

/* ---- Sums along an axis ---- */

static void NAME(sum_rows)(long rows, long width, const REAL *x, REAL *restrict out) {
    for (long j = 0; j < width; j++) out[j] = 0;
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < width; j++) out[j] += x[r * width + j];
}

/* ---- Normalization: x becomes the normalized values, y the layer's output ---- */

static void NAME(batch_norm)(const struct Network *net, const struct Member *me, int layer,
                             long rows, long width, REAL *restrict x, REAL *restrict y,
                             REAL *restrict rstd, REAL *restrict mean) {
    const REAL *weights = me->weights, *scale = weights + net->layers[layer].scale;
    const REAL *shift = weights + net->layers[layer].shift;
    long place = me->place * net->padded;
    REAL *running_mean = (REAL *)net->layers[layer].running_mean + place;
    REAL *running_var = (REAL *)net->layers[layer].running_var + place;
    if (!net->training) {
        for (long j = 0; j < width; j++) {
            mean[j] = running_mean[j];
            rstd[j] = 1 / SQRT(running_var[j] + (REAL)NORM_EPSILON);
        }
    } else {
        NAME(sum_rows)(rows, width, x, mean);
        for (long j = 0; j < width; j++) { mean[j] /= rows; rstd[j] = 0; }
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < width; j++) {
                REAL d = x[r * width + j] - mean[j];
                rstd[j] += d * d;
            }
        for (long j = 0; j < width; j++) {
            REAL variance = rstd[j] / rows;
            rstd[j] = 1 / SQRT(variance + (REAL)NORM_EPSILON);
            if (rows == 1) continue; /* no spread to learn from */
            REAL unbiased = variance * ((REAL)rows / (rows - 1));
            running_mean[j] += (REAL)RUNNING_MOMENTUM * (mean[j] - running_mean[j]);
            running_var[j] += (REAL)RUNNING_MOMENTUM * (unbiased - running_var[j]);
        }
    }
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < width; j++) {
            REAL v = (x[r * width + j] - mean[j]) * rstd[j];
            x[r * width + j] = v;
            y[r * width + j] = v * scale[j] + shift[j];
        }
}

static void NAME(layer_norm)(const struct Network *net, const struct Member *me, int layer,
                             long rows, long width, REAL *restrict x, REAL *restrict y,
                             REAL *restrict rstd) {
    const REAL *weights = me->weights, *scale = weights + net->layers[layer].scale;
    const REAL *shift = weights + net->layers[layer].shift;
    for (long r = 0; r < rows; r++) {
        REAL *v = x + r * width, *out = y + r * width, mean = 0, variance = 0;
        _Pragma("omp simd reduction(+ : mean)")
        for (long j = 0; j < width; j++) mean += v[j];
        mean /= width;
        _Pragma("omp simd reduction(+ : variance)")
        for (long j = 0; j < width; j++) variance += (v[j] - mean) * (v[j] - mean);
        rstd[r] = 1 / SQRT(variance / width + (REAL)NORM_EPSILON);
        for (long j = 0; j < width; j++) {
            v[j] = (v[j] - mean) * rstd[r];
            out[j] = v[j] * scale[j] + shift[j];
        }
    }
}

/* d, the gradient of the output, becomes that of the input; scale and shift get theirs. */
static void NAME(norm_backward)(const struct Network *net, const struct Member *me, int layer,
                                long rows, long width, const REAL *restrict normal,
                                const REAL *restrict rstd, REAL *restrict d,
                                REAL *restrict grads) {
    const REAL *scale = (const REAL *)me->weights + net->layers[layer].scale;
    REAL *scale_grad = grads + net->layers[layer].scale;
    REAL *shift_grad = grads + net->layers[layer].shift;
    NAME(sum_rows)(rows, width, d, shift_grad);
    for (long j = 0; j < width; j++) scale_grad[j] = 0;
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < width; j++)
            scale_grad[j] += d[r * width + j] * normal[r * width + j];
    for (long r = 0; r < rows; r++) {
        REAL *g = d + r * width;
        const REAL *v = normal + r * width;
        if (net->norm == BATCH_NORM) {
            for (long j = 0; j < width; j++)
                g[j] = (g[j] - (shift_grad[j] + v[j] * scale_grad[j]) / rows) * scale[j] * rstd[j];
            continue;
        }
        REAL along = 0, across = 0;
        _Pragma("omp simd reduction(+ : along, across)")
        for (long j = 0; j < width; j++) {
            g[j] *= scale[j];
            along += g[j];
            across += g[j] * v[j];
        }
        for (long j = 0; j < width; j++)
            g[j] = (g[j] - (along + v[j] * across) / width) * rstd[r];
    }
}

/* ---- Losses: outputs become their gradient; returns their part of the batch's mean ---- */

static double NAME(cross_entropy)(const struct Member *me, long rows, long batch, long classes,
                                  const int64_t *label, REAL *restrict x) {
    const REAL smoothing = me->smoothing, gamma = me->gamma;
    double total = 0;
    for (long r = 0; r < rows; r++) {
        REAL *row = x + r * classes, most = row[0];
        for (long c = 1; c < classes; c++) most = row[c] > most ? row[c] : most;
        for (long c = 0; c < classes; c++) row[c] -= most;
    }
    for (long r = 0; r < rows; r++) {
        REAL *row = x + r * classes, sum = 0, mean = 0;
        REAL right = row[label[r]];
        for (long c = 0; c < classes; c++) mean += row[c];
        for (long c = 0; c < classes; c++) row[c] = EXP(row[c]);
        for (long c = 0; c < classes; c++) sum += row[c];
        REAL log_sum = LOG(sum);
        right -= log_sum;
        mean = mean / classes - log_sum;
        REAL loss = -(1 - smoothing) * right - smoothing * mean, factor = 1, inner = 0;
        if (gamma > 0) { /* (1 - p) ** 0 has no finite slope at p = 1: kept away from it */
            REAL wrong = -EXPM1(right), near = wrong < (REAL)SURE ? (REAL)SURE : wrong;
            factor = POW(near, gamma);
            if (wrong >= (REAL)SURE) inner = loss * gamma * factor / near * EXP(right);
            if (wrong != wrong) factor = inner = wrong;
            loss *= factor;
        }
        total += loss;
        REAL share = (factor + inner) / (sum * batch), spread = factor * smoothing / classes / batch;
        for (long c = 0; c < classes; c++) row[c] = row[c] * share - spread;
        row[label[r]] -= (inner + factor * (1 - smoothing)) / batch;
    }
    return total / batch;
}

static double NAME(errors)(const struct Member *me, long rows, long batch, const REAL *target,
                           REAL *restrict x) {
    const REAL delta = me->delta;
    double total = 0;
    for (long r = 0; r < rows; r++) {
        REAL error = x[r] - target[r], size = FABS(error), loss, slope;
        if (me->loss == MSE) {
            loss = error * error;
            slope = 2 * error;
        } else if (me->loss == MAE) {
            loss = size;
            slope = (REAL)((error > 0) - (error < 0));
        } else {
            loss = size < delta ? error * error / 2 : delta * (size - delta / 2);
            slope = error < -delta ? -delta : error > delta ? delta : error;
        }
        total += loss;
        x[r] = slope / batch;
    }
    return total / batch;
}

/* ---- The network ---- */

struct NAME(Space) { /* the tensors of one step, in the memory of a thread or a team */
    REAL *grads, *x, *out, *other, *target;
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
    for (int layer = 0; layer < net->depth; layer++) {
        TAKE(h[layer], rows * net->padded);
        TAKE(slope[layer], rows * net->padded);
        TAKE(normal[layer], net->norm ? rows * net->padded : 0);
        TAKE(rstd[layer], net->norm ? (rows > net->padded ? rows : net->padded) : 0);
    }
#undef TAKE
    return used;
}

/* Outputs of some rows of the batch; x, and what is kept of them, begins with row `first`. */
static void NAME(forward)(const struct Network *net, const struct Member *me, long first,
                          long rows, const REAL *x, uint64_t key,
                          const struct NAME(Space) *space) {
    const REAL *weights = me->weights, *from = x;
    long size = net->inputs;
    for (int layer = 0; layer <= net->depth; layer++) {
        const struct Layer *at = net->layers + layer;
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs;
        long ld = hidden ? net->padded : net->outputs, skip = first * width;
        REAL *z = !hidden ? space->out : net->norm ? space->normal[layer] : space->slope[layer];
        z += skip;
        NAME(multiply)('N', 'N', rows, width, size, from, size, weights + at->weight, ld, z, width);
        if (at->bias >= 0) {
            const REAL *bias = weights + at->bias;
            for (long r = 0; r < rows; r++)
                for (long j = 0; j < width; j++) z[r * width + j] += bias[j];
        }
        if (!hidden) return;
        REAL *h = space->h[layer] + skip, *slope = space->slope[layer] + skip;
        if (net->norm == BATCH_NORM)
            NAME(batch_norm)(net, me, layer, rows, width, z, slope, space->rstd[layer],
                             space->other);
        else if (net->norm == LAYER_NORM)
            NAME(layer_norm)(net, me, layer, rows, width, z, slope, space->rstd[layer]);
        NAME(activate)(me->activation, rows * width, slope, h);
        if (net->training && me->dropout > 0)
            NAME(drop)(first, rows, width, me->dropout, draw_key(key, layer), h, slope);
        from = h;
        size = width;
    }
}

/* The outputs of some rows become their loss's gradient; returns their part of the mean loss. */
static double NAME(loss)(const struct Network *net, const struct Member *me, long first,
                         long rows, long batch, const int64_t *row,
                         const struct NAME(Space) *space) {
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

/* Gradients of what each layer computed, for some rows: they take the place of the slopes. */
static void NAME(backward)(const struct Network *net, const struct Member *me, long first,
                           long rows, const struct NAME(Space) *space) {
    const REAL *weights = me->weights;
    for (int layer = net->depth; layer > 0; layer--) {
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs, size = me->widths[layer - 1];
        const REAL *d = (hidden ? space->slope[layer] : space->out) + first * width;
        /* Not at `first * size`: the other half may be at a layer of another size. */
        REAL *back = space->other + first * net->padded;
        REAL *slope = space->slope[layer - 1] + first * size;
        NAME(multiply)('N', 'T', rows, size, width, d, width,
                       weights + net->layers[layer].weight, hidden ? net->padded : net->outputs,
                       back, size);
        for (long i = 0; i < rows * size; i++) slope[i] *= back[i];
        if (net->norm)
            NAME(norm_backward)(net, me, layer - 1, rows, size, space->normal[layer - 1],
                                space->rstd[layer - 1], slope, space->grads);
    }
}

/* Gradients of the weights and biases of a part of the network, from those of `backward`. */
static void NAME(weight_grads)(const struct Network *net, const struct Member *me, int part,
                               long rows, const struct NAME(Space) *space) {
    REAL *grads = space->grads;
    for (int layer = 0; layer <= net->depth; layer++) {
        const struct Layer *at = net->layers + layer;
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs;
        long ld = hidden ? net->padded : net->outputs;
        long size = layer ? me->widths[layer - 1] : net->inputs;
        struct Range some = part_of(size, part);
        const REAL *from = layer ? space->h[layer - 1] : space->x;
        const REAL *d = hidden ? space->slope[layer] : space->out;
        if (some.end > some.first)
            NAME(multiply)('T', 'N', some.end - some.first, width, rows, from + some.first, size,
                           d, width, grads + at->weight + some.first * ld, ld);
        if (at->bias < 0) continue;
        some = part_of(width, part);
        REAL *bias = grads + at->bias;
        for (long j = some.first; j < some.end; j++) bias[j] = 0;
        for (long r = 0; r < rows; r++)
            for (long j = some.first; j < some.end; j++) bias[j] += d[r * width + j];
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

static void NAME(update_run)(int optimizer, const struct NAME(Rule) *rule, long n, int decayed,
                             REAL *restrict w, REAL *restrict g, REAL *restrict m,
                             REAL *restrict v) {
    const REAL b1 = rule->b1, b2 = rule->b2, rate = rule->rate, shrink = rule->shrink;
    const REAL c1 = rule->c1, c2 = rule->c2, step = rule->step, second = rule->second;
    if (rule->scale != 1) EACH g[i] *= rule->scale;
    if (decayed && rule->coupled > 0) EACH g[i] += rule->coupled * w[i];
    if (decayed && shrink != 1) EACH w[i] *= shrink;
    switch (optimizer) {
    case SGD:
        if (b1 > 0) EACH { m[i] = b1 * m[i] + g[i]; w[i] -= rate * m[i]; }
        else EACH w[i] -= rate * g[i];
        break;
    case NESTEROV:
        if (b1 > 0) EACH { m[i] = b1 * m[i] + g[i]; w[i] -= rate * (g[i] + b1 * m[i]); }
        else EACH w[i] -= rate * g[i];
        break;
    case ADAM:
        EACH {
            m[i] += c1 * (g[i] - m[i]);
            v[i] = b2 * v[i] + c2 * g[i] * g[i];
            w[i] -= step * m[i] / (SQRT(v[i]) * second + (REAL)ADAM_EPSILON);
        }
        break;
    case RMSPROP:
        EACH {
            v[i] = b2 * v[i] + c2 * g[i] * g[i];
            m[i] = b1 * m[i] + g[i] / (SQRT(v[i]) + (REAL)ADAM_EPSILON);
            w[i] -= rate * m[i];
        }
        break;
    }
}

/* The t-th update, given the sum of all gradients' squares. */
static void NAME(update)(const struct Network *net, const struct Member *me, int part, double rate,
                         double t, double squares, REAL *restrict g) {
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

/* Steps until the end of the round or of the time: by one thread, or by two that share each step
 * (half 0 and 1), each some of the batch's rows and then some of the weights. */
static void NAME(train)(const struct Network *net, struct Member *me, double until, REAL *memory,
                        struct Team *team, int half) {
    struct NAME(Space) space;
    NAME(cut)(net, net->batch, memory, &space);
    const REAL *data = net->x;
    const int part = team ? half : WHOLE;
    const double updates = *me->steps;
    const int64_t begun = me->done;
    struct Team alone = {.stop = 0};
    struct Team *both = team ? team : &alone;
    if (team && !meet(team, half)) return;
    for (int64_t step = begun; step < net->steps && !both->stop; step++) {
        int64_t start = step * net->batch, batch = net->examples - start;
        if (batch > net->batch) batch = net->batch;
        const int64_t *row = me->rows + start;
        struct Range some = part_of(batch, part);
        long rows = some.end - some.first;
        REAL *x = space.x + some.first * net->inputs;
        for (int64_t r = 0; r < rows; r++)
            memcpy(x + r * net->inputs, data + row[some.first + r] * net->inputs,
                   net->inputs * sizeof(REAL));
        double loss = 0;
        if (rows > 0) {
            NAME(forward)(net, me, some.first, rows, x, step_key(me->key, step), &space);
            loss = NAME(loss)(net, me, some.first, rows, batch, row, &space);
            NAME(backward)(net, me, some.first, rows, &space);
        }
        both->loss[half] = loss;
        if (team && !meet(team, half)) return;
        NAME(weight_grads)(net, me, part, batch, &space);
        if (team)
            team->squares[half] = NAME(regularize)(net, me, half, space.grads);
        else
            for (int i = 0; i < 2; i++) alone.squares[i] = NAME(regularize)(net, me, i, space.grads);
        if (team && !meet(team, half)) return;
        NAME(update)(net, me, part, me->rates[step], updates + (step - begun) + 1,
                     both->squares[0] + both->squares[1], space.grads);
        if (half == 0) {
            me->loss_sum += (both->loss[0] + both->loss[1]) * batch;
            me->done = step + 1;
            ++*me->steps;
            both->stop = now() > until;
        }
        if (team && !meet(team, half)) return;
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
        NAME(forward)(net, me, 0, rows, data + start * net->inputs, 0, &space);
        memcpy((REAL *)me->outputs + start * net->outputs, space.out,
               rows * net->outputs * sizeof(REAL));
    }
    me->done = net->steps;
}

static void NAME(run)(struct Job *job, double until, void *memory, int half) {
    const struct Network *net = job->network;
    int64_t i;
    if (job->team)
        NAME(train)(net, job->members, until, memory, job->team, half);
    else
        while ((i = atomic_fetch_add(&job->next, 1)) < job->count && now() < until) {
            if (net->training)
                NAME(train)(net, job->members + i, until, memory, 0, 0);
            else
                NAME(evaluate)(net, job->members + i, memory);
        }
}

#undef EACH
/* What this was included with. */
#undef PRECISION
#undef REAL
#undef REAL_BYTES
#undef EXP
#undef TANH
#undef ERF
#undef LOG
#undef EXPM1
#undef POW
#undef SQRT
#undef FABS
