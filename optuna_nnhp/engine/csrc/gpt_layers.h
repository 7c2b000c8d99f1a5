/* The layers of a GPT: normalization, dropout, the feed-forward layer's activation, and the loss. Part
 * of the template of `gpt.c`, see `instruction_sets.h`. Rows are tokens, window after window; matrices
 * are stored row after row. "grad" stands for the gradient of the loss.
 */

/* ---- Normalization ---- */

/* Write the normalized rows of x to `normed`, and to `block_input` the same times a gain, with half of
 * the channels taken from the token before if there is a token shift. Without gain and shift both are
 * the same memory. */
static void SUFFIXED(norm_forward)(const struct Gpt *gpt, long rows, const REAL *x,
                                   const REAL *gain, REAL *restrict normed, REAL *restrict rstd,
                                   REAL *block_input) {
    const long w = gpt->heads * gpt->head_size, half = gpt->token_shift ? w / 2 : 0;
    for (long r = 0; r < rows; r++) {
        const REAL *from = x + r * w;
        REAL *to = normed + r * w, mean = 0, variance = 0;
        if (gpt->norm != RMS) {
#pragma omp simd reduction(+ : mean)
            for (long j = 0; j < w; j++) mean += from[j];
            mean /= w;
        }
#pragma omp simd reduction(+ : variance)
        for (long j = 0; j < w; j++) variance += (from[j] - mean) * (from[j] - mean);
        const REAL scale = 1 / SQRT(variance / w + (REAL)NORM_EPSILON);
        for (long j = 0; j < w; j++) to[j] = (from[j] - mean) * scale;
        rstd[r] = scale;
    }
    if (block_input == normed) return;
    for (long r = 0; r < rows; r++) {
        const REAL *from = normed + r * w;
        REAL *to = block_input + r * w;
        if (r % gpt->length)
            for (long j = 0; j < half; j++) to[j] = from[j - w];
        else
            for (long j = 0; j < half; j++) to[j] = 0;
        for (long j = half; j < w; j++) to[j] = from[j];
        if (gain)
            for (long j = 0; j < w; j++) to[j] *= gain[j];
    }
}

/* Add to dx, the grad of the rows that were normalized, what follows from d, the grad of the block's
 * input. d is overwritten. */
static void SUFFIXED(norm_backward)(const struct Gpt *gpt, int shifted, long rows,
                                    const REAL *normed, const REAL *rstd, const REAL *gain,
                                    REAL *grad_gain, REAL *d, REAL *restrict dx) {
    const long w = gpt->heads * gpt->head_size, half = shifted ? w / 2 : 0;
    for (long r = 0; r < rows; r++) {
        const REAL *from = normed + r * w;
        REAL *grad_block = d + r * w, dot = 0, mean = 0;
        if (half && (r + 1) % gpt->length)
            for (long j = 0; j < half; j++) grad_block[j] = grad_block[j + w];
        else
            for (long j = 0; j < half; j++) grad_block[j] = 0;
        if (gain)
            for (long j = 0; j < w; j++) {
                grad_gain[j] += grad_block[j] * from[j];
                grad_block[j] *= gain[j];
            }
#pragma omp simd reduction(+ : dot)
        for (long j = 0; j < w; j++) dot += grad_block[j] * from[j];
        dot /= w;
        if (gpt->norm != RMS) {
#pragma omp simd reduction(+ : mean)
            for (long j = 0; j < w; j++) mean += grad_block[j];
            mean /= w;
        }
        REAL *to = dx + r * w;
        for (long j = 0; j < w; j++) to[j] += rstd[r] * (grad_block[j] - mean - from[j] * dot);
    }
}

/* ---- Dropout ---- */

/* Multiply each number of x by 0 with probability p and else by 1 / (1 - p). `draw` counts the dropout
 * layers. All members of a cohort draw the same noise. The backward pass applies it to the grads. */
