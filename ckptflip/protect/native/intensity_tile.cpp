// A float32 linear layer whose product checks itself: every tile is summed while it is still in registers.
//
// W is packed beforehand in panels of WIDE vectors of outputs: `inputs` rows of WIDE · LANES weights, one panel after
// the other, zeros where a panel goes beyond the outputs. Up to NARROW outputs W is kept as it is, its rows padded.
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
template <int R, int C>
INLINE void product(Lanes (&tile)[R][C], const float *x, std::int64_t stride, const float *panel, std::int64_t width,
                    std::int64_t inputs) {
  for (std::int64_t l = 0; l < inputs; ++l) {
    Lanes weights[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      load(weights[c], panel + l * width + c * LANES);
      if (R <= 4) __builtin_prefetch(panel + (l + 16) * width + c * LANES);
    }
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

template <int R, int C, int WIDE>
INLINE void tile_of(const Layer &layer, const Rows &x, const Output &y, std::int64_t row, std::int64_t column,
                    Lanes *sums) {
  Lanes tile[R][C] = {}, bias;
  const std::int64_t left = layer.outputs - column;
  product<R, C>(tile, x.data + row * x.stride, x.stride, layer.packed + column * layer.inputs, WIDE * LANES,
                layer.inputs);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    load(bias, layer.bias + column + c * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) tile[r][c] += bias;
  }
  float *to = y.data + row * y.stride + column;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Lanes sum = tile[r][0];
#pragma GCC unroll 4
    for (int c = 1; c < C; ++c) sum += tile[r][c];
    sums[r] += sum;
#pragma GCC unroll 4
    for (int c = 0; c + 1 < C; ++c) std::memcpy(to + r * y.stride + c * LANES, &tile[r][c], sizeof(Lanes));
  }
  // Only the last vector of outputs can be a part of one.
  const std::int64_t columns = left - (C - 1) * LANES;
  to += (C - 1) * LANES;
  if (columns >= LANES) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) std::memcpy(to + r * y.stride, &tile[r][C - 1], sizeof(Lanes));
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      std::memcpy(to + r * y.stride, &tile[r][C - 1], static_cast<std::size_t>(columns) * sizeof(float));
  }
}

// R rows by one panel, of which the last may need fewer vectors.
template <int R, int WIDE>
INLINE void panel_of(const Layer &layer, const Rows &x, const Output &y, std::int64_t row, std::int64_t column,
                     Lanes *sums) {
  const std::int64_t left = layer.outputs - column;
  if (WIDE > 2 && left > 2 * LANES)
    tile_of<R, WIDE, WIDE>(layer, x, y, row, column, sums);
  else if (WIDE > 1 && left > LANES)
    tile_of<R, (WIDE > 1 ? 2 : 1), WIDE>(layer, x, y, row, column, sums);
  else
    tile_of<R, 1, WIDE>(layer, x, y, row, column, sums);
}

// The rows, R at most, that are left at the end.
template <int R, int WIDE>
INLINE void rest_of(const Layer &layer, const Rows &x, const Output &y, std::int64_t row, std::int64_t end,
                    std::int64_t column, Lanes *sums) {
  if (end - row == R)
    panel_of<R, WIDE>(layer, x, y, row, column, sums);
  else if constexpr (R > 1)
    rest_of<R - 1, WIDE>(layer, x, y, row, end, column, sums);
}

// The fault that a test asked for: the value that the tile stores, and sums, has other bits.
INLINE void suffer(const Layer &layer, const Output &y, std::int64_t first, std::int64_t end, Lanes *sums) {
  if (layer.fault_row < first || layer.fault_row >= end) return;
  float &value = y.data[layer.fault_row * y.stride + layer.fault_column];
  const float clean = value;
  value = flipped(value, layer.fault_mask);
  sums[layer.fault_row - first][0] += value - clean;
}

template <int R>
INLINE std::int64_t verdicts(const Layer &layer, const Rows &x, std::int64_t row, const Lanes *sums) {
  Lanes sum[R], magnitude[R];
  dots<R>(layer, x, row, sum, magnitude);
  std::int64_t suspects = 0;
  for (int r = 0; r < R; ++r) suspects += suspect(layer, sums[r] - sum[r], magnitude[r]);
  return suspects;
}

