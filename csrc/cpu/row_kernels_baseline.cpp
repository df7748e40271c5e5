// SPDX-License-Identifier: Apache-2.0
// Row kernels for any processor of the target architecture.
#include "row_kernels.inl"

namespace fastpref::cpu {

const RowKernels row_kernels_baseline[kElements] = {
    kernels_of<Element::float64>(),
    kernels_of<Element::float32>(),
    kernels_of<Element::bfloat16>(),
    kernels_of<Element::float16>(),
};

}  // namespace fastpref::cpu
