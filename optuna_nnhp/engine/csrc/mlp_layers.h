/* The layers of a multilayer perceptron: normalization, dropout and losses. Part of the template of
 * `mlp.c`, see `instruction_sets.h`. Rows are examples; matrices are stored row after row. "grad"
 * stands for the gradient of the loss.
 */

/* ---- Sums along an axis ---- */

/* out = the sum of the rows of x. */
static void SUFFIXED(sum_rows)(long rows, long width, const REAL *x, REAL *restrict out) {
    for (long j = 0; j < width; j++) out[j] = 0;
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < width; j++) out[j] += x[r * width + j];
}

/* ---- Normalization ---- */

/* Replace x by its normalized values, and write these times scale plus bias to y. In training also
 * update the running statistics. rstd receives the reciprocal standard deviation of each unit; mean
 * is scratch. */
static void SUFFIXED(batch_norm_forward)(const struct Network *network,
                                         const struct Member *member, int layer, long rows,
                                         long width, REAL *restrict x, REAL *restrict y,
                                         REAL *restrict rstd, REAL *restrict mean) {
    const REAL *weights = member->weights,
               *norm_weight = weights + network->layers[layer].norm_weight;
    const REAL *norm_bias = weights + network->layers[layer].norm_bias;
    long index = member->index * network->padded;
    REAL *running_mean = (REAL *)network->layers[layer].running_mean + index;
    REAL *running_var = (REAL *)network->layers[layer].running_var + index;
    if (!network->training) {
        for (long j = 0; j < width; j++) {
            mean[j] = running_mean[j];
            rstd[j] = 1 / SQRT(running_var[j] + (REAL)NORM_EPSILON);
        }
    } else {
        SUFFIXED(sum_rows)(rows, width, x, mean);
        for (long j = 0; j < width; j++) {
            mean[j] /= rows;
            rstd[j] = 0;
        }
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < width; j++) {
                REAL d = x[r * width + j] - mean[j];
                rstd[j] += d * d;
            }
        for (long j = 0; j < width; j++) {
            REAL variance = rstd[j] / rows;
            rstd[j] = 1 / SQRT(variance + (REAL)NORM_EPSILON);
            if (rows == 1) continue; /* one example has no variance */
            REAL unbiased = variance * ((REAL)rows / (rows - 1));
            running_mean[j] += (REAL)RUNNING_MOMENTUM * (mean[j] - running_mean[j]);
            running_var[j] += (REAL)RUNNING_MOMENTUM * (unbiased - running_var[j]);
        }
    }
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < width; j++) {
            REAL v = (x[r * width + j] - mean[j]) * rstd[j];
            x[r * width + j] = v;
            y[r * width + j] = v * norm_weight[j] + norm_bias[j];
        }
}

/* Do the same with the mean and the standard deviation of each example. */
static void SUFFIXED(layer_norm_forward)(const struct Network *network,
                                         const struct Member *member, int layer, long rows,
                                         long width, REAL *restrict x, REAL *restrict y,
                                         REAL *restrict rstd) {
    const REAL *weights = member->weights,
               *norm_weight = weights + network->layers[layer].norm_weight;
    const REAL *norm_bias = weights + network->layers[layer].norm_bias;
    for (long r = 0; r < rows; r++) {
        REAL *v = x + r * width, *out = y + r * width, mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
        for (long j = 0; j < width; j++) mean += v[j];
        mean /= width;
#pragma omp simd reduction(+ : variance)
        for (long j = 0; j < width; j++) variance += (v[j] - mean) * (v[j] - mean);
        rstd[r] = 1 / SQRT(variance / width + (REAL)NORM_EPSILON);
        for (long j = 0; j < width; j++) {
            v[j] = (v[j] - mean) * rstd[r];
            out[j] = v[j] * norm_weight[j] + norm_bias[j];
        }
    }
}

/* Replace d, the grad of the layer's output, by that of its input, and compute the grads of its
 * weights and biases. */
