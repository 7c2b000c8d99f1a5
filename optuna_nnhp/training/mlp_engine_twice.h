/* The engine in both precisions, for the instruction set MACHINE. */
#define PRECISION float
#define REAL float
#define EXP NAME(fast_exp)
#define TANH NAME(fast_tanh)
#define ERF NAME(fast_erf)
#define LOG logf
#define EXPM1 expm1f
#define POW powf
#define SQRT sqrtf
#define FABS fabsf
#define REAL_BYTES 4
#include "mlp_products.h"
#include "mlp_pieces.h"
#include "mlp_engine.h"
#include "mlp_team.h"

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
#include "mlp_products.h"
#include "mlp_pieces.h"
#include "mlp_engine.h"
#include "mlp_team.h"
