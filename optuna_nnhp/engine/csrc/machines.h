/* An engine's parts in both precisions for each instruction set. Included with
 *   PARTS   the header with the parts, which are written with REAL and NAME
 */
#define ROW_KEY 0x9e3779b1u  /* training/noise.py */
#define UNIT_KEY 0x85ebca77u /* training/noise.py */

/* In the order of `engine/mlp.py`. */
enum { ACT_RELU, ACT_LEAKY_RELU, ACT_TANH, ACT_SIGMOID, ACT_ELU, ACT_SELU, ACT_GELU, ACT_SILU, ACT_MISH };

#ifdef __has_builtin /* GCC has it from version 12 on */
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

#define JOIN_(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)

#define NAME(x) JOIN(x, PRECISION, MACHINE)

#define MACHINE any
#define VECTOR_BYTES 16
#include "twice.h"
#undef MACHINE
#undef VECTOR_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_MORE 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define MACHINE avx2
#define VECTOR_BYTES 32
#include "twice.h"
#undef MACHINE
#undef VECTOR_BYTES
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define MACHINE avx512
#define VECTOR_BYTES 64
#include "twice.h"
#undef MACHINE
#undef VECTOR_BYTES
#pragma GCC pop_options
#endif

/* What this machine has. */
enum { ANY, AVX2, AVX512 };
static int machine(void) {
#ifdef HAS_MORE
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return ANY;
}

/* What Python finds by ctypes. */
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
