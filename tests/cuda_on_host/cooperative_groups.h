// SPDX-License-Identifier: Apache-2.0
// What is used of it is in the stand-in itself.
#pragma once

#include "cuda_runtime.h"
