/* One network: forward pass, backward pass, and the update of its weights. Part of the template of
 * `mlp.c`, see `instruction_sets.h`. "ld" is the distance between two rows of a matrix in memory.
 *
 * Dropout is applied in `network_forward` (and, for two threads, in `team_forward` of `mlp_team.h`).
 */

/* The tensors of one training step, in the memory of one thread or of a team. */
struct SUFFIXED(Workspace) {
    REAL *grads, *x, *out, *scratch, *target;
    REAL *partial[2][2]; /* of a team: each half's products, for the current and the last layer */
    REAL *hidden[MAX_LAYERS], *slope[MAX_LAYERS], *normalized[MAX_LAYERS], *rstd[MAX_LAYERS];
};

/* Divide memory among the tensors of a workspace. Return how many numbers they take; memory may be
 * NULL to learn only this. */
static int64_t SUFFIXED(partition_workspace)(const struct Network *network, int64_t rows,
                                             REAL *memory,
                                             struct SUFFIXED(Workspace) * workspace) {
    int64_t used = 0;
#define TAKE(name, numbers)                           \
    do {                                              \
        workspace->name = memory ? memory + used : 0; \
        used += ((numbers) + 15) / 16 * 16;           \
    } while (0)
    int64_t wide = network->padded > network->outputs ? network->padded : network->outputs;
    TAKE(grads, network->training ? network->parameters : 0);
    TAKE(x, network->training ? rows * network->inputs : 0);
    TAKE(out, rows * network->outputs);
    TAKE(scratch, rows * wide);
    TAKE(target, rows * (int64_t)(sizeof(int64_t) / sizeof(REAL))); /* targets or int64 labels */
    for (int i = 0; i < 4; i++)
        TAKE(partial[i / 2][i % 2], network->training && network->split_sums ? rows * wide : 0);
    for (int layer = 0; layer < network->depth; layer++) {
        TAKE(hidden[layer], rows * network->padded);
        TAKE(slope[layer], rows * network->padded);
        TAKE(normalized[layer], network->norm ? rows * network->padded : 0);
        TAKE(rstd[layer], network->norm ? (rows > network->padded ? rows : network->padded) : 0);
    }
#undef TAKE
    return used;
}

/* Compute z (rows, width) = input (rows, size) times w. With `split_sums` it is the sum of two
 * products, each over half of the inputs, which rounds as the sum of a team's two threads does. */
static void SUFFIXED(linear_forward)(const struct Network *network, long rows, long width,
                                     long size, const REAL *input, const REAL *w, long ld, REAL *z,
                                     const struct SUFFIXED(Workspace) * workspace) {
    const struct Range range = range_of_part(size, network->split_sums ? 1 : WHOLE);
    REAL *last = range.first ? workspace->scratch : z;
    SUFFIXED(matmul)('N', 'N', rows, width, range.end - range.first, input + range.first, size,
                     w + range.first * ld, ld, last, width);
    if (!range.first) return;
    SUFFIXED(matmul)('N', 'N', rows, width, range.first, input, size, w, ld, z, width);
    for (long i = 0; i < rows * width; i++) z[i] += last[i];
}

/* Compute the outputs of some examples. In training, keep what the backward pass needs, and apply
 * dropout; `key` is that of the step. */
static void SUFFIXED(network_forward)(const struct Network *network, const struct Member *member,
                                      long rows, const REAL *x, uint64_t key,
                                      const struct SUFFIXED(Workspace) * workspace) {
    const REAL *weights = member->weights, *input = x;
    long size = network->inputs;
    for (int layer = 0; layer <= network->depth; layer++) {
        const struct Layer *starts = network->layers + layer;
        int is_hidden = layer < network->depth;
        long width = is_hidden ? member->widths[layer] : network->outputs;
        long ld = is_hidden ? network->padded : network->outputs;
        REAL *z = !is_hidden      ? workspace->out
                  : network->norm ? workspace->normalized[layer]
                                  : workspace->slope[layer];
        SUFFIXED(linear_forward)(network, rows, width, size, input, weights + starts->weight, ld,
                                 z, workspace);
        if (starts->bias >= 0) {
            const REAL *bias = weights + starts->bias;
            for (long r = 0; r < rows; r++)
                for (long j = 0; j < width; j++) z[r * width + j] += bias[j];
        }
        if (!is_hidden) return;
        REAL *hidden = workspace->hidden[layer], *slope = workspace->slope[layer];
        if (network->norm == BATCH_NORM)
            SUFFIXED(batch_norm_forward)(network, member, layer, rows, width, z, slope,
                                         workspace->rstd[layer], workspace->scratch);
        else if (network->norm == LAYER_NORM)
            SUFFIXED(layer_norm_forward)(network, member, layer, rows, width, z, slope,
                                         workspace->rstd[layer]);
        SUFFIXED(activation_forward)(member->activation, rows * width, slope, hidden);
        if (network->training && member->dropout > 0)
            for (long r = 0; r < rows; r++)
                SUFFIXED(dropout_forward)(r, 0, width, member->dropout, layer_key(key, layer),
                                          hidden + r * width, slope + r * width);
        input = hidden;
        size = width;
    }
}

