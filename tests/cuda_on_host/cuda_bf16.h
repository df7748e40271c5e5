// SPDX-License-Identifier: Apache-2.0
// The element types are in the stand-in itself.
#pragma once

#include "cuda_runtime.h"
