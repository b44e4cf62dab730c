// What knn_kth_distance.cpp is fast by: rows packed for vectors, scores of a panel of queries
// against a panel of references, exact distances. The same source, compiled once per level of
// instruction sets; which one runs is decided at run time by kLevels, at the end. All of them give
// the same answers, since scores only filter. A CPU that has none of them is left to PyTorch.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__) && defined(__linux__)
#define HAS_LEVELS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kMostQueries = 32, kMostRows = 32;  // of a panel

struct Level {
  const char* name;
  bool bf16;
  int queries, rows;  // of a panel
  bool (*supported)();

  // Packs a panel of `width` rows of d elements, a multiple of 32: word w of row r less the centre
  // goes to out[w * step + r] (`tiles`: each row by itself). A word is 4 bytes: one fp32 value, or
  // a pair of bf16. Also |x - centre|^2 of each row, and of what rounding cuts off.
  void (*pack)(const float* const* rows, int width, bool tiles, const float* centre, int64_t d,
               uint32_t* out, float* square, float* lost);
  // scores[i][j] = start[j] + query i . reference j, and masks: bit j of mask[i] says that score
  // [i][j] reaches limit[i]. Panels hold a word of all rows together, so that one vector load meets
  // neighbouring rows; for AMX (`tiles`) each of the queries lies by itself.
  void (*scores)(const uint32_t* queries, const uint32_t* references, int64_t words,
                 const float* start, const float* limit, float* scores, uint32_t* mask);
  double (*exact)(const float* x, const float* y, int64_t d);  // sum (x - y)^2
  bool tiles = false;
};

#ifdef HAS_LEVELS
#define INLINE inline __attribute__((always_inline))

template <int L>
struct Vector {  // of L words
  typedef float Floats __attribute__((vector_size(4 * L)));
  typedef uint32_t Bits __attribute__((vector_size(4 * L)));
};
template <class V>
INLINE V load(const void* p) {  // unaligned
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// bf16: word j of 16 pairs elements j and 16 + j of 32. Both sides do, so the products are
// unchanged, and no shuffle is needed. Subnormal bf16 become zero: the hardware reads them so.
template <bool bf16, int L>
INLINE void pack(const float* const* rows, int width, bool tiles, const float* centre, int64_t d,
                 uint32_t* out, float* square, float* lost) {
  typedef typename Vector<L>::Floats Floats;
  typedef typename Vector<L>::Bits Bits;
  Floats sum[kMostRows] = {}, rest[kMostRows] = {};
  const int64_t step = tiles ? 1 : width, apart = tiles ? d / (bf16 ? 2 : 1) : 1;
  for (int64_t i = 0; i < d; i += bf16 ? 32 : L, out += L * step) {
    for (int r = 0; r < width; ++r) {  // some words of all rows: what is written stays in L1
      Bits word = {};
      __builtin_prefetch(rows[r] + i + 64);
      for (int half = 0; half < (bf16 ? 32 : 16); half += 16) {
        const Floats value = load<Floats>(rows[r] + i + half) - load<Floats>(centre + i + half);
        Bits bits = (Bits)value;
        sum[r] += value * value;
        if (bf16) {
          bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;  // to nearest, ties to even
          bits &= (Bits)((bits & 0x7f800000u) != 0);
          rest[r] += (value - (Floats)bits) * (value - (Floats)bits);
        }
        word |= bf16 && !half ? bits >> 16 : bits;
      }
      for (int l = 0; l < L; ++l) out[l * step + r * apart] = word[l];
    }
  }
  for (int r = 0; r < width; ++r) {
    square[r] = lost[r] = 0;
    for (int l = 0; l < L; ++l) square[r] += sum[r][l], lost[r] += rest[r][l];
  }
}

// sum (x - y)^2 in fp64, in one fixed order: 16 running sums, then these one after the other.
INLINE double exact(const float* x, const float* y, int64_t d) {
  typedef double v8d __attribute__((vector_size(64)));
  typedef Vector<8>::Floats v8f;
  v8d low = {}, high = {};
  for (int64_t i = 0; i < d; i += 16) {
    v8d a = __builtin_convertvector(load<v8f>(x + i), v8d) -
            __builtin_convertvector(load<v8f>(y + i), v8d);
    v8d b = __builtin_convertvector(load<v8f>(x + i + 8), v8d) -
            __builtin_convertvector(load<v8f>(y + i + 8), v8d);
    low += a * a;
    high += b * b;
  }
  double total = 0;
  for (int l = 0; l < 8; ++l) total += low[l] + high[l];
  return total;
}

// sum + the product of word x and each of y, rounded once (fp32), or of both their halves (bf16).
template <bool bf16, class Floats>
INLINE Floats multiply_add(uint32_t x, Floats y, Floats sum) {
  typedef typename Vector<sizeof(Floats) / 4>::Bits Bits;
  const Bits word = Bits{} + x;
  if constexpr (bf16)
    return (Floats)__builtin_ia32_dpbf16ps_v16sf((__m512)sum, (__m512bh)word, (__m512bh)y);
  else if constexpr (sizeof(Floats) == 64)
    return __builtin_ia32_vfmaddps512_mask((Floats)word, y, sum, -1, _MM_FROUND_CUR_DIRECTION);
  else
    return __builtin_ia32_vfmaddps256((Floats)word, y, sum);
}

// Bit l says that score l reaches the limit.
template <class Floats>
INLINE uint32_t passing(Floats score, float limit) {
  if constexpr (sizeof(Floats) == 64)
    return __builtin_ia32_cmpps512_mask(score, limit + Floats{}, _CMP_GE_OQ, -1,
                                        _MM_FROUND_CUR_DIRECTION);
  else
    return __builtin_ia32_movmskps256((Floats)(score >= limit));
}

// Q queries x 2 L references, scores in registers: 2 Q accumulators and 3 more, 15 of 16 for Q = 6.
// The queries' panel stays in L1, the references stream from L2.
template <bool bf16, int Q, int L>
INLINE void scores(const uint32_t* x, const uint32_t* y, int64_t words, const float* start,
                   const float* limit, float* out, uint32_t* mask) {
  typedef typename Vector<L>::Floats Floats;
  Floats sum[Q][2];
#pragma GCC unroll 12
  for (int i = 0; i < Q; ++i)
    sum[i][0] = load<Floats>(start), sum[i][1] = load<Floats>(start + L);
  for (int64_t w = 0; w < words; ++w, x += Q, y += 2 * L) {
    const Floats left = load<Floats>(y), right = load<Floats>(y + L);
#pragma GCC unroll 12
    for (int i = 0; i < Q; ++i) {
      sum[i][0] = multiply_add<bf16>(x[i], left, sum[i][0]);
      sum[i][1] = multiply_add<bf16>(x[i], right, sum[i][1]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Q; ++i) {
    std::memcpy(out + 2 * L * i, sum[i], sizeof sum[i]);
    mask[i] = passing(sum[i][0], limit[i]) | passing(sum[i][1], limit[i]) << L;
  }
}

#define COMPILE(LEVEL, TARGET, BF16, Q, L)                                                         \
  __attribute__((target(TARGET))) void pack_##LEVEL(                                               \
      const float* const* rows, int width, bool tiles, const float* centre, int64_t d,             \
      uint32_t* out, float* square, float* lost) {                                                 \
    pack<BF16, L>(rows, width, tiles, centre, d, out, square, lost);                               \
  }                                                                                                \
  __attribute__((target(TARGET))) void scores_##LEVEL(                                             \
      const uint32_t* x, const uint32_t* y, int64_t words, const float* start, const float* limit, \
      float* out, uint32_t* mask) {                                                                \
    scores<BF16, Q, L>(x, y, words, start, limit, out, mask);                                      \
  }                                                                                                \
  __attribute__((target(TARGET))) double exact_##LEVEL(const float* x, const float* y,             \
                                                       int64_t d) {                                \
    return exact(x, y, d);                                                                         \
  }
