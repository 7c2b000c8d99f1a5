/* Matrix products of the sizes that small networks have, for one precision and instruction set.
 *
 * A kernel computes some rows of one or two vectors of columns in registers; what it reads of b is
 * packed before, row after row. Nothing else is: a, b and c fit in a core's cache. A library's
 * product of 64 x 256 by 256 x 256 numbers took a fifth longer, since it packs all of both.
 *
 * Source: Goto and van de Geijn 2008 (doi:10.1145/1356052.1356053) on kernels and packing.
 */
typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL))));
#define LANES ((long)(VECTOR_BYTES / sizeof(REAL)))
#define WIDE (2 * LANES) /* columns of a kernel */
#define TALL 6           /* rows of a kernel, at most */
#define DEEP 256         /* rows of b that are packed at once */
#define NEAR 8192        /* numbers of b that are near enough without packing */

#define KERNEL(name, tall, columns) \
static void NAME(name)(long k, const REAL *a, long row, long col, const REAL *restrict b, \
                       long ldb, REAL *c, long ldc, int add) { \
    NAME(vector) sum[tall][columns]; \
    for (int i = 0; i < tall; i++) \
        for (int j = 0; j < columns; j++) sum[i][j] = (NAME(vector)){0}; \
    for (long p = 0; p < k; p++) { \
        NAME(vector) part[columns]; \
        for (int j = 0; j < columns; j++) \
            part[j] = *(const NAME(vector) *)(b + p * ldb + j * LANES); \
        for (int i = 0; i < tall; i++) { \
            REAL x = a[i * row + p * col]; \
            for (int j = 0; j < columns; j++) sum[i][j] += x * part[j]; \
        } \
    } \
    for (int i = 0; i < tall; i++) \
        for (int j = 0; j < columns; j++) { \
            NAME(vector) *out = (NAME(vector) *)(c + i * ldc + j * LANES); \
            *out = add ? *out + sum[i][j] : sum[i][j]; \
        } \
}
#define KERNELS(tall) KERNEL(narrow##tall, tall, 1) KERNEL(wide##tall, tall, 2)
KERNELS(1)
KERNELS(2)
KERNELS(3)
KERNELS(4)
KERNELS(5)
KERNELS(6)

typedef void (*NAME(kernel))(long, const REAL *, long, long, const REAL *restrict, long, REAL *,
                             long, int);
static const NAME(kernel) NAME(kernels)[2][TALL] = {
    {NAME(narrow1), NAME(narrow2), NAME(narrow3), NAME(narrow4), NAME(narrow5), NAME(narrow6)},
    {NAME(wide1), NAME(wide2), NAME(wide3), NAME(wide4), NAME(wide5), NAME(wide6)},
};

#ifdef HAS_SHUFFLE
/* LANES rows of LANES numbers, transposed in log2(LANES) rounds of swaps. */
static inline void NAME(transpose)(NAME(vector) *v) {
#define SWAP(step, low, high) \
    for (int i = 0; i < LANES; i++) \
        if (!(i & step)) { \
            NAME(vector) x = v[i], y = v[i + step]; \
            v[i] = __builtin_shufflevector(x, y, UNPACK low); \
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

/* Some columns of a part of b, row after row of `pitch` numbers, zeros after the last column. */
static void NAME(pack)(long deep, long columns, long pitch, const REAL *b, long ldb,
                       REAL *restrict packed) {
    if (columns == WIDE) {
        for (long p = 0; p < deep; p++) memcpy(packed + p * WIDE, b + p * ldb, WIDE * sizeof(REAL));
        return;
    }
    for (long p = 0; p < deep; p++)
        for (long s = 0; s < pitch; s++) packed[p * pitch + s] = s < columns ? b[p * ldb + s] : 0;
}

/* The same from b's transposed matrix. */
static void NAME(pack_transposed)(long deep, long columns, long pitch, const REAL *b, long ldb,
                                  REAL *restrict packed) {
    for (long first = 0; first < pitch; first += LANES) {
        long p = 0, count = columns - first < LANES ? columns - first : LANES;
#ifdef HAS_SHUFFLE
        for (; count == LANES && p + LANES <= deep; p += LANES) {
            NAME(vector) block[LANES];
            for (long s = 0; s < LANES; s++)
                block[s] = *(const NAME(vector) *)(b + (first + s) * ldb + p);
            NAME(transpose)(block);
            for (long s = 0; s < LANES; s++)
                *(NAME(vector) *)(packed + (p + s) * pitch + first) = block[s];
        }
#endif
        for (; p < deep; p++)
            for (long s = 0; s < LANES; s++)
                packed[p * pitch + first + s] = s < count ? b[(first + s) * ldb + p] : 0;
    }
}

/* c (m, n) = a (m, k) times b (k, n), or c += it; 'T' for an a or b that is stored the other way
 * round. */
static void NAME(multiply_to)(char ta, char tb, long m, long n, long k, const REAL *a, long lda,
                              const REAL *b, long ldb, REAL *c, long ldc, int add) {
    REAL packed[DEEP * WIDE] __attribute__((aligned(64)));
    REAL edge[TALL * WIDE] __attribute__((aligned(64)));
    const long row = ta == 'N' ? lda : 1, col = ta == 'N' ? 1 : lda;
    for (long p = 0; p < k; p += DEEP) {
        const long deep = k - p < DEEP ? k - p : DEEP;
        for (long j = 0; j < n; j += WIDE) {
            const long columns = n - j < WIDE ? n - j : WIDE, is_wide = columns > LANES;
            const long pitch = is_wide ? WIDE : LANES;
            const REAL *part = packed;
            long distance = pitch;
            if (tb == 'T')
                NAME(pack_transposed)(deep, columns, pitch, b + j * ldb + p, ldb, packed);
            else if (columns == pitch && (m <= 2 * TALL || deep * ldb <= NEAR))
                part = b + p * ldb + j, distance = ldb; /* as it is */
            else
                NAME(pack)(deep, columns, pitch, b + p * ldb + j, ldb, packed);
            for (long i = 0, tall; i < m; i += tall) {
                const long blocks = (m - i + TALL - 1) / TALL;
                tall = (m - i + blocks - 1) / blocks; /* about equal ones */
                const NAME(kernel) kernel = NAME(kernels)[is_wide][tall - 1];
                const REAL *from = a + i * row + p * col;
                REAL *to = c + i * ldc + j;
                if (columns == pitch) {
                    kernel(deep, from, row, col, part, distance, to, ldc, add || p);
                    continue;
                }
                kernel(deep, from, row, col, part, distance, edge, pitch, 0);
                for (long r = 0; r < tall; r++)
                    for (long s = 0; s < columns; s++)
                        to[r * ldc + s] = (add || p ? to[r * ldc + s] : 0) + edge[r * pitch + s];
            }
        }
    }
}

static void NAME(multiply)(char ta, char tb, long m, long n, long k, const REAL *a, long lda,
                           const REAL *b, long ldb, REAL *c, long ldc) {
    NAME(multiply_to)(ta, tb, m, n, k, a, lda, b, ldb, c, ldc, 0);
}

#undef KERNEL
#undef KERNELS
#undef LANES
#undef WIDE
#undef TALL
#undef DEEP
#undef NEAR
