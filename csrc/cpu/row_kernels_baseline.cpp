// SPDX-License-Identifier: Apache-2.0
// Row kernels for any processor of the target architecture.
#define FASTPREF_ROW_KERNELS row_kernels_baseline
#include "row_kernels.inl"
