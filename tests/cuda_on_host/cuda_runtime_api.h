// SPDX-License-Identifier: Apache-2.0
// The types that launchers are declared with. Nothing is launched.
#pragma once

using cudaError_t = int;
using cudaStream_t = void*;