COMPILE(avx2, "avx2,fma", false, 6, 8)
COMPILE(avx512, "avx512f", false, 12, 16)
COMPILE(bf16, "avx512f,avx512bf16", true, 12, 16)
#undef COMPILE

// Scores of 32 queries x 32 references in the tile registers 0-3; a stride of 0 loads `start` into
// all 16 rows.
__attribute__((target("avx512f,amx-tile,amx-bf16"))) void scores_amx(
    const uint32_t* x, const uint32_t* y, int64_t words, const float* start, const float* limit,
    float* out, uint32_t* mask) {
  struct alignas(64) {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  _tile_loadconfig(&shape);
  _tile_loadd(0, start, 0);
  _tile_loadd(1, start + 16, 0);
  _tile_loadd(2, start, 0);
  _tile_loadd(3, start + 16, 0);
  for (int64_t w = 0; w < words; w += 16, x += 16, y += 16 * 32) {
    _tile_loadd(4, x, 4 * words);
    _tile_loadd(6, y, 128);
    _tile_loadd(7, y + 16, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x + 16 * words, 4 * words);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * 32, 128);
  _tile_stored(3, out + 16 * 32 + 16, 128);
  for (int i = 0; i < 32; ++i, out += 32)
    mask[i] = passing(load<Vector<16>::Floats>(out), limit[i]) |
              passing(load<Vector<16>::Floats>(out + 16), limit[i]) << 16;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
// G flop/s of a thread, bf16 against fp32: 225 to 115 on AMD Zen 4, but 66 to 133 on an Intel Xeon
// of model 207
bool has_bf16() { return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel"); }
bool has_amx() {  // the system has to be asked for the tile registers
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}
#endif

const std::vector<Level> kLevels = {  // the best first
#ifdef HAS_LEVELS
    {"amx", true, 32, 32, has_amx, pack_bf16, scores_amx, exact_bf16, true},
    {"avx512bf16", true, 12, 32, has_bf16, pack_bf16, scores_bf16, exact_bf16},
    {"avx512", false, 12, 32, has_avx512, pack_avx512, scores_avx512, exact_avx512},
    {"avx2", false, 6, 16, has_avx2, pack_avx2, scores_avx2, exact_avx2},
#endif
};

}  // namespace
