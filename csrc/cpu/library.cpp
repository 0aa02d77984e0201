// The extension as a Python module: importing mlmfast._cpu loads the library, and loading it registers the ops.
#include <Python.h>

#include <string>
#include <vector>

#include "isa.h"
#include "tensors.h"

namespace mlmfast {

// What the Python side must find; raised with every change of an op's schema. Older binaries may lie about in checkouts.
constexpr int64_t VERSION = 6;

int64_t version() { return VERSION; }

// The paths that this processor has, best first, commas between.
std::string instruction_sets() {
  std::string names;
  for (const Kernels* each : usable_kernels()) names += (names.empty() ? "" : ",") + std::string(each->name);
  return names;
}

std::string instructions() { return kernels().name; }

void use_instructions(std::string name) {
  STD_TORCH_CHECK(use_kernels(name.c_str()), "instructions '", name, "' are not had here; choose from ",
                  instruction_sets());
}

}  // namespace mlmfast

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cpu, m) {
  m.def("version() -> int");
  m.def("instruction_sets() -> str");
  m.def("instructions() -> str");
  m.def("use_instructions(str name) -> ()");
}

// No tensor among their arguments tells a device.
STABLE_TORCH_LIBRARY_IMPL(mlmfast_cpu, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&mlmfast::version));
  m.impl("instruction_sets", TORCH_BOX(&mlmfast::instruction_sets));
  m.impl("instructions", TORCH_BOX(&mlmfast::instructions));
  m.impl("use_instructions", TORCH_BOX(&mlmfast::use_instructions));
}

extern "C" PyMODINIT_FUNC PyInit__cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
