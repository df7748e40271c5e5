// SPDX-License-Identifier: Apache-2.0
// Row kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FASTPREF_ROW_KERNELS row_kernels_avx512
#include "row_kernels.inl"
#endif
