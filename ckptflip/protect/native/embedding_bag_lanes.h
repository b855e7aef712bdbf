// Sums in plain C++, for compilers to turn into vectors; see embedding_bag_loop.h. The source that includes this
// has defined KERNEL, `multiply_add` and `half_value`.
#include "embedding_bag.h"

namespace ckptflip::bags {
namespace {

constexpr int lanes = most_columns, most_vectors = 1;

INLINE void prefetch(std::uintptr_t at) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void *>(at));
#else
  (void)at;
#endif
}

template <std::int64_t kind> struct Checks {
  Differs differs;

  INLINE void add(const Table &table, const std::uint8_t *row, std::uint64_t id) {
    std::uint32_t plain = 0, weighted = 0;
    if constexpr (kind > 8) {
      for (std::int64_t at = 0; at + 4 <= table.check; at += 4) plain += load<std::uint32_t>(row + at);
      if (table.check & 2) plain += load<std::uint16_t>(row + table.check - 2);
      differs.sum |= plain ^ float_sum<kind>(table, row, id);
    } else {
      for (std::int64_t place = 0; place < 8 / kind; ++place)
        for (std::int64_t byte = 0; byte < table.check; ++byte) {
          const std::uint32_t code = row[byte] >> (place * kind) & ((1u << kind) - 1);
          plain += code;
          weighted += code * static_cast<std::uint32_t>(((byte * (8 / kind) + place) & 255) - 128);
        }
      differs.sum |= plain ^ digit_sum<kind>(table, row);
      differs.tag |= weighted ^ tag_sum<kind>(table, row, id);
    }
  }

  INLINE void altered(const Fault *fault) {
    alter(differs.sum, fault, Part::plain);
    if constexpr (kind <= 8) alter(differs.tag, fault, Part::weighted);
  }

  INLINE Differs found() const { return differs; }
};

template <std::int64_t kind>
INLINE void numbers(const Table &table, const std::uint8_t *row, float &scale, float &bias) {
  if constexpr (kind == int8) {
    scale = load<float>(row + table.width - 8);
    bias = load<float>(row + table.width - 4);
  } else if constexpr (kind < 8) {
    scale = half_value(load<std::uint16_t>(row + table.width - 4));
    bias = half_value(load<std::uint16_t>(row + table.width - 2));
  }
}

template <std::int64_t kind> INLINE float value(const std::uint8_t *row, std::int64_t column) {
  if constexpr (kind == fp32) {
    return load<float>(row + 4 * column);
  } else if constexpr (kind == bf16) {
    const std::uint32_t word = static_cast<std::uint32_t>(load<std::uint16_t>(row + 2 * column)) << 16;
    float found;
    std::memcpy(&found, &word, 4);
    return found;
  } else {
    constexpr std::int64_t each = 8 / kind;
    return static_cast<float>(row[column / each] >> (column % each * kind) & ((1 << kind) - 1));
  }
}

template <std::int64_t kind, int vectors> struct Sums {
  float sum[most_columns] = {}, twin[most_columns] = {};
  std::int64_t columns;

  INLINE explicit Sums(std::int64_t left) : columns(std::min(left, most_columns)) {}

  INLINE void add(const Table &table, const std::uint8_t *row, std::int64_t column, const float *weight,
                  const Fault *fault) {
    add_to(sum, table, row, column, weight, fault);
    alter(sum, fault, Part::sum, column);
    // The compiler must not see that this is the same once more.
    const std::uint8_t *volatile row_again = row;
    const float *volatile weight_again = weight;
    add_to(twin, table, row_again, column, weight_again, nullptr);
    alter(twin, fault, Part::twin, column);
  }

  INLINE void add_to(float *to, const Table &table, const std::uint8_t *row, std::int64_t column, const float *weight,
                     const Fault *fault) {
    float scale = 1, bias = 0;
    numbers<kind>(table, row, scale, bias);
    if (weight) {
      scale *= *weight;
      bias *= *weight;
    }
    alter(scale, fault, Part::scale);
    alter(bias, fault, Part::bias);
    for (std::int64_t j = 0; j < columns; ++j) {
      float some = value<kind>(row, column + j);
      alter(some, fault, Part::value, column + j);
      to[j] = multiply_add(scale, some, kind > 8 ? to[j] : to[j] + bias);
    }
  }

  INLINE void finish(float factor, float factor_again) {
    for (std::int64_t j = 0; j < columns; ++j) {
      sum[j] *= factor;
      twin[j] *= factor_again;
    }
  }

  // Of two NaN that meet in an addition, compilers may keep either: NaN is like NaN.
  INLINE bool same() const {
    if (std::memcmp(sum, twin, sizeof sum) == 0) return true;
    bool found = true;
    for (std::int64_t j = 0; j < columns; ++j)
      found &= std::memcmp(&sum[j], &twin[j], sizeof(float)) == 0 || (sum[j] != sum[j] && twin[j] != twin[j]);
    return found;
  }

  INLINE void store(float *out) const {
    for (std::int64_t j = 0; j < columns; ++j) out[j] = sum[j];
  }
};

}  // namespace
}  // namespace ckptflip::bags

#include "embedding_bag_loop.h"
