// scrimp._host: host-side objects that are no tensor ops. No torch here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "host/suffix_automaton.h"

namespace py = pybind11;
using scrimp::SuffixAutomaton;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side objects of scrimp.";
  m.def(
      "detect_isa", [] { return scrimp::isa_names[static_cast<int>(scrimp::detect_isa())]; },
      "Name of the widest instruction set that this processor and its operating system support.");
  py::class_<SuffixAutomaton>(m, "SuffixAutomaton", "Which places of a growing text ended with its last tokens.")
      .def(py::init())
      .def("__len__", &SuffixAutomaton::size)
      .def(
          "extend",
          [](SuffixAutomaton& self, const std::vector<int64_t>& tokens) {
            for (const int64_t token : tokens)
              if (token < 0 || token >= int64_t{1} << 32)
                throw std::invalid_argument("token " + std::to_string(token) + " is not from 0 to 2^32 - 1");
            if (self.size() + static_cast<int64_t>(tokens.size()) >= int64_t{1} << 31)
              throw std::invalid_argument("a text of 2^31 tokens or more");
            for (const int64_t token : tokens) self.extend(token);
          },
          py::arg("tokens"), "Appends tokens.")
      .def("matches", &SuffixAutomaton::matches, py::arg("count"), py::arg("shortest"),
           "Up to `count` pairs (n, end): the last n >= shortest tokens are those before index `end` too.");
}
