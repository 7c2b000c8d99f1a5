/* Matrix products for the sizes of small networks. Part of the template, see `instruction_sets.h`.
 *
 * A kernel computes up to 6 rows and one or two vectors of columns of c in registers. The block of b
 * that it reads is first copied ("packed") so that its rows follow one another in memory. a and c are
 * not packed, because all three matrices fit in a core's cache: a BLAS library, which packs both a
 * and b, took 20 % longer for 64 x 256 by 256 x 256.
 *
 * Source: Goto and van de Geijn 2008 (doi:10.1145/1356052.1356053) on kernels and packing.
 */
typedef REAL SUFFIXED(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL))));
#define LANES ((long)(VECTOR_BYTES / sizeof(REAL)))
#define KERNEL_COLUMNS (2 * LANES) /* columns of c that the wide kernels compute */
#define MAX_KERNEL_ROWS 6          /* rows of c that a kernel computes at most */
#define PACKED_ROWS 256            /* rows of b that are packed at once */
#define MAX_UNPACKED 8192          /* numbers of b up to which packing does not pay */

#define KERNEL(name, kernel_rows, columns)                                             \
    static void SUFFIXED(name)(long k, const REAL *a, long a_row, long a_col,          \
                               const REAL *restrict b, long ldb, REAL *c, long ldc,    \
                               int accumulate) {                                       \
        SUFFIXED(vector) sum[kernel_rows][columns];                                    \
        for (int i = 0; i < kernel_rows; i++)                                          \
            for (int j = 0; j < columns; j++) sum[i][j] = (SUFFIXED(vector)){0};       \
        for (long p = 0; p < k; p++) {                                                 \
            SUFFIXED(vector) b_block[columns];                                         \
            for (int j = 0; j < columns; j++)                                          \
                b_block[j] = *(const SUFFIXED(vector) *)(b + p * ldb + j * LANES);     \
            for (int i = 0; i < kernel_rows; i++) {                                    \
                REAL x = a[i * a_row + p * a_col];                                     \
                for (int j = 0; j < columns; j++) sum[i][j] += x * b_block[j];         \
            }                                                                          \
        }                                                                              \
        for (int i = 0; i < kernel_rows; i++)                                          \
            for (int j = 0; j < columns; j++) {                                        \
                SUFFIXED(vector) *out = (SUFFIXED(vector) *)(c + i * ldc + j * LANES); \
                *out = accumulate ? *out + sum[i][j] : sum[i][j];                      \
            }                                                                          \
    }