/* Replace the outputs of a range of a batch's rows by their grad. Return the range's part of the
 * batch's mean loss. */
static double SUFFIXED(loss_grad)(const struct Network *network, const struct Member *member,
                                  struct Range range, long batch, const int64_t *row,
                                  const struct SUFFIXED(Workspace) * workspace) {
    const long first = range.first, rows = range.end - first;
    REAL *out = workspace->out + first * network->outputs;
    if (member->loss == CROSS_ENTROPY) {
        int64_t *label = (int64_t *)workspace->target + first;
        for (long r = 0; r < rows; r++) label[r] = ((const int64_t *)network->y)[row[first + r]];
        return SUFFIXED(cross_entropy_grad)(member, rows, batch, network->outputs, label, out);
    }
    REAL *target = workspace->target + first;
    for (long r = 0; r < rows; r++) target[r] = ((const REAL *)network->y)[row[first + r]];
    return SUFFIXED(regression_grad)(member, rows, batch, target, out);
}

/* Compute the grads of a layer's weights, for a part of its inputs, and of its biases, for a part of
 * its units. `input` begins with that part's first input; d is the grad of the layer's output. */
static void SUFFIXED(linear_weight_grads)(const struct Network *network,
                                          const struct Member *member, int layer, int part,
                                          long rows, const REAL *input, long ld_input,
                                          const REAL *d, REAL *grads) {
    const struct Layer *starts = network->layers + layer;
    int is_hidden = layer < network->depth;
    long width = is_hidden ? member->widths[layer] : network->outputs;
    long ld = is_hidden ? network->padded : network->outputs;
    struct Range range = range_of_part(layer ? member->widths[layer - 1] : network->inputs, part);
    if (range.end > range.first)
        SUFFIXED(matmul)('T', 'N', range.end - range.first, width, rows, input, ld_input, d, width,
                         grads + starts->weight + range.first * ld, ld);
    if (starts->bias < 0) return;
    range = range_of_part(width, part);
    REAL *bias = grads + starts->bias;
    for (long j = range.first; j < range.end; j++) bias[j] = 0;
    for (long r = 0; r < rows; r++)
        for (long j = range.first; j < range.end; j++) bias[j] += d[r * width + j];
}

/* Compute the grads of all parameters from the grad of the outputs. The grad of each layer's output
 * replaces the derivative of its activation in `slope`. */
static void SUFFIXED(network_backward)(const struct Network *network, const struct Member *member,
                                       long rows, const struct SUFFIXED(Workspace) * workspace) {
    const REAL *weights = member->weights;
    for (int layer = network->depth; layer >= 0; layer--) {
        int is_hidden = layer < network->depth;
        long width = is_hidden ? member->widths[layer] : network->outputs;
        long size = layer ? member->widths[layer - 1] : network->inputs;
        const REAL *d = is_hidden ? workspace->slope[layer] : workspace->out;
        SUFFIXED(linear_weight_grads)(network, member, layer, WHOLE, rows,
                                      layer ? workspace->hidden[layer - 1] : workspace->x, size, d,
                                      workspace->grads);
        if (!layer) return;
        REAL *input_grad = workspace->scratch, *slope = workspace->slope[layer - 1];
        SUFFIXED(matmul)('N', 'T', rows, size, width, d, width,
                         weights + network->layers[layer].weight,
                         is_hidden ? network->padded : network->outputs, input_grad, size);
        for (long i = 0; i < rows * size; i++) slope[i] *= input_grad[i];
        if (network->norm)
            SUFFIXED(norm_backward)(network, member, layer - 1, rows, size,
                                    workspace->normalized[layer - 1], workspace->rstd[layer - 1],
                                    slope, workspace->grads);
    }
}

/* ---- Regularization and update, for a part of the network ---- */

