// What the kernels of embedding_bag*.cpp share: a protected table, a call, and the part of a row's check that
// needs no vectors. What the checks find, and why: docs/design/abft-embeddings.md.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ckptflip::bags {

// How the values of a row are stored: codes of so many bits, or floats.
enum Kind : std::int64_t { int2 = 2, int4 = 4, int8 = 8, bf16 = 16, fp32 = 32 };

// Rows are fetched into the cache so many look-ups before they are read.
constexpr std::int64_t ahead = 16;
// Columns that are added up in registers at a time, twice each. A wider row is gone through again, from the cache:
// measured, that leaves more of the waiting for memory to overlap than more registers at once.
constexpr std::int64_t most_columns = 64;

// As Python packs it, in 64-bit integers. A row is: values, check bytes, scale, bias. The check bytes are the
// digits of the codes' sum, zeros, and a tag of 2 bytes; those of floats, which have no scale and bias, are a
// sum of 4 bytes.
struct Table {
  std::int64_t kind, rows, width, dim;
  std::int64_t check, tag;  // where the check bytes and the tag begin
  std::int64_t digits;
  std::int64_t weight[8];  // of the digits
};

// What a fault in the arithmetic of a bag alters: the sum or its twin, after a look-up was added; the value that is
// added; the scale or bias that it is added with; the factor of a mean; the check of codes' sums or of tags.
enum class Part : std::int64_t { sum, twin, value, scale, bias, mean, plain, weighted };

// One bit that is altered in a register, to see what the checks say of it. As Python packs it.
struct Fault {
  std::int64_t bag, step;  // of the bag's look-ups
  Part part;
  std::int64_t place, bit;  // which 32-bit word of the part: of values and sums a column, else a lane
};

struct Call {
  const std::uint8_t *rows;
  const void *ids;
  std::int64_t id_size, count;
  const void *offsets;  // null: every bag has `length` ids
  std::int64_t offset_size, listed, length, bags;
  const float *weights;  // one for each id, or null
  std::int64_t mean;
  std::int64_t padding;  // an id that is skipped, or -1
  float *out;
  std::uint8_t *verdict;  // one for each bag
  const Fault *fault;     // or null
};

enum Verdict : std::uint8_t { sound = 0, sum_differs = 1, tag_differs = 2, arithmetic_differs = 4 };

// The multipliers of the tag. That a flip of any one or two bits of scale, bias and row number changes it is tested
// for all of them.
constexpr std::uint64_t mix_numbers = 0x9E3779B97F4A7C15u, mix_row = 0xD1B54A32D192ED03u;

// The layout of rows of `dim` columns, for dimensions whose digits fit into 16 bits: as `Row` in rows.py has it.
constexpr Table layout(std::int64_t kind, std::int64_t dim) {
  Table table{};
  table.kind = kind;
  table.dim = dim;
  table.check = (dim * kind + 7) / 8;
  table.tag = table.check + (kind > 8 ? 0 : 2);
  table.width = table.check + 4 + (kind > 8 ? 0 : kind == int8 ? 8 : 4);
  for (std::int64_t place = 1; kind <= 8 && dim > 0; place <<= kind) {
    const std::int64_t weight = dim < place ? dim : place;
    table.weight[table.digits++] = weight;
    dim -= weight;
  }
  return table;
}

// Alters `words`, which hold a part from its word `first` on, if the fault is there. Of null nothing is left once it
// is compiled.
template <class T>
[[gnu::always_inline]] inline void alter(T &words, const Fault *fault, Part part, std::int64_t first = 0) {
  if (!fault || fault->part != part) return;
  const std::int64_t word = fault->place - first;
  if (word < 0 || word >= static_cast<std::int64_t>(sizeof words / 4)) return;
  std::uint32_t bits;
  std::memcpy(&bits, reinterpret_cast<const std::uint8_t *>(&words) + 4 * word, 4);
  bits ^= std::uint32_t{1} << (fault->bit & 31);
  std::memcpy(reinterpret_cast<std::uint8_t *>(&words) + 4 * word, &bits, 4);
}

template <class T> inline T load(const std::uint8_t *from) {
  T found;
  std::memcpy(&found, from, sizeof found);
  return found;
}

