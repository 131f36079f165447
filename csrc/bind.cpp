// The Python binding: passes pointers. What they point to was checked on the Python side (dtype, device, shape,
// strides); what the numbers say is checked by the core. Each op's part is in csrc/bind.
#include "bind/bind.h"
#include "common/machine_peak.h"
#include "common/matrix_units.h"

namespace {

py::dict info() {
  py::dict d;
  d["version"] = interfuse_version();
  d["isa"] = interfuse_isa();
#if defined(INTERFUSE_HAVE_X86_ISAS)
  d["isas"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  d["isas"] = std::vector<std::string>{"baseline"};
#endif
  d["compiler"] = std::string(INTERFUSE_COMPILER);
  d["openmp"] = _OPENMP;
  d["matrix_units"] = interfuse::matrix_units();
#if defined(INTERFUSE_HAVE_CUDA)
  d["cuda_built"] = true;
#else
  d["cuda_built"] = false;
#endif
  return d;
}

py::dict machine_peak(int threads) {
  interfuse::MachinePeak peak;
  {
    py::gil_scoped_release release;
    peak = interfuse::measure_machine_peak(threads);
  }
  py::dict d;
  d["operations"] = peak.operations;
  d["bytes"] = peak.bytes;
  return d;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "interfuse's native core, bound by pointers; use interfuse.ops instead.";
  m.def("info", &info);
  m.def("machine_peak", &machine_peak, py::arg("threads"),
        "Float32 operations and bytes read a second that this machine reaches at best, measured in about 0.3 s.");
  interfuse::bind::attention(m);
  interfuse::bind::conv_pool(m);
  interfuse::bind::linear(m);
  interfuse::bind::losses(m);
  interfuse::bind::memory(m);
  interfuse::bind::rnn(m);
}
