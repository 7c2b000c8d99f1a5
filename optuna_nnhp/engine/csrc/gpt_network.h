/* The network: embedding, blocks and head, forward and backward, and the work of one thread. Part of
 * the template of `gpt.c`, see `instruction_sets.h`.
 *
 * Dropout is applied in `add_projection` (to what a block adds to the residual stream) and, with
 * learned positions, in `embedding_forward`.
 */

/* What a block keeps for the backward pass. */
struct SUFFIXED(BlockActivations) {
    REAL *normed1, *rstd1, *input1, *qkv, *rstd_heads, *logsum, *attended;
    REAL *normed2, *rstd2, *input2, *up, *units;
};

/* The tensors of a pass; x is the residual stream, dx its grad, d1 and d2 are scratch. */
struct SUFFIXED(Workspace) {
    struct SUFFIXED(BlockActivations) saved[MAX_LAYERS];
    REAL *x, *normed, *rstd, *block_input, *logits, *cap_slope, *weights, *slopes;
    REAL *dx, *d1, *d2;
};

static long SUFFIXED(up_columns)(const struct Gpt *gpt) {
    return gpt->feed_forward == FF_SWIGLU ? 2 * gpt->inner : gpt->inner;
}

/* Return for how many tokens the logits are computed at once. */
static long SUFFIXED(max_logit_rows)(const struct Gpt *gpt) {
    return gpt->vocabulary < MAX_LOGITS / 16 ? MAX_LOGITS / gpt->vocabulary : 16;
}

/* Return how many windows a thread computes at once: half of a step's. */
static long SUFFIXED(max_windows)(const struct Gpt *gpt) { return (gpt->windows + 1) / 2; }

/* Divide memory among the tensors of a workspace. Return how many numbers they take; memory may be
 * NULL to learn only this. In evaluation all blocks use the same memory. */
static int64_t SUFFIXED(partition_workspace)(const struct Gpt *gpt, REAL *memory,
                                             struct SUFFIXED(Workspace) * to) {
    const long rows = SUFFIXED(max_windows)(gpt) * gpt->length, w = gpt->heads * gpt->head_size;
    const long up = SUFFIXED(up_columns)(gpt), wide = up > 3 * w ? up : 3 * w;
    const int has_separate_input = gpt->token_shift || gpt->norm == LAYER_GAIN;
    int64_t used = 0;
#define TAKE(name, numbers) \
    (name = memory ? memory + used : NULL, used += ((numbers) + 15) / 16 * 16)
    for (long layer = 0; layer < gpt->layers; layer++) {
        struct SUFFIXED(BlockActivations) *saved = to->saved + layer;
        if (layer && !gpt->training) {
            *saved = to->saved[0];
            continue;
        }
        TAKE(saved->normed1, rows * w);
        TAKE(saved->rstd1, rows);
        saved->input1 = saved->normed1;
        if (has_separate_input) TAKE(saved->input1, rows * w);
        TAKE(saved->qkv, rows * 3 * w);
        TAKE(saved->rstd_heads, gpt->qk_norm ? rows * 2 * gpt->heads : 0);
        TAKE(saved->logsum, rows * gpt->heads);
        TAKE(saved->attended, rows * w);
        TAKE(saved->normed2, rows * w);
        TAKE(saved->rstd2, rows);
        saved->input2 = saved->normed2;
        if (has_separate_input) TAKE(saved->input2, rows * w);
        TAKE(saved->up, rows * up);
        TAKE(saved->units, rows * gpt->inner);
    }
    TAKE(to->x, rows * w);
    TAKE(to->normed, rows * w);
    TAKE(to->rstd, rows);
    to->block_input = to->normed;
    if (gpt->norm == LAYER_GAIN) TAKE(to->block_input, rows * w);
    TAKE(to->logits, SUFFIXED(max_logit_rows)(gpt) * gpt->vocabulary);
    TAKE(to->cap_slope, gpt->logit_cap ? gpt->vocabulary : 0);
    TAKE(to->weights, QUERY_ROWS * gpt->length);
    TAKE(to->slopes, QUERY_ROWS * gpt->length);
    TAKE(to->dx, rows * w);
    TAKE(to->d1, rows * wide);
    TAKE(to->d2, rows * (gpt->inner > w ? gpt->inner : w));
#undef TAKE
    return used;
}