template <int R, int WIDE>
INLINE std::int64_t wide(const Layer &layer, const Rows &x, const Output &y) {
  Lanes sums[BLOCK];
  std::int64_t suspects = 0;
  for (std::int64_t first = 0; first < x.count; first += BLOCK) {
    const std::int64_t end = first + BLOCK < x.count ? first + BLOCK : x.count;
    for (auto &sum : sums) sum = Lanes{};
    for (std::int64_t column = 0; column < layer.outputs; column += WIDE * LANES) {
      std::int64_t row = first;
      for (; row + R <= end; row += R) panel_of<R, WIDE>(layer, x, y, row, column, sums + row - first);
      rest_of<R - 1, WIDE>(layer, x, y, row, end, column, sums + row - first);
    }
    suffer(layer, y, first, end, sums);
    std::int64_t row = first;
    for (; row + 4 <= end; row += 4) suspects += verdicts<4>(layer, x, row, sums + row - first);
    for (; row < end; ++row) suspects += verdicts<1>(layer, x, row, sums + row - first);
  }
  return suspects;
}

// R rows by a few outputs: dot products, for panels would be empty for the most part.
template <int R>
INLINE std::int64_t narrow_rows(const Layer &layer, const Rows &x, const Output &y, std::int64_t row) {
  const std::int64_t k = layer.inputs, whole = k - k % LANES, padded = whole < k ? whole + LANES : whole;
  const bool beyond = (R - 1) * x.stride + padded <= (x.count - row - 1) * x.stride + k;
  float row_sums[R] = {};
  Lanes sum[R], magnitude[R];
  for (std::int64_t j = 0; j < layer.outputs; ++j) {
    const float *weights = layer.packed + j * padded;
    Lanes dot[R]{}, weight, part;
    for (std::int64_t l = 0; l < whole; l += LANES) {
      load(weight, weights + l);
      for (int r = 0; r < R; ++r) load(part, x.data + (row + r) * x.stride + l), dot[r] += part * weight;
    }
    if (whole < k) {
      load(weight, weights + whole);
      for (int r = 0; r < R; ++r) {
        load_part(part, x.data + (row + r) * x.stride + whole, k - whole, beyond);
        dot[r] += part * weight;
      }
    }
    for (int r = 0; r < R; ++r) {
      float value = total(dot[r]) + layer.bias[j];
      if (layer.fault_row == row + r && layer.fault_column == j) value = flipped(value, layer.fault_mask);
      y.data[(row + r) * y.stride + j] = value;
      row_sums[r] += value;
    }
  }
  dots<R>(layer, x, row, sum, magnitude);
  std::int64_t suspects = 0;
  for (int r = 0; r < R; ++r)
    suspects += suspect(layer, double(row_sums[r]) - total(sum[r]) - layer.bias_sum,
                        total(magnitude[r]) + layer.bias_magnitude);
  return suspects;
}

INLINE std::int64_t narrow(const Layer &layer, const Rows &x, const Output &y) {
  std::int64_t row = 0, suspects = 0;
  for (; row + 4 <= x.count; row += 4) suspects += narrow_rows<4>(layer, x, y, row);
  for (; row < x.count; ++row) suspects += narrow_rows<1>(layer, x, y, row);
  return suspects;
}

using Linear = std::int64_t(const Layer &, const Rows &, const Output &);

// Tiles fill the registers: R · WIDE · LANES sums and a panel's row.
#define VERSION(name, R, WIDE)                                                                  \
  std::int64_t name(const Layer &layer, const Rows &x, const Output &y) {                       \
    return layer.outputs <= NARROW ? narrow(layer, x, y) : wide<R, WIDE>(layer, x, y);          \
  }

VERSION(linear_generic, 2, 1)
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) VERSION(linear_avx2, 6, 1)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) VERSION(linear_avx512, 8, 3)
constexpr Linear *LINEAR[] = {linear_generic, linear_avx2, linear_avx512};
#else
constexpr Linear *LINEAR[] = {linear_generic, linear_generic, linear_generic};
#endif

}  // namespace

PyObject *linear_panel(PyObject *, PyObject *) {
  return Py_BuildValue("ii", isa() == Isa::avx512 ? 3 * LANES : LANES, int(NARROW));
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
