// A float32 linear layer whose product checks itself: every tile is summed while it is still in registers.
//
// W is packed beforehand in panels of WIDE vectors of outputs: `inputs` rows of WIDE · L weights, one panel after the
// other, zeros where a panel goes beyond the outputs. Up to NARROW outputs W is kept as it is, its rows padded.
#include "intensity.h"

namespace ckptflip {
namespace {

constexpr std::int64_t BLOCK = 64;  // rows of x that stay in the first caches while the panels pass
constexpr std::int64_t NARROW = 4;

struct Output {
  float *data;
  std::int64_t stride;
};

// Σ_l x_l W_l for a tile of R rows by C vectors of outputs, l in order.
template <int L, int R, int C>
INLINE void product(Lanes<L> (&tile)[R][C], const float *x, std::int64_t stride, const float *panel,
                    std::int64_t width, std::int64_t inputs) {
  for (std::int64_t l = 0; l < inputs; ++l, panel += width) {
    Lanes<L> weights[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      load<L>(weights[c], panel + c * L);
      if (R <= 4) __builtin_prefetch(panel + 16 * width + c * L);
    }
#if defined(__GNUC__)
    // Where it knows the address, GCC reads the weights anew for each of two or three rows.
    __asm__("" : "+r"(panel));
#endif
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float factor = x[r * stride + l];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) tile[r][c] += weights[c] * factor;
    }
  }
}

INLINE float flipped(float value, std::int64_t mask) {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  word ^= static_cast<std::uint32_t>(mask);
  std::memcpy(&value, &word, sizeof(word));
  return value;
}

template <int L, int R, int C, int WIDE>
INLINE void tile_of(const Layer &layer, const Rows &x, const Output &y, std::int64_t row, std::int64_t column,
                    Lanes<L> *sums) {
  Lanes<L> tile[R][C] = {}, bias;
  const std::int64_t left = layer.outputs - column;
  product<L, R, C>(tile, x.data + row * x.stride, x.stride, layer.packed + column * layer.inputs, WIDE * L,
                   layer.inputs);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    load<L>(bias, layer.bias + column + c * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) tile[r][c] += bias;
  }
  float *to = y.data + row * y.stride + column;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Lanes<L> sum = tile[r][0];
#pragma GCC unroll 4
    for (int c = 1; c < C; ++c) sum += tile[r][c];
    sums[r] += sum;
#pragma GCC unroll 4
    for (int c = 0; c + 1 < C; ++c) std::memcpy(to + r * y.stride + c * L, &tile[r][c], sizeof(Lanes<L>));
  }
  // Only the last vector of outputs can be a part of one.
  const std::int64_t columns = left - (C - 1) * L;
  to += (C - 1) * L;
  if (columns >= L) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) std::memcpy(to + r * y.stride, &tile[r][C - 1], sizeof(Lanes<L>));
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      std::memcpy(to + r * y.stride, &tile[r][C - 1], static_cast<std::size_t>(columns) * sizeof(float));
  }
}

// R rows by one panel; the last panel may need fewer than its WIDE vectors.
template <int L, int R, int WIDE, int C = WIDE>
INLINE void panel_of(const Layer &layer, const Rows &x, const Output &y, std::int64_t row, std::int64_t column,
                     Lanes<L> *sums) {
  if constexpr (C > 1) {
    if (layer.outputs - column <= (C - 1) * L) {
      panel_of<L, R, WIDE, C - 1>(layer, x, y, row, column, sums);
      return;
    }
  }
  tile_of<L, R, C, WIDE>(layer, x, y, row, column, sums);
}

// The rows, R at most, that are left at the end.
template <int L, int R, int WIDE>
INLINE void rest_of(const Layer &layer, const Rows &x, const Output &y, std::int64_t row, std::int64_t end,
                    std::int64_t column, Lanes<L> *sums) {
  if (end - row == R)
    panel_of<L, R, WIDE>(layer, x, y, row, column, sums);
  else if constexpr (R > 1)
    rest_of<L, R - 1, WIDE>(layer, x, y, row, end, column, sums);
}

// The fault that a test asked for: the value that the tile stores, and sums, has other bits.
template <int L>
INLINE void suffer(const Layer &layer, const Output &y, std::int64_t first, std::int64_t end, Lanes<L> *sums) {
  if (layer.fault_row < first || layer.fault_row >= end) return;
  float &value = y.data[layer.fault_row * y.stride + layer.fault_column];
  const float clean = value;
  value = flipped(value, layer.fault_mask);
  sums[layer.fault_row - first][0] += value - clean;
}

template <int L, int R>
INLINE std::int64_t verdicts(const Layer &layer, const Rows &x, std::int64_t row, const Lanes<L> *sums) {
  Lanes<L> sum[R], magnitude[R];
  dots<L, R>(layer, x, row, sum, magnitude);
  std::int64_t suspects = 0;
  for (int r = 0; r < R; ++r) suspects += suspect<L>(layer, sums[r] - sum[r], magnitude[r]);
  return suspects;
}