inline std::int64_t integer_at(const void *array, std::int64_t size, std::int64_t at) {
  return size == 8 ? static_cast<const std::int64_t *>(array)[at] : static_cast<const std::int32_t *>(array)[at];
}

// Where bag `b` begins in the ids; for b = bags, where the last one ends.
inline std::int64_t bag_begin(const Call &call, std::int64_t b) {
  if (!call.offsets) return b * call.length;
  return b < call.listed ? integer_at(call.offsets, call.offset_size, b) : call.count;
}

inline float half(std::uint16_t word) {
  const std::uint32_t sign = static_cast<std::uint32_t>(word & 0x8000) << 16, size = word & 0x7FFF;
  float found;
  if (size >= 0x7C00) {  // infinite or NaN
    const std::uint32_t bits = sign | 0x7F800000 | size << 13;
    std::memcpy(&found, &bits, 4);
    return found;
  }
  // 2^112 makes up for the exponents' difference; exact for denormals too.
  const std::uint32_t bits = size << 13, factor_bits = 0x77800000;
  float factor;
  std::memcpy(&found, &bits, 4);
  std::memcpy(&factor, &factor_bits, 4);
  found *= factor;
  return sign ? -found : found;
}

// Scale and bias of a row as they are stored, the scale in the low bits.
template <std::int64_t kind> inline std::uint64_t scale_bias(const Table &table, const std::uint8_t *row) {
  if constexpr (kind > 8) return 0;
  else if constexpr (kind == int8) return load<std::uint64_t>(row + table.width - 8);
  else return load<std::uint32_t>(row + table.width - 4);
}

// The sum of the codes of a row, as its digits have it.
template <std::int64_t kind> inline std::uint32_t digit_sum(const Table &table, const std::uint8_t *row) {
  constexpr std::uint32_t most = (1u << (kind & 15)) - 1;
  const std::uint32_t digits = load<std::uint32_t>(row + table.check);
  std::uint32_t sum = digits & most;  // the first digit's weight is 1
  for (std::int64_t k = 1; k < table.digits; ++k)
    sum += (digits >> (k * kind) & most) * static_cast<std::uint32_t>(table.weight[k]);
  return sum;
}

// Scale, bias and number of a row, mixed.
template <std::int64_t kind>
inline std::uint64_t mixed(const Table &table, const std::uint8_t *row, std::uint64_t id) {
  return scale_bias<kind>(table, row) * mix_numbers + id * mix_row;
}

// The weighted sum of the codes, as the tag has it; 16 bits of it count.
template <std::int64_t kind>
inline std::uint32_t tag_sum(const Table &table, const std::uint8_t *row, std::uint64_t id) {
  return load<std::uint16_t>(row + table.tag) - static_cast<std::uint32_t>(mixed<kind>(table, row, id) >> 48);
}

// The sum of the words of a row of floats.
template <std::int64_t kind>
inline std::uint32_t float_sum(const Table &table, const std::uint8_t *row, std::uint64_t id) {
  return load<std::uint32_t>(row + table.tag) - static_cast<std::uint32_t>(mixed<kind>(table, row, id) >> 32);
}

// What the checks of a bag's rows have found: a sum that differs, a tag that differs.
struct Differs {
  std::uint32_t sum = 0, tag = 0;
};

inline std::uint8_t verdict_of(const Differs &found, bool twice_the_same) {
  return static_cast<std::uint8_t>((found.sum ? sum_differs : sound) | (found.tag & 0xFFFF ? tag_differs : sound) |
                                   (twice_the_same ? sound : arithmetic_differs));
}

// The bags from `first` up to `last`. Returns how many verdicts are not sound, or -1 - b where bag b has an id
// beyond the table or offsets that go back or beyond the ids; nothing beyond the table was read then.
using Run = std::int64_t (*)(const Table &, const Call &, std::int64_t first, std::int64_t last);

// `altered`: the same loops, with the fault of the call.
Run avx512_run(const Table &table, bool altered);
Run avx2_run(const Table &table, bool altered);
Run generic_run(const Table &table, bool altered);

}  // namespace ckptflip::bags
