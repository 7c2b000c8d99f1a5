/* Normalization, dropout, the feed-forward layer's function, and the loss; see `gpt_engine.c`.
 * Rows are tokens, window after window; all matrices are row after row.
 */

/* ---- Normalization ---- */

/* What a block reads of the stream: normalized, times a gain, half of it from the token before. */
static void NAME(normalize)(const struct Gpt *gpt, long rows, const REAL *x, const REAL *gain,
                            REAL *restrict normed, REAL *restrict rstd, REAL *read) {
    const long w = gpt->heads * gpt->head_size, half = gpt->shift ? w / 2 : 0;
    for (long r = 0; r < rows; r++) {
        const REAL *from = x + r * w;
        REAL *to = normed + r * w, mean = 0, square = 0;
        if (gpt->norm != RMS) {
#pragma omp simd reduction(+ : mean)
            for (long j = 0; j < w; j++) mean += from[j];
            mean /= w;
        }
#pragma omp simd reduction(+ : square)
        for (long j = 0; j < w; j++) square += (from[j] - mean) * (from[j] - mean);
        const REAL scale = 1 / SQRT(square / w + (REAL)NORM_EPSILON);
        for (long j = 0; j < w; j++) to[j] = (from[j] - mean) * scale;
        rstd[r] = scale;
    }
    if (read == normed) return;
    for (long r = 0; r < rows; r++) {
        const REAL *from = normed + r * w;
        REAL *to = read + r * w;
        if (r % gpt->length)
            for (long j = 0; j < half; j++) to[j] = from[j - w];
        else
            for (long j = 0; j < half; j++) to[j] = 0;
        for (long j = half; j < w; j++) to[j] = from[j];
        if (gain)
            for (long j = 0; j < w; j++) to[j] *= gain[j];
    }
}

/* The gradient of what was read becomes a part of the stream's; `d` is lost. */
static void NAME(normalize_back)(const struct Gpt *gpt, int shifted, long rows, const REAL *normed,
                                 const REAL *rstd, const REAL *gain, REAL *grad_gain, REAL *d,
                                 REAL *restrict dx) {
    const long w = gpt->heads * gpt->head_size, half = shifted ? w / 2 : 0;
    for (long r = 0; r < rows; r++) {
        const REAL *from = normed + r * w;
        REAL *back = d + r * w, along = 0, mean = 0;
        if (half && (r + 1) % gpt->length)
            for (long j = 0; j < half; j++) back[j] = back[j + w];
        else
            for (long j = 0; j < half; j++) back[j] = 0;
        if (gain)
            for (long j = 0; j < w; j++) {
                grad_gain[j] += back[j] * from[j];
                back[j] *= gain[j];
            }
#pragma omp simd reduction(+ : along)
        for (long j = 0; j < w; j++) along += back[j] * from[j];
        along /= w;
        if (gpt->norm != RMS) {
#pragma omp simd reduction(+ : mean)
            for (long j = 0; j < w; j++) mean += back[j];
            mean /= w;
        }
        REAL *to = dx + r * w;
        for (long j = 0; j < w; j++) to[j] += rstd[r] * (back[j] - mean - from[j] * along);
    }
}

/* ---- Dropout: the members share the noise of a step's rows ---- */

static void NAME(silence)(const struct Gpt *gpt, const struct Task *task, long window, long rows,
                          int draw, REAL *restrict x) {
    const long w = gpt->heads * gpt->head_size;
    if (!task->keys || task->dropout <= 0) return;
    const REAL p = (REAL)task->dropout, kept = 1 / (1 - p);
    for (long r = 0; r < rows; r++) {
        const uint32_t start = (uint32_t)(window * gpt->length + r) * ROW_KEY;
        for (uint32_t j = 0; j < (uint32_t)w; j++)
            x[r * w + j] *= NAME(noise)(start + j * UNIT_KEY, task->keys[draw]) < p ? 0 : kept;
    }
}

/* ---- The feed-forward layer's function: its slopes take the place of the arguments ---- */

static void NAME(feed)(const struct Gpt *gpt, long rows, REAL *restrict up, REAL *restrict units) {
    const long n = gpt->inner;
    if (gpt->feed_forward == FF_GELU) {
        NAME(activate)(ACT_GELU, rows * n, up, units);
    } else if (gpt->feed_forward == FF_RELU2) {
        for (long i = 0; i < rows * n; i++) {
            const REAL v = up[i] < 0 ? 0 : up[i]; /* NaN stays */
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

/* The slopes become the gradients of the arguments. */
static void NAME(feed_back)(const struct Gpt *gpt, long rows, const REAL *d, REAL *restrict up) {
    const long n = gpt->inner, parts = gpt->feed_forward == FF_SWIGLU ? 2 : 1;
    for (long r = 0; r < rows; r++)
        for (long part = 0; part < parts; part++)
            for (long j = 0; j < n; j++) up[(r * parts + part) * n + j] *= d[r * n + j];
}

/* ---- The loss: logits become their gradient ---- */

/* Nats of some tokens; the gradient is that of their sum times `share`. */
static double NAME(cross_entropy)(const struct Gpt *gpt, long rows, const int64_t *target,
                                  REAL share, REAL *restrict logits, REAL *restrict slope) {
    const long n = gpt->vocabulary;
    const REAL scale = (REAL)gpt->head_scale, most = (REAL)gpt->logit_cap;
    double loss = 0;
    for (long r = 0; r < rows; r++) {
        REAL *row = logits + r * n, top, sum = 0;
        for (long j = 0; j < n; j++) row[j] *= scale;
        if (most)
            for (long j = 0; j < n; j++) {
                const REAL t = TANH(row[j] / most);
                row[j] = most * t;
                slope[j] = 1 - t * t;
            }
        top = row[0];
#pragma omp simd reduction(max : top)
        for (long j = 0; j < n; j++) top = row[j] > top ? row[j] : top;
        const REAL right = row[target[r]] - top;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < n; j++) {
            row[j] = EXP(row[j] - top);
            sum += row[j];
        }
        loss += LOG(sum) - right;
        if (!gpt->training) continue;
        const REAL factor = share / sum;
        for (long j = 0; j < n; j++) row[j] *= factor;
        row[target[r]] -= share;
        if (most)
            for (long j = 0; j < n; j++) row[j] *= slope[j];
        for (long j = 0; j < n; j++) row[j] *= scale;
    }
    return loss;
}
