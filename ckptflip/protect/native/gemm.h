// The kernels of products, by name for the module's table; and how one body is compiled for several instruction sets.
#pragma once

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#define CKPTFLIP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#else
#define CKPTFLIP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#endif
#define CKPTFLIP_AVX2 __attribute__((target("avx2,fma")))
#else
#define CKPTFLIP_AVX512
#define CKPTFLIP_AVX2
#endif

#if defined(__GNUC__)
#define CKPTFLIP_INLINE inline __attribute__((always_inline))
#else
#define CKPTFLIP_INLINE inline
#endif

namespace ckptflip {

PyObject *gemm_codes(PyObject *, Arguments, Py_ssize_t);
PyObject *gemm_float_rows(PyObject *, Arguments, Py_ssize_t);
PyObject *gemm_plan(PyObject *, Arguments, Py_ssize_t);
PyObject *gemm_rows(PyObject *, Arguments, Py_ssize_t);

}  // namespace ckptflip
