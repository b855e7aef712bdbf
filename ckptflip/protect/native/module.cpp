// The module `_kernels`: its table of functions. Each group of kernels has a source file of its own.
#include "gemm.h"
#include "intensity.h"
#include "kernels.h"

namespace ckptflip {

// In clipping.cpp.
PyObject *clip(PyObject *, Arguments, Py_ssize_t);
PyObject *clip_stack(PyObject *, Arguments, Py_ssize_t);
PyObject *clip_scale(PyObject *, Arguments, Py_ssize_t);
PyObject *clip_cross(PyObject *, Arguments, Py_ssize_t);

// In embedding_bag.cpp.
PyObject *embedding_bag(PyObject *, Arguments, Py_ssize_t);

Isa isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Isa found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return Isa::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::generic;
  }();
  return found;
#else
  return Isa::generic;
#endif
}

namespace {

PyCFunction fast(PyObject *(*function)(PyObject *, Arguments, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyObject *name_of_isa(PyObject *, PyObject *) {
  static const char *const names[] = {"generic", "avx2", "avx512"};
  return PyUnicode_FromString(names[static_cast<int>(isa())]);
}

PyMethodDef methods[] = {
    {"isa", name_of_isa, METH_NOARGS, "The instructions in use: avx512, avx2 or generic."},
    {"clip", fast(clip), METH_FASTCALL, "How many values lie beyond bounds; they are replaced if told."},
    {"clip_stack", fast(clip_stack), METH_FASTCALL, "Rows of several tables side by side, clipped; as clip."},
    {"clip_scale", fast(clip_scale), METH_FASTCALL, "Features times their vectors, clipped; as clip."},
    {"clip_cross", fast(clip_cross), METH_FASTCALL, "A cross layer of a vector, clipped; as clip."},
    {"gemm_codes", fast(gemm_codes), METH_FASTCALL, "Floats to codes of 8 bits, and the sum of each row's codes."},
    {"gemm_plan", fast(gemm_plan), METH_FASTCALL, "What does not change from call to call of gemm_rows."},
    {"gemm_rows", fast(gemm_rows), METH_FASTCALL, "Checks and writes rows of an int8 product; None, or verdicts."},
    {"gemm_float_rows", fast(gemm_float_rows), METH_FASTCALL, "How many rows of a float product do not hold."},
    {"linear_rows", fast(linear_rows), METH_FASTCALL, "How many rows of a linear layer's output are suspect."},
    {"linear_whole", fast(linear_whole), METH_FASTCALL, "1 where a linear layer's output is suspect as a whole."},
    {"linear_tiles", fast(linear_tiles), METH_FASTCALL, "A linear layer; how many of its rows are suspect."},
    {"linear_same", fast(linear_same), METH_FASTCALL, "Whether two stretches of memory hold the same bits."},
    {"linear_panel", linear_panel, METH_NOARGS, "Outputs in a panel; up to how many there are no panels; lanes of sums."},
    {"embedding_bag", fast(embedding_bag), METH_FASTCALL, "Adds up bags of rows and checks them; how many do not hold."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", "Kernels on addresses.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace ckptflip

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&ckptflip::definition); }
