/* Exponentials, activations and dropout, for one precision and one instruction set. Included with
 *   REAL             float or double
 *   NAME(x)          x with a suffix of its own
 *   EXP, TANH, ...   functions of a REAL
 */
/* ---- Exponentials: loops over these become vector instructions. ---- */

static inline float NAME(fast_exp)(float x) {
    /* 2^n times the Taylor polynomial on |r| <= ln(2) / 2: relative error below 2e-7. */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t i; float f; } scale;
    scale.i = ((int32_t)n + 127) << 23;
    return p * scale.f;
}

static inline float NAME(fast_tanh)(float x) {
    float e = NAME(fast_exp)(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

static inline float NAME(fast_erf)(float x) {
    /* Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7. */
    float a = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return copysignf(1.0f - p * t * NAME(fast_exp)(-a * a), x);
}

/* ---- Activations: their value, and their slope in place of the argument ---- */

#define EACH for (long i = 0; i < n; i++)

static void NAME(activate)(int kind, long n, REAL *restrict x, REAL *restrict y) {
    const REAL leak = (REAL)0.01;
    const REAL alpha = (REAL)1.6732632423543772, scale = (REAL)1.0507009873554805;
    const REAL root_half = (REAL)0.7071067811865476, density = (REAL)0.3989422804014327;
    switch (kind) {
    case ACT_RELU:
        EACH { REAL v = x[i]; y[i] = v < 0 ? 0 : v; x[i] = v <= 0 ? 0 : 1; }
        break;
    case ACT_LEAKY_RELU:
        EACH { REAL v = x[i]; y[i] = v > 0 ? v : leak * v; x[i] = v > 0 ? 1 : leak; }
        break;
    case ACT_TANH:
        EACH { REAL t = TANH(x[i]); y[i] = t; x[i] = 1 - t * t; }
        break;
    case ACT_SIGMOID:
        EACH { REAL s = 1 / (1 + EXP(-x[i])); y[i] = s; x[i] = s * (1 - s); }
        break;
    case ACT_ELU:
        EACH { REAL v = x[i], e = EXP(v < 0 ? v : 0);
               y[i] = v > 0 ? v : e - 1; x[i] = v > 0 ? 1 : e; }
        break;
    case ACT_SELU:
        EACH { REAL v = x[i], e = alpha * EXP(v < 0 ? v : 0);
               y[i] = scale * (v > 0 ? v : e - alpha); x[i] = scale * (v > 0 ? 1 : e); }
        break;
    case ACT_GELU:
        EACH { REAL v = x[i], p = (1 + ERF(v * root_half)) / 2;
               y[i] = v * p; x[i] = p + v * density * EXP(-v * v / 2); }
        break;
    case ACT_SILU:
        EACH { REAL v = x[i], s = 1 / (1 + EXP(-v)); y[i] = v * s; x[i] = s * (1 + v * (1 - s)); }
        break;
    case ACT_MISH: /* tanh(softplus(v)) = n / (n + 2) with n = e (e + 2) and e = exp(v) */
        EACH { REAL v = x[i], e = EXP(v > 20 ? 20 : v), m = e * (e + 2), t = m / (m + 2);
               y[i] = v * t; x[i] = t + v * (1 - t * t) * (e / (1 + e)); }
        break;
    }
}
/* ---- Dropout ---- */

/* A number in (0, 1) for a place, from the key of a draw. */
static inline REAL NAME(noise)(uint32_t place, uint32_t key) {
    uint32_t h = place ^ key;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    h ^= h >> 16;
    return ((REAL)(int32_t)(h >> 9) + (REAL)0.5) * (REAL)(1.0 / 8388608);
}

/* Factors 0 and 1 / (1 - p) on an example's activations and slopes, from unit `first` on;
 * `training/noise.py` has the same noise. */
static inline void NAME(drop)(uint32_t row, uint32_t first, uint32_t n, REAL p, uint32_t key,
                              REAL *restrict y, REAL *restrict slope) {
    const REAL kept = 1 / (1 - p);
    const uint32_t start = row * ROW_KEY + first * UNIT_KEY;
    for (uint32_t j = 0; j < n; j++) {
        REAL factor = NAME(noise)(start + j * UNIT_KEY, key) < p ? 0 : kept;
        y[j] *= factor;
        slope[j] *= factor;
    }
}