static void SUFFIXED(dropout_forward)(const struct Gpt *gpt, const struct Task *task, long window,
                                      long rows, int draw, REAL *restrict x) {
    const long w = gpt->heads * gpt->head_size;
    if (!task->keys || task->dropout <= 0) return;
    const REAL p = (REAL)task->dropout, keep_scale = 1 / (1 - p);
    for (long r = 0; r < rows; r++) {
        const uint32_t start = (uint32_t)(window * gpt->length + r) * ROW_MULTIPLIER;
        for (uint32_t j = 0; j < (uint32_t)w; j++)
            x[r * w + j] *=
                SUFFIXED(uniform_noise)(start + j * UNIT_MULTIPLIER, task->keys[draw]) < p
                    ? 0
                    : keep_scale;
    }
}

/* ---- The activation of the feed-forward layer ---- */

/* Write the activations of `up` to `units`, and replace `up` by the derivatives there. */
static void SUFFIXED(feed_forward_activation)(const struct Gpt *gpt, long rows, REAL *restrict up,
                                              REAL *restrict units) {
    const long n = gpt->inner;
    if (gpt->feed_forward == FF_GELU) {
        SUFFIXED(activation_forward)(ACT_GELU, rows * n, up, units);
    } else if (gpt->feed_forward == FF_RELU2) {
        for (long i = 0; i < rows * n; i++) {
            const REAL v = up[i] < 0 ? 0 : up[i]; /* NaN stays NaN */
            units[i] = v * v;
            up[i] = 2 * v;
        }
    } else {
        for (long r = 0; r < rows; r++) {
            REAL *gate = up + r * 2 * n, *value = gate + n;
            for (long j = 0; j < n; j++) {
                const REAL g = gate[j], v = value[j], s = 1 / (1 + EXP(-g));
                units[r * n + j] = g * s * v;
                gate[j] = v * s * (1 + g * (1 - s));
                value[j] = g * s;
            }
        }
    }
}

/* Replace the derivatives in `up` by the grads of the activation's inputs; d is that of its output. */
static void SUFFIXED(feed_forward_activation_backward)(const struct Gpt *gpt, long rows,
                                                       const REAL *d, REAL *restrict up) {
    const long n = gpt->inner, parts = gpt->feed_forward == FF_SWIGLU ? 2 : 1;
    for (long r = 0; r < rows; r++)
        for (long part = 0; part < parts; part++)
            for (long j = 0; j < n; j++) up[(r * parts + part) * n + j] *= d[r * n + j];
}

/* ---- The loss ---- */

/* Return the loss of some tokens in nats, and in training replace their logits by the grad of its sum
 * times `grad_scale`. `slope` is scratch for the derivatives of the cap on the logits. */
static double SUFFIXED(cross_entropy_grad)(const struct Gpt *gpt, long rows, const int64_t *target,
                                           REAL grad_scale, REAL *restrict logits,
                                           REAL *restrict slope) {
    const long n = gpt->vocabulary;
    const REAL scale = (REAL)gpt->head_scale, cap = (REAL)gpt->logit_cap;
    double loss = 0;
    for (long r = 0; r < rows; r++) {
        REAL *row = logits + r * n, top, sum = 0;
        for (long j = 0; j < n; j++) row[j] *= scale;
        if (cap)
            for (long j = 0; j < n; j++) {
                const REAL t = TANH(row[j] / cap);
                row[j] = cap * t;
                slope[j] = 1 - t * t;
            }
        top = row[0];
#pragma omp simd reduction(max : top)
        for (long j = 0; j < n; j++) top = row[j] > top ? row[j] : top;
        const REAL target_logit = row[target[r]] - top;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < n; j++) {
            row[j] = EXP(row[j] - top);
            sum += row[j];
        }
        loss += LOG(sum) - target_logit;
        if (!gpt->training) continue;
        const REAL factor = grad_scale / sum;
        for (long j = 0; j < n; j++) row[j] *= factor;
        row[target[r]] -= grad_scale;
        if (cap)
            for (long j = 0; j < n; j++) row[j] *= slope[j];
        for (long j = 0; j < n; j++) row[j] *= scale;
    }
    return loss;
}