/* Return where a parameter begins, or NULL if there is none. */
static const REAL *SUFFIXED(parameter_at)(const void *row, int64_t start) {
    return start < 0 ? NULL : (const REAL *)row + start;
}

/* Multiply some rows by a matrix, apply dropout, and add the result to the residual stream. */
static void SUFFIXED(add_projection)(const struct Gpt *gpt, const struct Task *task, long window,
                                     long rows, int draw, long inputs, const REAL *from,
                                     const REAL *matrix, struct SUFFIXED(Workspace) * workspace) {
    const long w = gpt->heads * gpt->head_size;
    const int has_dropout = task->keys && task->dropout > 0;
    REAL *to = has_dropout ? workspace->d1 : workspace->x;
    SUFFIXED(gemm)('N', 'N', rows, w, inputs, from, inputs, matrix, w, to, w, !has_dropout);
    if (!has_dropout) return;
    SUFFIXED(dropout_forward)(gpt, task, window, rows, draw, to);
    for (long i = 0; i < rows * w; i++) workspace->x[i] += to[i];
}

/* Compute a block: attention, then the feed-forward layer. `draw` is its first dropout layer. */
static void SUFFIXED(block_forward)(const struct Gpt *gpt, const struct Task *task, long layer,
                                    long window, long windows, int draw,
                                    struct SUFFIXED(Workspace) * workspace) {
    const long rows = windows * gpt->length, w = gpt->heads * gpt->head_size;
    const long up = SUFFIXED(up_columns)(gpt);
    const struct Block *block = gpt->blocks + layer;
    const REAL *weights = task->weights;
    struct SUFFIXED(BlockActivations) *saved = workspace->saved + layer;
    SUFFIXED(norm_forward)(gpt, rows, workspace->x, SUFFIXED(parameter_at)(weights, block->gain1),
                           saved->normed1, saved->rstd1, saved->input1);
    SUFFIXED(matmul)('N', 'N', rows, 3 * w, w, saved->input1, w, weights + block->qkv, 3 * w,
                     saved->qkv, 3 * w);
    if (gpt->rotations) SUFFIXED(rotate_channels)(gpt, rows, 1, saved->qkv);
    if (gpt->qk_norm) SUFFIXED(qk_norm_forward)(gpt, rows, saved->qkv, saved->rstd_heads);
    SUFFIXED(attention_forward)(gpt, windows, saved->qkv, saved->logsum, saved->attended,
                                workspace->weights);
    SUFFIXED(add_projection)(gpt, task, window, rows, draw, w, saved->attended,
                             weights + block->out, workspace);
    SUFFIXED(norm_forward)(gpt, rows, workspace->x, SUFFIXED(parameter_at)(weights, block->gain2),
                           saved->normed2, saved->rstd2, saved->input2);
    SUFFIXED(matmul)('N', 'N', rows, up, w, saved->input2, w, weights + block->up, up, saved->up,
                     up);
    SUFFIXED(feed_forward_activation)(gpt, rows, saved->up, saved->units);
    SUFFIXED(add_projection)(gpt, task, window, rows, draw + 1, gpt->inner, saved->units,
                             weights + block->down, workspace);
}

/* Return the grad of what `add_projection` has added before dropout: the stream's grad, with the same
 * dropout applied. */
static const REAL *SUFFIXED(residual_grad)(const struct Gpt *gpt, const struct Task *task,
                                           long window, long rows, int draw,
                                           struct SUFFIXED(Workspace) * workspace) {
    if (!task->keys || task->dropout <= 0) return workspace->dx;
    const long w = gpt->heads * gpt->head_size;
    memcpy(workspace->d1, workspace->dx, rows * w * sizeof(REAL));
    SUFFIXED(dropout_forward)(gpt, task, window, rows, draw, workspace->d1);
    return workspace->d1;
}

/* Compute the grads of a block's parameters, and replace dx, the grad of its output, by that of its
 * input. */