template <int L, int R, int WIDE>
INLINE std::int64_t wide(const Layer &layer, const Rows &x, const Output &y) {
  Lanes<L> sums[BLOCK];
  std::int64_t suspects = 0;
  for (std::int64_t first = 0; first < x.count; first += BLOCK) {
    const std::int64_t end = first + BLOCK < x.count ? first + BLOCK : x.count;
    for (auto &sum : sums) sum = Lanes<L>{};
    for (std::int64_t column = 0; column < layer.outputs; column += WIDE * L) {
      std::int64_t row = first;
      for (; row + R <= end; row += R) panel_of<L, R, WIDE>(layer, x, y, row, column, sums + row - first);
      rest_of<L, R - 1, WIDE>(layer, x, y, row, end, column, sums + row - first);
    }
    suffer<L>(layer, y, first, end, sums);
    std::int64_t row = first;
    for (; row + 4 <= end; row += 4) suspects += verdicts<L, 4>(layer, x, row, sums + row - first);
    for (; row < end; ++row) suspects += verdicts<L, 1>(layer, x, row, sums + row - first);
  }
  return suspects;
}

// R rows by a few outputs: dot products, for panels would be empty for the most part.
template <int L, int R>
INLINE std::int64_t narrow_rows(const Layer &layer, const Rows &x, const Output &y, std::int64_t row) {
  const std::int64_t k = layer.inputs, whole = k - k % L, padded = (k + PADDED - 1) / PADDED * PADDED;
  const bool beyond = (R - 1) * x.stride + whole + L <= (x.count - row - 1) * x.stride + k;
  float row_sums[R] = {};
  Lanes<L> sum[R], magnitude[R];
  for (std::int64_t j = 0; j < layer.outputs; ++j) {
    const float *weights = layer.packed + j * padded;
    Lanes<L> dot[R]{}, weight, part;
    for (std::int64_t l = 0; l < whole; l += L) {
      load<L>(weight, weights + l);
      for (int r = 0; r < R; ++r) load<L>(part, x.data + (row + r) * x.stride + l), dot[r] += part * weight;
    }
    if (whole < k) {
      load<L>(weight, weights + whole);
      for (int r = 0; r < R; ++r) {
        load_part<L>(part, x.data + (row + r) * x.stride + whole, k - whole, beyond);
        dot[r] += part * weight;
      }
    }
    for (int r = 0; r < R; ++r) {
      float value = total<L>(dot[r]) + layer.bias[j];
      if (layer.fault_row == row + r && layer.fault_column == j) value = flipped(value, layer.fault_mask);
      y.data[(row + r) * y.stride + j] = value;
      row_sums[r] += value;
    }
  }
  dots<L, R>(layer, x, row, sum, magnitude);
  std::int64_t suspects = 0;
  for (int r = 0; r < R; ++r)
    suspects += suspect(layer, double(row_sums[r]) - total<L>(sum[r]) - layer.bias_sum,
                        total<L>(magnitude[r]) + layer.bias_magnitude);
  return suspects;
}

template <int L> INLINE std::int64_t narrow(const Layer &layer, const Rows &x, const Output &y) {
  std::int64_t row = 0, suspects = 0;
  for (; row + 4 <= x.count; row += 4) suspects += narrow_rows<L, 4>(layer, x, y, row);
  for (; row < x.count; ++row) suspects += narrow_rows<L, 1>(layer, x, y, row);
  return suspects;
}

using Linear = std::int64_t(const Layer &, const Rows &, const Output &);

// Tiles fill the registers: R · WIDE vectors of sums, WIDE of weights and a factor.
constexpr int wide_of(Isa isa) { return isa == Isa::avx512 ? 3 : 2; }
constexpr int rows_of(Isa isa) { return isa == Isa::avx512 ? 8 : isa == Isa::avx2 ? 6 : 4; }

#define VERSION(name, isa)                                                                                     \
  std::int64_t name(const Layer &layer, const Rows &x, const Output &y) {                                      \
    return layer.outputs <= NARROW ? narrow<lanes(isa)>(layer, x, y)                                           \
                                   : wide<lanes(isa), rows_of(isa), wide_of(isa)>(layer, x, y);                \
  }

VERSION(linear_generic, Isa::generic)
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) VERSION(linear_avx2, Isa::avx2)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) VERSION(linear_avx512, Isa::avx512)
constexpr Linear *LINEAR[] = {linear_generic, linear_avx2, linear_avx512};
#else
constexpr Linear *LINEAR[] = {linear_generic, linear_generic, linear_generic};
#endif

}  // namespace

PyObject *linear_panel(PyObject *, PyObject *) {
  return Py_BuildValue("iii", wide_of(isa()) * lanes(isa()), int(NARROW), lanes(isa()));
}

PyObject *linear_tiles(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("linear_tiles", given, 6)) return nullptr;
  const auto *layer = address<const Layer>(arguments[0]);
  const Rows x{address<const float>(arguments[2]), integer(arguments[3]), integer(arguments[1])};
  const Output y{address<float>(arguments[4]), integer(arguments[5])};
  if (PyErr_Occurred()) return nullptr;
  std::int64_t suspects;
  Py_BEGIN_ALLOW_THREADS
  suspects = LINEAR[static_cast<int>(isa())](*layer, x, y);
  Py_END_ALLOW_THREADS
  return PyLong_FromLongLong(suspects);
}

}  // namespace ckptflip
