/* Includes the code in TEMPLATE twice, for float and for double, for one INSTRUCTION_SET. */
#define PRECISION float
#define REAL float
#define EXP SUFFIXED(fast_exp)
#define TANH SUFFIXED(fast_tanh)
#define ERF SUFFIXED(fast_erf)
#define LOG logf
#define EXPM1 expm1f
#define POW powf
#define SQRT sqrtf
#define FABS fabsf
#define REAL_BYTES 4
#include "matmul.h"
#include "elementwise.h"
#include TEMPLATE
#undef FOR_EACH
#undef PRECISION
#undef REAL
#undef REAL_BYTES
#undef EXP
#undef TANH
#undef ERF
#undef LOG
#undef EXPM1
#undef POW
#undef SQRT
#undef FABS

#define PRECISION double
#define REAL double
#define EXP exp
#define TANH tanh
#define ERF erf
#define LOG log
#define EXPM1 expm1
#define POW pow
#define SQRT sqrt
#define FABS fabs
#define REAL_BYTES 8
#include "matmul.h"
#include "elementwise.h"
#include TEMPLATE
#undef FOR_EACH
#undef PRECISION
#undef REAL
#undef REAL_BYTES
#undef EXP
#undef TANH
#undef ERF
#undef LOG
#undef EXPM1
#undef POW
#undef SQRT
#undef FABS
