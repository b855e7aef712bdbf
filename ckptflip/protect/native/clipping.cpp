// Values beyond bounds are found and replaced in one pass that writes nothing where all is well; what some layers do
// is done in the same pass: ReLUs, rows of several tables side by side, cross layers.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CKPTFLIP_CLIP_X86
#endif

#define INLINE inline __attribute__((always_inline))

namespace ckptflip {
namespace {

struct Limits {
  float low, high, below, above, nan;
};

// What is done besides counting: nothing, values beyond the bounds are replaced, and then all negative ones by 0.
enum class Task { count, replace, rectify };

// A block stays in the first cache while it is looked at again.
constexpr std::size_t kBlock = 1024;

// Whether all values lie within bounds; comparisons with NaN are false. The loop has no branch, so that it is
// vectorised.
INLINE bool inside(const float *values, std::size_t size, float low, float high) {
  std::uint32_t all = ~0u;
  for (std::size_t i = 0; i < size; ++i) all &= -static_cast<std::uint32_t>((values[i] >= low) & (values[i] <= high));
  return all != 0;
}

#ifdef CKPTFLIP_CLIP_X86
// Two comparisons for 16 values, and nothing else; compilers add moves between kinds of masks.
__attribute__((target("avx512f"))) inline bool inside_avx512(const float *values, std::size_t size, float low,
                                                             float high) {
  const __m512 least = _mm512_set1_ps(low), most = _mm512_set1_ps(high);
  __mmask16 below = 0, above = 0;
  const std::size_t whole = size - size % 32;
  for (std::size_t i = whole; i > 0;) {
    i -= 32;
    const __m512 first = _mm512_loadu_ps(values + i), second = _mm512_loadu_ps(values + i + 16);
    below |= _mm512_cmp_ps_mask(first, least, _CMP_NGE_UQ) | _mm512_cmp_ps_mask(second, least, _CMP_NGE_UQ);
    above |= _mm512_cmp_ps_mask(first, most, _CMP_NLE_UQ) | _mm512_cmp_ps_mask(second, most, _CMP_NLE_UQ);
  }
  return !(below | above) && inside(values + whole, size - whole, low, high);
}
#endif

template <class Inside>
INLINE std::int64_t clip_all(float *values, std::size_t count, const Limits &limits, Task task, Inside is_inside) {
  const float low = limits.low, high = limits.high;
  std::int64_t changed = 0;
  // From the end: what was written last is still in the caches, and what is read next by others will be.
  for (std::size_t end = count, size; end > 0; end -= size) {
    size = end % kBlock ? end % kBlock : kBlock;
    float *block = values + end - size;
    if (!is_inside(block, size, low, high)) {
      for (std::size_t i = 0; i < size; ++i) {
        const float value = block[i];
        if (value >= low && value <= high) continue;
        ++changed;
        if (task != Task::count) block[i] = value < low ? limits.below : value > high ? limits.above : limits.nan;
      }
    }
    if (task == Task::rectify) {
      for (std::size_t i = 0; i < size; ++i) block[i] = block[i] > 0.0f ? block[i] : 0.0f;
    }
  }
  return changed;
}

// Rows of `columns` values from each part, side by side.
struct Stack {
  const std::vector<const float *> &parts;
  std::size_t columns;

  std::size_t width() const { return parts.size() * columns; }

  INLINE void write(float *to, std::size_t row) const {
    for (const float *part : parts) {
      const float *from = part + row * columns;
      std::size_t left = columns;
      __builtin_prefetch(from + 4 * columns);
      // A call of memcpy costs more than a short row.
      for (; left >= 16; left -= 16, from += 16, to += 16) std::memcpy(to, from, 16 * sizeof(float));
      for (; left > 0; --left) *to++ = *from++;
    }
  }
};

// A factor for each feature of a row, times the feature's own columns.
struct Scale {
  const float *factors, *weight;
  std::size_t features, columns;

  std::size_t width() const { return features * columns; }

  INLINE void write(float *to, std::size_t row) const {
    const float *from = weight;
    for (std::size_t f = 0; f < features; ++f, from += columns, to += columns) {
      const float factor = factors[row * features + f];
      for (std::size_t i = 0; i < columns; ++i) to[i] = factor * from[i];
    }
  }
};

// start · factor + bias + crossed, rounded step by step, as PyTorch does; a factor for each row.
struct Cross {
  const float *start, *factors, *bias, *crossed;
  std::size_t columns;

  std::size_t width() const { return columns; }

