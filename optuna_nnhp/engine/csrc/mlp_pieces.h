/* What a perceptron's layers are made of, for one precision and one instruction set; see
 * `mlp_engine.c`. Included with
 *   REAL             float or double
 *   NAME(x)          x with a suffix of its own
 *   EXP, TANH, ...   functions of a REAL
 * Rows are examples; all matrices are row after row.
 */

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
