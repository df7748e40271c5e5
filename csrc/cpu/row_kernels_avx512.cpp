// SPDX-License-Identifier: Apache-2.0
// Row kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL), float64 aside.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "row_kernels.inl"

namespace fastpref::cpu {

const RowKernels row_kernels_avx512[kElements] = {
    {},
    kernels_of<Element::float32>(),
    kernels_of<Element::bfloat16>(),
    kernels_of<Element::float16>(),
};

}  // namespace fastpref::cpu
#endif
