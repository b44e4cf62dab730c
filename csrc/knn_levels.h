// What knn_kth_distance.cpp is fast by: rows packed for vectors, scores of 24 or 32 queries x 32
// references, exact distances. The same source, compiled once per level of instruction sets; which
// one runs is decided at run time by kLevels, at the end. All of them give the same answers, since
// scores only filter.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

// A word is 4 bytes: one fp32 value, or a pair of bf16. 16 words of a row are a chunk. Rows are
// packed in panels. Panels of the reference have 16 rows and are transposed (a word of all rows
// lies together), so that one vector load meets neighbouring references.
constexpr int kTile = 16;                 // words of a chunk; rows of a reference panel
constexpr int kWords = kTile * kTile;     // of a chunk of such a panel
constexpr int kStep = 2 * kTile;          // references scored at a time
constexpr int kGroup = 32;                // queries scored at a time, at most: Level.group

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

// L centred values of a row from column i on; zeros beyond column d, and where there is no row.
template <int L>
INLINE typename Vector<L>::Floats centred(const float* row, const float* centre, int64_t i,
                                          int64_t d) {
  typename Vector<L>::Floats x = {}, mean = {};
  const int64_t bytes = row ? 4 * std::clamp<int64_t>(d - i, 0, L) : 0;
  if (bytes == sizeof x) return load<decltype(x)>(row + i) - load<decltype(x)>(centre + i);
  if (bytes) std::memcpy(&x, row + i, bytes), std::memcpy(&mean, centre + i, bytes);
  return x - mean;
}

// L words of a row from word w on; adds to the sums of squares of the values and of what rounding
// cuts off. bf16: word j of a chunk pairs its elements j and 16 + j. Both sides do, so the products
// are unchanged, and no shuffle is needed. Subnormal bf16 become zero: the hardware reads them so.
template <bool bf16, int L, class Floats = typename Vector<L>::Floats,
          class Bits = typename Vector<L>::Bits>
INLINE Bits words(const float* row, const float* centre, int64_t w, int64_t d, Floats& square,
                  Floats& residual) {
  Bits word = {};
  for (int half = 0; half < (bf16 ? 2 : 1); ++half) {
    const Floats value = centred<L>(row, centre, bf16 ? 2 * w + half * kTile : w, d);
    square += value * value;
    Bits bits = (Bits)value;
    if (!bf16) return bits;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;  // round to nearest, ties to even
    bits &= (Bits)((bits & 0x7f800000u) != 0);
    residual += (value - (Floats)bits) * (value - (Floats)bits);
    word |= half ? bits : bits >> 16;
  }
  return word;
}

// Transposes L rows of L words by rounds of exchanges: half the time of word by word.
template <int L, class Bits = typename Vector<L>::Bits>
INLINE void transpose(Bits* row) {
  Bits i;
  for (int l = 0; l < L; ++l) i[l] = l;
#pragma GCC unroll 4
  for (unsigned s = 1; s < L; s *= 2) {
    const Bits upper = (Bits)((i & s) != 0), left = i + (upper & (L - s)),
               right = i + s + (upper & (L - s));
#pragma GCC unroll 16
    for (unsigned r = 0; r < L; ++r) {
      if (r & s) continue;
      const Bits a = row[r], b = row[r + s];
      row[r] = __builtin_shuffle(a, b, left);
      row[r + s] = __builtin_shuffle(a, b, right);
    }
  }
}

// Packs a panel of `pitch` rows, a multiple of L, L x L words at a time. rows: nullptr for a row of
// zeros. square, residual: the two sums of each row.
template <bool bf16, int L>
INLINE void pack(const float* const* rows, int pitch, bool transposed, const float* centre,
                 int64_t d, uint32_t* out, float* square, float* residual) {
  constexpr int width = bf16 ? 2 : 1;  // values in a word
  for (int first = 0; first < pitch; first += L) {
    typename Vector<L>::Floats sum[L] = {}, lost[L] = {};
    for (int64_t w = 0; w * width < d || w % kTile; w += L) {
      typename Vector<L>::Bits word[L];
      for (int r = 0; r < L; ++r) {
        const float* row = rows[first + r];
        if (row) __builtin_prefetch(row + width * w + 64);
        word[r] = words<bf16, L>(row, centre, w, d, sum[r], lost[r]);
      }
      if (transposed) transpose<L>(word);
      for (int r = 0; r < L; ++r)
        std::memcpy(out + (transposed ? (w + r) * pitch + first : w * pitch + r * kTile), &word[r],
                    sizeof word[r]);
    }
    for (int r = 0; r < L; ++r) {
      square[first + r] = residual[first + r] = 0;
      for (int l = 0; l < L; ++l) square[first + r] += sum[r][l], residual[first + r] += lost[r][l];
    }
  }
}

