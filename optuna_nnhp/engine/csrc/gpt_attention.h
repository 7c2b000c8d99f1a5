/* Causal self-attention of some windows; see `gpt_engine.c`. A head's queries, keys and values are
 * columns of `qkv`, whose rows are `3 * width` long.
 */

/* Turn each pair of channels by an angle of its position, forth (sign 1) or back (sign -1). */
static void NAME(turn)(const struct Gpt *gpt, long rows, REAL sign, REAL *restrict qkv) {
    const long d = gpt->head_size, w = gpt->heads * d;
    for (long r = 0; r < rows; r++) {
        const REAL *turns = (const REAL *)gpt->turns + r % gpt->length * d;
        for (long head = 0; head < 2 * gpt->heads; head++) {
            REAL *x = qkv + r * 3 * w + head * d;
            for (long j = 0; j < d; j += 2) {
                const REAL a = x[j], b = x[j + 1], c = turns[j], s = sign * turns[j + 1];
                x[j] = a * c - b * s;
                x[j + 1] = a * s + b * c;
            }
        }
    }
}

/* Queries and keys over their root mean square. */
static void NAME(norm_heads)(const struct Gpt *gpt, long rows, REAL *restrict qkv,
                             REAL *restrict rstd) {
    const long d = gpt->head_size, heads = 2 * gpt->heads, w = gpt->heads * d;
    for (long i = 0; i < rows * heads; i++) {
        REAL *x = qkv + i / heads * 3 * w + i % heads * d, square = 0;
        for (long j = 0; j < d; j++) square += x[j] * x[j];
        rstd[i] = 1 / SQRT(square / d + (REAL)NORM_EPSILON);
        for (long j = 0; j < d; j++) x[j] *= rstd[i];
    }
}

static void NAME(norm_heads_back)(const struct Gpt *gpt, long rows, const REAL *qkv,
                                  const REAL *rstd, REAL *restrict grad) {
    const long d = gpt->head_size, heads = 2 * gpt->heads, w = gpt->heads * d;
    for (long i = 0; i < rows * heads; i++) {
        const long at = i / heads * 3 * w + i % heads * d;
        REAL along = 0;
        for (long j = 0; j < d; j++) along += grad[at + j] * qkv[at + j];
        along /= d;
        for (long j = 0; j < d; j++) grad[at + j] = rstd[i] * (grad[at + j] - along * qkv[at + j]);
    }
}

/* Weights of a strip of one head's queries over the keys before them, zero over the others. */
static void NAME(weigh)(const struct Gpt *gpt, const REAL *qkv, long first, long rows,
                        REAL *restrict weights, REAL *restrict logsum, int again) {
    const long d = gpt->head_size, w = gpt->heads * d, n = gpt->length, end = first + rows;
    const REAL scale = (REAL)gpt->attention_scale;
    NAME(multiply)('N', 'T', rows, end, d, qkv + first * 3 * w, 3 * w, qkv + w, 3 * w, weights, n);
    for (long r = 0; r < rows; r++) {
        REAL *row = weights + r * n, top = row[0], sum = 0;
        const long seen = first + r + 1;
        if (again) {
            const REAL known = logsum[first + r];
            for (long j = 0; j < seen; j++) row[j] = EXP(row[j] * scale - known);
        } else {
#pragma omp simd reduction(max : top)
            for (long j = 0; j < seen; j++) top = row[j] > top ? row[j] : top;
            top *= scale;
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < seen; j++) {
                row[j] = EXP(row[j] * scale - top);
                sum += row[j];
            }
            logsum[first + r] = top + LOG(sum);
            sum = 1 / sum;
            for (long j = 0; j < seen; j++) row[j] *= sum;
        }
        for (long j = seen; j < end; j++) row[j] = 0;
    }
}

static void NAME(attend)(const struct Gpt *gpt, long windows, const REAL *qkv, REAL *logsum,
                         REAL *mixed, REAL *weights) {
    const long d = gpt->head_size, w = gpt->heads * d, n = gpt->length;
    for (long i = 0; i < windows * gpt->heads; i++) {
        const long at = i / gpt->heads * n, channel = i % gpt->heads * d;
        const REAL *own = qkv + at * 3 * w + channel;
        for (long first = 0; first < n; first += STRIP) {
            const long rows = n - first < STRIP ? n - first : STRIP;
            NAME(weigh)(gpt, own, first, rows, weights, logsum + i * n, 0);
            NAME(multiply)('N', 'N', rows, d, first + rows, weights, n, own + 2 * w, 3 * w,
                           mixed + (at + first) * w + channel, w);
        }
    }
}

/* `grad` becomes the gradient of `qkv`, from `d_mixed`, that of what was mixed. */
static void NAME(attend_back)(const struct Gpt *gpt, long windows, const REAL *qkv, REAL *logsum,
                              const REAL *mixed, const REAL *d_mixed, REAL *grad, REAL *weights,
                              REAL *slopes) {
    const long d = gpt->head_size, w = gpt->heads * d, n = gpt->length, ld = 3 * w;
    const REAL scale = (REAL)gpt->attention_scale;
    memset(grad, 0, windows * n * ld * sizeof(REAL));
    for (long i = 0; i < windows * gpt->heads; i++) {
        const long at = i / gpt->heads * n, channel = i % gpt->heads * d;
        const REAL *own = qkv + at * ld + channel;
        REAL *back = grad + at * ld + channel;
        for (long first = 0; first < n; first += STRIP) {
            const long rows = n - first < STRIP ? n - first : STRIP, end = first + rows;
            const REAL *out = mixed + (at + first) * w + channel;
            const REAL *d_out = d_mixed + (at + first) * w + channel;
            NAME(weigh)(gpt, own, first, rows, weights, logsum + i * n, 1);
            NAME(multiply)('N', 'T', rows, end, d, d_out, w, own + 2 * w, ld, slopes, n);
            NAME(multiply_to)('T', 'N', end, d, rows, weights, n, d_out, w, back + 2 * w, ld, 1);
            for (long r = 0; r < rows; r++) {
                REAL along = 0;
                for (long j = 0; j < d; j++) along += out[r * w + j] * d_out[r * w + j];
                for (long j = 0; j < end; j++)
                    slopes[r * n + j] = scale * weights[r * n + j] * (slopes[r * n + j] - along);
            }
            NAME(multiply)('N', 'N', rows, d, end, slopes, n, own + w, ld, back + first * ld, ld);
            NAME(multiply_to)('T', 'N', end, d, rows, slopes, n, own + first * ld, ld, back + w, ld,
                              1);
        }
    }
}
