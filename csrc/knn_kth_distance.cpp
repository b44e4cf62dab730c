// knn_kth_distance: d(x; V, k) = |x - v_(k)|, the distance of each query to its k-th nearest
// reference row (VRF, Eq. 4). Reference in PyTorch: vrf.kth_distance.
// queries [N, D], reference [M, D], both row-major fp32 -> [N] fp32.
//
// Method. With a centre c, X = x - c, Y = y - c, the nearest row has the largest score
//     s_j = X.Y_j - |Y_j|^2 / 2            (|x - y_j|^2 = |X|^2 - 2 s_j).
//   filter   cheap scores s'_j: bf16 products accumulated in fp32 (fp32 products where the CPU has
//            no bf16)
//   bound    a running lower bound of the k-th best score; nearly every row fails it and is
//            forgotten
//   band     rigorous intervals [s'_j - e_j, s'_j + e_j] around the survivors: most are certainly
//            nearer, or certainly farther, than the k-th; only those whose interval meets the
//            k-th's stay undecided
//   refine   sum (x - y)^2 in fp64 for the undecided ones; the (k - certainly nearer)-th is the
//            answer
// The four functions below carry these names.
//
// The error e_j. Let X', Y' be the rounded vectors that are multiplied, dx >= |X - X'|,
// dy_j >= |Y_j - Y'_j| their residual norms as measured while rounding, nx >= |X|, ny_j >= |Y_j|.
// By Cauchy-Schwarz
//     |X.Y - X'.Y'| = |X.(Y - Y') + (X - X').Y'| <= nx dy + dx (ny + dy).
// The fp32 sum of D products (exact for bf16, once rounded for fp32) started at -|Y|^2/2 errs, in
// any order of summation, by at most gamma (|X'||Y'| + |Y|^2/2), gamma = (2 D + 8) 2^-24. Of this,
// D + 2 roundings to nearest are the products' and their sum's, min(D, 16) + D / 16 + 2 are those
// of |Y|^2/2, itself an fp32 sum in 16 lanes, and the rest covers those of s' - e_j and s' + e_j:
//     e_j = nx dy + dx (ny + dy) + gamma ((nx + dx)(ny + dy) + ny^2 / 2) + tiny
// where tiny = (D + 4) 2^-124 covers what underflows, also where the process flushes subnormal
// numbers to zero. Centring shrinks nx and ny, and so the band; any centre is right.
//
// Why the band is enough. k rows have s_j >= L = the k-th largest lower end, and at most k - 1 rows
// have s_j > U = the k-th largest upper end, so the k-th best score lies in [L, U]. A row with
// s'_j - e_j > U is strictly nearer, one with s'_j + e_j < L strictly farther; neither can be the
// k-th. While streaming, L may be replaced by anything not above it; a *guess* from a sample is
// used (see `bound`) and verified at the end, when L is known: where it was too high, the query is
// done again without guesses.
//
// Memory traffic: inputs are read once per pass over the queries (4,000 or more at small k); scores
// live in registers and a 4 KiB buffer, so no distance matrix exists. Scratch is at most about
// 64 + 16 MiB.
// Result: fp64 differences summed in one fixed order, so the same bits for any number of threads
// and for any instruction set; near-duplicates keep full relative precision, unlike
// |x|^2 + |y|^2 - 2 x.y.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

// A tile is 16 rows x 16 words of 4 bytes; a word is one fp32 or a pair of bf16. Query tiles hold a
// query per row; reference tiles are transposed, a reference per column, so that one vector load
// meets 16 references. A row of D values is `chunks` tiles deep. Scores are made 32 queries x 32
// references at a time.
constexpr int kTile = 16;
constexpr int kWords = kTile * kTile;
constexpr int kGroup = 2 * kTile;
constexpr int64_t kBlockBytes = 1 << 18;  // packed references at work: they stay in L2
constexpr int64_t kSpan = 64;  // blocks packed between two barriers: waiting is dear when busy
constexpr int64_t kTeam = 8;  // groups of queries that share a block while it is in a thread's L2
constexpr int64_t kBufferBytes = 64 << 20;  // survivors of all queries of one pass
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float v16f __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef float v8f __attribute__((vector_size(32)));
typedef double v8d __attribute__((vector_size(64)));

