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

Run generic_run(const Table &table, bool altered) { return run_of(table, altered); }

namespace {

Run fastest(const Table &table, bool altered) {
  switch (isa()) {
    case Isa::avx512: return avx512_run(table, altered);
    case Isa::avx2: return avx2_run(table, altered);
    default: return generic_run(table, altered);
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
// out, verdict, threads, fault): see `Table`, `Call` and `Fault`; None for no fault. How many verdicts are not sound, or -1 - b as `Run` has it. `isa`
// is the most that may be used: 0 generic, 1 AVX2, 2 all there is.
PyObject *embedding_bag(PyObject *, Arguments arguments, Py_ssize_t given) {
  if (!counted("embedding_bag", given, 18)) return nullptr;
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
  bags::Fault fault;
  if (arguments[17] != Py_None) {
    if (PyBytes_AsStringAndSize(arguments[17], &described, &size)) return nullptr;
    if (size != sizeof fault) {
      PyErr_SetString(PyExc_ValueError, "embedding_bag: a fault is described by 5 integers of 64 bits");
      return nullptr;
    }
    std::memcpy(&fault, described, sizeof fault);
  }
  bags::Call call{};
  call.fault = arguments[17] == Py_None ? nullptr : &fault;
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
  if (!PyByteArray_Check(arguments[15]) || PyByteArray_Size(arguments[15]) < call.bags) {
    PyErr_SetString(PyExc_TypeError, "embedding_bag: verdicts are a bytearray with a byte for each bag");
    return nullptr;
  }
  call.verdict = reinterpret_cast<std::uint8_t *>(PyByteArray_AsString(arguments[15]));
  const std::int64_t threads = integer(arguments[16]);
  if (PyErr_Occurred()) return nullptr;
  const bool altered = call.fault != nullptr;
  const bags::Run run = which == 0 ? bags::generic_run(*table, altered)
                        : which == 1 && isa() >= Isa::avx2 ? bags::avx2_run(*table, altered)
                                                           : bags::fastest(*table, altered);
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
