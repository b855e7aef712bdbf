// Rows of an int8 product against their checksums, then scaled, shifted and narrowed: one call for each product.
// A row is checked first, while it is in the nearest cache, and written only if it holds.
#include "gemm.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace ckptflip {
namespace {

constexpr int kLanes = 16;
// Integers of this size and above are rounded in float32.
constexpr std::int32_t kExact = 1 << 24;
// So many vectors of numbers below 2^25 sum up within 32 bits.
constexpr std::int64_t kFold = 64 * kLanes;

typedef float Singles __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Counts __attribute__((vector_size(4 * kLanes)));
typedef std::uint8_t Codes __attribute__((vector_size(kLanes)));

enum Scheme : std::int64_t { kBeside = 0, kDigits = 1, kModulo = 2 };
enum Verdict : char { kHolds = 0, kFaulty = 1, kWide = 2, kInput = 3 };

// What does not change from call to call; made by `gemm_plan`, kept by the caller as bytes.
struct Plan {
  std::int64_t outputs, inputs, scheme, digits;
  const std::int16_t *low, *high;
  const std::int32_t *zeros;  // what inputs of a zero point other than 0 add to each column, or null
  const float *scales, *shifts;
  std::int64_t narrow;  // whether results are codes
  float x_scale, lowest, per_step, code_zero, code_lowest;
};

struct Call {
  float *rows;
  std::int64_t stride, count;
  const std::uint8_t *x;
  std::int64_t x_stride;
  void *out;
  std::int64_t out_stride;
  const std::int32_t *given;
  std::int32_t *made;
};

template <class Vector, class Number> CKPTFLIP_INLINE Vector loaded(const Number *at) {
  Vector vector;
  std::memcpy(&vector, at, sizeof vector);
  return vector;
}

CKPTFLIP_INLINE Words whole(Singles numbers) { return __builtin_convertvector(numbers, Words); }

// What is no number, or none of 32 bits, becomes the smallest integer: far from exact.
inline std::int32_t whole(float number) {
  return number > -2147483648.0f && number < 2147483648.0f ? static_cast<std::int32_t>(number) : INT32_MIN;
}

// Adds numbers shifted to be positive; sets bits from 2^25 up for those that are not exact.
struct Sum {
  std::int64_t total = 0;
  std::uint32_t beyond = 0;

  CKPTFLIP_INLINE void add(const float *row, std::int64_t n) {
    Counts bits = {};
    std::int64_t j = 0;
    while (j + kLanes <= n) {
      Counts sums = {};
      const std::int64_t end = n - j < kFold ? n - kLanes : j + kFold - kLanes;
      for (; j <= end; j += kLanes) {
        const Words numbers = whole(loaded<Singles>(row + j));
        const Counts shifted = loaded<Counts>(&numbers) + static_cast<std::uint32_t>(kExact);
        sums += shifted;
        bits |= shifted;
      }
      for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) beyond |= bits[lane];
    for (; j < n; ++j) {
      const std::uint32_t shifted = static_cast<std::uint32_t>(whole(row[j])) + static_cast<std::uint32_t>(kExact);
      total += shifted;
      beyond |= shifted;
    }
    total -= n * kExact;
  }