template <class V>
INLINE V load(const void* p) {  // unaligned
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// ---- pieces compiled once per instruction set ----

// Centres and rounds one chunk of a row; adds to the sums of squares of the value and of the
// residual. bf16: word j pairs elements j and 16 + j of the chunk. Both sides do, so the products
// are unchanged, and no shuffle is needed. Subnormal bf16 are set to zero, as the hardware would
// read them.
template <bool bf16>
INLINE v16u round_chunk(const float* x, const float* centre, v16f& square, v16f& residual) {
  v16u word = {};
  for (int half = 0; half < (bf16 ? 2 : 1); ++half) {
    v16f value = load<v16f>(x + 16 * half) - load<v16f>(centre + 16 * half);
    square += value * value;
    v16u bits = (v16u)value;
    if (bf16) {
      bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;  // round to nearest, ties to even
      bits &= (v16u)((bits & 0x7f800000u) != 0);
      v16f lost = value - (v16f)bits;
      residual += lost * lost;
      bits = half ? bits : bits >> 16;
    }
    word |= bits;
  }
  return word;
}

// Transposes a tile. Four rounds of exchanges where the CPU has a shuffle of two 64-byte vectors:
// half the time of word by word.
template <bool shuffle>
INLINE void transpose_tile(uint32_t* tile) {
  if (!shuffle) {
    for (int r = 0; r < kTile; ++r)
      for (int w = 0; w < r; ++w) std::swap(tile[r * kTile + w], tile[w * kTile + r]);
    return;
  }
  v16u row[kTile], i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  std::memcpy(row, tile, sizeof row);
#pragma GCC unroll 4
  for (unsigned s = 1; s < kTile; s *= 2) {
    const v16u upper = (v16u)((i & s) != 0), left = i + (upper & (kTile - s)),
               right = i + s + (upper & (kTile - s));
#pragma GCC unroll 16
    for (unsigned r = 0; r < kTile; ++r) {
      if (r & s) continue;
      const v16u a = row[r], b = row[r + s];
      row[r] = __builtin_shuffle(a, b, left);
      row[r + s] = __builtin_shuffle(a, b, right);
    }
  }
  std::memcpy(tile, row, sizeof row);
}

// Packs 16 rows (nullptr: a row of zeros) into `chunks` tiles, a query per row or a reference per
// column.
template <bool bf16, bool transpose, bool shuffle>
INLINE void pack(const float* const* rows, const float* centre, int64_t d, uint32_t* out,
                 float* square, float* residual) {
  constexpr int width = bf16 ? 32 : 16;
  const int64_t whole = d / width, chunks = (d + width - 1) / width;
  for (int r = 0; r < kTile; ++r) {
    v16f sum = {}, lost = {};
    if (transpose && r + 1 < kTile && rows[r + 1])  // reference rows lie far apart in memory
      for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(rows[r + 1] + i);
    for (int64_t c = 0; c < chunks; ++c) {
      v16u word = {};
      if (rows[r] && c < whole) {
        word = round_chunk<bf16>(rows[r] + c * width, centre + c * width, sum, lost);
      } else if (rows[r]) {
        float x[width] = {}, m[width] = {};
        std::copy(rows[r] + c * width, rows[r] + d, x);
        std::copy(centre + c * width, centre + d, m);
        word = round_chunk<bf16>(x, m, sum, lost);
      }
      std::memcpy(out + c * kWords + r * kTile, &word, sizeof word);
    }
    square[r] = residual[r] = 0;
    for (int l = 0; l < 16; ++l) square[r] += sum[l], residual[r] += lost[l];
  }
  if (transpose)
    for (int64_t c = 0; c < chunks; ++c) transpose_tile<shuffle>(out + c * kWords);
}

// sum (x - y)^2 in fp64, in one fixed order: 16 running sums, then these one after the other.
INLINE double exact(const float* x, const float* y, int64_t d) {
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

// What an instruction set supplies. scores: out[32][32] from 2 query and 2 reference panels of
// `chunks` tiles, started at `start`. passing: bit j of mask[i] says that score [i][j] reaches
// bound[i].
struct InstructionSet {
  const char* name;
  bool bf16;
  bool (*supported)();
  void (*scores)(const uint32_t* query, const uint32_t* reference, const float* start,
                 int64_t chunks, float* out);
  void (*passing)(const float* scores, const float* bound, uint32_t* mask);
  void (*pack_queries)(const float* const*, const float*, int64_t, uint32_t*, float*, float*);
  void (*pack_reference)(const float* const*, const float*, int64_t, uint32_t*, float*, float*);
  double (*exact)(const float*, const float*, int64_t);
};

// Plain C++: 4 queries x 8 references in registers.
void scores_portable(const uint32_t* query, const uint32_t* reference, const float* start,
                     int64_t chunks, float* out) {
  typedef float v4f __attribute__((vector_size(16)));
  for (int q = 0; q < kGroup; q += 4) {
    for (int r = 0; r < kGroup; r += 8) {
      const auto* x = (const float*)query + (q / kTile) * chunks * kWords + (q % kTile) * kTile;
      const auto* y = (const float*)reference + (r / kTile) * chunks * kWords + r % kTile;
      v4f sum[4][2];
      for (auto& row : sum) row[0] = load<v4f>(start + r), row[1] = load<v4f>(start + r + 4);
      for (int64_t c = 0; c < chunks; ++c, x += kWords, y += kWords) {
        for (int w = 0; w < kTile; ++w) {
          const v4f left = load<v4f>(y + w * kTile), right = load<v4f>(y + w * kTile + 4);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            sum[i][0] += x[i * kTile + w] * left;
            sum[i][1] += x[i * kTile + w] * right;
          }
        }
      }
      for (int i = 0; i < 4; ++i) std::memcpy(out + (q + i) * kGroup + r, sum[i], sizeof sum[i]);
    }
  }
}

void passing_portable(const float* scores, const float* bound, uint32_t* mask) {
  for (int q = 0; q < kGroup; ++q, scores += kGroup) {
    int any = 0;  // nearly always 0, and this loop is vectorised
    for (int r = 0; r < kGroup; ++r) any |= scores[r] >= bound[q];
    mask[q] = 0;
    for (int r = 0; any && r < kGroup; ++r) mask[q] |= uint32_t(scores[r] >= bound[q]) << r;
  }
}

#define PIECES(NAME, BF16, SHUFFLE, TARGET)                                                   \
  TARGET void pack_queries_##NAME(const float* const* rows, const float* centre, int64_t d,   \
                                  uint32_t* out, float* square, float* residual) {            \
    pack<BF16, false, SHUFFLE>(rows, centre, d, out, square, residual);                       \
  }                                                                                           \
  TARGET void pack_reference_##NAME(const float* const* rows, const float* centre, int64_t d, \
                                    uint32_t* out, float* square, float* residual) {          \
    pack<BF16, true, SHUFFLE>(rows, centre, d, out, square, residual);                        \
  }                                                                                           \
  TARGET double exact_##NAME(const float* x, const float* y, int64_t d) { return exact(x, y, d); }