// sum (x - y)^2 in fp64, in one fixed order: 16 running sums, then these one after the other.
INLINE double exact(const float* x, const float* y, int64_t d) {
  typedef double v8d __attribute__((vector_size(64)));
  typedef Vector<8>::Floats v8f;
  v8d low = {}, high = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
    v8d a = __builtin_convertvector(load<v8f>(x + i), v8d) -
            __builtin_convertvector(load<v8f>(y + i), v8d);
    v8d b = __builtin_convertvector(load<v8f>(x + i + 8), v8d) -
            __builtin_convertvector(load<v8f>(y + i + 8), v8d);
    low += a * a;
    high += b * b;
  }
  double total = 0;
  for (int l = 0; l < 8; ++l) total += low[l] + high[l];
  for (; i < d; ++i) total += (double(x[i]) - y[i]) * (double(x[i]) - y[i]);
  return total;
}

// Bit j of mask[i] says that score [i][j] reaches bound[i].
INLINE void passing(const float* scores, const float* bound, int queries, uint32_t* mask) {
  for (int q = 0; q < queries; ++q, scores += kStep) {
    int any = 0;  // nearly always 0, and this loop is vectorised
    for (int r = 0; r < kStep; ++r) any |= scores[r] >= bound[q];
    mask[q] = 0;
    for (int r = 0; any && r < kStep; ++r) mask[q] |= uint32_t(scores[r] >= bound[q]) << r;
  }
}

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")  // a * b + c in one instruction, where there is one
template <bool bf16, class Floats>
INLINE Floats multiply_add(uint32_t x, Floats y, Floats sum) {
#if defined(__x86_64__)
  if constexpr (bf16) {
    const typename Vector<16>::Bits word = typename Vector<16>::Bits{} + x;
    return (Floats)__builtin_ia32_dpbf16ps_v16sf((__m512)sum, (__m512bh)word, (__m512bh)y);
  }
#endif
  float value;
  std::memcpy(&value, &x, 4);
  return sum + value * y;
}

// Scores [24][32] of 24 queries in transposed panels of Q and of 2 panels of the reference, started
// at `start`. Q x 2 L of them stay in registers while a part of the words is multiplied; the part is
// so short that the references' 16 KiB stay in L1 for all queries. 2 Q accumulators and 3 more
// registers: 15 of 16 for Q = 6.
template <bool bf16, int Q, int L>
INLINE void scores(const uint32_t* query, const uint32_t* reference, const float* start,
                   int64_t chunks, float* out) {
  typedef typename Vector<L>::Floats Floats;
  constexpr int pitch = (Q + L - 1) / L * L;
  const int64_t depth = chunks * kTile, part = 2048 / L;
  const int64_t apart = L == kTile ? chunks * kWords : L;  // from one vector to its neighbour
  for (int r = 0; r < kStep; r += 2 * L) {
    for (int64_t from = 0; from < depth; from += part) {
      const int64_t end = std::min(part, depth - from);
      for (int q = 0; q < 24; q += Q) {
        const uint32_t* x = query + (q / Q * depth + from) * pitch;
        const uint32_t* y = reference + r / kTile * chunks * kWords + r % kTile + from * kTile;
        float* const to = out + q * kStep + r;
        Floats sum[Q][2];
#pragma GCC unroll 12
        for (int i = 0; i < Q; ++i) {
          sum[i][0] = load<Floats>(from ? to + i * kStep : start + r);
          sum[i][1] = load<Floats>(from ? to + i * kStep + L : start + r + L);
        }
        for (int64_t w = 0; w < end; ++w, x += pitch, y += kTile) {
          const Floats left = load<Floats>(y), right = load<Floats>(y + apart);
#pragma GCC unroll 12
          for (int i = 0; i < Q; ++i) {
            sum[i][0] = multiply_add<bf16>(x[i], left, sum[i][0]);
            sum[i][1] = multiply_add<bf16>(x[i], right, sum[i][1]);
          }
        }
#pragma GCC unroll 12
        for (int i = 0; i < Q; ++i) {
          std::memcpy(to + i * kStep, &sum[i][0], sizeof(Floats));
          std::memcpy(to + i * kStep + L, &sum[i][1], sizeof(Floats));
        }
      }
    }
  }
}

#define COMPILE(LEVEL, TARGET, BF16, Q, L)                                                        \
  TARGET void scores_##LEVEL(const uint32_t* query, const uint32_t* reference,                    \
                             const float* start, int64_t chunks, float* out) {                    \
    scores<BF16, Q, L>(query, reference, start, chunks, out);                                     \
  }
