// Embedding bags over protected tables, checked as they are looked up: the function that Python calls, the split
// between threads, and the kernels for processors without AVX2.
#include "embedding_bag.h"

#include <thread>
#include <vector>

#include "kernels.h"

#define KERNEL
#define INLINE inline

namespace ckptflip::bags {
namespace {

// Rounded once where the processor can do it, as ATen does; else twice, which stays within the stated bound.
INLINE float multiply_add(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE float half_value(std::uint16_t word) { return half(word); }

}  // namespace
}  // namespace ckptflip::bags

#include "embedding_bag_lanes.h"

namespace ckptflip {
namespace bags {

Run generic_run(const Table &table) { return run_of(table); }

namespace {

Run fastest(const Table &table) {
  switch (isa()) {
    case Isa::avx512: return avx512_run(table);
    case Isa::avx2: return avx2_run(table);
    default: return generic_run(table);
  }
}

std::int64_t on_threads(Run run, const Table &table, const Call &call, std::int64_t threads) {
  if (call.bags && bag_begin(call, 0) != 0) return -1;  // ids before the first bag would not be looked at
  if (threads <= 1 || call.bags < 2 * threads) return run(table, call, 0, call.bags);
  std::vector<std::int64_t> found(static_cast<std::size_t>(threads));
  std::vector<std::thread> workers;
  const auto work = [&](std::int64_t t) {
    found[static_cast<std::size_t>(t)] = run(table, call, call.bags * t / threads, call.bags * (t + 1) / threads);
  };
  std::int64_t started = 1;
  try {
    for (; started < threads; ++started) workers.emplace_back(work, started);
  } catch (const std::exception &) {  // no more threads are to be had: their share is done here
    for (std::int64_t t = started; t < threads; ++t) work(t);
  }
  work(0);
  for (auto &worker : workers) worker.join();
  std::int64_t unsound = 0;
  for (const auto each : found) {
    if (each < 0) return each;  // of the first bag that was refused
    unsound += each;
  }
  return unsound;
}

}  // namespace
}  // namespace bags

// embedding_bag(isa, table, rows, ids, id_size, count, offsets, offset_size, listed, length, bags, weights, mean, padding,
// out, verdict, threads): see `Table` and `Call`. How many verdicts are not sound, or -1 - b as `Run` has it. `isa`
// is the most that may be used: 0 generic, 1 AVX2, 2 all there is.
PyObject *embedding_bag(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("embedding_bag", given, 17)) return nullptr;
  const std::int64_t which = integer(arguments[0]);
  char *described;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(arguments[1], &described, &size)) return nullptr;
  if (size != sizeof(bags::Table)) {
    PyErr_SetString(PyExc_ValueError, "embedding_bag: a table is described by 15 integers of 64 bits");
    return nullptr;
  }
  bags::Table description;
  std::memcpy(&description, described, sizeof description);
  const bags::Table *const table = &description;
  bags::Call call{};
  call.rows = address<const std::uint8_t>(arguments[2]);
  call.ids = address<const void>(arguments[3]);
  call.id_size = integer(arguments[4]);
  call.count = integer(arguments[5]);
  call.offsets = address<const void>(arguments[6]);
  call.offset_size = integer(arguments[7]);
  call.listed = integer(arguments[8]);
  call.length = integer(arguments[9]);
  call.bags = integer(arguments[10]);
  call.weights = address<const float>(arguments[11]);
  call.mean = integer(arguments[12]);
  call.padding = integer(arguments[13]);
  call.out = address<float>(arguments[14]);
  call.verdict = address<std::uint8_t>(arguments[15]);
  const std::int64_t threads = integer(arguments[16]);
  if (PyErr_Occurred()) return nullptr;
  const bags::Run run = which == 0 ? bags::generic_run(*table)
                        : which == 1 && isa() >= Isa::avx2 ? bags::avx2_run(*table)
                                                           : bags::fastest(*table);
  if (!run) {
    PyErr_SetString(PyExc_ValueError, "embedding_bag: a table of an unknown kind");
    return nullptr;
  }
  std::int64_t found;
  Py_BEGIN_ALLOW_THREADS
  found = bags::on_threads(run, *table, call, threads);
  Py_END_ALLOW_THREADS
  return PyLong_FromLongLong(found);
}

}  // namespace ckptflip
