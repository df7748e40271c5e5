// SPDX-License-Identifier: Apache-2.0
// fastpref._C: what only native code can say about this build and this processor; the rest of the build's facts are in
// fastpref/_build_info.json. It links no torch, and the operators work without it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "cpu_features.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict features() {
  py::dict result;
  for (const auto& [name, present] : fastpref::cpu_features()) result[py::str(name)] = present;
  return result;
}

std::optional<fastpref::CpuCapability> capability_named(const std::string& name) {
  using fastpref::CpuCapability;
  for (const auto capability : {CpuCapability::baseline, CpuCapability::avx2, CpuCapability::avx512}) {
    if (name == fastpref::capability_name(capability)) return capability;
  }
  return std::nullopt;
}

std::pair<std::string, std::string> choose(const std::optional<std::string>& request, const std::string& detected) {
  const auto limit = capability_named(detected);
  if (!limit) throw py::value_error("detected must be baseline, avx2 or avx512, got " + detected);
  const auto choice = fastpref::choose_cpu_capability(request ? request->c_str() : nullptr, *limit);
  return {fastpref::capability_name(choice.capability), choice.note};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Facts about this build of fastpref and the processor it runs on.";
  m.attr("compiler") = compiler();
  m.def("cpu_features", &features, "Processor features that the kernels look at, by name.");
  m.def(
      "cpu_capability", [] { return std::string(fastpref::capability_name(fastpref::cpu_capability())); },
      "The instruction set that the CPU operators use: baseline, avx2 or avx512.");
  m.def(
      "cpu_capability_note", [] { return fastpref::cpu_choice().note; },
      "Why FASTPREF_CPU_CAPABILITY was not followed; empty when it was, or is not set.");
  m.def("choose_cpu_capability", &choose, py::arg("request"), py::arg("detected"),
        "The rule alone: (capability, note) for a request and what the processor offers.");
}
