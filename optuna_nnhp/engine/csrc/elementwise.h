/* Functions of single numbers: exponentials, activations and the random numbers of dropout. The
 * compiler turns loops over them into vector instructions. Part of the template, see
 * `instruction_sets.h`: `precisions.h` defines REAL, EXP, TANH and the other functions of a REAL.
 */

/* ---- Exponentials ---- */

static inline float SUFFIXED(fast_exp)(float x) {
    /* 2^n times the Taylor polynomial of exp(r), |r| <= ln(2) / 2: relative error below 2e-7. */
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
    union {
        uint32_t bits;
        float value;
    } scale;
    scale.bits = (uint32_t)((int32_t)n + 127) << 23;
    return p * scale.value;
}

static inline float SUFFIXED(fast_tanh)(float x) {
    float e = SUFFIXED(fast_exp)(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

static inline float SUFFIXED(fast_erf)(float x) {
    /* Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7. */
    float a = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * a);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return copysignf(1.0f - p * t * SUFFIXED(fast_exp)(-a * a), x);
}

/* ---- Activations ---- */

#define FOR_EACH for (long i = 0; i < n; i++)

/* Write the activations of x to y, and replace x by the derivatives there. */
static void SUFFIXED(activation_forward)(int kind, long n, REAL *restrict x, REAL *restrict y) {
    const REAL leak = (REAL)0.01;
    const REAL alpha = (REAL)1.6732632423543772, scale = (REAL)1.0507009873554805;
    const REAL root_half = (REAL)0.7071067811865476, density = (REAL)0.3989422804014327;
    switch (kind) {
    case ACT_RELU:
        FOR_EACH {
            REAL v = x[i];
            y[i] = v < 0 ? 0 : v;
            x[i] = v <= 0 ? 0 : 1;
        }
        break;
    case ACT_LEAKY_RELU:
        FOR_EACH {
            REAL v = x[i];
            y[i] = v > 0 ? v : leak * v;
            x[i] = v > 0 ? 1 : leak;
        }
        break;
    case ACT_TANH:
        FOR_EACH {
            REAL t = TANH(x[i]);
            y[i] = t;
            x[i] = 1 - t * t;
        }
        break;
    case ACT_SIGMOID:
        FOR_EACH {
            REAL s = 1 / (1 + EXP(-x[i]));
            y[i] = s;
            x[i] = s * (1 - s);
        }
        break;
    case ACT_ELU:
        FOR_EACH {
            REAL v = x[i], e = EXP(v < 0 ? v : 0);
            y[i] = v > 0 ? v : e - 1;
            x[i] = v > 0 ? 1 : e;
        }
        break;
    case ACT_SELU:
        FOR_EACH {
            REAL v = x[i], e = alpha * EXP(v < 0 ? v : 0);
            y[i] = scale * (v > 0 ? v : e - alpha);
            x[i] = scale * (v > 0 ? 1 : e);
        }
        break;
    case ACT_GELU:
        FOR_EACH {
            REAL v = x[i], p = (1 + ERF(v * root_half)) / 2;
            y[i] = v * p;
            x[i] = p + v * density * EXP(-v * v / 2);
        }
        break;
    case ACT_SILU:
        FOR_EACH {
            REAL v = x[i], s = 1 / (1 + EXP(-v));
            y[i] = v * s;
            x[i] = s * (1 + v * (1 - s));
        }
        break;
    case ACT_MISH: /* tanh(softplus(v)) = n / (n + 2) with n = e (e + 2) and e = exp(v) */
        FOR_EACH {
            REAL v = x[i], e = EXP(v > 20 ? 20 : v), m = e * (e + 2), t = m / (m + 2);
            y[i] = v * t;
            x[i] = t + v * (1 - t * t) * (e / (1 + e));
        }
        break;
    }
}

/* ---- Random numbers of dropout ---- */

/* Return a number in (0, 1), a hash of a unit's position and the key of the draw. `_uniform` in
 * networks/noise.py computes the same number. */
static inline REAL SUFFIXED(uniform_noise)(uint32_t position, uint32_t key) {
    uint32_t h = position ^ key;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    h ^= h >> 16;
    return ((REAL)(int32_t)(h >> 9) + (REAL)0.5) * (REAL)(1.0 / 8388608);
}