#if defined(__x86_64__)
#define V3 __attribute__((target("avx2,fma")))
#define V4 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define BF16 __attribute__((target("avx512f,avx512bf16,prefer-vector-width=512")))
#define AMX __attribute__((target("avx512f,amx-tile,amx-bf16")))
constexpr int kPlainQ = 6;
COMPILE(v3, V3, false, 6, 8)
COMPILE(v4, V4, false, 12, 16)
COMPILE(bf16, BF16, true, 12, 16)
#else
constexpr int kPlainQ = 12;  // as with the 32 registers of ARM
#endif
COMPILE(baseline, , false, kPlainQ, 4)
#pragma GCC pop_options
#undef COMPILE

#if defined(__x86_64__)
// AMX: scores [32][32] of queries that are not transposed. The tile registers 0-3 hold them; a
// stride of 0 loads `start` into all 16 rows.
AMX void scores_amx(const uint32_t* query, const uint32_t* reference, const float* start,
                    int64_t chunks, float* out) {
  struct alignas(64) {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  _tile_loadconfig(&shape);
  _tile_loadd(0, start, 0);
  _tile_loadd(1, start + kTile, 0);
  _tile_loadd(2, start, 0);
  _tile_loadd(3, start + kTile, 0);
  const int64_t panel = chunks * kWords;
  for (int64_t c = 0; c < chunks; ++c, query += kWords, reference += kWords) {
    _tile_loadd(4, query, 64);
    _tile_loadd(6, reference, 64);
    _tile_loadd(7, reference + panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, query + panel, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 4 * kStep);
  _tile_stored(1, out + kTile, 4 * kStep);
  _tile_stored(2, out + kTile * kStep, 4 * kStep);
  _tile_stored(3, out + kTile * kStep + kTile, 4 * kStep);
}

V4 void passing_v4(const float* scores, const float* bound, int queries, uint32_t* mask) {
  for (int q = 0; q < queries; ++q, scores += kStep) {
    const __m512 limit = _mm512_set1_ps(bound[q]);
    const __m512 left = _mm512_loadu_ps(scores), right = _mm512_loadu_ps(scores + kTile);
    mask[q] = _mm512_cmp_ps_mask(left, limit, _CMP_GE_OQ) |
              uint32_t(_mm512_cmp_ps_mask(right, limit, _CMP_GE_OQ)) << kTile;
  }
}
V3 void passing_v3(const float* scores, const float* bound, int queries, uint32_t* mask) {
  passing(scores, bound, queries, mask);
}
#endif

#define COMPILE(LEVEL, TARGET, BF16, L)                                                           \
  TARGET void pack_##LEVEL(const float* const* rows, int pitch, bool transposed,                  \
                           const float* centre, int64_t d, uint32_t* out, float* square,          \
                           float* residual) {                                                     \
    pack<BF16, L>(rows, pitch, transposed, centre, d, out, square, residual);                     \
  }                                                                                               \
  TARGET double exact_##LEVEL(const float* x, const float* y, int64_t d) { return exact(x, y, d); }
COMPILE(baseline, , false, 4)
#if defined(__x86_64__)
COMPILE(v3, V3, false, 8)
COMPILE(v4, V4, false, 16)
COMPILE(bf16, V4, true, 16)

bool has_v3() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_bf16() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() {
#if defined(__linux__)  // the system has to be asked for the tile registers
  return has_v4() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}
// G flop/s of a thread, bf16 against fp32: 225 to 115 on AMD Zen 4, 66 to 133 on an Intel Xeon of
// model 207
bool is_slow(const char* level) {
  return !std::strcmp(level, "avx512bf16") && __builtin_cpu_is("intel");
}
#else
bool is_slow(const char*) { return false; }
#endif

struct Level {
  const char* name;
  bool bf16, tiles;
  int group, panel, pitch;  // queries scored at a time; of these in a panel; places in a panel
  bool (*supported)();
  decltype(&scores_baseline) scores;
  void (*passing)(const float* scores, const float* bound, int queries, uint32_t* mask);
  decltype(&pack_baseline) pack;
  decltype(&exact_baseline) exact;
};
const Level kLevels[] = {
#if defined(__x86_64__)
    {"amx", true, true, 32, 16, 16, has_amx, scores_amx, passing_v4, pack_bf16, exact_bf16},
    {"avx512bf16", true, false, 24, 12, 16, has_bf16, scores_bf16, passing_v4, pack_bf16,
     exact_bf16},
    {"v4", false, false, 24, 12, 16, has_v4, scores_v4, passing_v4, pack_v4, exact_v4},
    {"v3", false, false, 24, 6, 8, has_v3, scores_v3, passing_v3, pack_v3, exact_v3},
#endif
    {"baseline", false, false, 24, kPlainQ, (kPlainQ + 3) / 4 * 4, [] { return true; },
     scores_baseline, passing, pack_baseline, exact_baseline},
};

}  // namespace
