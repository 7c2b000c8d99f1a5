/* A team: two threads that share the steps of one member. Part of the template of `mlp.c`, see
 * `instruction_sets.h`.
 *
 * Each layer's inputs are divided between the threads, so that each has half of the weights, of their
 * grads and of the optimizer's state in its own core's cache. The cores exchange only the products of
 * each half, which are added, and the grads of the layers' outputs. Dividing the rows of a batch
 * instead moved half of all weights from core to core at every step, which took 215 us for 2 layers
 * of 256 units and 64 rows.
 *
 * Source: Shoeybi et al. 2019 (arXiv:1909.08053) divide layers in this way between devices.
 */

/* Compute the outputs of a batch; this thread keeps those of its half of the rows. x holds only this
 * thread's half of the inputs. Return 0 if the other thread has stopped. */
static int SUFFIXED(team_forward)(const struct Network *network, const struct Member *member,
                                  long batch, const REAL *x, uint64_t key,
                                  const struct SUFFIXED(Workspace) * workspace, struct Team *team,
                                  int half) {
    const REAL *weights = member->weights, *input = x;
    struct Range range = range_of_part(network->inputs, half);
    long ld_input = range.end - range.first;
    for (int layer = 0;; layer++) {
        const struct Layer *starts = network->layers + layer;
        int is_hidden = layer < network->depth;
        long width = is_hidden ? member->widths[layer] : network->outputs;
        long ld = is_hidden ? network->padded : network->outputs,
             own_size = range.end - range.first;
        REAL *const *partial = workspace->partial[layer % 2];
        if (own_size)
            SUFFIXED(matmul)('N', 'N', batch, width, own_size, input, ld_input,
                             weights + starts->weight + range.first * ld, ld, partial[half],
                             width);
        else
            memset(partial[half], 0, batch * width * sizeof(REAL));
        if (!wait_for_partner(team, half)) return 0;
        const REAL *bias = starts->bias >= 0 ? weights + starts->bias : 0;
        struct Range rows = range_of_part(batch, is_hidden ? WHOLE : half);
        range = range_of_part(width, is_hidden ? half : WHOLE);
        for (long r = rows.first; r < rows.end; r++) {
            const long start = r * width + range.first, n = range.end - range.first;
            const REAL *first_partial = partial[0] + start, *second_partial = partial[1] + start;
            REAL *z = (is_hidden ? workspace->slope[layer] : workspace->out) + start;
            FOR_EACH
                z[i] = first_partial[i] + second_partial[i];
            if (bias)
                FOR_EACH
                    z[i] += bias[range.first + i];
            if (!is_hidden) continue;
            REAL *hidden = workspace->hidden[layer] + start;
            SUFFIXED(activation_forward)(member->activation, n, z, hidden);
            if (member->dropout > 0)
                SUFFIXED(dropout_forward)(r, range.first, n, member->dropout,
                                          layer_key(key, layer), hidden, z);
        }
        if (!is_hidden) return 1;
        input = workspace->hidden[layer] + range.first;
        ld_input = width;
    }
}

/* Compute the grads of this thread's half of the weights from the grad of the outputs. Return 0 if
 * the other thread has stopped. */
static int SUFFIXED(team_backward)(const struct Network *network, const struct Member *member,
                                   long batch, const REAL *x,
                                   const struct SUFFIXED(Workspace) * workspace, struct Team *team,
                                   int half) {
    const REAL *weights = member->weights;
    for (int layer = network->depth;; layer--) {
        int is_hidden = layer < network->depth;
        long width = is_hidden ? member->widths[layer] : network->outputs;
        long size = layer ? member->widths[layer - 1] : network->inputs;
        struct Range range = range_of_part(size, half);
        const long n = range.end - range.first;
        const REAL *d = is_hidden ? workspace->slope[layer] : workspace->out;
        const REAL *input = layer ? workspace->hidden[layer - 1] + range.first : x;
        SUFFIXED(linear_weight_grads)(network, member, layer, half, batch, input, layer ? size : n,
                                      d, workspace->grads);
        if (!layer) return 1;
        REAL *input_grad = workspace->scratch + (half ? batch * (size / 2) : 0);
        long ld = is_hidden ? network->padded : network->outputs;
        if (n)
            SUFFIXED(matmul)('N', 'T', batch, n, width, d, width,
                             weights + network->layers[layer].weight + range.first * ld, ld,
                             input_grad, n);
        for (long r = 0; r < batch; r++) {
            REAL *slope = workspace->slope[layer - 1] + r * size + range.first;
            FOR_EACH
                slope[i] *= input_grad[r * n + i];
        }
        if (!wait_for_partner(team, half)) return 0;
    }
}

/* Train the member until the end of the round, until the deadline, or until the other thread has
 * stopped. */
static void SUFFIXED(team_train)(const struct Network *network, struct Member *member,
                                 double deadline, REAL *memory, struct Team *team, int half) {
    struct SUFFIXED(Workspace) workspace;
    SUFFIXED(partition_workspace)(network, network->batch, memory, &workspace);
    const REAL *data = network->x;
    const struct Range inputs = range_of_part(network->inputs, half);
    const long own_size = inputs.end - inputs.first;
    REAL *x = workspace.x + (half ? network->batch * inputs.first : 0);
    const double updates = *member->updates;
    const int64_t first_step = member->steps_done;
    for (int64_t step = first_step, stop = 0; step < network->steps && !stop; step++) {
        const struct Range all = batch_range(network, step);
        const int64_t *row = member->rows + all.first, batch = all.end - all.first;
        for (int64_t r = 0; r < batch; r++)
            memcpy(x + r * own_size, data + row[r] * network->inputs + inputs.first,
                   own_size * sizeof(REAL));
        const uint64_t key = step_key(member->key, step);
        if (!SUFFIXED(team_forward)(network, member, batch, x, key, &workspace, team, half))
            return;
        team->loss[half] = SUFFIXED(loss_grad)(network, member, range_of_part(batch, half), batch,
                                               row, &workspace);
        if (!wait_for_partner(team, half)) return;
        if (!SUFFIXED(team_backward)(network, member, batch, x, &workspace, team, half)) return;
        team->squares[half] = SUFFIXED(regularize_grads)(network, member, half, workspace.grads);
        if (half == 0) team->stop = monotonic_seconds() > deadline;
        if (!wait_for_partner(team, half)) return;
        stop = team->stop;
        SUFFIXED(update_weights)(network, member, half, member->rates[step],
                                 updates + (step - first_step) + 1,
                                 team->squares[0] + team->squares[1], workspace.grads);
        if (half) continue;
        member->loss_sum += (team->loss[0] + team->loss[1]) * batch;
        member->steps_done = step + 1;
        ++*member->updates;
    }
}
