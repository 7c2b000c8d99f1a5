/* The parts of `mlp_engine.c` that there are of each precision and instruction set. */
#include "mlp_pieces.h"
#include "mlp_engine.h"
#include "mlp_team.h"
