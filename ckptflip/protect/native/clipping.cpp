// Values beyond bounds are found and replaced in one pass that writes nothing where all is well.
#include "kernels.h"

namespace ckptflip {
namespace {

struct Limits {
  float low, high, below, above, nan;
};

// What is done besides counting: nothing, values beyond the bounds are replaced, and then all negative ones by 0.
enum class Task { count, replace, rectify };

// A block stays in the first cache while it is looked at again.
constexpr std::size_t kBlock = 1024;

// The loops that run on clean data have no branch, so that they are vectorised.
inline __attribute__((always_inline)) std::int64_t clip_all(float *values, std::size_t count,
                                                            const Limits &limits, Task task) {
  const float low = limits.low, high = limits.high;
  std::int64_t changed = 0;
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    float *block = values + begin;
    const std::size_t size = count - begin < kBlock ? count - begin : kBlock;
    std::uint32_t inside = ~0u;
    // Comparisons with NaN are false.
    for (std::size_t i = 0; i < size; ++i) inside &= -static_cast<std::uint32_t>((block[i] >= low) & (block[i] <= high));
    if (!inside) {
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

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) std::int64_t clip_avx512(
    float *values, std::size_t count, const Limits &limits, Task task) {
  return clip_all(values, count, limits, task);
}
__attribute__((target("avx2"))) std::int64_t clip_avx2(float *values, std::size_t count, const Limits &limits,
                                                       Task task) {
  return clip_all(values, count, limits, task);
}
#endif

std::int64_t clip_any(float *values, std::size_t count, const Limits &limits, Task task) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() == Isa::avx512) return clip_avx512(values, count, limits, task);
  if (isa() == Isa::avx2) return clip_avx2(values, count, limits, task);
#endif
  return clip_all(values, count, limits, task);
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
