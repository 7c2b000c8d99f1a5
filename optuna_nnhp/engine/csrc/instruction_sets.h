/* Includes the code in TEMPLATE once for each instruction set and precision, and detects at run time
 * which instruction sets the processor has. A function `f` of the template is written
 * `SUFFIXED(f)` and becomes, for example, `f_float_avx2`. Define before including:
 *   TEMPLATE   the header with the code, written in terms of REAL and SUFFIXED
 */
#define ROW_MULTIPLIER 0x9e3779b1u  /* networks/noise.py: ROW_KEY */
#define UNIT_MULTIPLIER 0x85ebca77u /* networks/noise.py: UNIT_KEY */

/* In the order of `ACTIVATIONS` in engine/mlp.py. */
enum {
    ACT_RELU,
    ACT_LEAKY_RELU,
    ACT_TANH,
    ACT_SIGMOID,
    ACT_ELU,
    ACT_SELU,
    ACT_GELU,
    ACT_SILU,
    ACT_MISH
};

#ifdef __has_builtin /* GCC has it from version 12 on */
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLEVECTOR 1
#endif
#endif

#define CONCATENATE_(a, b, c) a##_##b##_##c
#define CONCATENATE(a, b, c) CONCATENATE_(a, b, c)

#define SUFFIXED(x) CONCATENATE(x, PRECISION, INSTRUCTION_SET)

#define INSTRUCTION_SET any
#define VECTOR_BYTES 16
#include "precisions.h"
#undef INSTRUCTION_SET
#undef VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_AVX 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define INSTRUCTION_SET avx2
#define VECTOR_BYTES 32
#include "precisions.h"
#undef INSTRUCTION_SET
#undef VECTOR_BYTES
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define INSTRUCTION_SET avx512
#define VECTOR_BYTES 64
#include "precisions.h"
#undef INSTRUCTION_SET
#undef VECTOR_BYTES
#pragma GCC pop_options
#endif

enum { ANY, AVX2, AVX512 };

/* Return the best instruction set of this processor. */
static int detect_instruction_set(void) {
#ifdef HAS_AVX
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return ANY;
}