  INLINE void write(float *to, std::size_t row) const {
    const float factor = factors[row], *from = start + row * columns, *more = crossed + row * columns;
    for (std::size_t i = 0; i < columns; ++i) to[i] = from[i] * factor + bias[i] + more[i];
  }
};

// Rows that are written and then clipped, some at a time, while they are in the first cache.
template <class Rows, class Inside>
INLINE std::int64_t make_all(const Rows &rows, std::size_t count, float *out, const Limits &limits, Inside is_inside) {
  const std::size_t width = rows.width(), together = std::max<std::size_t>(1, 4 * kBlock / std::max<std::size_t>(1, width));
  std::int64_t changed = 0;
  for (std::size_t begin = 0; begin < count; begin += together) {
    const std::size_t end = std::min(count, begin + together);
    for (std::size_t row = begin; row < end; ++row) rows.write(out + row * width, row);
    changed += clip_all(out + begin * width, (end - begin) * width, limits, Task::replace, is_inside);
  }
  return changed;
}

#define VERSION(target, name, inside)                                                                            \
  target std::int64_t clip_##name(float *values, std::size_t count, const Limits &limits, Task task) {           \
    return clip_all(values, count, limits, task, inside);                                                        \
  }                                                                                                              \
  template <class Rows>                                                                                          \
  target std::int64_t make_##name(const Rows &rows, std::size_t count, float *out, const Limits &limits) {       \
    return make_all(rows, count, out, limits, inside);                                                           \
  }

VERSION(, generic, inside)
#ifdef CKPTFLIP_CLIP_X86
VERSION(__attribute__((target("avx2"))), avx2, inside)
VERSION(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))), avx512, inside_avx512)
#endif

std::int64_t clip_any(float *values, std::size_t count, const Limits &limits, Task task) {
#ifdef CKPTFLIP_CLIP_X86
  if (isa() == Isa::avx512) return clip_avx512(values, count, limits, task);
  if (isa() == Isa::avx2) return clip_avx2(values, count, limits, task);
#endif
  return clip_generic(values, count, limits, task);
}

template <class Rows> std::int64_t make_any(const Rows &rows, std::size_t count, float *out, const Limits &limits) {
#ifdef CKPTFLIP_CLIP_X86
  if (isa() == Isa::avx512) return make_avx512(rows, count, out, limits);
  if (isa() == Isa::avx2) return make_avx2(rows, count, out, limits);
#endif
  return make_generic(rows, count, out, limits);
}

// low, high, and what becomes of values too low, too high, NaN.
Limits limits_of(Arguments numbers) {
  const auto number = [&](int i) { return static_cast<float>(PyFloat_AsDouble(numbers[i])); };
  return {number(0), number(1), number(2), number(3), number(4)};
}

// A size; sets a Python error where it is negative.
std::size_t size_of(PyObject *value) {
  const std::int64_t size = integer(value);
  if (size < 0 && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a size is 0 or more");
  return static_cast<std::size_t>(size);
}

}  // namespace

// clip(address, count, limits as in limits_of, task): float32 values.
PyObject *clip(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("clip", given, 8)) return nullptr;
  float *values = address<float>(arguments[0]);
  const std::size_t count = size_of(arguments[1]);
  const Limits limits = limits_of(arguments + 2);
  const std::int64_t task = integer(arguments[7]);
  if (PyErr_Occurred()) return nullptr;
  if (task < 0 || task > 2) {
    PyErr_SetString(PyExc_ValueError, "clip takes a task from 0 to 2");
    return nullptr;
  }
  return PyLong_FromLongLong(clip_any(values, count, limits, static_cast<Task>(task)));
}

// clip_stack(tuple of addresses, rows, columns, out, limits): float32 (rows, columns) each, out (rows, parts, columns).
PyObject *clip_stack(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("clip_stack", given, 9)) return nullptr;
  const Py_ssize_t count = PyTuple_Size(arguments[0]);
  std::vector<const float *> parts;
  for (Py_ssize_t i = 0; i < count; ++i) parts.push_back(address<const float>(PyTuple_GetItem(arguments[0], i)));
  const std::size_t rows = size_of(arguments[1]), columns = size_of(arguments[2]);
  float *out = address<float>(arguments[3]);
  const Limits limits = limits_of(arguments + 4);
  if (PyErr_Occurred()) return nullptr;
  return PyLong_FromLongLong(make_any(Stack{parts, columns}, rows, out, limits));
}

// clip_scale(factors, weight, rows, features, columns, out, limits): float32 (rows, features), (features, columns).
PyObject *clip_scale(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("clip_scale", given, 11)) return nullptr;
  const float *factors = address<const float>(arguments[0]), *weight = address<const float>(arguments[1]);
  const std::size_t rows = size_of(arguments[2]), features = size_of(arguments[3]), columns = size_of(arguments[4]);
  float *out = address<float>(arguments[5]);
  const Limits limits = limits_of(arguments + 6);
  if (PyErr_Occurred()) return nullptr;
  return PyLong_FromLongLong(make_any(Scale{factors, weight, features, columns}, rows, out, limits));
}

// clip_cross(start, factors, bias, crossed, rows, columns, out, limits): float32 (rows, columns), (rows), (columns).
PyObject *clip_cross(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("clip_cross", given, 12)) return nullptr;
  const float *from[4];
  for (int i = 0; i < 4; ++i) from[i] = address<const float>(arguments[i]);
  const std::size_t rows = size_of(arguments[4]), columns = size_of(arguments[5]);
  float *out = address<float>(arguments[6]);
  const Limits limits = limits_of(arguments + 7);
  if (PyErr_Occurred()) return nullptr;
  return PyLong_FromLongLong(make_any(Cross{from[0], from[1], from[2], from[3], columns}, rows, out, limits));
}

}  // namespace ckptflip
