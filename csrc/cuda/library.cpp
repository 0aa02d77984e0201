// The extension as a Python module: importing mlmfast._cuda loads the library, and loading it registers the ops.
#include <Python.h>
#include <torch/csrc/stable/library.h>

namespace {

// What the Python side must find; raised with every change of an op's schema. Older binaries may lie about in checkouts.
constexpr int64_t VERSION = 3;

int64_t version() { return VERSION; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mlmfast_cuda, m) { m.def("version() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(mlmfast_cuda, CompositeExplicitAutograd, m) { m.impl("version", TORCH_BOX(&version)); }

extern "C" PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
