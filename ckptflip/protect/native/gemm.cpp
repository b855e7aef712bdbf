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
// So many products of a code and a residue modulo 127 do as well.
constexpr std::int64_t kStretch = 1 << 16;

typedef float Singles __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Counts __attribute__((vector_size(4 * kLanes)));
typedef std::uint8_t Codes __attribute__((vector_size(kLanes)));

// Accumulators are asked for so many ahead of the sum, and the next row while one is written, where both and what
// scales them fit into the nearest cache: a product leaves them in one further off.
constexpr std::int64_t kSoon = 512;
constexpr std::int64_t kAhead = 3072;

enum Verdict : char { kHolds = 0, kFaulty = 1, kWide = 2, kInput = 3 };

// What does not change from call to call; made by `gemm_plan`, kept by the caller as bytes.
struct Plan {
  std::int64_t outputs, inputs;
  std::int64_t modulus;  // of the comparison, or 0
  std::int64_t digits;   // columns of the checksum, or 0 where it lies beside
  const std::int16_t *low, *high;
  const std::int32_t *zeros;  // what inputs of a zero point other than 0 add to each column, or null
  const float *scales, *shifts;
  std::int64_t each;    // whether outputs differ: in their scales, by what is added, or by a least result
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

// Adds numbers; sets bits from 2^25 up for those that, shifted to be positive, are not exact.
struct Sum {
  static constexpr std::uint32_t kShift = kExact;
  std::int64_t total = 0;
  std::uint32_t beyond = 0;

  CKPTFLIP_INLINE void add(const float *row, std::int64_t n) {
    Counts bits[2] = {};
    std::int64_t j = 0;
    while (j + kLanes <= n) {
      Counts sums[2] = {};
      const std::int64_t end = n - j < kFold ? n : j + kFold;
      for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
        __builtin_prefetch(row + j + kSoon);
        __builtin_prefetch(row + j + kSoon + kLanes);
        add(row + j, sums[0], bits[0]);
        add(row + j + kLanes, sums[1], bits[1]);
      }
      if (j + kLanes <= end) {
        add(row + j, sums[0], bits[0]);
        j += kLanes;
      }
      const Counts both = sums[0] + sums[1];
      const Words found = loaded<Words>(&both);
      for (int lane = 0; lane < kLanes; ++lane) total += found[lane];
    }
    bits[0] |= bits[1];
    for (int lane = 0; lane < kLanes; ++lane) beyond |= bits[0][lane];
    for (; j < n; ++j) {
      const std::int32_t number = whole(row[j]);
      total += number;
      beyond |= static_cast<std::uint32_t>(number) + kShift;
    }
  }

  static CKPTFLIP_INLINE void add(const float *row, Counts &sums, Counts &bits) {
    const Words numbers = whole(loaded<Singles>(row));
    const Counts counts = loaded<Counts>(&numbers);
    sums += counts;
    bits |= counts + kShift;
  }

  bool exact() const { return beyond < 2u * kExact; }
};

// The sum that the codes of an input and the sums of the weight's rows foresee: modulo 2^32, and as it is where sums
// are residues, of which a stretch adds up within 32 bits.
CKPTFLIP_INLINE std::int64_t foreseen(const std::uint8_t *x, const std::int16_t *sums, std::int64_t k) {
  std::int64_t total = 0;
  for (std::int64_t begin = 0; begin < k; begin += kStretch) {
    const std::int64_t end = k - begin < kStretch ? k : begin + kStretch;
    std::uint32_t stretch = 0;
    for (std::int64_t p = begin; p < end; ++p)
      stretch += static_cast<std::uint32_t>(static_cast<std::int32_t>(static_cast<std::int16_t>(x[p])) * sums[p]);
    total += static_cast<std::int32_t>(stretch);
  }
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
  std::int64_t off = sum.total;
  if (plan.digits == 0) {
    off -= foreseen(x, plan.low, plan.inputs);
    if (plan.high) off -= foreseen(x, plan.high, plan.inputs) * 65536;
    if (plan.modulus == 0) return static_cast<std::uint32_t>(off) == 0 ? kHolds : kFaulty;
  }
  std::int64_t wanted = 0;
  for (std::int64_t digit = plan.digits - 1; digit >= 0; --digit) {
    const std::int32_t column = whole(row[plan.outputs + digit]);
    if (column <= -kExact || column >= kExact) return kWide;
    wanted = wanted * 256 + column;
  }
  off -= wanted;
  return (plan.modulus ? off % plan.modulus : off) == 0 ? kHolds : kFaulty;
}