  bool exact() const { return beyond < 2u * kExact; }
};

// The sum that the codes of an input and the sums of the weight's rows foresee, modulo 2^32.
CKPTFLIP_INLINE std::uint32_t foreseen(const std::uint8_t *x, const std::int16_t *sums, std::int64_t k) {
  std::uint32_t total = 0;
  for (std::int64_t p = 0; p < k; ++p)
    total += static_cast<std::uint32_t>(static_cast<std::int32_t>(static_cast<std::int16_t>(x[p])) * sums[p]);
  return total;
}

CKPTFLIP_INLINE std::int32_t summed(const std::uint8_t *codes, std::int64_t n) {
  std::int32_t total = 0;
  for (std::int64_t p = 0; p < n; ++p) total += codes[p];
  return total;
}

CKPTFLIP_INLINE Verdict judged(const Plan &plan, const float *row, const std::uint8_t *x) {
  Sum sum;
  sum.add(row, plan.outputs);
  if (!sum.exact()) return kWide;
  if (plan.scheme == kBeside) {
    std::uint32_t wanted = foreseen(x, plan.low, plan.inputs);
    if (plan.high) wanted += foreseen(x, plan.high, plan.inputs) << 16;
    return static_cast<std::uint32_t>(sum.total) == wanted ? kHolds : kFaulty;
  }
  std::int64_t wanted = 0;
  for (std::int64_t digit = plan.digits - 1; digit >= 0; --digit) {
    const std::int32_t column = whole(row[plan.outputs + digit]);
    if (column <= -kExact || column >= kExact) return kWide;
    wanted = wanted * 256 + column;
  }
  const std::int64_t off = sum.total - wanted;
  return (plan.scheme == kModulo ? off % 127 : off) == 0 ? kHolds : kFaulty;
}

// The same operations in the same order as oneDNN's, so that results have the same bits. Fractions, which only a fault
// can make of an accumulator, are cut off: they do not reach the result.
CKPTFLIP_INLINE Singles scaled(const Plan &plan, const float *row, std::int64_t j) {
  Words numbers = whole(loaded<Singles>(row + j));
  if (plan.zeros) numbers -= loaded<Words>(plan.zeros + j);
  return __builtin_convertvector(numbers, Singles) * plan.x_scale * loaded<Singles>(plan.scales + j) +
         loaded<Singles>(plan.shifts + j);
}

inline float scaled_one(const Plan &plan, const float *row, std::int64_t j) {
  const std::int32_t number = whole(row[j]) - (plan.zeros ? plan.zeros[j] : 0);
  return static_cast<float>(number) * plan.x_scale * plan.scales[j] + plan.shifts[j];
}

CKPTFLIP_INLINE void written(const Plan &plan, const float *row, float *out) {
  std::int64_t j = 0;
  for (; j + kLanes <= plan.outputs; j += kLanes) {
    Singles numbers = scaled(plan, row, j);
    numbers = numbers < plan.lowest ? Singles{} + plan.lowest : numbers;
    std::memcpy(out + j, &numbers, sizeof numbers);
  }
  for (; j < plan.outputs; ++j) {
    const float number = scaled_one(plan, row, j);
    out[j] = number < plan.lowest ? plan.lowest : number;
  }
}

// To the nearest code, ties to even: adding and taking away 2^23 rounds a number from 0 to 255.
CKPTFLIP_INLINE void written(const Plan &plan, const float *row, std::uint8_t *out) {
  constexpr float kRound = 8388608.0f;
  std::int64_t j = 0;
  for (; j + kLanes <= plan.outputs; j += kLanes) {
    Singles steps = scaled(plan, row, j) * plan.per_step + plan.code_zero;
    steps = steps < plan.code_lowest ? Singles{} + plan.code_lowest : steps;
    steps = steps > 255.0f ? Singles{} + 255.0f : steps;
    const Codes bytes = __builtin_convertvector(whole((steps + kRound) - kRound), Codes);
    std::memcpy(out + j, &bytes, sizeof bytes);
  }
  for (; j < plan.outputs; ++j) {
    float steps = scaled_one(plan, row, j) * plan.per_step + plan.code_zero;
    steps = steps < plan.code_lowest ? plan.code_lowest : steps > 255.0f ? 255.0f : steps;
    out[j] = static_cast<std::uint8_t>((steps + kRound) - kRound);
  }
}

// The verdicts of all rows, empty where all hold.
CKPTFLIP_INLINE void checked(const Plan &plan, const Call &call, std::vector<char> &verdicts) {
  for (std::int64_t i = 0; i < call.count; ++i) {
    const float *row = call.rows + i * call.stride;
    const std::uint8_t *x = call.x + i * call.x_stride;
    Verdict verdict = judged(plan, row, x);
    if (call.given && verdict == kHolds && summed(x, plan.inputs) != call.given[i]) verdict = kInput;
    if (verdict != kHolds) {
      if (verdicts.empty()) verdicts.resize(static_cast<std::size_t>(call.count), kHolds);
      verdicts[static_cast<std::size_t>(i)] = verdict;
      continue;
    }
    if (!plan.narrow) {
      written(plan, row, static_cast<float *>(call.out) + i * call.out_stride);
      continue;
    }
    std::uint8_t *out = static_cast<std::uint8_t *>(call.out) + i * call.out_stride;
    written(plan, row, out);
    if (call.made) call.made[i] = summed(out, plan.outputs);
  }
}

CKPTFLIP_AVX512 void checked_avx512(const Plan &plan, const Call &call, std::vector<char> &verdicts) {
  checked(plan, call, verdicts);
}

CKPTFLIP_AVX2 void checked_avx2(const Plan &plan, const Call &call, std::vector<char> &verdicts) {
  checked(plan, call, verdicts);
}

void checked_generic(const Plan &plan, const Call &call, std::vector<char> &verdicts) {
  checked(plan, call, verdicts);
}

// Where each call has a scale and a zero point of its own; the plan's zeros are then those of a zero point of 1.
void of_call(Plan &plan, float x_scale, std::int32_t x_zero, std::vector<std::int32_t> &zeros) {
  plan.x_scale = x_scale;
  if (!plan.zeros) return;
  if (x_zero)
    for (std::int64_t j = 0; j < plan.outputs; ++j) zeros.push_back(x_zero * plan.zeros[j]);
  plan.zeros = x_zero ? zeros.data() : nullptr;
}

}  // namespace