static void SUFFIXED(block_backward)(const struct Gpt *gpt, const struct Task *task, long layer,
                                     long window, long windows, int draw,
                                     struct SUFFIXED(Workspace) * workspace) {
    const long rows = windows * gpt->length, w = gpt->heads * gpt->head_size, n = gpt->inner;
    const long up = SUFFIXED(up_columns)(gpt);
    const struct Block *block = gpt->blocks + layer;
    const REAL *weights = task->weights, *d;
    REAL *grads = task->grads, *d1 = workspace->d1, *d2 = workspace->d2, *dx = workspace->dx;
    struct SUFFIXED(BlockActivations) *saved = workspace->saved + layer;
    d = SUFFIXED(residual_grad)(gpt, task, window, rows, draw + 1, workspace);
    SUFFIXED(matmul)('T', 'N', n, w, rows, saved->units, n, d, w, grads + block->down, w);
    SUFFIXED(matmul)('N', 'T', rows, n, w, d, w, weights + block->down, w, d2, n);
    SUFFIXED(feed_forward_activation_backward)(gpt, rows, d2, saved->up);
    SUFFIXED(matmul)('T', 'N', w, up, rows, saved->input2, w, saved->up, up, grads + block->up,
                     up);
    SUFFIXED(matmul)('N', 'T', rows, w, up, saved->up, up, weights + block->up, up, d2, w);
    SUFFIXED(norm_backward)(gpt, gpt->token_shift, rows, saved->normed2, saved->rstd2,
                            SUFFIXED(parameter_at)(weights, block->gain2), grads + block->gain2,
                            d2, dx);
    d = SUFFIXED(residual_grad)(gpt, task, window, rows, draw, workspace);
    SUFFIXED(matmul)('T', 'N', w, w, rows, saved->attended, w, d, w, grads + block->out, w);
    SUFFIXED(matmul)('N', 'T', rows, w, w, d, w, weights + block->out, w, d2, w);
    SUFFIXED(attention_backward)(gpt, windows, saved->qkv, saved->logsum, saved->attended, d2, d1,
                                 workspace->weights, workspace->slopes);
    if (gpt->qk_norm) SUFFIXED(qk_norm_backward)(gpt, rows, saved->qkv, saved->rstd_heads, d1);
    if (gpt->rotations) SUFFIXED(rotate_channels)(gpt, rows, -1, d1);
    SUFFIXED(matmul)('T', 'N', w, 3 * w, rows, saved->input1, w, d1, 3 * w, grads + block->qkv,
                     3 * w);
    SUFFIXED(matmul)('N', 'T', rows, w, 3 * w, d1, 3 * w, weights + block->qkv, 3 * w, d2, w);
    SUFFIXED(norm_backward)(gpt, gpt->token_shift, rows, saved->normed1, saved->rstd1,
                            SUFFIXED(parameter_at)(weights, block->gain1), grads + block->gain1,
                            d2, dx);
}

/* Write the embeddings of the windows' tokens to the residual stream. */
static void SUFFIXED(embedding_forward)(const struct Gpt *gpt, const struct Task *task,
                                        long window, long windows,
                                        struct SUFFIXED(Workspace) * workspace) {
    const long w = gpt->heads * gpt->head_size, n = gpt->length;
    const REAL *weights = task->weights, *table = weights + gpt->embedding;
    const REAL *position = SUFFIXED(parameter_at)(weights, gpt->position);
    for (long r = 0; r < windows * n; r++) {
        const REAL *from = table + gpt->x[task->starts[window + r / n] + r % n] * w;
        REAL *to = workspace->x + r * w;
        for (long j = 0; j < w; j++) to[j] = from[j];
        if (position)
            for (long j = 0; j < w; j++) to[j] += position[r % n * w + j];
    }
    if (position) SUFFIXED(dropout_forward)(gpt, task, window, windows * n, 0, workspace->x);
}

/* Add the stream's grad to those of the embeddings. */
static void SUFFIXED(embedding_backward)(const struct Gpt *gpt, const struct Task *task,
                                         long window, long windows,
                                         struct SUFFIXED(Workspace) * workspace) {
    const long w = gpt->heads * gpt->head_size, n = gpt->length;
    REAL *grads = task->grads, *table = grads + gpt->embedding;
    if (gpt->position >= 0)
        SUFFIXED(dropout_forward)(gpt, task, window, windows * n, 0, workspace->dx);
    for (long r = 0; r < windows * n; r++) {
        REAL *to = table + gpt->x[task->starts[window + r / n] + r % n] * w;
        const REAL *from = workspace->dx + r * w;
        for (long j = 0; j < w; j++) to[j] += from[j];
        if (gpt->position >= 0) {
            REAL *position = grads + gpt->position + r % n * w;
            for (long j = 0; j < w; j++) position[j] += from[j];
        }
    }
}

/* Return the loss of all tokens in nats. In training also compute the grads of the head's weights, and
 * that of its input in d2. A few tokens' logits are in memory at once. */
