// Checked embedding bags for AVX2 with FMA, in vectors that the compiler makes.
#include "embedding_bag.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define KERNEL __attribute__((target("avx2,fma,f16c")))
#define INLINE KERNEL __attribute__((always_inline)) inline

namespace ckptflip::bags {
namespace {
INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE float half_value(std::uint16_t word) { return _cvtsh_ss(word); }
}  // namespace
}  // namespace ckptflip::bags

#include "embedding_bag_lanes.h"

namespace ckptflip::bags {
Run avx2_run(const Table &table, bool altered) { return run_of(table, altered); }
}  // namespace ckptflip::bags

#else
namespace ckptflip::bags {
Run avx2_run(const Table &table, bool altered) { return generic_run(table, altered); }
}  // namespace ckptflip::bags
#endif
