// The loops over bags and look-ups. Each source that includes this has defined, for its instructions:
//   KERNEL, INLINE                  the attributes of functions, and of those that become part of their callers
//   Checks<kind>                    the checks of a bag's rows: `add`, `altered` by a fault, `found`
//   Sums<kind, vectors>             vectors · lanes columns of a bag, added up twice: `add`, `finish`, `same`, `store`
//   lanes, most_vectors             columns in a vector; vectors in a `Sums`
#include "embedding_bag.h"

namespace ckptflip::bags {
namespace {

INLINE void fetch(const Table &table, const Call &call, std::int64_t at) {
  const auto id = static_cast<std::uint64_t>(integer_at(call.ids, call.id_size, std::min(at, call.count - 1)));
  // An id beyond the table is refused when its turn comes; fetching from anywhere is harmless.
  const auto row = reinterpret_cast<std::uintptr_t>(call.rows) + id * static_cast<std::uint64_t>(table.width);
  // Every line of the row, once. A branch on where a row begins costs more than a fetch of what is there already:
  // where there is no further line, the ids stand in for it.
  const auto width = static_cast<std::uintptr_t>(table.width), lines = (width + 63) / 64;
  for (std::uintptr_t line = 0; line < lines; ++line) prefetch(row + 64 * line);
  const auto further = std::uintptr_t{0} - (((row & 63) + width - 1) / 64 == lines);
  const auto ids = reinterpret_cast<std::uintptr_t>(call.ids);
  prefetch(ids + ((row + width - 1 - ids) & further));
}

// What one bag's look-ups have in common.
struct Bag {
  std::int64_t number, begin, end;
  std::int64_t rows = 0;  // that were not skipped
  Differs differs{};
  bool same = true;  // whether both additions gave the same
};

// What the sums of a bag are multiplied by.
INLINE float factor_of(const Call &call, std::int64_t rows) {
  return call.mean && rows ? 1.0f / static_cast<float>(rows) : 1.0f;
}

// Adds up some columns of a bag; the first columns' turn checks ids and rows too. False: an id beyond the table.
// With `dim`, that is what the table has: for usual ones, whose loops then have no branches.
template <std::int64_t kind, std::int64_t dim, int vectors, bool first, bool altered>
KERNEL bool pass(const Table &given, const Call &call, std::int64_t from, Bag &bag, float *out) {
  const std::int64_t column = first ? 0 : dim == 2 * most_columns ? most_columns : from;
  Table table = given;
  if constexpr (dim > 0) {
    table = layout(kind, dim);
    table.rows = given.rows;
  }
  const std::int64_t end = bag.end, padding = call.padding;
  const Fault *const fault_here = altered && call.fault->bag == bag.number ? call.fault : nullptr;
  const float *const weights = call.weights;
  std::int64_t rows = 0;
  Checks<kind> checks;
  Sums<kind, vectors> sums(table.dim - column);
  for (std::int64_t i = bag.begin; i < end; ++i) {
    const auto id = static_cast<std::uint64_t>(integer_at(call.ids, call.id_size, i));
    if (first) {
      fetch(table, call, i + ahead);
      if (id >= static_cast<std::uint64_t>(table.rows)) return false;
    }
    if (static_cast<std::int64_t>(id) == padding) continue;
    const std::uint8_t *row = call.rows + id * static_cast<std::uint64_t>(table.width);
    const Fault *const fault = altered && fault_here && i - bag.begin == fault_here->step ? fault_here : nullptr;
    if (first) {
      ++rows;
      checks.add(table, row, id);
      checks.altered(fault);
    }
    sums.add(table, row, column, weights ? weights + i : nullptr, fault);
  }
  if (first) {
    bag.rows = rows;
    bag.differs = checks.found();
  }
  const volatile std::int64_t rows_again = bag.rows;
  float factor = factor_of(call, bag.rows);
  alter(factor, fault_here, Part::mean);
  sums.finish(factor, factor_of(call, rows_again));
  bag.same &= sums.same();
  sums.store(out + column);
  return true;
}

template <std::int64_t kind, std::int64_t dim, int vectors, bool altered>
KERNEL bool some_columns(const Table &table, const Call &call, std::int64_t column, Bag &bag, float *out) {
  if constexpr (vectors > 1 && (dim == 0 || dim <= (vectors - 1) * lanes))
    if (table.dim - column <= (vectors - 1) * lanes)
      return some_columns<kind, dim, vectors - 1, altered>(table, call, column, bag, out);
  return column ? pass<kind, dim, vectors, false, altered>(table, call, column, bag, out)
                : pass<kind, dim, vectors, true, altered>(table, call, 0, bag, out);
}

template <std::int64_t kind, std::int64_t dim, bool altered = false>
KERNEL std::int64_t bags_of(const Table &table, const Call &call, std::int64_t first, std::int64_t last) {
  std::int64_t unsound = 0;
  const std::int64_t begin = bag_begin(call, first);
  for (std::int64_t i = begin; i >= 0 && i < std::min(begin + ahead, call.count); ++i) fetch(table, call, i);
  for (std::int64_t b = first; b < last; ++b) {
    Bag bag{b, bag_begin(call, b), bag_begin(call, b + 1)};
    if (bag.begin < 0 || bag.begin > bag.end || bag.end > call.count) return -1 - b;
    for (std::int64_t column = 0; column < table.dim; column += most_vectors * lanes)
      if (!some_columns<kind, dim, most_vectors, altered>(table, call, column, bag, call.out + b * table.dim)) return -1 - b;
    call.verdict[b] = verdict_of(bag.differs, bag.same);
    unsound += call.verdict[b] != sound;
  }
  return unsound;
}

template <std::int64_t kind> Run of_dim(std::int64_t dim, bool altered) {
  if (altered) return bags_of<kind, 0, true>;
  switch (dim) {
    case 16: return bags_of<kind, 16>;
    case 32: return bags_of<kind, 32>;
    case 64: return bags_of<kind, 64>;
    case 128: return bags_of<kind, 128>;
    case 256: return bags_of<kind, 256>;
    default: return bags_of<kind, 0>;
  }
}

Run run_of(const Table &table, bool altered) {
  switch (table.kind) {
    case int2: return of_dim<int2>(table.dim, altered);
    case int4: return of_dim<int4>(table.dim, altered);
    case int8: return of_dim<int8>(table.dim, altered);
    case bf16: return of_dim<bf16>(table.dim, altered);
    case fp32: return of_dim<fp32>(table.dim, altered);
    default: return nullptr;
  }
}

}  // namespace
}  // namespace ckptflip::bags
