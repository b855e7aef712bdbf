// Floats to codes of 8 bits, with the sum of each row's codes on the way.
#include "gemm.h"

#include <cstring>

namespace ckptflip {
namespace {

constexpr int kLanes = 16;

typedef float Singles __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint8_t Codes __attribute__((vector_size(kLanes)));

struct Floats {
  const float *x;
  std::int64_t rows, length;
  float per_step, zero;
  std::uint8_t *codes;
  std::int32_t *sums;
};

// Adding and taking away 2^23 rounds a number from 0 to 255, ties to even; NaN becomes 0.
constexpr float kRound = 8388608.0f;

CKPTFLIP_INLINE void coded(const Floats &a) {
  for (std::int64_t i = 0; i < a.rows; ++i) {
    const float *x = a.x + i * a.length;
    std::uint8_t *codes = a.codes + i * a.length;
    Words sums = {};
    std::int32_t total = 0;
    std::int64_t p = 0;
    for (; p + kLanes <= a.length; p += kLanes) {
      Singles steps;
      std::memcpy(&steps, x + p, sizeof steps);
      steps = steps * a.per_step + a.zero;
      steps = steps > 0.0f ? steps : Singles{};
      steps = steps > 255.0f ? Singles{} + 255.0f : steps;
      const Words whole = __builtin_convertvector((steps + kRound) - kRound, Words);
      const Codes bytes = __builtin_convertvector(whole, Codes);
      std::memcpy(codes + p, &bytes, sizeof bytes);
      sums += whole;
    }
    for (; p < a.length; ++p) {
      float steps = x[p] * a.per_step + a.zero;
      steps = steps > 0.0f ? steps : 0.0f;
      steps = steps > 255.0f ? 255.0f : steps;
      codes[p] = static_cast<std::uint8_t>((steps + kRound) - kRound);
      total += codes[p];
    }
    if (!a.sums) continue;
    for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
    a.sums[i] = total;
  }
}

CKPTFLIP_AVX512 void coded_avx512(const Floats &a) { coded(a); }

CKPTFLIP_AVX2 void coded_avx2(const Floats &a) { coded(a); }

void coded_generic(const Floats &a) { coded(a); }

}  // namespace

PyObject *gemm_codes(PyObject *, Arguments given, Py_ssize_t count) {
  if (!counted("gemm_codes", count, 7)) return nullptr;
  Floats a;
  a.x = address<float>(given[0]);
  a.rows = integer(given[1]);
  a.length = integer(given[2]);
  a.per_step = static_cast<float>(PyFloat_AsDouble(given[3]));
  a.zero = static_cast<float>(integer(given[4]));
  a.codes = address<std::uint8_t>(given[5]);
  a.sums = address<std::int32_t>(given[6]);
  if (PyErr_Occurred()) return nullptr;
  switch (isa()) {
    case Isa::avx512: coded_avx512(a); break;
    case Isa::avx2: coded_avx2(a); break;
    default: coded_generic(a);
  }
  Py_RETURN_NONE;
}

}  // namespace ckptflip
