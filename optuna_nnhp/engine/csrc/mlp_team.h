/* Two threads that share the steps of one member, for one precision and one instruction set; see
 * `mlp_engine.c` and, for what it is included with, `mlp_pieces.h`.
 *
 * Each layer's inputs are divided between them: a thread has its half of the weights, gradients and
 * optimizer state for itself, and what goes from one core to the other is the products of its
 * inputs, which are added, and the gradient of what a layer computed. With the rows of a batch
 * divided instead, half of all weights went from core to core at every step: 215 us for 256 x 2
 * units and 64 rows.
 *
 * Source: Shoeybi et al. 2019 (arXiv:1909.08053) divide layers so between devices.
 */

/* Outputs of a batch, each thread's for its half of the rows; x has this one's inputs alone. */
static int NAME(forward_shared)(const struct Network *net, const struct Member *me, long batch,
                                const REAL *x, uint64_t key, const struct NAME(Space) *space,
                                struct Team *team, int half) {
    const REAL *weights = me->weights, *from = x;
    struct Range some = part_of(net->inputs, half);
    long ld_from = some.end - some.first;
    for (int layer = 0;; layer++) {
        const struct Layer *at = net->layers + layer;
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs;
        long ld = hidden ? net->padded : net->outputs, own = some.end - some.first;
        REAL *const *partial = space->partial[layer % 2];
        if (own)
            NAME(multiply)('N', 'N', batch, width, own, from, ld_from,
                           weights + at->weight + some.first * ld, ld, partial[half], width);
        else
            memset(partial[half], 0, batch * width * sizeof(REAL));
        if (!meet(team, half)) return 0;
        const REAL *bias = at->bias >= 0 ? weights + at->bias : 0;
        struct Range rows = part_of(batch, hidden ? WHOLE : half);
        some = part_of(width, hidden ? half : WHOLE);
        for (long r = rows.first; r < rows.end; r++) {
            const long start = r * width + some.first, n = some.end - some.first;
            const REAL *one = partial[0] + start, *two = partial[1] + start;
            REAL *z = (hidden ? space->slope[layer] : space->out) + start;
            EACH z[i] = one[i] + two[i];
            if (bias) EACH z[i] += bias[some.first + i];
            if (!hidden) continue;
            REAL *h = space->h[layer] + start;
            NAME(activate)(me->activation, n, z, h);
            if (me->dropout > 0)
                NAME(drop)(r, some.first, n, me->dropout, draw_key(key, layer), h, z);
        }
        if (!hidden) return 1;
        from = space->h[layer] + some.first;
        ld_from = width;
    }
}

/* The gradients of this thread's weights, from those of the outputs. */
static int NAME(backward_shared)(const struct Network *net, const struct Member *me, long batch,
                                 const REAL *x, const struct NAME(Space) *space,
                                 struct Team *team, int half) {
    const REAL *weights = me->weights;
    for (int layer = net->depth;; layer--) {
        int hidden = layer < net->depth;
        long width = hidden ? me->widths[layer] : net->outputs;
        long size = layer ? me->widths[layer - 1] : net->inputs;
        struct Range some = part_of(size, half);
        const long n = some.end - some.first;
        const REAL *d = hidden ? space->slope[layer] : space->out;
        const REAL *from = layer ? space->h[layer - 1] + some.first : x;
        NAME(layer_grads)(net, me, layer, half, batch, from, layer ? size : n, d, space->grads);
        if (!layer) return 1;
        REAL *back = space->other + (half ? batch * (size / 2) : 0);
        long ld = hidden ? net->padded : net->outputs;
        if (n)
            NAME(multiply)('N', 'T', batch, n, width, d, width,
                           weights + net->layers[layer].weight + some.first * ld, ld, back, n);
        for (long r = 0; r < batch; r++) {
            REAL *slope = space->slope[layer - 1] + r * size + some.first;
            EACH slope[i] *= back[r * n + i];
        }
        if (!meet(team, half)) return 0;
    }
}

/* Steps until the end of the round or of the time, or until the other one is given up. */
static void NAME(train_shared)(const struct Network *net, struct Member *me, double until,
                               REAL *memory, struct Team *team, int half) {
    struct NAME(Space) space;
    NAME(cut)(net, net->batch, memory, &space);
    const REAL *data = net->x;
    const struct Range inputs = part_of(net->inputs, half);
    const long own = inputs.end - inputs.first;
    REAL *x = space.x + (half ? net->batch * inputs.first : 0);
    const double updates = *me->steps;
    const int64_t begun = me->done;
    for (int64_t step = begun, stop = 0; step < net->steps && !stop; step++) {
        const struct Range all = batch_of(net, step);
        const int64_t *row = me->rows + all.first, batch = all.end - all.first;
        for (int64_t r = 0; r < batch; r++)
            memcpy(x + r * own, data + row[r] * net->inputs + inputs.first, own * sizeof(REAL));
        const uint64_t key = step_key(me->key, step);
        if (!NAME(forward_shared)(net, me, batch, x, key, &space, team, half)) return;
        team->loss[half] = NAME(loss)(net, me, part_of(batch, half), batch, row, &space);
        if (!meet(team, half)) return;
        if (!NAME(backward_shared)(net, me, batch, x, &space, team, half)) return;
        team->squares[half] = NAME(regularize)(net, me, half, space.grads);
        if (half == 0) team->stop = now() > until;
        if (!meet(team, half)) return;
        stop = team->stop;
        NAME(update)(net, me, half, me->rates[step], updates + (step - begun) + 1,
                     team->squares[0] + team->squares[1], space.grads);
        if (half) continue;
        me->loss_sum += (team->loss[0] + team->loss[1]) * batch;
        me->done = step + 1;
        ++*me->steps;
    }
}

/* ---- What a thread does ---- */

static void NAME(run)(struct Job *job, double until, void *memory, int half) {
    const struct Network *net = job->network;
    int64_t i;
    if (job->team)
        NAME(train_shared)(net, job->members, until, memory, job->team, half);
    else
        while ((i = atomic_fetch_add(&job->next, 1)) < job->count && now() < until) {
            if (net->training)
                NAME(train)(net, job->members + i, until, memory);
            else
                NAME(evaluate)(net, job->members + i, memory);
        }
}

