// Float rows against their checksums: one pass over results and inputs, in double precision; what only widens the bound
// is summed in single precision, and enlarged by more than its own rounding.
// Sums are taken in lanes: any order is within the bound that ckptflip/protect/gemm/floats.py derives.
#include "gemm.h"

#include <cmath>
#include <cstring>

namespace ckptflip {
namespace {

constexpr int kLanes = 8, kChains = 2, kStep = kLanes * kChains;
// More than sums of 2^17 terms in float32 can lose in one lane; longer rows are not sent here.
constexpr double kEnlarge = 1 + 1.0 / 64;

typedef float Singles __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef std::int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct Rows {
  const void *out, *x;
  std::int64_t out_stride, rows, outputs, x_stride, inputs;
  const double *sums;
  const float *sizes;
  double bias_sum, bias_size, relative, result, absolute;
};

inline float value(float word) { return word; }

inline float value(std::uint16_t word) {
  const std::uint32_t bits = static_cast<std::uint32_t>(word) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

template <class Vector, class Word> CKPTFLIP_INLINE Vector loaded(const Word *at) {
  Vector vector;
  std::memcpy(&vector, at, sizeof vector);
  return vector;
}

CKPTFLIP_INLINE Singles values(const float *at) { return loaded<Singles>(at); }

CKPTFLIP_INLINE Singles values(const std::uint16_t *at) {
  const Words bits = __builtin_convertvector(loaded<Halves>(at), Words) << 16;
  return loaded<Singles>(&bits);
}

CKPTFLIP_INLINE Singles magnitude(Singles number) {
  const Words bits = loaded<Words>(&number) & 0x7fffffff;
  return loaded<Singles>(&bits);
}

// As a tree: one addition after the other would take longer than a short row.
template <class Vector> CKPTFLIP_INLINE double total(const Vector *chains) {
  const Doubles v = __builtin_convertvector(chains[0] + chains[1], Doubles);
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// The sum of results, and of their sizes.
template <class Word> CKPTFLIP_INLINE void summed(const Word *out, std::int64_t n, double &sum, double &size) {
  Doubles sums[kChains] = {};
  Singles sizes[kChains] = {};
  std::int64_t j = 0;
  for (; j + kStep <= n; j += kStep)
    for (int chain = 0; chain < kChains; ++chain) {
      const Singles made = values(out + j + chain * kLanes);
      sums[chain] += __builtin_convertvector(made, Doubles);
      sizes[chain] += magnitude(made);
    }
  sum = total(sums);
  size = total(sizes) * kEnlarge;
  for (; j < n; ++j) {
    sum += value(out[j]);
    size += std::fabs(value(out[j]));
  }
}

// Inputs times the sums of the weight, and their sizes times its sizes.
template <class Word>
CKPTFLIP_INLINE void explained(const Word *x, const Rows &a, double &wanted, double &size) {
  Doubles sums[kChains] = {};
  Singles sizes[kChains] = {};
  std::int64_t p = 0;
  for (; p + kStep <= a.inputs; p += kStep)
    for (int chain = 0; chain < kChains; ++chain) {
      const std::int64_t at = p + chain * kLanes;
      const Singles given = values(x + at);
      sums[chain] += __builtin_convertvector(given, Doubles) * loaded<Doubles>(a.sums + at);
      sizes[chain] += magnitude(given) * loaded<Singles>(a.sizes + at);
    }
  wanted = total(sums);
  size = total(sizes) * kEnlarge;
  for (; p < a.inputs; ++p) {
    wanted += value(x[p]) * a.sums[p];
    size += std::fabs(value(x[p])) * a.sizes[p];
  }
}

// Rows that do not hold; a comparison with NaN counts as one.
template <class Word> CKPTFLIP_INLINE std::int64_t failing(const Rows &a) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < a.rows; ++i) {
    double made, made_size, wanted, size;
    summed(static_cast<const Word *>(a.out) + i * a.out_stride, a.outputs, made, made_size);
    explained(static_cast<const Word *>(a.x) + i * a.x_stride, a, wanted, size);
    const double allowed = a.relative * (size + a.bias_size) + a.result * made_size + a.absolute;
    const double residual = std::fabs(made - (wanted + a.bias_sum));
    found += !(residual <= allowed && std::isfinite(made) && std::isfinite(allowed));
  }
  return found;
}

CKPTFLIP_AVX512 std::int64_t failing_avx512(int kind, const Rows &a) {
  return kind ? failing<std::uint16_t>(a) : failing<float>(a);
}

CKPTFLIP_AVX2 std::int64_t failing_avx2(int kind, const Rows &a) {
  return kind ? failing<std::uint16_t>(a) : failing<float>(a);
}

std::int64_t failing_generic(int kind, const Rows &a) {
  return kind ? failing<std::uint16_t>(a) : failing<float>(a);
}

}  // namespace

PyObject *gemm_float_rows(PyObject *, Arguments given, Py_ssize_t count) {
  if (!counted("gemm_float_rows", count, 15)) return nullptr;
  Rows a;
  const int kind = static_cast<int>(integer(given[0]));
  a.out = address<void>(given[1]);
  a.out_stride = integer(given[2]);
  a.rows = integer(given[3]);
  a.outputs = integer(given[4]);
  a.x = address<void>(given[5]);
  a.x_stride = integer(given[6]);
  a.inputs = integer(given[7]);
  a.sums = address<double>(given[8]);
  a.sizes = address<float>(given[9]);
  a.bias_sum = PyFloat_AsDouble(given[10]);
  a.bias_size = PyFloat_AsDouble(given[11]);
  a.relative = PyFloat_AsDouble(given[12]);
  a.result = PyFloat_AsDouble(given[13]);
  a.absolute = PyFloat_AsDouble(given[14]);
  if (PyErr_Occurred()) return nullptr;
  switch (isa()) {
    case Isa::avx512: return PyLong_FromLongLong(failing_avx512(kind, a));
    case Isa::avx2: return PyLong_FromLongLong(failing_avx2(kind, a));
    default: return PyLong_FromLongLong(failing_generic(kind, a));
  }
}

}  // namespace ckptflip
