// scrimp._host: host-side objects that are no tensor ops. No torch here.
#include <pybind11/pybind11.h>

#include "common/cpu_features.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side objects of scrimp.";
  m.def(
      "detect_isa", [] { return scrimp::isa_names[static_cast<int>(scrimp::detect_isa())]; },
      "Name of the widest instruction set that this processor and its operating system support.");
}
