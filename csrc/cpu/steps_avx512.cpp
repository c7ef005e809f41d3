// The optimizers' steps for AVX512, 64-byte vectors.
#if defined(__x86_64__)
#define R2_INSTRUCTION_SET avx512
#define R2_VECTOR_BYTES 64

// Everything from the standard library and PyTorch comes before the pragma: the linker may take any copy of an inline
// function for the whole program.
#include "before_target.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "step.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
