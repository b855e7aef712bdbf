// What the sources of the extension share. Kernels take addresses and sizes as integers: the caller, in Python,
// has checked shapes, dtypes and contiguity, and keeps the memory alive.
#pragma once

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstddef>
#include <cstdint>

namespace ckptflip {

enum class Isa { generic, avx2, avx512 };

// The widest instructions that this processor and this build have.
Isa isa();

using Arguments = PyObject *const *;

// An address or a size; sets a Python error where it is no integer.
inline std::int64_t integer(PyObject *value) { return PyLong_AsLongLong(value); }

template <class T> T *address(PyObject *value) { return static_cast<T *>(PyLong_AsVoidPtr(value)); }

// Sets TypeError unless there are `wanted` arguments.
inline bool counted(const char *name, Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", name, wanted, given);
  return false;
}

}  // namespace ckptflip