/* Add the grad of the L1 penalty. Return the sum of the squared grads, or 0 without `clip_norm`. */
static double SUFFIXED(regularize_grads)(const struct Network *network,
                                         const struct Member *member, int part, REAL *restrict g) {
    const REAL *w = member->weights, l1 = member->l1;
    struct Segments all[MAX_SEGMENTS], *end = all + list_segments(network, member, part, all);
    double squares = 0;
    for (struct Segments *p = all; p < end; p++)
        for (long start = p->first; start < p->end; start += p->ld) {
            if (l1 > 0 && p->is_weight)
                for (long i = start; i < start + p->length; i++)
                    g[i] += l1 * (REAL)((w[i] > 0) - (w[i] < 0));
            if (member->clip_norm == HUGE_VAL) continue;
            REAL sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long i = start; i < start + p->length; i++) sum += g[i] * g[i];
            squares += sum;
        }
    return squares;
}

/* The coefficients of one step's update; one_minus_b1 is 1 - b1. */
struct SUFFIXED(UpdateRule) {
    REAL grad_scale, coupled_decay, shrink, b1, one_minus_b1, b2, one_minus_b2, rate;
    REAL adam_rate, adam_scale; /* with Adam's bias correction */
};

/* Update n consecutive parameters w in one pass, given their grads g and the optimizer's state m and
 * v. What is switched off has a factor of 1 or a term of 0. */
static void SUFFIXED(update_segment)(int optimizer, const struct SUFFIXED(UpdateRule) * rule,
                                     long n, int is_weight, REAL *restrict w,
                                     const REAL *restrict g, REAL *restrict m, REAL *restrict v) {
    const REAL scale = rule->grad_scale, coupled = is_weight ? rule->coupled_decay : 0;
    const REAL shrink = is_weight ? rule->shrink : 1;
    const REAL b1 = rule->b1, b2 = rule->b2, rate = rule->rate;
    const REAL c1 = rule->one_minus_b1, c2 = rule->one_minus_b2;
    const REAL step = rule->adam_rate, second = rule->adam_scale;
#define GRADIENT REAL d = scale * g[i] + coupled * w[i]
    switch (optimizer) {
    case SGD:
        if (b1 > 0)
            FOR_EACH {
                GRADIENT;
                m[i] = b1 * m[i] + d;
                w[i] = shrink * w[i] - rate * m[i];
            }
        else
            FOR_EACH {
                GRADIENT;
                w[i] = shrink * w[i] - rate * d;
            }
        break;
    case NESTEROV:
        if (b1 > 0)
            FOR_EACH {
                GRADIENT;
                m[i] = b1 * m[i] + d;
                w[i] = shrink * w[i] - rate * (d + b1 * m[i]);
            }
        else
            FOR_EACH {
                GRADIENT;
                w[i] = shrink * w[i] - rate * d;
            }
        break;
    case ADAM:
        FOR_EACH {
            GRADIENT;
            m[i] += c1 * (d - m[i]);
            v[i] = b2 * v[i] + c2 * d * d;
            w[i] = shrink * w[i] - step * m[i] / (SQRT(v[i]) * second + (REAL)ADAM_EPSILON);
        }
        break;
    case RMSPROP:
        FOR_EACH {
            GRADIENT;
            v[i] = b2 * v[i] + c2 * d * d;
            m[i] = b1 * m[i] + d / (SQRT(v[i]) + (REAL)ADAM_EPSILON);
            w[i] = shrink * w[i] - rate * m[i];
        }
        break;
    }
#undef GRADIENT
}

/* Do the t-th update of a part of the weights, given the sum of all squared grads. */
static void SUFFIXED(update_weights)(const struct Network *network, const struct Member *member,
                                     int part, double rate, double t, double squares,
                                     const REAL *restrict g) {
    REAL *w = member->weights, *m = member->exp_avg, *v = member->exp_avg_sq;
    struct Segments all[MAX_SEGMENTS], *end = all + list_segments(network, member, part, all);
    double scale = member->clip_norm < HUGE_VAL ? member->clip_norm / (sqrt(squares) + 1e-6) : 1;
    struct SUFFIXED(UpdateRule) rule = {
        .grad_scale = scale > 1 ? 1 : scale, /* NaN stays NaN */
        .coupled_decay = member->decoupled ? 0 : member->weight_decay,
        .shrink = member->decoupled ? 1 - rate * member->weight_decay : 1,
        .b1 = member->momentum,
        .one_minus_b1 = 1 - member->momentum,
        .b2 = member->beta2,
        .one_minus_b2 = 1 - member->beta2,
        .rate = rate,
        .adam_rate = rate / (1 - pow(member->momentum, t)),
        .adam_scale = 1 / sqrt(1 - pow(member->beta2, t)),
    };
    for (struct Segments *p = all; p < end; p++)
        for (long start = p->first; start < p->end; start += p->ld)
            SUFFIXED(update_segment)(member->optimizer, &rule, p->length, p->is_weight, w + start,
                                     g + start, m + start, v + start);
}
