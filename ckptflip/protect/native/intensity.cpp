// One pass over what a linear layer was given and what it gave: a verdict for each row, or one for the layer.
#include "intensity.h"

namespace ckptflip {
namespace {

// The lanes of Σ y over a row, from four chains of them.
template <int L> INLINE void row_sum(Lanes<L> &sum, const float *y, std::int64_t n) {
  Lanes<L> a{}, b{}, c{}, d{}, part;
  std::int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L) {
    load<L>(part, y + j), a += part;
    load<L>(part, y + j + L), b += part;
    load<L>(part, y + j + 2 * L), c += part;
    load<L>(part, y + j + 3 * L), d += part;
  }
  for (; j + L <= n; j += L) load<L>(part, y + j), a += part;
  if (j < n) load_part<L>(part, y + j, n - j, false), b += part;
  sum = (a + b) + (c + d);
}

// The lanes of Σ y - x · S, and of the magnitude.
template <int L, int R>
INLINE void residuals(const Layer &layer, const Rows &x, const Rows &y, std::int64_t row, Lanes<L> (&residual)[R],
                      Lanes<L> (&magnitude)[R]) {
  Lanes<L> sum;
  dots<L, R>(layer, x, row, residual, magnitude);
  for (int r = 0; r < R; ++r) {
    row_sum<L>(sum, y.data + (row + r) * y.stride, layer.outputs);
    residual[r] = sum - residual[r];
  }
}

template <int L, int R>
INLINE std::int64_t some_rows(const Layer &layer, const Rows &x, const Rows &y, std::int64_t row) {
  Lanes<L> residual[R], magnitude[R];
  residuals<L, R>(layer, x, y, row, residual, magnitude);
  std::int64_t suspects = 0;
  for (int r = 0; r < R; ++r) suspects += suspect<L>(layer, residual[r], magnitude[r]);
  return suspects;
}

template <int L> INLINE std::int64_t each_row(const Layer &layer, const Rows &x, const Rows &y) {
  std::int64_t row = 0, suspects = 0;
  for (; row + 4 <= x.count; row += 4) suspects += some_rows<L, 4>(layer, x, y, row);
  for (; row < x.count; ++row) suspects += some_rows<L, 1>(layer, x, y, row);
  return suspects;
}

// One verdict: rows are added by fours, and what comes of it in double.
template <int L> INLINE std::int64_t whole(const Layer &layer, const Rows &x, const Rows &y) {
  double all = 0, size = 0;
  std::int64_t row = 0;
  for (; row + 4 <= x.count; row += 4) {
    Lanes<L> residual[4], magnitude[4];
    residuals<L, 4>(layer, x, y, row, residual, magnitude);
    all += total<L>((residual[0] + residual[1]) + (residual[2] + residual[3]));
    size += total<L>((magnitude[0] + magnitude[1]) + (magnitude[2] + magnitude[3]));
  }
  for (; row < x.count; ++row) {
    Lanes<L> residual[1], magnitude[1];
    residuals<L, 1>(layer, x, y, row, residual, magnitude);
    all += total<L>(residual[0]), size += total<L>(magnitude[0]);
  }
  const double rows = double(x.count);
  return suspect(layer, all - rows * layer.bias_sum, size + rows * layer.bias_magnitude, rows);
}

using Check = std::int64_t(const Layer &, const Rows &, const Rows &);

#define VERSION(name, body, isa) \
  std::int64_t name(const Layer &layer, const Rows &x, const Rows &y) { return body<lanes(isa)>(layer, x, y); }

VERSION(each_row_generic, each_row, Isa::generic)
VERSION(whole_generic, whole, Isa::generic)
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) VERSION(each_row_avx2, each_row, Isa::avx2)
__attribute__((target("avx2,fma"))) VERSION(whole_avx2, whole, Isa::avx2)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) VERSION(each_row_avx512, each_row, Isa::avx512)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))) VERSION(whole_avx512, whole, Isa::avx512)
constexpr Check *EACH_ROW[] = {each_row_generic, each_row_avx2, each_row_avx512};
constexpr Check *WHOLE[] = {whole_generic, whole_avx2, whole_avx512};
#else
constexpr Check *EACH_ROW[] = {each_row_generic, each_row_generic, each_row_generic};
constexpr Check *WHOLE[] = {whole_generic, whole_generic, whole_generic};
#endif

PyObject *checked(const char *name, Arguments arguments, Py_ssize_t given, Check *check) {
  if (!counted(name, given, 6)) return nullptr;
  const auto *layer = address<const Layer>(arguments[0]);
  const std::int64_t rows = integer(arguments[1]);
  const Rows x{address<const float>(arguments[2]), integer(arguments[3]), rows};
  const Rows y{address<const float>(arguments[4]), integer(arguments[5]), rows};
  if (PyErr_Occurred()) return nullptr;
  std::int64_t suspects;
  Py_BEGIN_ALLOW_THREADS
  suspects = check(*layer, x, y);
  Py_END_ALLOW_THREADS
  return PyLong_FromLongLong(suspects);
}

}  // namespace

PyObject *linear_rows(PyObject *, Arguments arguments, Py_ssize_t given) {
  return checked("linear_rows", arguments, given, EACH_ROW[static_cast<int>(isa())]);
}

PyObject *linear_whole(PyObject *, Arguments arguments, Py_ssize_t given) {
  return checked("linear_whole", arguments, given, WHOLE[static_cast<int>(isa())]);
}

// Whether two stretches of memory hold the same bits: NaN is like itself.
PyObject *linear_same(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("linear_same", given, 3)) return nullptr;
  const void *one = address<const void>(arguments[0]), *other = address<const void>(arguments[1]);
  const std::int64_t bytes = integer(arguments[2]);
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(std::memcmp(one, other, static_cast<std::size_t>(bytes)) == 0);
}

}  // namespace ckptflip
