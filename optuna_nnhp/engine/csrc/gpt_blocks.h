/* Blocks, embedding and head, forth and back, and the tasks of a thread; see `gpt_engine.c`. */

/* What a block keeps for the way back. */
struct NAME(Kept) {
    REAL *normed1, *rstd1, *read1, *qkv, *rstd_heads, *logsum, *mixed;
    REAL *normed2, *rstd2, *read2, *up, *units;
};

struct NAME(Space) {
    struct NAME(Kept) kept[MAX_LAYERS];
    REAL *x, *normed, *rstd, *read, *logits, *bent, *weights, *slopes;
    REAL *dx, *d1, *d2;
};

static long NAME(up_columns)(const struct Gpt *gpt) {
    return gpt->feed_forward == FF_SWIGLU ? 2 * gpt->inner : gpt->inner;
}

static long NAME(logit_rows)(const struct Gpt *gpt) {
    return gpt->vocabulary < LOGITS / 16 ? LOGITS / gpt->vocabulary : 16;
}

/* Windows that a thread has in memory at once: half of a step's. */
static long NAME(at_once)(const struct Gpt *gpt) { return (gpt->windows + 1) / 2; }

/* Cut memory into pieces; how many numbers it takes. In evaluation all blocks share theirs. */
static int64_t NAME(cut)(const struct Gpt *gpt, REAL *memory, struct NAME(Space) *to) {
    const long rows = NAME(at_once)(gpt) * gpt->length, w = gpt->heads * gpt->head_size;
    const long up = NAME(up_columns)(gpt), wide = up > 3 * w ? up : 3 * w;
    const int reads = gpt->shift || gpt->norm == LAYER_GAIN;
    int64_t used = 0;
#define TAKE(name, numbers) (name = memory + used, used += ((numbers) + 15) / 16 * 16)
    for (long layer = 0; layer < gpt->layers; layer++) {
        struct NAME(Kept) *kept = to->kept + layer;
        if (layer && !gpt->training) {
            *kept = to->kept[0];
            continue;
        }
        TAKE(kept->normed1, rows * w);
        TAKE(kept->rstd1, rows);
        kept->read1 = kept->normed1;
        if (reads) TAKE(kept->read1, rows * w);
        TAKE(kept->qkv, rows * 3 * w);
        TAKE(kept->rstd_heads, gpt->qk_norm ? rows * 2 * gpt->heads : 0);
        TAKE(kept->logsum, rows * gpt->heads);
        TAKE(kept->mixed, rows * w);
        TAKE(kept->normed2, rows * w);
        TAKE(kept->rstd2, rows);
        kept->read2 = kept->normed2;
        if (reads) TAKE(kept->read2, rows * w);
        TAKE(kept->up, rows * up);
        TAKE(kept->units, rows * gpt->inner);
    }
    TAKE(to->x, rows * w);
    TAKE(to->normed, rows * w);
    TAKE(to->rstd, rows);
    to->read = to->normed;
    if (gpt->norm == LAYER_GAIN) TAKE(to->read, rows * w);
    TAKE(to->logits, NAME(logit_rows)(gpt) * gpt->vocabulary);
    TAKE(to->bent, gpt->logit_cap ? gpt->vocabulary : 0);
    TAKE(to->weights, STRIP * gpt->length);
    TAKE(to->slopes, STRIP * gpt->length);
    TAKE(to->dx, rows * w);
    TAKE(to->d1, rows * wide);
    TAKE(to->d2, rows * (gpt->inner > w ? gpt->inner : w));
#undef TAKE
    return used;
}

static const REAL *NAME(at)(const void *row, int64_t start) {
    return start < 0 ? NULL : (const REAL *)row + start;
}

/* Add what a matrix makes of some rows to the stream, dropout in between. */
static void NAME(project)(const struct Gpt *gpt, const struct Task *task, long window, long rows,
                          int draw, long inputs, const REAL *from, const REAL *matrix,
                          struct NAME(Space) *space) {
    const long w = gpt->heads * gpt->head_size;
    const int drops = task->keys && task->dropout > 0;
    REAL *to = drops ? space->d1 : space->x;
    NAME(multiply_to)('N', 'N', rows, w, inputs, from, inputs, matrix, w, to, w, !drops);
    if (!drops) return;
    NAME(silence)(gpt, task, window, rows, draw, to);
    for (long i = 0; i < rows * w; i++) space->x[i] += to[i];
}

