/* The part of `gpt.c` that is compiled once for each precision and instruction set. */
#include "gpt_layers.h"
#include "gpt_attention.h"
#include "gpt_network.h"
#include "orthogonalize.h"
