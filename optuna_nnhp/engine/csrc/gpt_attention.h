/* Causal self-attention. Part of the template of `gpt.c`, see `instruction_sets.h`. The queries, keys
 * and values of the heads are columns of `qkv`, whose rows have `3 * width` numbers.
 */

/* Rotate each pair of channels of the queries and keys by the angle of its position (rotary position
 * embedding); with sign -1 in the other direction. */
static void SUFFIXED(rotate_channels)(const struct Gpt *gpt, long rows, REAL sign,
                                      REAL *restrict qkv) {
    const long d = gpt->head_size, w = gpt->heads * d;
    for (long r = 0; r < rows; r++) {
        const REAL *rotations = (const REAL *)gpt->rotations + r % gpt->length * d;
        for (long head = 0; head < 2 * gpt->heads; head++) {
            REAL *x = qkv + r * 3 * w + head * d;
            for (long j = 0; j < d; j += 2) {
                const REAL a = x[j], b = x[j + 1], c = rotations[j], s = sign * rotations[j + 1];
                x[j] = a * c - b * s;
                x[j + 1] = a * s + b * c;
            }
        }
    }
}

/* Divide each head's queries and keys by their root mean square. */
static void SUFFIXED(qk_norm_forward)(const struct Gpt *gpt, long rows, REAL *restrict qkv,
                                      REAL *restrict rstd) {
    const long d = gpt->head_size, heads = 2 * gpt->heads, w = gpt->heads * d;
    for (long i = 0; i < rows * heads; i++) {
        REAL *x = qkv + i / heads * 3 * w + i % heads * d, square = 0;
        for (long j = 0; j < d; j++) square += x[j] * x[j];
        rstd[i] = 1 / SQRT(square / d + (REAL)NORM_EPSILON);
        for (long j = 0; j < d; j++) x[j] *= rstd[i];
    }
}

/* Replace `grad`, that of the normalized queries and keys in `qkv`, by the grad of those before. */
static void SUFFIXED(qk_norm_backward)(const struct Gpt *gpt, long rows, const REAL *qkv,
                                       const REAL *rstd, REAL *restrict grad) {
    const long d = gpt->head_size, heads = 2 * gpt->heads, w = gpt->heads * d;
    for (long i = 0; i < rows * heads; i++) {
        const long start = i / heads * 3 * w + i % heads * d;
        REAL dot = 0;
        for (long j = 0; j < d; j++) dot += grad[start + j] * qkv[start + j];
        dot /= d;
        for (long j = 0; j < d; j++)
            grad[start + j] = rstd[i] * (grad[start + j] - dot * qkv[start + j]);
    }
}

/* Compute one head's attention weights for some rows of queries: a softmax over the keys up to each
 * query's position, and 0 after it. `logsum` keeps the logarithm of the softmax's denominator for the
 * backward pass, which passes `has_logsum`. */
static void SUFFIXED(attention_weights)(const struct Gpt *gpt, const REAL *qkv, long first,
                                        long rows, REAL *restrict weights, REAL *restrict logsum,
                                        int has_logsum) {
    const long d = gpt->head_size, w = gpt->heads * d, n = gpt->length, end = first + rows;
    const REAL scale = (REAL)gpt->attention_scale;
    SUFFIXED(matmul)('N', 'T', rows, end, d, qkv + first * 3 * w, 3 * w, qkv + w, 3 * w, weights,
                     n);
    for (long r = 0; r < rows; r++) {
        REAL *row = weights + r * n, top = row[0], sum = 0;
        const long visible = first + r + 1;
        if (has_logsum) {
            const REAL row_logsum = logsum[first + r];
            for (long j = 0; j < visible; j++) row[j] = EXP(row[j] * scale - row_logsum);
        } else {
#pragma omp simd reduction(max : top)
            for (long j = 0; j < visible; j++) top = row[j] > top ? row[j] : top;
            top *= scale;
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < visible; j++) {
                row[j] = EXP(row[j] * scale - top);
                sum += row[j];
            }
            logsum[first + r] = top + LOG(sum);
            sum = 1 / sum;
            for (long j = 0; j < visible; j++) row[j] *= sum;
        }
        for (long j = visible; j < end; j++) row[j] = 0;
    }
}

/* Write the weighted sums of the values to `attended`. `weights` is scratch. */
static void SUFFIXED(attention_forward)(const struct Gpt *gpt, long windows, const REAL *qkv,
                                        REAL *logsum, REAL *attended, REAL *weights) {
    const long d = gpt->head_size, w = gpt->heads * d, n = gpt->length;
    for (long i = 0; i < windows * gpt->heads; i++) {
        const long row_start = i / gpt->heads * n, channel = i % gpt->heads * d;
        const REAL *head_qkv = qkv + row_start * 3 * w + channel;
        for (long first = 0; first < n; first += QUERY_ROWS) {
            const long rows = n - first < QUERY_ROWS ? n - first : QUERY_ROWS;
            SUFFIXED(attention_weights)(gpt, head_qkv, first, rows, weights, logsum + i * n, 0);
            SUFFIXED(matmul)('N', 'N', rows, d, first + rows, weights, n, head_qkv + 2 * w, 3 * w,
                             attended + (row_start + first) * w + channel, w);
        }
    }
}

/* Compute `grad`, that of `qkv`, from d_attended, that of `attended`. The weights are computed again;
 * `weights` and `slopes` are scratch. */
static void SUFFIXED(attention_backward)(const struct Gpt *gpt, long windows, const REAL *qkv,
                                         REAL *logsum, const REAL *attended,
                                         const REAL *d_attended, REAL *grad, REAL *weights,
                                         REAL *d_weights) {
    const long d = gpt->head_size, w = gpt->heads * d, n = gpt->length, ld = 3 * w;
    const REAL scale = (REAL)gpt->attention_scale;
    memset(grad, 0, windows * n * ld * sizeof(REAL));
    for (long i = 0; i < windows * gpt->heads; i++) {
        const long row_start = i / gpt->heads * n, channel = i % gpt->heads * d;
        const REAL *head_qkv = qkv + row_start * ld + channel;
        REAL *head_grad = grad + row_start * ld + channel;
        for (long first = 0; first < n; first += QUERY_ROWS) {
            const long rows = n - first < QUERY_ROWS ? n - first : QUERY_ROWS, end = first + rows;
            const REAL *out = attended + (row_start + first) * w + channel;
            const REAL *d_out = d_attended + (row_start + first) * w + channel;
            SUFFIXED(attention_weights)(gpt, head_qkv, first, rows, weights, logsum + i * n, 1);
            SUFFIXED(matmul)('N', 'T', rows, end, d, d_out, w, head_qkv + 2 * w, ld, d_weights, n);
            SUFFIXED(gemm)('T', 'N', end, d, rows, weights, n, d_out, w, head_grad + 2 * w, ld, 1);
            for (long r = 0; r < rows; r++) {
                REAL dot = 0;
                for (long j = 0; j < d; j++) dot += out[r * w + j] * d_out[r * w + j];
                for (long j = 0; j < end; j++)
                    d_weights[r * n + j] =
                        scale * weights[r * n + j] * (d_weights[r * n + j] - dot);
            }
            SUFFIXED(matmul)('N', 'N', rows, d, end, d_weights, n, head_qkv + w, ld,
                             head_grad + first * ld, ld);
            SUFFIXED(gemm)('T', 'N', end, d, rows, d_weights, n, head_qkv + first * ld, ld,
                           head_grad + w, ld, 1);
        }
    }
}
