/* The parts of `gpt_engine.c` that there are of each precision and instruction set. */
#include "gpt_pieces.h"
#include "gpt_attention.h"
#include "gpt_blocks.h"
#include "gpt_muon.h"
