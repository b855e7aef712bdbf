// What the checks of float32 linear layers share: y = x Wᵀ + b against checksums of W and b.
//
// Sums run in as many lanes as the instruction set has; the bound that the caller hands over (`scale`) is derived for
// that. With S = Σ_j W_j and A = Σ_j |W_j| over the outputs j, a row, or a whole layer, is
// suspect unless |Σ y - (x · S + Σ b)| <= scale · magnitude + floor, with magnitude = |x| · A + Σ |b|; and also where the
// magnitude is not finite, or so large that clean sums may overflow. The caller looks at suspects in double precision.
#pragma once

// Products and sums are fused where the processor can: the bound holds with and without. Elsewhere in the extension
// they are not, so this stands before anything is defined.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "kernels.h"

#include <cmath>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace ckptflip {

PyObject *linear_rows(PyObject *, Arguments, Py_ssize_t);
PyObject *linear_whole(PyObject *, Arguments, Py_ssize_t);
PyObject *linear_tiles(PyObject *, Arguments, Py_ssize_t);
PyObject *linear_same(PyObject *, Arguments, Py_ssize_t);
PyObject *linear_panel(PyObject *, PyObject *);

// Vectors that the caller keeps are padded with zeros to a multiple of this, the lanes of the widest instructions.
constexpr int PADDED = 16;

// L floats in a register, and their bits.
template <int L> struct Vector {
  typedef float floats __attribute__((vector_size(L * sizeof(float))));
  typedef std::uint32_t words __attribute__((vector_size(L * sizeof(float))));
};
template <int L> using Lanes = typename Vector<L>::floats;
template <int L> using Words = typename Vector<L>::words;

// The lanes that each instruction set is given.
constexpr int lanes(Isa isa) { return isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4; }

constexpr double LARGEST = 3.4028234663852886e38;

// What the caller keeps for a layer; `native.py` packs it. Vectors are padded (PADDED).
struct Layer {
  std::int64_t inputs, outputs;
  const float *sums, *magnitudes;  // S and A
  double bias_sum, bias_magnitude;
  double scale, floor;
  const float *packed, *bias;  // of the product that checks itself, alone
  // A fault that this product is to suffer, for tests and studies; none where the row is negative.
  std::int64_t fault_row, fault_column, fault_mask;
};

// Rows of floats, the last of them the last that may be read.
struct Rows {
  const float *data;
  std::int64_t stride, count;
};

template <int L> INLINE void load(Lanes<L> &into, const float *from) { std::memcpy(&into, from, sizeof(into)); }

template <int L> INLINE void absolute(Lanes<L> &into, const Lanes<L> &of) {
  Words<L> words;
  std::memcpy(&words, &of, sizeof(words));
  words &= 0x7fffffffu;
  std::memcpy(&into, &words, sizeof(into));
}

// The first `count` lanes; reads further ones where `beyond` says that the memory is there, and makes them zero.
template <int L> INLINE void load_part(Lanes<L> &into, const float *from, std::int64_t count, bool beyond) {
  if (beyond) {
    Words<L> words, kept;
    for (int i = 0; i < L; ++i) kept[i] = i < count ? 0xffffffffu : 0u;
    std::memcpy(&words, from, sizeof(words));
    words &= kept;
    std::memcpy(&into, &words, sizeof(into));
  } else {
    float whole[L] = {};
    std::memcpy(whole, from, static_cast<std::size_t>(count) * sizeof(float));
    load<L>(into, whole);
  }
}

// The lanes' sum, by halves.
template <int L> INLINE float total(const Lanes<L> &of) {
  if constexpr (L == 4) {
    return (of[0] + of[2]) + (of[1] + of[3]);
  } else {
    Lanes<L / 2> low, high;
    std::memcpy(&low, &of, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char *>(&of) + sizeof(low), sizeof(high));
    low += high;
    return total<L / 2>(low);
  }
}

// The lanes of x · S and of |x| · A for R rows at once, so that the checksums are loaded once for all.
template <int L, int R>
INLINE void dots(const Layer &layer, const Rows &x, std::int64_t row, Lanes<L> (&s)[R], Lanes<L> (&m)[R]) {
  Lanes<L> part, size, weight, weight_size;
  for (int r = 0; r < R; ++r) s[r] = m[r] = Lanes<L>{};
  const std::int64_t k = layer.inputs, whole = k - k % L;
  const float *from = x.data + row * x.stride;
  for (std::int64_t l = 0; l < whole; l += L) {
    load<L>(weight, layer.sums + l);
    load<L>(weight_size, layer.magnitudes + l);
    for (int r = 0; r < R; ++r) {
      load<L>(part, from + r * x.stride + l);
      absolute<L>(size, part);
      s[r] += part * weight;
      m[r] += size * weight_size;
    }
  }
  if (whole < k) {
    const bool beyond = (R - 1) * x.stride + whole + L <= (x.count - row - 1) * x.stride + k;
    load<L>(weight, layer.sums + whole);
    load<L>(weight_size, layer.magnitudes + whole);
    for (int r = 0; r < R; ++r) {
      load_part<L>(part, from + r * x.stride + whole, k - whole, beyond);
      absolute<L>(size, part);
      s[r] += part * weight;
      m[r] += size * weight_size;
    }
  }
}

INLINE bool suspect(const Layer &layer, double residual, double magnitude, double rows = 1) {
  return !(magnitude <= LARGEST / 4 && std::fabs(residual) <= layer.scale * magnitude + layer.floor * rows);
}

template <int L> INLINE bool suspect(const Layer &layer, const Lanes<L> &residual, const Lanes<L> &magnitude) {
  return suspect(layer, total<L>(residual) - layer.bias_sum, total<L>(magnitude) + layer.bias_magnitude);
}

}  // namespace ckptflip