PIECES(portable, false, false, )
bool always() { return true; }

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define AVX512BF16 __attribute__((target("avx512f,avx512bf16")))
#define AMX __attribute__((target("avx512f,amx-tile,amx-bf16")))

// AVX2: 4 queries x 16 references in 8 registers.
AVX2 void scores_avx2(const uint32_t* query, const uint32_t* reference, const float* start,
                      int64_t chunks, float* out) {
  for (int r = 0; r < kGroup; r += kTile) {
    for (int q = 0; q < kGroup; q += 4) {
      const auto* x = (const float*)query + (q / kTile) * chunks * kWords + (q % kTile) * kTile;
      const auto* y = (const float*)reference + (r / kTile) * chunks * kWords;
      __m256 sum[4][2];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        sum[i][0] = _mm256_loadu_ps(start + r);
        sum[i][1] = _mm256_loadu_ps(start + r + 8);
      }
      for (int64_t c = 0; c < chunks; ++c, x += kWords, y += kWords) {
        for (int w = 0; w < kTile; ++w) {
          const __m256 left = _mm256_loadu_ps(y + w * kTile),
                       right = _mm256_loadu_ps(y + w * kTile + 8);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m256 value = _mm256_broadcast_ss(x + i * kTile + w);
            sum[i][0] = _mm256_fmadd_ps(value, left, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(value, right, sum[i][1]);
          }
        }
      }
      // stored one by one: a memcpy would keep `sum` in memory all along
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(out + (q + i) * kGroup + r, sum[i][0]);
        _mm256_storeu_ps(out + (q + i) * kGroup + r + 8, sum[i][1]);
      }
    }
  }
}

AVX2 void passing_avx2(const float* scores, const float* bound, uint32_t* mask) {
  for (int q = 0; q < kGroup; ++q, scores += kGroup) {
    const __m256 limit = _mm256_set1_ps(bound[q]);
    mask[q] = 0;
    for (int r = 0; r < kGroup; r += 8) {
      const __m256 pass = _mm256_cmp_ps(_mm256_loadu_ps(scores + r), limit, _CMP_GE_OQ);
      mask[q] |= uint32_t(_mm256_movemask_ps(pass)) << r;
    }
  }
}