static void NAME(block)(const struct Gpt *gpt, const struct Task *task, long layer, long window,
                        long windows, int draw, struct NAME(Space) *space) {
    const long rows = windows * gpt->length, w = gpt->heads * gpt->head_size;
    const long up = NAME(up_columns)(gpt);
    const struct Block *block = gpt->blocks + layer;
    const REAL *weights = task->weights;
    struct NAME(Kept) *kept = space->kept + layer;
    NAME(normalize)(gpt, rows, space->x, NAME(at)(weights, block->gain1), kept->normed1,
                    kept->rstd1, kept->read1);
    NAME(multiply)('N', 'N', rows, 3 * w, w, kept->read1, w, weights + block->qkv, 3 * w,
                   kept->qkv, 3 * w);
    if (gpt->turns) NAME(turn)(gpt, rows, 1, kept->qkv);
    if (gpt->qk_norm) NAME(norm_heads)(gpt, rows, kept->qkv, kept->rstd_heads);
    NAME(attend)(gpt, windows, kept->qkv, kept->logsum, kept->mixed, space->weights);
    NAME(project)(gpt, task, window, rows, draw, w, kept->mixed, weights + block->out, space);
    NAME(normalize)(gpt, rows, space->x, NAME(at)(weights, block->gain2), kept->normed2,
                    kept->rstd2, kept->read2);
    NAME(multiply)('N', 'N', rows, up, w, kept->read2, w, weights + block->up, up, kept->up, up);
    NAME(feed)(gpt, rows, kept->up, kept->units);
    NAME(project)(gpt, task, window, rows, draw + 1, gpt->inner, kept->units,
                  weights + block->down, space);
}

/* The gradient of what was added to the stream: the stream's, but for dropout. */
static const REAL *NAME(added)(const struct Gpt *gpt, const struct Task *task, long window,
                               long rows, int draw, struct NAME(Space) *space) {
    if (!task->keys || task->dropout <= 0) return space->dx;
    const long w = gpt->heads * gpt->head_size;
    memcpy(space->d1, space->dx, rows * w * sizeof(REAL));
    NAME(silence)(gpt, task, window, rows, draw, space->d1);
    return space->d1;
}

static void NAME(block_back)(const struct Gpt *gpt, const struct Task *task, long layer,
                             long window, long windows, int draw, struct NAME(Space) *space) {
    const long rows = windows * gpt->length, w = gpt->heads * gpt->head_size, n = gpt->inner;
    const long up = NAME(up_columns)(gpt);
    const struct Block *block = gpt->blocks + layer;
    const REAL *weights = task->weights, *d;
    REAL *grads = task->grads, *d1 = space->d1, *d2 = space->d2, *dx = space->dx;
    struct NAME(Kept) *kept = space->kept + layer;
    d = NAME(added)(gpt, task, window, rows, draw + 1, space);
    NAME(multiply)('T', 'N', n, w, rows, kept->units, n, d, w, grads + block->down, w);
    NAME(multiply)('N', 'T', rows, n, w, d, w, weights + block->down, w, d2, n);
    NAME(feed_back)(gpt, rows, d2, kept->up);
    NAME(multiply)('T', 'N', w, up, rows, kept->read2, w, kept->up, up, grads + block->up, up);
    NAME(multiply)('N', 'T', rows, w, up, kept->up, up, weights + block->up, up, d2, w);
    NAME(normalize_back)(gpt, gpt->shift, rows, kept->normed2, kept->rstd2,
                         NAME(at)(weights, block->gain2), grads + block->gain2, d2, dx);
    d = NAME(added)(gpt, task, window, rows, draw, space);
    NAME(multiply)('T', 'N', w, w, rows, kept->mixed, w, d, w, grads + block->out, w);
    NAME(multiply)('N', 'T', rows, w, w, d, w, weights + block->out, w, d2, w);
    NAME(attend_back)(gpt, windows, kept->qkv, kept->logsum, kept->mixed, d2, d1, space->weights,
                      space->slopes);
    if (gpt->qk_norm) NAME(norm_heads_back)(gpt, rows, kept->qkv, kept->rstd_heads, d1);
    if (gpt->turns) NAME(turn)(gpt, rows, -1, d1);
    NAME(multiply)('T', 'N', w, 3 * w, rows, kept->read1, w, d1, 3 * w, grads + block->qkv, 3 * w);
    NAME(multiply)('N', 'T', rows, w, 3 * w, d1, 3 * w, weights + block->qkv, 3 * w, d2, w);
    NAME(normalize_back)(gpt, gpt->shift, rows, kept->normed1, kept->rstd1,
                         NAME(at)(weights, block->gain1), grads + block->gain1, d2, dx);
}

static void NAME(embed)(const struct Gpt *gpt, const struct Task *task, long window, long windows,
                        struct NAME(Space) *space) {
    const long w = gpt->heads * gpt->head_size, n = gpt->length;
    const REAL *weights = task->weights, *table = weights + gpt->embedding;
    const REAL *position = NAME(at)(weights, gpt->position);
    for (long r = 0; r < windows * n; r++) {
        const REAL *from = table + gpt->x[task->starts[window + r / n] + r % n] * w;
        REAL *to = space->x + r * w;
        for (long j = 0; j < w; j++) to[j] = from[j];
        if (position)
            for (long j = 0; j < w; j++) to[j] += position[r % n * w + j];
    }
    if (position) NAME(silence)(gpt, task, window, windows * n, 0, space->x);
}