static double SUFFIXED(head_forward_backward)(const struct Gpt *gpt, const struct Task *task,
                                              long window, long windows,
                                              struct SUFFIXED(Workspace) * workspace) {
    const long n = gpt->length, rows = windows * n, w = gpt->heads * gpt->head_size;
    const long size = gpt->vocabulary, max_rows = SUFFIXED(max_logit_rows)(gpt);
    const int tied = gpt->head < 0;
    const REAL *weights = task->weights, *matrix = weights + (tied ? gpt->embedding : gpt->head);
    REAL *grads = task->grads, *to = grads + (tied ? gpt->embedding : gpt->head);
    const REAL grad_scale = (REAL)1 / (gpt->windows * n);
    int64_t target[max_rows];
    double loss = 0;
    for (long first = 0; first < rows; first += max_rows) {
        const long count = rows - first < max_rows ? rows - first : max_rows;
        const REAL *from = workspace->block_input + first * w;
        REAL *logits = workspace->logits;
        for (long r = 0; r < count; r++)
            target[r] = gpt->y[task->starts[window + (first + r) / n] + (first + r) % n];
        SUFFIXED(matmul)('N', tied ? 'T' : 'N', count, size, w, from, w, matrix, tied ? w : size,
                         logits, size);
        loss += SUFFIXED(cross_entropy_grad)(gpt, count, target, grad_scale, logits,
                                             workspace->cap_slope);
        if (!gpt->training) continue;
        if (tied)
            SUFFIXED(gemm)('T', 'N', size, w, count, logits, size, from, w, to, w, 1);
        else
            SUFFIXED(gemm)('T', 'N', w, size, count, from, w, logits, size, to, size, 1);
        SUFFIXED(matmul)('N', tied ? 'N' : 'T', count, w, size, logits, size, matrix,
                         tied ? w : size, workspace->d2 + first * w, w);
    }
    return loss;
}

/* Return the loss of some windows, and in training add their part of the grads. */
static double SUFFIXED(network_forward_backward)(const struct Gpt *gpt, const struct Task *task,
                                                 long window, long windows,
                                                 struct SUFFIXED(Workspace) * workspace) {
    const long rows = windows * gpt->length, w = gpt->heads * gpt->head_size;
    const int draw = gpt->position >= 0;
    const REAL *gain = SUFFIXED(parameter_at)(task->weights, gpt->gain);
    struct Gpt unshifted = *gpt;
    unshifted.token_shift = 0;
    SUFFIXED(embedding_forward)(gpt, task, window, windows, workspace);
    for (long layer = 0; layer < gpt->layers; layer++)
        SUFFIXED(block_forward)(gpt, task, layer, window, windows, draw + 2 * (int)layer,
                                workspace);
    SUFFIXED(norm_forward)(&unshifted, rows, workspace->x, gain, workspace->normed,
                           workspace->rstd, workspace->block_input);
    const double loss = SUFFIXED(head_forward_backward)(gpt, task, window, windows, workspace);
    if (!gpt->training) return loss;
    memset(workspace->dx, 0, rows * w * sizeof(REAL));
    SUFFIXED(norm_backward)(gpt, 0, rows, workspace->normed, workspace->rstd, gain,
                            (REAL *)task->grads + gpt->gain, workspace->d2, workspace->dx);
    for (long layer = gpt->layers - 1; layer >= 0; layer--)
        SUFFIXED(block_backward)(gpt, task, layer, window, windows, draw + 2 * (int)layer,
                                 workspace);
    SUFFIXED(embedding_backward)(gpt, task, window, windows, workspace);
    return loss;
}

/* Compute tasks until none is left. */
static void SUFFIXED(run_job)(struct Job *job, void *memory) {
    const struct Gpt *gpt = job->gpt;
    struct SUFFIXED(Workspace) workspace;
    SUFFIXED(partition_workspace)(gpt, memory, &workspace);
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->count;) {
        struct Task *task = job->tasks + i;
        const long max_windows = SUFFIXED(max_windows)(gpt);
        task->loss = 0;
        if (gpt->training) memset(task->grads, 0, gpt->parameters * sizeof(REAL));
        for (long first = task->first; first < task->end; first += max_windows) {
            const long windows = task->end - first < max_windows ? task->end - first : max_windows;
            task->loss +=
                SUFFIXED(network_forward_backward)(gpt, task, first, windows, &workspace);
        }
    }
}