// AVX-512: 8 queries x 32 references in 16 registers; a query's word is broadcast from memory.
template <bool bf16>
AVX512BF16 void scores_avx512(const uint32_t* query, const uint32_t* reference, const float* start,
                              int64_t chunks, float* out) {
  for (int q = 0; q < kGroup; q += 8) {
    const uint32_t* x = query + (q / kTile) * chunks * kWords + (q % kTile) * kTile;
    const uint32_t* y = reference;
    __m512 sum[8][2];
    for (auto& row : sum) row[0] = _mm512_loadu_ps(start), row[1] = _mm512_loadu_ps(start + kTile);
    for (int64_t c = 0; c < chunks; ++c, x += kWords, y += kWords) {
#pragma GCC unroll 4
      for (int w = 0; w < kTile; ++w) {
        const __m512i left = _mm512_loadu_si512(y + w * kTile),
                      right = _mm512_loadu_si512(y + chunks * kWords + w * kTile);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m512i value = _mm512_set1_epi32(x[i * kTile + w]);
          if (bf16) {
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], (__m512bh)value, (__m512bh)left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], (__m512bh)value, (__m512bh)right);
          } else {
            sum[i][0] = _mm512_fmadd_ps((__m512)value, (__m512)left, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps((__m512)value, (__m512)right, sum[i][1]);
          }
        }
      }
    }
    for (int i = 0; i < 8; ++i) std::memcpy(out + (q + i) * kGroup, sum[i], sizeof sum[i]);
  }
}

AVX512 void passing_avx512(const float* scores, const float* bound, uint32_t* mask) {
  for (int q = 0; q < kGroup; ++q, scores += kGroup) {
    const __m512 limit = _mm512_set1_ps(bound[q]);
    mask[q] = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores), limit, _CMP_GE_OQ) |
              uint32_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(scores + kTile), limit, _CMP_GE_OQ))
                  << kTile;
  }
}

// AMX: the tile registers 0-3 hold 32 x 32 scores; a stride of 0 loads `start` into all 16 rows.
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
  _tile_stored(0, out, 4 * kGroup);
  _tile_stored(1, out + kTile, 4 * kGroup);
  _tile_stored(2, out + kTile * kGroup, 4 * kGroup);
  _tile_stored(3, out + kTile * kGroup + kTile, 4 * kGroup);
}

PIECES(avx2, false, false, AVX2)
PIECES(avx512, false, true, AVX512)
PIECES(avx512bf16, true, true, AVX512)

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() {
#if defined(__linux__)
  unsigned a = 7, b = 0, c = 0, d = 0;  // CPUID leaf 7: EDX bit 22 AMX-BF16, bit 24 AMX-TILE
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool there = (d >> 22 & 1) && (d >> 24 & 1) && has_avx512bf16();
  return there &&
         syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}
#endif

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"amx", true, has_amx, scores_amx, passing_avx512, pack_queries_avx512bf16,
     pack_reference_avx512bf16, exact_avx512},
    {"avx512bf16", true, has_avx512bf16, scores_avx512<true>, passing_avx512,
     pack_queries_avx512bf16, pack_reference_avx512bf16, exact_avx512},
    {"avx512", false, has_avx512, scores_avx512<false>, passing_avx512, pack_queries_avx512,
     pack_reference_avx512, exact_avx512},
    {"avx2", false, has_avx2, scores_avx2, passing_avx2, pack_queries_avx2, pack_reference_avx2,
     exact_avx2},
#endif
    {"portable", false, always, scores_portable, passing_portable, pack_queries_portable,
     pack_reference_portable, exact_portable},
};

const InstructionSet* find(const char* name) {
  for (const auto& set : kSets)
    if (!std::strcmp(set.name, name) && set.supported()) return &set;
  return nullptr;
}

// ---- the four steps ----

struct Survivor {
  float score;
  uint32_t row;
};

// A query under way: its norms, the best known lower bound of its k-th best score, survivors.
struct Query {
  int64_t id = 0;
  float norm = 0, residual = 0;
  float lower = -kInfinity;
  bool overflow = false;  // so many rows cannot be told apart that brute force is cheaper
  std::vector<Survivor> survivors;
};

// A packed side: tiles and, per row, upper bounds of the norm and of the residual's norm.
struct Packed {
  std::vector<uint32_t> storage;
  uint32_t* words;  // in `storage`, on a cache line: straddling tiles cost 1.5 times the time
  std::vector<float> norm, residual, start;  // start: -|Y|^2 / 2, where the sum of products begins
};

