/* Orthogonal matrices for Muon's steps, by the iteration of Newton and Schulz as in
 * hyperparameters/muon.py. Part of the template of `gpt.c`, see `instruction_sets.h`.
 */

/* Replace a matrix by one that is about orthogonal. memory is scratch for two squares of the shorter
 * side and one matrix. */
static void SUFFIXED(orthogonalize_matrix)(long rows, long columns, REAL *x, REAL *memory) {
    const long n = rows < columns ? rows : columns, size = rows * columns;
    const int is_tall = rows > columns;
    REAL *gram = memory, *square = gram + n * n, *y = square + n * n, norm = 0;
#pragma omp simd reduction(+ : norm)
    for (long i = 0; i < size; i++) norm += x[i] * x[i];
    norm = SQRT(norm);
    norm = 1 / (norm < (REAL)MUON_EPSILON ? (REAL)MUON_EPSILON : norm);
    for (long i = 0; i < size; i++) x[i] *= norm;
    for (int iteration = 0; iteration < MUON_ITERATIONS; iteration++) {
        SUFFIXED(matmul)(is_tall ? 'T' : 'N', is_tall ? 'N' : 'T', n, n, is_tall ? rows : columns,
                         x, columns, x, columns, gram, n);
        SUFFIXED(matmul)('N', 'N', n, n, n, gram, n, gram, n, square, n);
        for (long i = 0; i < n * n; i++)
            square[i] = (REAL)MUON_B * gram[i] + (REAL)MUON_C * square[i];
        if (is_tall)
            SUFFIXED(matmul)('N', 'N', rows, n, n, x, n, square, n, y, n);
        else
            SUFFIXED(matmul)('N', 'N', n, columns, n, square, n, x, columns, y, columns);
        for (long i = 0; i < size; i++) x[i] = (REAL)MUON_A * x[i] + y[i];
    }
}

/* Orthogonalize matrices until none is left. */
static void SUFFIXED(orthogonalize_stack)(struct MatrixStack *stack, void *memory) {
    const long size = stack->rows * stack->columns;
    for (int64_t i; (i = atomic_fetch_add(&stack->next, 1)) < stack->count;)
        SUFFIXED(orthogonalize_matrix)(stack->rows, stack->columns,
                                       (REAL *)stack->matrices + i * size, memory);
}