#define KERNELS(kernel_rows) \
    KERNEL(narrow##kernel_rows, kernel_rows, 1) KERNEL(wide##kernel_rows, kernel_rows, 2)
KERNELS(1)
KERNELS(2)
KERNELS(3)
KERNELS(4)
KERNELS(5)
KERNELS(6)

typedef void (*SUFFIXED(kernel))(long, const REAL *, long, long, const REAL *restrict, long,
                                 REAL *, long, int);
static const SUFFIXED(kernel) SUFFIXED(kernels)[2][MAX_KERNEL_ROWS] = {
    {SUFFIXED(narrow1), SUFFIXED(narrow2), SUFFIXED(narrow3), SUFFIXED(narrow4), SUFFIXED(narrow5),
     SUFFIXED(narrow6)},
    {SUFFIXED(wide1), SUFFIXED(wide2), SUFFIXED(wide3), SUFFIXED(wide4), SUFFIXED(wide5),
     SUFFIXED(wide6)},
};

#ifdef HAS_SHUFFLEVECTOR
/* Transpose LANES vectors in place, in log2(LANES) rounds of swaps. */
static inline void SUFFIXED(transpose_block)(SUFFIXED(vector) * v) {
#define SWAP(step, low, high)                                         \
    for (int i = 0; i < LANES; i++)                                   \
        if (!(i & step)) {                                            \
            SUFFIXED(vector) x = v[i], y = v[i + step];               \
            v[i] = __builtin_shufflevector(x, y, UNPACK low);         \
            v[i + step] = __builtin_shufflevector(x, y, UNPACK high); \
        }
#define UNPACK(...) __VA_ARGS__
#if VECTOR_BYTES / REAL_BYTES == 16
    SWAP(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
         (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
    SWAP(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
         (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    SWAP(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
         (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    SWAP(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
         (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#elif VECTOR_BYTES / REAL_BYTES == 8
    SWAP(1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
    SWAP(2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
    SWAP(4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#elif VECTOR_BYTES / REAL_BYTES == 4
    SWAP(1, (0, 4, 2, 6), (1, 5, 3, 7))
    SWAP(2, (0, 1, 4, 5), (2, 3, 6, 7))
#else
    SWAP(1, (0, 2), (1, 3))
#endif
#undef SWAP
#undef UNPACK
}
#endif

/* Copy a (depth, columns) block of b into rows of `pitch` numbers, padded with zeros. */
static void SUFFIXED(pack_block)(long depth, long columns, long pitch, const REAL *b, long ldb,
                                 REAL *restrict packed) {
    if (columns == KERNEL_COLUMNS) {
        for (long p = 0; p < depth; p++)
            memcpy(packed + p * KERNEL_COLUMNS, b + p * ldb, KERNEL_COLUMNS * sizeof(REAL));
        return;
    }
    for (long p = 0; p < depth; p++)
        for (long s = 0; s < pitch; s++) packed[p * pitch + s] = s < columns ? b[p * ldb + s] : 0;
}

/* Copy the transpose of a (columns, depth) block of b in the same way. */
static void SUFFIXED(pack_transposed_block)(long depth, long columns, long pitch, const REAL *b,
                                            long ldb, REAL *restrict packed) {
    for (long first = 0; first < pitch; first += LANES) {
        long p = 0, count = columns - first < LANES ? columns - first : LANES;
#ifdef HAS_SHUFFLEVECTOR
        for (; count == LANES && p + LANES <= depth; p += LANES) {
            SUFFIXED(vector) block[LANES];
            for (long s = 0; s < LANES; s++)
                block[s] = *(const SUFFIXED(vector) *)(b + (first + s) * ldb + p);
            SUFFIXED(transpose_block)(block);
            for (long s = 0; s < LANES; s++)
                *(SUFFIXED(vector) *)(packed + (p + s) * pitch + first) = block[s];
        }
#endif
        for (; p < depth; p++)
            for (long s = 0; s < LANES; s++)
                packed[p * pitch + first + s] = s < count ? b[(first + s) * ldb + p] : 0;
    }
}

/* Compute c = a b, or c += a b if `accumulate`, for a (m, k), b (k, n) and c (m, n). An a or b with
 * 'T' is stored transposed. lda, ldb and ldc are the distances between the rows in memory. */
static void SUFFIXED(gemm)(char trans_a, char trans_b, long m, long n, long k, const REAL *a,
                           long lda, const REAL *b, long ldb, REAL *c, long ldc, int accumulate) {
    REAL packed[PACKED_ROWS * KERNEL_COLUMNS] __attribute__((aligned(64)));
    REAL edge_block[MAX_KERNEL_ROWS * KERNEL_COLUMNS] __attribute__((aligned(64)));
    const long a_row = trans_a == 'N' ? lda : 1, a_col = trans_a == 'N' ? 1 : lda;
    for (long p = 0; p < k; p += PACKED_ROWS) {
        const long depth = k - p < PACKED_ROWS ? k - p : PACKED_ROWS;
        for (long j = 0; j < n; j += KERNEL_COLUMNS) {
            const long columns = n - j < KERNEL_COLUMNS ? n - j : KERNEL_COLUMNS,
                       is_double_width = columns > LANES;
            const long pitch = is_double_width ? KERNEL_COLUMNS : LANES;
            const REAL *b_block = packed;
            long ld_block = pitch;
            if (trans_b == 'T')
                SUFFIXED(pack_transposed_block)(depth, columns, pitch, b + j * ldb + p, ldb,
                                                packed);
            else if (columns == pitch && (m <= 2 * MAX_KERNEL_ROWS || depth * ldb <= MAX_UNPACKED))
                b_block = b + p * ldb + j, ld_block = ldb; /* read b where it is */
            else
                SUFFIXED(pack_block)(depth, columns, pitch, b + p * ldb + j, ldb, packed);
            for (long i = 0, kernel_rows; i < m; i += kernel_rows) {
                const long kernels_left = (m - i + MAX_KERNEL_ROWS - 1) / MAX_KERNEL_ROWS;
                kernel_rows =
                    (m - i + kernels_left - 1) / kernels_left; /* about the same for all kernels */
                const SUFFIXED(kernel) kernel =
                    SUFFIXED(kernels)[is_double_width][kernel_rows - 1];
                const REAL *a_block = a + i * a_row + p * a_col;
                REAL *c_block = c + i * ldc + j;
                if (columns == pitch) {
                    kernel(depth, a_block, a_row, a_col, b_block, ld_block, c_block, ldc,
                           accumulate || p);
                    continue;
                }
                kernel(depth, a_block, a_row, a_col, b_block, ld_block, edge_block, pitch, 0);
                for (long r = 0; r < kernel_rows; r++)
                    for (long s = 0; s < columns; s++)
                        c_block[r * ldc + s] = (accumulate || p ? c_block[r * ldc + s] : 0) +
                                               edge_block[r * pitch + s];
            }
        }
    }
}

/* Compute c = a b, see `gemm`. */
static void SUFFIXED(matmul)(char trans_a, char trans_b, long m, long n, long k, const REAL *a,
                             long lda, const REAL *b, long ldb, REAL *c, long ldc) {
    SUFFIXED(gemm)(trans_a, trans_b, m, n, k, a, lda, b, ldb, c, ldc, 0);
}

#undef KERNEL
#undef KERNELS
#undef LANES
#undef KERNEL_COLUMNS
#undef MAX_KERNEL_ROWS
#undef PACKED_ROWS
#undef MAX_UNPACKED