struct Search {
  const InstructionSet& set;
  const float *queries, *reference;
  int64_t m, d, k, chunks, block_rows, blocks;
  int threads = 1;
  float slack = 0;  // a factor for the fp32 rounding of the norms and of the error terms themselves
  float gamma = 0, tiny = 0;  // of the header
  float floor = 0;            // covers squares that underflow in a sum of squares
  bool guess = true;          // see `bound`
  std::vector<float> centre, norm, residual;  // [D], [M], [M]; the last two as far as packed

  // Block b holds rows b, b + blocks, b + 2 blocks, ...: every block is a strided sample of the
  // reference, so the cost does not depend on how the rows are ordered (sorted by class is the bad
  // case otherwise).
  int64_t rows_in(int64_t b) const { return (m - b + blocks - 1) / blocks; }
  int64_t padded() const { return (block_rows + kGroup - 1) / kGroup * kGroup; }

  // e_j of the header.
  float error(const Query& q, float ny, float dy) const {
    return slack * (q.norm * dy + q.residual * (ny + dy) +
                     gamma * ((q.norm + q.residual) * (ny + dy) + 0.5f * ny * ny) + tiny);
  }
  float error(const Query& q, uint32_t row) const { return error(q, norm[row], residual[row]); }
};

// Filter: scores of 32 queries against one block (packed from row `first` on); rows that reach a
// query's bound survive. Work: 32 x 32 scores of D products, then 32 compares of 32 scores;
// survivors are about 1 in 50 and fewer. `worst` is the largest e_j of the block for each query, so
// no row that may matter is dropped.
void bound(const Search& s, Query& q, int64_t rows_seen);

void filter(const Search& s, Query* group, int count, const uint32_t* query_tiles, int64_t block,
            const Packed& packed, int64_t first, int64_t rows_seen) {
  alignas(64) float scores[kGroup * kGroup], limit[kGroup];
  uint32_t mask[kGroup];
  const int64_t rows = s.rows_in(block), room = 4 * s.k + 16384;
  const float ny = *std::max_element(&packed.norm[first], &packed.norm[first] + rows);
  const float dy = *std::max_element(&packed.residual[first], &packed.residual[first] + rows);
  float worst[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    worst[i] = i < count ? s.error(group[i], ny, dy) : 0;
    limit[i] = i < count && !group[i].overflow ? group[i].lower - worst[i] : kInfinity;
  }
  for (int64_t r = 0; r < rows; r += kGroup) {
    s.set.scores(query_tiles, &packed.words[(first + r) * s.chunks * kTile],
                 &packed.start[first + r], s.chunks, scores);
    s.set.passing(scores, limit, mask);
    const uint32_t real = rows - r < kGroup ? (1u << (rows - r)) - 1 : ~0u;  // the rest is padding
    for (int i = 0; i < count; ++i) {
      uint32_t hits = mask[i] & real;
      if (!hits) continue;
      Query& q = group[i];
      if (q.survivors.size() + kGroup > q.survivors.capacity()) {
        bound(s, q, rows_seen);
        if (2 * q.survivors.size() > q.survivors.capacity()) {
          if (int64_t(q.survivors.size()) > room) {
            q.overflow = true;
            std::vector<Survivor>().swap(q.survivors);
          } else {
            q.survivors.reserve(2 * q.survivors.capacity());
          }
        }
        limit[i] = q.overflow ? kInfinity : q.lower - worst[i];
      }
      for (; hits && !q.overflow; hits &= hits - 1) {
        const int j = __builtin_ctz(hits);
        q.survivors.push_back({scores[i * kGroup + j], uint32_t(block + (r + j) * s.blocks)});
      }
    }
  }
}

// Bound: raises q.lower and drops the survivors below it. A fraction p of the reference (rows_seen:
// whole blocks, the one at work included, so a strided sample) holds about e = k p of the k best
// rows, and more than e + 6 sqrt(e) + 8 almost never: the survivor of that rank bounds the k-th
// best from below long before k rows are known. It is a guess, and `band` verifies it. Without
// guesses the rank is k.
void bound(const Search& s, Query& q, int64_t rows_seen) {
  const double expected = double(s.k) * double(rows_seen) / double(s.m);
  int64_t rank = s.k;
  if (s.guess)
    rank = std::min(rank, int64_t(std::ceil(expected + 6 * std::sqrt(expected) + 8)));
  if (int64_t(q.survivors.size()) < rank) return;
  static thread_local std::vector<float> low;
  low.clear();
  for (const auto& v : q.survivors) low.push_back(v.score - s.error(q, v.row));
  std::nth_element(low.begin(), low.begin() + (rank - 1), low.end(), std::greater<float>());
  q.lower = std::max(q.lower, low[rank - 1]);
  auto below = [&](const Survivor& v) { return v.score + s.error(q, v.row) < q.lower; };
  q.survivors.erase(std::remove_if(q.survivors.begin(), q.survivors.end(), below),
                    q.survivors.end());
}

