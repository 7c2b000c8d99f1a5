/* The part of `mlp.c` that is compiled once for each precision and instruction set. */
#include "mlp_layers.h"
#include "mlp_network.h"
#include "mlp_team.h"
#include "mlp_training.h"