static void NAME(embed_back)(const struct Gpt *gpt, const struct Task *task, long window,
                             long windows, struct NAME(Space) *space) {
    const long w = gpt->heads * gpt->head_size, n = gpt->length;
    REAL *grads = task->grads, *table = grads + gpt->embedding;
    if (gpt->position >= 0) NAME(silence)(gpt, task, window, windows * n, 0, space->dx);
    for (long r = 0; r < windows * n; r++) {
        REAL *to = table + gpt->x[task->starts[window + r / n] + r % n] * w;
        const REAL *from = space->dx + r * w;
        for (long j = 0; j < w; j++) to[j] += from[j];
        if (gpt->position >= 0) {
            REAL *position = grads + gpt->position + r % n * w;
            for (long j = 0; j < w; j++) position[j] += from[j];
        }
    }
}

/* Nats of all tokens; in training the gradient of the stream too, some rows after the other. */
static double NAME(head)(const struct Gpt *gpt, const struct Task *task, long window, long windows,
                         struct NAME(Space) *space) {
    const long n = gpt->length, rows = windows * n, w = gpt->heads * gpt->head_size;
    const long size = gpt->vocabulary, most = NAME(logit_rows)(gpt);
    const int tied = gpt->head < 0;
    const REAL *weights = task->weights, *matrix = weights + (tied ? gpt->embedding : gpt->head);
    REAL *grads = task->grads, *to = grads + (tied ? gpt->embedding : gpt->head);
    const REAL share = (REAL)1 / (gpt->windows * n);
    int64_t target[most];
    double loss = 0;
    for (long first = 0; first < rows; first += most) {
        const long some = rows - first < most ? rows - first : most;
        const REAL *from = space->read + first * w;
        REAL *logits = space->logits;
        for (long r = 0; r < some; r++)
            target[r] = gpt->y[task->starts[window + (first + r) / n] + (first + r) % n];
        NAME(multiply)('N', tied ? 'T' : 'N', some, size, w, from, w, matrix, tied ? w : size,
                       logits, size);
        loss += NAME(cross_entropy)(gpt, some, target, share, logits, space->bent);
        if (!gpt->training) continue;
        if (tied)
            NAME(multiply_to)('T', 'N', size, w, some, logits, size, from, w, to, w, 1);
        else
            NAME(multiply_to)('T', 'N', w, size, some, from, w, logits, size, to, size, 1);
        NAME(multiply)('N', tied ? 'N' : 'T', some, w, size, logits, size, matrix,
                       tied ? w : size, space->d2 + first * w, w);
    }
    return loss;
}

/* The loss of some windows, and in training their share of the gradients. */
static double NAME(pass)(const struct Gpt *gpt, const struct Task *task, long window, long windows,
                         struct NAME(Space) *space) {
    const long rows = windows * gpt->length, w = gpt->heads * gpt->head_size;
    const int draw = gpt->position >= 0;
    const REAL *gain = NAME(at)(task->weights, gpt->gain);
    struct Gpt unshifted = *gpt;
    unshifted.shift = 0;
    NAME(embed)(gpt, task, window, windows, space);
    for (long layer = 0; layer < gpt->layers; layer++)
        NAME(block)(gpt, task, layer, window, windows, draw + 2 * (int)layer, space);
    NAME(normalize)(&unshifted, rows, space->x, gain, space->normed, space->rstd, space->read);
    const double loss = NAME(head)(gpt, task, window, windows, space);
    if (!gpt->training) return loss;
    memset(space->dx, 0, rows * w * sizeof(REAL));
    NAME(normalize_back)(gpt, 0, rows, space->normed, space->rstd, gain,
                         (REAL *)task->grads + gpt->gain, space->d2, space->dx);
    for (long layer = gpt->layers - 1; layer >= 0; layer--)
        NAME(block_back)(gpt, task, layer, window, windows, draw + 2 * (int)layer, space);
    NAME(embed_back)(gpt, task, window, windows, space);
    return loss;
}

static void NAME(run)(struct Job *job, void *memory) {
    const struct Gpt *gpt = job->gpt;
    struct NAME(Space) space;
    NAME(cut)(gpt, memory, &space);
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->count;) {
        struct Task *task = job->tasks + i;
        const long most = NAME(at_once)(gpt);
        task->loss = 0;
        if (gpt->training) memset(task->grads, 0, gpt->parameters * sizeof(REAL));
        for (long first = task->first; first < task->end; first += most) {
            const long windows = task->end - first < most ? task->end - first : most;
            task->loss += NAME(pass)(gpt, task, first, windows, &space);
        }
    }
}