// Band: leaves the undecided rows in q.survivors and returns which of them, counted from 1 by
// distance, is the k-th of all; 0 if a guess was too high and rows are missing.
int64_t band(const Search& s, Query& q) {
  if (int64_t(q.survivors.size()) < s.k) return 0;
  std::vector<float> low, high;
  for (const auto& v : q.survivors) {
    const float e = s.error(q, v.row);
    low.push_back(v.score - e);
    high.push_back(v.score + e);
  }
  std::vector<float> sorted = low;
  std::nth_element(sorted.begin(), sorted.begin() + (s.k - 1), sorted.end(), std::greater<float>());
  const float lower = sorted[s.k - 1];
  if (lower < q.lower) return 0;
  sorted = high;
  std::nth_element(sorted.begin(), sorted.begin() + (s.k - 1), sorted.end(), std::greater<float>());
  const float upper = sorted[s.k - 1];
  int64_t nearer = 0, kept = 0;
  for (size_t i = 0; i < q.survivors.size(); ++i) {
    if (low[i] > upper) ++nearer;
    else if (high[i] >= lower) q.survivors[kept++] = q.survivors[i];
  }
  q.survivors.resize(kept);
  return s.k - nearer;
}

// Refine: exact distances of the undecided rows, and the rank-th of them for each query. Rows are
// visited 256 at a time for all queries, so that they come from the cache and not once per pair
// from memory.
void refine(const Search& s, const std::vector<Query>& group, const std::vector<int64_t>& rank,
            float* out) {
  constexpr int64_t kBucket = 256;
  std::vector<int64_t> first(group.size() + 1, 0);
  for (size_t i = 0; i < group.size(); ++i)
    first[i + 1] = first[i] + (rank[i] ? int64_t(group[i].survivors.size()) : 0);
  struct Pair {
    uint32_t query, row;
    int64_t slot;
  };
  std::vector<Pair> pairs(first.back());
  std::vector<double> distance(first.back());
  const int64_t buckets = s.m / kBucket + 1;
  std::vector<int64_t> place(buckets + 1, 0);
  for (size_t i = 0; i < group.size(); ++i)
    for (int64_t j = 0; j < first[i + 1] - first[i]; ++j)
      ++place[group[i].survivors[j].row / kBucket + 1];
  for (int64_t b = 0; b < buckets; ++b) place[b + 1] += place[b];
  std::vector<int64_t> begin = place;
  for (size_t i = 0; i < group.size(); ++i) {
    for (int64_t j = 0; j < first[i + 1] - first[i]; ++j) {
      const uint32_t row = group[i].survivors[j].row;
      pairs[place[row / kBucket]++] = {uint32_t(i), row, first[i] + j};
    }
  }
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < buckets; ++b) {
    for (int64_t p = begin[b]; p < begin[b + 1]; ++p) {
      const Pair& pair = pairs[p];
      distance[pair.slot] =
          s.set.exact(s.queries + group[pair.query].id * s.d, s.reference + pair.row * s.d, s.d);
    }
  }
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 16)
  for (int64_t i = 0; i < int64_t(group.size()); ++i) {
    if (!rank[i]) continue;
    const auto start = distance.begin() + first[i];
    std::nth_element(start, start + (rank[i] - 1), distance.begin() + first[i + 1]);
    out[group[i].id] = float(std::sqrt(start[rank[i] - 1]));
  }
}

// ---- around them ----

// Brute force in fp64 for a query whose survivors do not fit (many thousands of equal distances).
float brute(const Search& s, int64_t id) {
  std::vector<double> distance(s.m);
  for (int64_t j = 0; j < s.m; ++j)
    distance[j] = s.set.exact(s.queries + id * s.d, s.reference + j * s.d, s.d);
  std::nth_element(distance.begin(), distance.begin() + (s.k - 1), distance.end());
  return float(std::sqrt(distance[s.k - 1]));
}