// What makes results of accumulators: the same operations in the same order as oneDNN's, so that results have the same
// bits. Fractions, which only a fault can make of an accumulator, are cut off: they do not reach the result. Held by
// value: what is written can then not be taken for a change of it.
template <bool shifted, bool each> struct Scaling {
  const std::int32_t *zeros;
  const float *scales, *shifts;
  float x_scale, scale;

  explicit Scaling(const Plan &plan)
      : zeros(plan.zeros), scales(plan.scales), shifts(plan.shifts), x_scale(plan.x_scale), scale(*plan.scales) {}

  CKPTFLIP_INLINE Singles vector(const float *row, std::int64_t j) const {
    Words numbers = whole(loaded<Singles>(row + j));
    if (shifted) numbers -= loaded<Words>(zeros + j);
    const Singles found = __builtin_convertvector(numbers, Singles) * x_scale;
    return each ? found * loaded<Singles>(scales + j) + loaded<Singles>(shifts + j) : found * scale;
  }

  CKPTFLIP_INLINE float one(const float *row, std::int64_t j) const {
    const float found = static_cast<float>(whole(row[j]) - (shifted ? zeros[j] : 0)) * x_scale;
    return each ? found * scales[j] + shifts[j] : found * scale;
  }
};

template <bool shifted, bool each>
CKPTFLIP_INLINE void written(const Plan &plan, const float *row, std::int64_t ahead, float *out) {
  const Scaling<shifted, each> scaling(plan);
  const std::int64_t n = plan.outputs;
  const float least = plan.lowest;
  const Singles lowest = Singles{} + least;
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    __builtin_prefetch(row + ahead + j);
    Singles numbers = scaling.vector(row, j);
    if (each) numbers = numbers > lowest ? numbers : lowest;
    std::memcpy(out + j, &numbers, sizeof numbers);
  }
  for (; j < n; ++j) {
    const float number = scaling.one(row, j);
    out[j] = !each || number > least ? number : least;
  }
}

// To the nearest code, ties to even: adding and taking away 2^23 rounds a number from 0 to 255.
template <bool shifted, bool each>
CKPTFLIP_INLINE void written(const Plan &plan, const float *row, std::int64_t, std::uint8_t *out) {
  constexpr float kRound = 8388608.0f;
  const Scaling<shifted, each> scaling(plan);
  const std::int64_t n = plan.outputs;
  const float per_step = plan.per_step, zero = plan.code_zero, least = plan.code_lowest;
  const Singles lowest = Singles{} + least, highest = Singles{} + 255.0f;
  std::int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Singles steps = scaling.vector(row, j) * per_step + zero;
    steps = lowest > steps ? lowest : steps;
    steps = highest < steps ? highest : steps;
    const Codes bytes = __builtin_convertvector(whole((steps + kRound) - kRound), Codes);
    std::memcpy(out + j, &bytes, sizeof bytes);
  }
  for (; j < n; ++j) {
    float steps = scaling.one(row, j) * per_step + zero;
    steps = steps < least ? least : steps > 255.0f ? 255.0f : steps;
    out[j] = static_cast<std::uint8_t>((steps + kRound) - kRound);
  }
}

template <class Result>
CKPTFLIP_INLINE void written(const Plan &plan, const float *row, std::int64_t ahead, Result *out) {
  if (plan.zeros)
    written<true, true>(plan, row, ahead, out);
  else if (plan.each)
    written<false, true>(plan, row, ahead, out);
  else
    written<false, false>(plan, row, ahead, out);
}

// The verdicts of all rows, empty where all hold.
CKPTFLIP_INLINE void checked(const Plan &plan, const Call &call, std::vector<char> &verdicts) {
  const std::int64_t step = plan.outputs <= kAhead ? call.stride : 0;
  for (std::int64_t i = 0; i < call.count; ++i) {
    const std::int64_t ahead = i + 1 < call.count ? step : 0;
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
      written(plan, row, ahead, static_cast<float *>(call.out) + i * call.out_stride);
      continue;
    }
    std::uint8_t *out = static_cast<std::uint8_t *>(call.out) + i * call.out_stride;
    written(plan, row, ahead, out);
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
  if (x_zero) zeros.assign(plan.zeros, plan.zeros + plan.outputs);
  for (std::int32_t &zero : zeros) zero *= x_zero;
  plan.zeros = x_zero ? zeros.data() : nullptr;
}

}  // namespace

PyObject *gemm_plan(PyObject *, Arguments given, Py_ssize_t count) {
  if (!counted("gemm_plan", count, 16)) return nullptr;
  Plan plan;
  plan.outputs = integer(given[0]);
  plan.inputs = integer(given[1]);
  plan.modulus = integer(given[2]);
  plan.digits = integer(given[3]);
  plan.low = address<std::int16_t>(given[4]);
  plan.high = address<std::int16_t>(given[5]);
  plan.zeros = address<std::int32_t>(given[6]);
  plan.scales = address<float>(given[7]);
  plan.shifts = address<float>(given[8]);
  plan.each = integer(given[9]);
  plan.narrow = integer(given[10]);
  plan.x_scale = static_cast<float>(PyFloat_AsDouble(given[11]));
  plan.lowest = static_cast<float>(PyFloat_AsDouble(given[12]));
  plan.per_step = static_cast<float>(PyFloat_AsDouble(given[13]));
  plan.code_zero = static_cast<float>(integer(given[14]));
  plan.code_lowest = static_cast<float>(integer(given[15]));
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
