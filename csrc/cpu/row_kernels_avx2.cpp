// SPDX-License-Identifier: Apache-2.0
// Row kernels for x86-64 processors with AVX2 and FMA.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define FASTPREF_ROW_KERNELS row_kernels_avx2
#include "row_kernels.inl"
#endif
