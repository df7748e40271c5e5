// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels may use. Header only and free of torch: the operator library dispatches on it
// and the pybind11 module reports it.
#pragma once

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace fastpref {

// In order: a capability includes the ones before it.
enum class CpuCapability : int { baseline = 0, avx2 = 1, avx512 = 2 };

constexpr const char* capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::avx512:
      return "avx512";
    case CpuCapability::avx2:
      return "avx2";
    case CpuCapability::baseline:
      break;
  }
  return "baseline";
}

// The features that the kernels or their successors ask for, and whether processor and operating system offer them.
inline std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},         {"fma", __builtin_cpu_supports("fma") != 0},
          {"f16c", __builtin_cpu_supports("f16c") != 0},         {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0}, {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0}};
#else
  return {};
#endif
}

inline CpuCapability detected_cpu_capability() {
  bool avx2 = true, avx512 = true, any = false;
  for (const auto& [name, present] : cpu_features()) {
    (name.rfind("avx512", 0) == 0 ? avx512 : avx2) &= present;
    any = true;
  }
  if (!any || !avx2) return CpuCapability::baseline;
  return avx512 ? CpuCapability::avx512 : CpuCapability::avx2;
}

struct CpuChoice {
  CpuCapability capability;
  std::string note;  // why a request was not followed; empty when it was, or when there was none
};

// `request` is the value of FASTPREF_CPU_CAPABILITY, or null. It may lower the capability and never raises it: a
// kernel for instructions that the processor lacks would end the process.
inline CpuChoice choose_cpu_capability(const char* request, CpuCapability detected) {
  if (request == nullptr || *request == '\0') return {detected, ""};
  for (const auto capability : {CpuCapability::baseline, CpuCapability::avx2, CpuCapability::avx512}) {
    if (std::string(request) != capability_name(capability)) continue;
    if (capability <= detected) return {capability, ""};
    return {detected, std::string("FASTPREF_CPU_CAPABILITY=") + request + " ignored: this processor offers " +
                          capability_name(detected) + " at most"};
  }
  return {detected, std::string("FASTPREF_CPU_CAPABILITY=") + request + " ignored: expected baseline, avx2 or avx512"};
}

// Read once, at the first call: getenv is not safe against a setenv in another thread.
inline const CpuChoice& cpu_choice() {
  static const CpuChoice choice =
      choose_cpu_capability(std::getenv("FASTPREF_CPU_CAPABILITY"), detected_cpu_capability());
  return choice;
}

inline CpuCapability cpu_capability() { return cpu_choice().capability; }

}  // namespace fastpref
