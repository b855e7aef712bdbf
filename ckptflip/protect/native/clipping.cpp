// Values beyond bounds are found and replaced in one pass that writes nothing where all is well.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define CKPTFLIP_CLIP_X86
#endif

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
inline bool inside(const float *values, std::size_t size, float low, float high) {
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
  std::size_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m512 first = _mm512_loadu_ps(values + i), second = _mm512_loadu_ps(values + i + 16);
    below |= _mm512_cmp_ps_mask(first, least, _CMP_NGE_UQ) | _mm512_cmp_ps_mask(second, least, _CMP_NGE_UQ);
    above |= _mm512_cmp_ps_mask(first, most, _CMP_NLE_UQ) | _mm512_cmp_ps_mask(second, most, _CMP_NLE_UQ);
  }
  return !(below | above) && inside(values + i, size - i, low, high);
}
#endif

template <class Inside>
inline __attribute__((always_inline)) std::int64_t clip_all(float *values, std::size_t count, const Limits &limits,
                                                            Task task, Inside is_inside) {
  const float low = limits.low, high = limits.high;
  std::int64_t changed = 0;
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    float *block = values + begin;
    const std::size_t size = count - begin < kBlock ? count - begin : kBlock;
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

#ifdef CKPTFLIP_CLIP_X86
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) std::int64_t clip_avx512(
    float *values, std::size_t count, const Limits &limits, Task task) {
  return clip_all(values, count, limits, task, inside_avx512);
}
__attribute__((target("avx2"))) std::int64_t clip_avx2(float *values, std::size_t count, const Limits &limits,
                                                       Task task) {
  return clip_all(values, count, limits, task, inside);
}
#endif

std::int64_t clip_any(float *values, std::size_t count, const Limits &limits, Task task) {
#ifdef CKPTFLIP_CLIP_X86
  if (isa() == Isa::avx512) return clip_avx512(values, count, limits, task);
  if (isa() == Isa::avx2) return clip_avx2(values, count, limits, task);
#endif
  return clip_all(values, count, limits, task, inside);
}

}  // namespace

// clip(address, count, low, high, what becomes of values too low, too high, NaN, task): float32 values.
PyObject *clip(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("clip", given, 8)) return nullptr;
  float *values = address<float>(arguments[0]);
  const std::int64_t count = integer(arguments[1]);
  float numbers[5];
  for (int i = 0; i < 5; ++i) numbers[i] = static_cast<float>(PyFloat_AsDouble(arguments[2 + i]));
  const std::int64_t task = integer(arguments[7]);
  if (PyErr_Occurred()) return nullptr;
  if (count < 0 || task < 0 || task > 2) {
    PyErr_SetString(PyExc_ValueError, "clip takes a count of 0 or more and a task from 0 to 2");
    return nullptr;
  }
  const Limits limits{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
  return PyLong_FromLongLong(clip_any(values, static_cast<std::size_t>(count), limits, static_cast<Task>(task)));
}

}  // namespace ckptflip