PyObject *gemm_plan(PyObject *, Arguments given, Py_ssize_t count) {
  if (!counted("gemm_plan", count, 15)) return nullptr;
  Plan plan;
  plan.outputs = integer(given[0]);
  plan.inputs = integer(given[1]);
  plan.scheme = integer(given[2]);
  plan.digits = integer(given[3]);
  plan.low = address<std::int16_t>(given[4]);
  plan.high = address<std::int16_t>(given[5]);
  plan.zeros = address<std::int32_t>(given[6]);
  plan.scales = address<float>(given[7]);
  plan.shifts = address<float>(given[8]);
  plan.narrow = integer(given[9]);
  plan.x_scale = static_cast<float>(PyFloat_AsDouble(given[10]));
  plan.lowest = static_cast<float>(PyFloat_AsDouble(given[11]));
  plan.per_step = static_cast<float>(PyFloat_AsDouble(given[12]));
  plan.code_zero = static_cast<float>(integer(given[13]));
  plan.code_lowest = static_cast<float>(integer(given[14]));
  if (PyErr_Occurred()) return nullptr;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char *>(&plan), sizeof plan);
}

PyObject *gemm_rows(PyObject *, Arguments given, Py_ssize_t count) {
  if (!counted("gemm_rows", count, 12)) return nullptr;
  Plan plan;
  if (!PyBytes_Check(given[0]) || PyBytes_Size(given[0]) != static_cast<Py_ssize_t>(sizeof plan)) {
    PyErr_SetString(PyExc_TypeError, "the first argument of gemm_rows is what gemm_plan gave");
    return nullptr;
  }
  std::memcpy(&plan, PyBytes_AsString(given[0]), sizeof plan);
  Call call;
  call.rows = address<float>(given[1]);
  call.stride = integer(given[2]);
  call.count = integer(given[3]);
  call.x = address<std::uint8_t>(given[4]);
  call.x_stride = integer(given[5]);
  call.out = address<void>(given[6]);
  call.out_stride = integer(given[7]);
  call.given = address<std::int32_t>(given[8]);
  call.made = address<std::int32_t>(given[9]);
  const float x_scale = static_cast<float>(PyFloat_AsDouble(given[10]));
  const std::int32_t x_zero = static_cast<std::int32_t>(integer(given[11]));
  if (PyErr_Occurred()) return nullptr;
  std::vector<std::int32_t> zeros;
  if (x_scale > 0) of_call(plan, x_scale, x_zero, zeros);
  std::vector<char> verdicts;
  switch (isa()) {
    case Isa::avx512: checked_avx512(plan, call, verdicts); break;
    case Isa::avx2: checked_avx2(plan, call, verdicts); break;
    default: checked_generic(plan, call, verdicts);
  }
  if (verdicts.empty()) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(verdicts.data(), static_cast<Py_ssize_t>(verdicts.size()));
}

}  // namespace ckptflip
