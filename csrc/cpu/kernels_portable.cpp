// All but the optimizers' steps for any processor: 128-bit vectors, which are SSE2 on x86 and NEON on aarch64.
#define R2_INSTRUCTION_SET portable
#define R2_TABLE kPortable
#define R2_NAME_OF_INSTRUCTION_SET "portable"
#define R2_VECTOR_BYTES 16

#include "before_target.h"
#include "table.h"
