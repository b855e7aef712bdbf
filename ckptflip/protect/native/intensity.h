// What the checks of float32 linear layers share: y = x Wᵀ + b against checksums of W and b.
//
// Sums run in LANES lanes, in an order that is the same with every instruction set; the bound that the caller hands
// over (`scale`) is derived for it. With S = Σ_j W_j and A = Σ_j |W_j| over the outputs j, a row, or a whole layer, is
// suspect unless |Σ y - (x · S + Σ b)| <= scale · magnitude + floor, with magnitude = |x| · A + Σ |b|; and also where the
// magnitude is not finite, or so large that clean sums may overflow. The caller looks at suspects in double precision.
#pragma once

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

constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef float Half __attribute__((vector_size(LANES / 2 * sizeof(float))));
typedef float Quarter __attribute__((vector_size(LANES / 4 * sizeof(float))));
typedef std::uint32_t Words __attribute__((vector_size(LANES * sizeof(float))));
constexpr double LARGEST = 3.4028234663852886e38;

// What the caller keeps for a layer; `native.py` packs it. Vectors are padded with zeros to a multiple of LANES.
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

INLINE void load(Lanes &into, const float *from) { std::memcpy(&into, from, sizeof(Lanes)); }

INLINE void absolute(Lanes &into, const Lanes &of) {
  Words words;
  std::memcpy(&words, &of, sizeof(Lanes));
  words &= 0x7fffffffu;
  std::memcpy(&into, &words, sizeof(Lanes));
}

// The first `count` lanes; reads further ones where `beyond` says that the memory is there, and makes them zero.
INLINE void load_part(Lanes &into, const float *from, std::int64_t count, bool beyond) {
  if (beyond) {
    Words words, kept;
    for (int i = 0; i < LANES; ++i) kept[i] = i < count ? 0xffffffffu : 0u;
    std::memcpy(&words, from, sizeof(Lanes));
    words &= kept;
    std::memcpy(&into, &words, sizeof(Lanes));
  } else {
    float whole[LANES] = {};
    std::memcpy(whole, from, static_cast<std::size_t>(count) * sizeof(float));
    load(into, whole);
  }
}

// The lanes' sum, by halves.
INLINE float total(const Lanes &of) {
  Half low, high;
  std::memcpy(&low, &of, sizeof(Half));
  std::memcpy(&high, reinterpret_cast<const char *>(&of) + sizeof(Half), sizeof(Half));
  low += high;
  Quarter first, second;
  std::memcpy(&first, &low, sizeof(Quarter));
  std::memcpy(&second, reinterpret_cast<const char *>(&low) + sizeof(Quarter), sizeof(Quarter));
  first += second;
  return (first[0] + first[2]) + (first[1] + first[3]);
}

// The lanes of x · S and of |x| · A for R rows at once, so that the checksums are loaded once for all.
template <int R>
INLINE void dots(const Layer &layer, const Rows &x, std::int64_t row, Lanes (&s)[R], Lanes (&m)[R]) {
  Lanes part, size, weight, weight_size;
  for (int r = 0; r < R; ++r) s[r] = m[r] = Lanes{};
  const std::int64_t k = layer.inputs, whole = k - k % LANES;
  const float *from = x.data + row * x.stride;
  for (std::int64_t l = 0; l < whole; l += LANES) {
    load(weight, layer.sums + l);
    load(weight_size, layer.magnitudes + l);
    for (int r = 0; r < R; ++r) {
      load(part, from + r * x.stride + l);
      absolute(size, part);
      s[r] += part * weight;
      m[r] += size * weight_size;
    }
  }
  if (whole < k) {
    const bool beyond = (R - 1) * x.stride + whole + LANES <= (x.count - row - 1) * x.stride + k;
    load(weight, layer.sums + whole);
    load(weight_size, layer.magnitudes + whole);
    for (int r = 0; r < R; ++r) {
      load_part(part, from + r * x.stride + whole, k - whole, beyond);
      absolute(size, part);
      s[r] += part * weight;
      m[r] += size * weight_size;
    }
  }
}

INLINE bool suspect(const Layer &layer, double residual, double magnitude, double rows = 1) {
  return !(magnitude <= LARGEST / 4 && std::fabs(residual) <= layer.scale * magnitude + layer.floor * rows);
}

INLINE bool suspect(const Layer &layer, const Lanes &residual, const Lanes &magnitude) {
  return suspect(layer, total(residual) - layer.bias_sum, total(magnitude) + layer.bias_magnitude);
}

}  // namespace ckptflip