static void SUFFIXED(norm_backward)(const struct Network *network, const struct Member *member,
                                    int layer, long rows, long width,
                                    const REAL *restrict normalized, const REAL *restrict rstd,
                                    REAL *restrict d, REAL *restrict grads) {
    const REAL *norm_weight = (const REAL *)member->weights + network->layers[layer].norm_weight;
    REAL *norm_weight_grad = grads + network->layers[layer].norm_weight;
    REAL *norm_bias_grad = grads + network->layers[layer].norm_bias;
    SUFFIXED(sum_rows)(rows, width, d, norm_bias_grad);
    for (long j = 0; j < width; j++) norm_weight_grad[j] = 0;
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < width; j++)
            norm_weight_grad[j] += d[r * width + j] * normalized[r * width + j];
    for (long r = 0; r < rows; r++) {
        REAL *g = d + r * width;
        const REAL *v = normalized + r * width;
        if (network->norm == BATCH_NORM) {
            for (long j = 0; j < width; j++)
                g[j] = (g[j] - (norm_bias_grad[j] + v[j] * norm_weight_grad[j]) / rows) *
                       norm_weight[j] * rstd[j];
            continue;
        }
        REAL grad_sum = 0, grad_dot = 0;
#pragma omp simd reduction(+ : grad_sum, grad_dot)
        for (long j = 0; j < width; j++) {
            g[j] *= norm_weight[j];
            grad_sum += g[j];
            grad_dot += g[j] * v[j];
        }
        for (long j = 0; j < width; j++)
            g[j] = (g[j] - (grad_sum + v[j] * grad_dot) / width) * rstd[r];
    }
}

/* ---- Dropout ---- */

/* Multiply the activations y of one example, and their derivatives, by 0 with probability p and else
 * by 1 / (1 - p), for n units from `first_unit` on. */
static inline void SUFFIXED(dropout_forward)(uint32_t row, uint32_t first_unit, uint32_t n, REAL p,
                                             uint32_t key, REAL *restrict y,
                                             REAL *restrict slope) {
    const REAL keep_scale = 1 / (1 - p);
    const uint32_t start = row * ROW_MULTIPLIER + first_unit * UNIT_MULTIPLIER;
    for (uint32_t j = 0; j < n; j++) {
        REAL factor =
            SUFFIXED(uniform_noise)(start + j * UNIT_MULTIPLIER, key) < p ? 0 : keep_scale;
        y[j] *= factor;
        slope[j] *= factor;
    }
}

/* ---- Losses ---- */

/* Replace the logits x of some rows of a batch by their grad. Return these rows' part of the batch's
 * mean loss. */
static double SUFFIXED(cross_entropy_grad)(const struct Member *member, long rows, long batch,
                                           long classes, const int64_t *label, REAL *restrict x) {
    const REAL smoothing = member->smoothing, gamma = member->gamma;
    double total = 0;
    for (long r = 0; r < rows; r++) {
        REAL *row = x + r * classes, top = row[0];
        for (long c = 1; c < classes; c++) top = row[c] > top ? row[c] : top;
        for (long c = 0; c < classes; c++) row[c] -= top;
    }
    for (long r = 0; r < rows; r++) {
        REAL *row = x + r * classes, sum = 0, mean = 0;
        REAL target_log_probability = row[label[r]];
        for (long c = 0; c < classes; c++) mean += row[c];
        for (long c = 0; c < classes; c++) row[c] = EXP(row[c]);
        for (long c = 0; c < classes; c++) sum += row[c];
        REAL log_sum = LOG(sum);
        target_log_probability -= log_sum;
        mean = mean / classes - log_sum;
        REAL loss = -(1 - smoothing) * target_log_probability - smoothing * mean, focal_factor = 1,
             focal_grad = 0;
        if (gamma > 0) { /* (1 - p) ** gamma has no finite derivative at p = 1: clamp 1 - p */
            REAL error_probability = -EXPM1(target_log_probability),
                 clamped = error_probability < (REAL)MIN_ERROR_PROBABILITY
                               ? (REAL)MIN_ERROR_PROBABILITY
                               : error_probability;
            focal_factor = POW(clamped, gamma);
            if (error_probability >= (REAL)MIN_ERROR_PROBABILITY)
                focal_grad = loss * gamma * focal_factor / clamped * EXP(target_log_probability);
            if (error_probability != error_probability)
                focal_factor = focal_grad = error_probability;
            loss *= focal_factor;
        }
        total += loss;
        REAL grad_scale = (focal_factor + focal_grad) / (sum * batch),
             smoothing_grad = focal_factor * smoothing / classes / batch;
        for (long c = 0; c < classes; c++) row[c] = row[c] * grad_scale - smoothing_grad;
        row[label[r]] -= (focal_grad + focal_factor * (1 - smoothing)) / batch;
    }
    return total / batch;
}

/* Do the same with the outputs of a regression, for the mean squared, mean absolute or Huber loss. */
static double SUFFIXED(regression_grad)(const struct Member *member, long rows, long batch,
                                        const REAL *target, REAL *restrict x) {
    const REAL delta = member->delta;
    double total = 0;
    for (long r = 0; r < rows; r++) {
        REAL error = x[r] - target[r], size = FABS(error), loss, slope;
        if (member->loss == MSE) {
            loss = error * error;
            slope = 2 * error;
        } else if (member->loss == MAE) {
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
