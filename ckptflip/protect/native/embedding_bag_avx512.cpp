// Checked embedding bags with AVX-512; its VNNI adds up codes.
#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
// GCC's own header sets off its warning of values that are meant to be undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "embedding_bag.h"

#define KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")))
#define INLINE KERNEL __attribute__((always_inline)) inline

namespace ckptflip::bags {
namespace {

constexpr int lanes = 16, most_vectors = most_columns / lanes;

INLINE void prefetch(std::uintptr_t at) { _mm_prefetch(reinterpret_cast<const char *>(at), _MM_HINT_T0); }

INLINE __mmask16 low(std::int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1); }

// The weights of the columns whose codes lie at the same place of their bytes, one place after the other.
template <std::int64_t bits> struct PlaceWeights {
  alignas(64) std::int8_t of[8 / bits][256];
  PlaceWeights() {
    for (std::int64_t place = 0; place < 8 / bits; ++place)
      for (std::int64_t byte = 0; byte < 256; ++byte)
        of[place][byte] = static_cast<std::int8_t>(((byte * 8 / bits + place) & 255) - 128);
  }
};
template <std::int64_t bits> const PlaceWeights<bits> place_weights;

// No load goes beyond the 64, 32 or 16 bytes that hold values: a row's last bytes are fetched, its neighbour's are not.
template <class Adder> INLINE void add_bytes(Adder &sums, const std::uint8_t *from, std::int64_t size) {
  std::int64_t at = 0;
  for (; at + 64 <= size; at += 64) sums.bytes(_mm512_loadu_si512(from + at), at);
  if (size & 32) {
    sums.bytes(_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + at))), at);
    at += 32;
  }
  if (size & 16) {
    sums.bytes(_mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + at))), at);
    at += 16;
  }
  if (size & 15) sums.bytes(_mm512_zextsi128_si512(_mm_maskz_loadu_epi8(low(size & 15), from + at)), at);
}

// The sums of a bag's rows are added up lane by lane, and lanes only once for a bag. From row to row the plain sum is
// multiplied by 3, so that damage in two rows does not cancel; what that leaves is in docs/design/abft-embeddings.md.
template <std::int64_t kind> struct Checks {
  __m512i plain, weighted;
  std::uint32_t digits = 0, tags = 0;

  INLINE Checks() : plain(_mm512_setzero_si512()), weighted(_mm512_setzero_si512()) {}

  INLINE void add(const Table &table, const std::uint8_t *row, std::uint64_t id) {
    plain = _mm512_add_epi32(plain, _mm512_slli_epi32(plain, 1));
    digits = 3 * digits + digit_sum<kind>(table, row);
    tags += tag_sum<kind>(table, row, id);
    add_bytes(*this, row, table.check);
  }

  INLINE void bytes(__m512i some, std::int64_t at) {
    for (int place = 0; place < 8 / kind; ++place) {
      __m512i codes = some;
      if (kind < 8)
        codes = _mm512_and_si512(_mm512_srli_epi16(some, place * kind), _mm512_set1_epi8((1 << (kind & 7)) - 1));
      plain = _mm512_dpbusd_epi32(plain, codes, _mm512_set1_epi8(1));
      weighted = _mm512_dpbusd_epi32(weighted, codes, _mm512_loadu_si512(place_weights<kind>.of[place] + (at & 255)));
    }
  }

  INLINE void altered(const Fault *fault) {
    alter(plain, fault, Part::plain);
    alter(digits, fault, Part::plain, lanes);
    alter(weighted, fault, Part::weighted);
    alter(tags, fault, Part::weighted, lanes);
  }

  INLINE Differs found() const {
    return {digits ^ static_cast<std::uint32_t>(_mm512_reduce_add_epi32(plain)),
            tags - static_cast<std::uint32_t>(_mm512_reduce_add_epi32(weighted))};
  }
};

struct FloatChecks {
  __m512i plain;
  Differs differs;

  INLINE FloatChecks() : plain(_mm512_setzero_si512()) {}

  template <std::int64_t kind> INLINE void row(const Table &table, const std::uint8_t *row, std::uint64_t id) {
    plain = _mm512_setzero_si512();
    add_bytes(*this, row, table.check);
    differs.sum |= static_cast<std::uint32_t>(_mm512_reduce_add_epi32(plain)) ^ float_sum<kind>(table, row, id);
  }

  INLINE void bytes(__m512i words, std::int64_t) { plain = _mm512_add_epi32(plain, words); }
  INLINE void altered(const Fault *fault) { alter(differs.sum, fault, Part::plain); }
  INLINE Differs found() const { return differs; }
};

template <> struct Checks<bf16> : FloatChecks {
  INLINE Checks() {}

  INLINE void add(const Table &table, const std::uint8_t *at, std::uint64_t id) { row<bf16>(table, at, id); }
};

template <> struct Checks<fp32> : FloatChecks {
  INLINE Checks() {}

  INLINE void add(const Table &table, const std::uint8_t *at, std::uint64_t id) { row<fp32>(table, at, id); }
};

