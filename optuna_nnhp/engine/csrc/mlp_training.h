/* Rounds of training, evaluation, and the work of one thread. Part of the template of `mlp.c`, see
 * `instruction_sets.h`.
 */

/* Train a member until the end of the round or until the deadline. */
static void SUFFIXED(train_member)(const struct Network *network, struct Member *member,
                                   double deadline, REAL *memory) {
    struct SUFFIXED(Workspace) workspace;
    SUFFIXED(partition_workspace)(network, network->batch, memory, &workspace);
    const REAL *data = network->x;
    for (int64_t step = member->steps_done; step < network->steps; step++) {
        const struct Range all = batch_range(network, step);
        const int64_t *row = member->rows + all.first, batch = all.end - all.first;
        for (int64_t r = 0; r < batch; r++)
            memcpy(workspace.x + r * network->inputs, data + row[r] * network->inputs,
                   network->inputs * sizeof(REAL));
        SUFFIXED(network_forward)(network, member, batch, workspace.x, step_key(member->key, step),
                                  &workspace);
        member->loss_sum += SUFFIXED(loss_grad)(network, member, range_of_part(batch, WHOLE),
                                                batch, row, &workspace) *
                            batch;
        SUFFIXED(network_backward)(network, member, batch, &workspace);
        double squares[2];
        for (int i = 0; i < 2; i++)
            squares[i] = SUFFIXED(regularize_grads)(network, member, i, workspace.grads);
        SUFFIXED(update_weights)(network, member, WHOLE, member->rates[step], ++*member->updates,
                                 squares[0] + squares[1], workspace.grads);
        member->steps_done = step + 1;
        if (monotonic_seconds() > deadline) return;
    }
}

/* Compute a member's outputs for the examples from `begin` to `end`. */
static void SUFFIXED(evaluate_member)(const struct Network *network, struct Member *member,
                                      REAL *memory) {
    if (member->steps_done >= network->steps) return;
    struct SUFFIXED(Workspace) workspace;
    SUFFIXED(partition_workspace)(network, network->batch, memory, &workspace);
    const REAL *data = network->x;
    for (int64_t start = member->begin; start < member->end; start += network->batch) {
        int64_t rows = member->end - start;
        if (rows > network->batch) rows = network->batch;
        SUFFIXED(network_forward)(network, member, rows, data + start * network->inputs, 0,
                                  &workspace);
        memcpy((REAL *)member->outputs + start * network->outputs, workspace.out,
               rows * network->outputs * sizeof(REAL));
    }
    member->steps_done = network->steps;
}

/* Train or evaluate members until none is left or the deadline has passed; or, if there is a team,
 * train its only member with the other thread. */
static void SUFFIXED(run_job)(struct Job *job, double deadline, void *memory, int half) {
    const struct Network *network = job->network;
    int64_t i;
    if (job->team)
        SUFFIXED(team_train)(network, job->members, deadline, memory, job->team, half);
    else
        while ((i = atomic_fetch_add(&job->next, 1)) < job->count &&
               monotonic_seconds() < deadline) {
            if (network->training)
                SUFFIXED(train_member)(network, job->members + i, deadline, memory);
            else
                SUFFIXED(evaluate_member)(network, job->members + i, memory);
        }
}