// Packs rows given by `source(i)`, 16 at a time, and takes their norms. False if one is not finite
// or too long.
template <class Source>
bool pack_rows(const Search& s, bool transpose, int64_t rows, const Source& source, Packed& out) {
  const int64_t panels = (rows + kGroup - 1) / kGroup * 2;
  out.storage.resize(panels * s.chunks * kWords + kTile);
  out.words = (uint32_t*)((uintptr_t(out.storage.data()) + 63) & ~uintptr_t(63));
  out.norm.resize(panels * kTile);
  out.residual.resize(panels * kTile);
  out.start.resize(panels * kTile);
  const auto packer = transpose ? s.set.pack_reference : s.set.pack_queries;
  bool good = true;
#pragma omp parallel for num_threads(s.threads) schedule(static) reduction(&& : good)
  for (int64_t p = 0; p < panels; ++p) {
    const float* from[kTile];
    for (int r = 0; r < kTile; ++r)
      from[r] = p * kTile + r < rows ? source(p * kTile + r) : nullptr;
    float *norm = &out.norm[p * kTile], *residual = &out.residual[p * kTile];
    packer(from, s.centre.data(), s.d, &out.words[p * s.chunks * kWords], norm, residual);
    for (int r = 0; r < kTile; ++r) {
      good = good && norm[r] < 1e36f;  // false for NaN as well
      out.start[p * kTile + r] = -0.5f * norm[r];
      norm[r] = std::sqrt(norm[r]) * s.slack + s.floor;
      // x - c is itself rounded
      residual[r] = std::sqrt(residual[r]) * s.slack + norm[r] * 0x1p-23f + s.floor;
    }
  }
  return good;
}

// Which row made `pack_rows` complain: a centre spoilt by one row makes all the others look bad, so
// search them.
std::string complaint(const Search& s, int64_t n) {
  for (int64_t j = 0; j < n + s.m; ++j) {
    const float* row = j < n ? s.queries + j * s.d : s.reference + (j - n) * s.d;
    double square = 0;
    for (int64_t i = 0; i < s.d; ++i) square += double(row[i]) * row[i];
    if (square < 0.25e36) continue;
    return std::string("knn_kth_distance: ") + (j < n ? "queries" : "reference") + " row " +
           std::to_string(j < n ? j : j - n) +
           (std::isfinite(square) ? " is longer than 5e17; scale both arguments down"
                                  : " holds NaN or infinity");
  }
  return "knn_kth_distance: rows are too long; scale both arguments down";
}

// One pass: all blocks of the reference against some queries. Fills out; queries whose guess failed
// are left in `again`. False if a row is not finite or too long.
bool pass(Search& s, const std::vector<int64_t>& ids, float* out, std::vector<int64_t>& again) {
  std::vector<Query> group(ids.size());
  Packed query, block;
  const auto query_row = [&](int64_t i) { return s.queries + ids[i] * s.d; };
  if (!pack_rows(s, false, int64_t(ids.size()), query_row, query)) return false;
  const int64_t capacity = std::min(s.m, std::max(s.block_rows, 2 * s.k) + 1024) + kGroup;
  for (size_t i = 0; i < ids.size(); ++i) {
    group[i].id = ids[i];
    group[i].norm = query.norm[i];
    group[i].residual = query.residual[i];
    group[i].survivors.reserve(capacity);
  }
  const int64_t groups = int64_t(query.norm.size()) / kGroup, padded = s.padded();
  const int64_t team = std::min(kTeam, (groups - 1) / s.threads + 1);
  for (int64_t from = 0; from < s.blocks; from += kSpan) {
    const int64_t to = std::min(from + kSpan, s.blocks);
    const auto reference_row = [&](int64_t i) {
      const int64_t b = from + i / padded, r = i % padded;
      return r < s.rows_in(b) ? s.reference + (b + r * s.blocks) * s.d : nullptr;
    };
    if (!pack_rows(s, true, (to - from) * padded, reference_row, block)) return false;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t r = 0; r < s.block_rows; ++r) {
      for (int64_t b = from; b < to && b + r * s.blocks < s.m; ++b) {
        s.norm[b + r * s.blocks] = block.norm[(b - from) * padded + r];
        s.residual[b + r * s.blocks] = block.residual[(b - from) * padded + r];
      }
    }
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 1)
    for (int64_t t = 0; t < groups; t += team) {
      for (int64_t b = from; b < to; ++b) {
        const int64_t seen = (b + 1) * s.rows_in(s.blocks - 1) + std::min(b + 1, s.m % s.blocks);
        for (int64_t g = t; g < std::min(t + team, groups); ++g) {
          Query* first = &group[g * kGroup];
          const int count = int(std::min<int64_t>(kGroup, int64_t(ids.size()) - g * kGroup));
          filter(s, first, count, &query.words[g * kGroup * s.chunks * kTile], b, block,
                 (b - from) * padded, seen);
          // a fresh guess at 1, 4, 16, 64 ... blocks: the sample grows, the guess sharpens
          if (((b + 1) & b) == 0 && ((b + 1) & 0x5555555555555555))
            for (int i = 0; i < count; ++i) bound(s, first[i], seen);
        }
      }
    }
  }
  std::vector<int64_t> rank(ids.size(), 0);