// Scale and bias of a row, in every lane.
template <std::int64_t kind>
INLINE void numbers(const Table &table, const std::uint8_t *row, __m512 &scale, __m512 &bias) {
  if constexpr (kind == int8) {
    scale = _mm512_set1_ps(load<float>(row + table.width - 8));
    bias = _mm512_set1_ps(load<float>(row + table.width - 4));
  } else if constexpr (kind < 8) {
    const __m512 both = _mm512_cvtph_ps(_mm256_set1_epi32(load<std::int32_t>(row + table.width - 4)));
    scale = _mm512_moveldup_ps(both);
    bias = _mm512_movehdup_ps(both);
  } else {
    scale = _mm512_set1_ps(1);
    bias = _mm512_setzero_ps();
  }
}

// Sixteen values of a row from `column` on; of codes, the codes.
template <std::int64_t kind> INLINE __m512 values(const std::uint8_t *row, std::int64_t column, __mmask16 mask) {
  if constexpr (kind == fp32) {
    return _mm512_maskz_loadu_ps(mask, row + 4 * column);
  } else if constexpr (kind == bf16) {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, row + 2 * column);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  } else if constexpr (kind == int8) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, row + column)));
  } else {
    // Eight or four bytes; at least as many follow a row's codes. Each lane takes its code by the low bits of an index:
    // the other bits of it mean nothing.
    const __m512i bytes = kind == int4 ? _mm512_set1_epi64(load<std::int64_t>(row + column / 2))
                                       : _mm512_set1_epi32(load<std::int32_t>(row + column / 4));
    const __m512i shift =
        kind == int4 ? _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0)
                     : _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512 codes = kind == int4 ? _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
                                      : _mm512_set_ps(3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(bytes, shift), codes);
  }
}

// The columns of a vector in their order: codes of 4 bits come as columns 0, 8, 1, 9 and so on.
template <std::int64_t kind> INLINE __m512 in_order(__m512 sums) {
  if constexpr (kind != int4) return sums;
  return _mm512_permutexvar_ps(_mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0), sums);
}

template <std::int64_t kind, int vectors> struct Sums {
  __m512 sum[vectors], twin[vectors];
  __mmask16 last;

  INLINE explicit Sums(std::int64_t columns) : last(low(columns - (vectors - 1) * lanes)) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] = twin[v] = _mm512_setzero_ps();
  }

  INLINE void add(const Table &table, const std::uint8_t *row, std::int64_t column, const float *weight,
                  const Fault *fault) {
    __m512 scale, bias;
    numbers<kind>(table, row, scale, bias);
    // The compiler must not see that these are the same once more.
    __m512 scale_again = scale, bias_again = bias;
    __asm__("" : "+v"(scale_again), "+v"(bias_again));
    if (weight) {
      const __m512 factor = _mm512_set1_ps(*weight);
      scale = _mm512_mul_ps(scale, factor);
      bias = _mm512_mul_ps(bias, factor);
      scale_again = _mm512_mul_ps(scale_again, factor);
      bias_again = _mm512_mul_ps(bias_again, factor);
    }
    alter(scale, fault, Part::scale);
    alter(bias, fault, Part::bias);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const std::int64_t place = column + lanes * v;
      __m512 some = values<kind>(row, place, v + 1 < vectors ? 0xFFFF : last);
      alter(some, fault, Part::value, place);
      sum[v] = _mm512_fmadd_ps(scale, some, kind > 8 ? sum[v] : _mm512_add_ps(sum[v], bias));
      twin[v] = _mm512_fmadd_ps(scale_again, some, kind > 8 ? twin[v] : _mm512_add_ps(twin[v], bias_again));
      alter(sum[v], fault, Part::sum, place);
      alter(twin[v], fault, Part::twin, place);
    }
  }

  INLINE void finish(float factor, float factor_again) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[v] = in_order<kind>(_mm512_mul_ps(sum[v], _mm512_set1_ps(factor)));
      twin[v] = in_order<kind>(_mm512_mul_ps(twin[v], _mm512_set1_ps(factor_again)));
    }
  }

  INLINE bool same() const {
    __m512i differs = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      // Of two NaN that meet in an addition, compilers may keep either: where both are NaN, they are the same.
      const int either = _mm512_cmp_ps_mask(sum[v], sum[v], _CMP_ORD_Q) |
                         _mm512_cmp_ps_mask(twin[v], twin[v], _CMP_ORD_Q);
      const auto numbers = static_cast<__mmask16>(either & (v + 1 < vectors ? 0xFFFF : last));
      differs = _mm512_or_si512(differs, _mm512_maskz_xor_epi32(numbers, _mm512_castps_si512(sum[v]),
                                                                _mm512_castps_si512(twin[v])));
    }
    return _mm512_test_epi32_mask(differs, differs) == 0;
  }

  INLINE void store(float *out) const {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      _mm512_mask_storeu_ps(out + lanes * v, v + 1 < vectors ? 0xFFFF : last,
                            sum[v]);
  }
};

}  // namespace
}  // namespace ckptflip::bags

#include "embedding_bag_loop.h"

namespace ckptflip::bags {
Run avx512_run(const Table &table, bool altered) {
  return __builtin_cpu_supports("avx512vnni") ? run_of(table, altered) : avx2_run(table, altered);
}
}  // namespace ckptflip::bags

#else
#include "embedding_bag.h"
namespace ckptflip::bags {
Run avx512_run(const Table &table, bool altered) { return generic_run(table, altered); }
}  // namespace ckptflip::bags
#endif
