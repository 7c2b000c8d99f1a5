/* Muon's orthogonal steps, by Newton and Schulz; see `hyperparameters/muon.py`. */

static void NAME(straighten_one)(long rows, long columns, REAL *x, REAL *memory) {
    const long n = rows < columns ? rows : columns, size = rows * columns;
    const int is_tall = rows > columns;
    REAL *gram = memory, *square = gram + n * n, *y = square + n * n, norm = 0;
#pragma omp simd reduction(+ : norm)
    for (long i = 0; i < size; i++) norm += x[i] * x[i];
    norm = SQRT(norm);
    norm = 1 / (norm < (REAL)MUON_EPSILON ? (REAL)MUON_EPSILON : norm);
    for (long i = 0; i < size; i++) x[i] *= norm;
    for (int turn = 0; turn < MUON_ITERATIONS; turn++) {
        NAME(multiply)(is_tall ? 'T' : 'N', is_tall ? 'N' : 'T', n, n, is_tall ? rows : columns, x,
                       columns, x, columns, gram, n);
        NAME(multiply)('N', 'N', n, n, n, gram, n, gram, n, square, n);
        for (long i = 0; i < n * n; i++)
            square[i] = (REAL)MUON_B * gram[i] + (REAL)MUON_C * square[i];
        if (is_tall)
            NAME(multiply)('N', 'N', rows, n, n, x, n, square, n, y, n);
        else
            NAME(multiply)('N', 'N', n, columns, n, square, n, x, columns, y, columns);
        for (long i = 0; i < size; i++) x[i] = (REAL)MUON_A * x[i] + y[i];
    }
}

static void NAME(straighten)(struct Stack *stack, void *memory) {
    const long size = stack->rows * stack->columns;
    for (int64_t i; (i = atomic_fetch_add(&stack->next, 1)) < stack->count;)
        NAME(straighten_one)(stack->rows, stack->columns, (REAL *)stack->matrices + i * size,
                             memory);
}