#pragma omp parallel for num_threads(s.threads) schedule(dynamic, 16)
  for (int64_t i = 0; i < int64_t(ids.size()); ++i) {
    if (group[i].overflow) out[ids[i]] = brute(s, ids[i]);
    else rank[i] = band(s, group[i]);
  }
  for (size_t i = 0; i < ids.size(); ++i)
    if (!rank[i] && !group[i].overflow) again.push_back(ids[i]);
  refine(s, group, rank, out);
  return true;
}

}  // namespace

extern "C" const char* best_instruction_set() {
  for (const auto& set : kSets) {
#if defined(__x86_64__)
    // G flop/s of a thread, bf16 against fp32: 225 to 115 on AMD Zen 4, 66 to 133 on an Intel Xeon
    // of model 207
    if (!std::strcmp(set.name, "avx512bf16") && __builtin_cpu_is("intel")) continue;
#endif
    if (set.supported()) return set.name;
  }
  return "portable";
}

extern "C" bool has_instruction_set(const char* name) { return find(name) != nullptr; }

extern "C" const char* knn_kth_distance_cpu(const float* queries, int64_t n, const float* reference,
                                            int64_t m, int64_t d, int64_t k,
                                            const char* instruction_set, int threads, float* out) {
  static thread_local std::string problem;
  const InstructionSet* set = find(instruction_set);
  if (!set) return "knn_kth_distance: this CPU does not offer the instruction set asked for";
  if (n == 0) return nullptr;
  if (d < 1 || k < 1 || k > m || m >= int64_t(1) << 32 || n >= int64_t(1) << 32)
    return "knn_kth_distance: needs D >= 1, 1 <= k <= M, and fewer than 2^32 rows";
  const int64_t width = set->bf16 ? 32 : 16, chunks = (d + width - 1) / width;
  const int64_t fitting = kBlockBytes / (chunks * kTile * 4) / kGroup * kGroup;
  const int64_t blocks = (m - 1) / std::max<int64_t>(fitting, 8 * kGroup) + 1;
  Search s{*set, queries, reference, m, d, k, chunks, (m - 1) / blocks + 1, blocks};
  s.threads = std::max(threads, 1);
  s.slack = 1.0001f + d * 0x1p-27f;
  s.gamma = (2.0f * d + 8) * 0x1p-24f;
  s.tiny = (d + 4.0f) * 0x1p-124f;
  s.floor = std::sqrt(float(d)) * 0x1p-62f;
  s.norm.resize(m);
  s.residual.resize(m);

  std::vector<double> sum(d, 0);  // centre: the mean of the first block
  for (int64_t j = 0; j < m; j += blocks)
    for (int64_t i = 0; i < d; ++i) sum[i] += reference[j * d + i];
  for (int64_t i = 0; i < d; ++i) s.centre.push_back(float(sum[i] / double(s.rows_in(0))));

  const int64_t each =
      8 * (std::min(m, std::max(s.block_rows, 2 * k) + 1024) + kGroup) + 4 * width * chunks;
  const int64_t at_once = std::max<int64_t>(kBufferBytes / each / kGroup, s.threads) * kGroup;
  std::vector<int64_t> todo(n), again;
  for (int64_t i = 0; i < n; ++i) todo[i] = i;
  while (!todo.empty()) {
    for (size_t first = 0; first < todo.size(); first += at_once) {
      const auto begin = todo.begin() + first,
                 end = todo.begin() + std::min(first + at_once, todo.size());
      if (!pass(s, std::vector<int64_t>(begin, end), out, again)) {
        problem = complaint(s, n);
        return problem.c_str();
      }
    }
    todo.swap(again);
    again.clear();
    s.guess = false;
  }
  return nullptr;
}
