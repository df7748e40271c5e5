// SPDX-License-Identifier: Apache-2.0
// The row kernels of the instructions that this processor has; of float64 those of any.
#pragma once

#include "../cpu_features.h"
#include "row_kernels.h"

namespace fastpref::cpu {

inline const RowKernels& row_kernels(Element element) {
  const int index = static_cast<int>(element);
#if defined(__x86_64__)
  switch (element == Element::float64 ? CpuCapability::baseline : cpu_capability()) {
    case CpuCapability::avx512:
      return row_kernels_avx512[index];
    case CpuCapability::avx2:
      return row_kernels_avx2[index];
    case CpuCapability::baseline:
      break;
  }
#endif
  return row_kernels_baseline[index];
}

}  // namespace fastpref::cpu
