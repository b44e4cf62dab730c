// knn_kth_distance on CUDA: Euclidean distance of each query to its k-th nearest reference row (VRF
// Eq. 4), exact. Reference in PyTorch: vrf.knn_kth_distance.
// queries [n, d], reference [m, d], both row-major fp32 -> [n] fp32.
//
// Method, k <= 16384: five steps per batch of queries, no distance matrix in device memory. Larger
// k, and the few queries that the filter cannot decide: brute force, a block per query, see
// knn_brute_kernel.
//   pack    both sides, centred by a given row (distances do not change), rounded to bf16;
//           the lengths of the rounded rows and of what the rounding cut off. The reference is
//           packed in a scattered order, so that any first part of it is a fair sample even where
//           the rows are sorted by class.
//   filter  scores s' = x.y - |y|^2 / 2 on tensor cores (wmma, fp32 accumulation);
//           s = (|x|^2 - |x - y|^2) / 2, so the largest score is the nearest row. Rows with
//           s' >= bound(x) are appended to the query's survivors.
//   bound   the reference goes through the filter in slabs, each eight times the rows before it.
//           After a slab of `seen` rows, bound(x) = (the rank-th best score so far) - 2 E(x),
//           rank = min(k, e + 6 sqrt(e) + 8), e = k seen / m: below the k-th best score of all rows
//           but for chance, see `refine`.
//   band    |s - s'| <= E(x) = |x| max|y - y'| + |x - x'| max|y'|
//                              + (d + 8) 2^-22 (|x'| max|y'| + max|y|^2 / 2).
//           The first two terms are x.y - x'.y' = x.(y - y') + (x - x').y'; the third covers fp32
//           sums in any order and with truncation, as tensor cores do them (at most 5/4 d steps of
//           2^-23 of the largest), the rounding of |y|^2 / 2 and of comparisons.
//   refine  T = k-th best s'. A row with s' > T + 2 E is nearer than the k-th: at most k - 1 rows
//           can have s > T + E. One with s' < T - 2 E is farther: k rows have s >= T - E. Those
//           between are computed again by differences in fp64, and the k-th smallest of all is the
//           answer. Where T - 2 E < bound, or a list ran over, or numbers overflowed, the filter
//           has decided nothing, and the query is done by brute force.
//
// Memory traffic: a tile of 128 queries x 128 rows is multiplied out of shared memory and ends in
// registers; the reference is read once per 128 queries, mostly from L2. Scratch: the bf16 copies
// and room for about 10 k survivors a query, 256 MiB of them at a time.
// Result: exact distances are fp64 sums in one fixed order, rounded once. Survivors are appended in
// any order, but a k-th smallest does not depend on it: repeatable bit for bit.
// sm_75 has no bf16 tensor cores: there the same code rounds to fp16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <mma.h>

#include "kernels.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kLargestFastK = 16384;

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

// The distance as Eq. 4 has it. The whole warp calls it; every lane gets the result.
__device__ float exact_distance(const float* x, const float* y, int64_t d) {
  double sum = 0.0;
  for (int64_t i = lane(); i < d; i += 32) {
    const double difference = double(x[i]) - double(y[i]);
    sum += difference * difference;
  }
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  return float(sqrt(sum));
}

// ---- the k-th smallest of many 32-bit keys, eight bits at a time, nothing stored or sorted ----
// prefix: the digits found so far; rank: how many of the keys with this prefix are smaller than the
// wanted one.
struct Search {
  unsigned prefix;
  unsigned rank;
};

__device__ void count_key(unsigned* histogram, unsigned key, const Search& search, int shift) {
  const unsigned known = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
  if ((key & known) == search.prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
}

__device__ void clear_histogram(unsigned* histogram) {
  for (int bin = threadIdx.x; bin < 256; bin += kThreads) histogram[bin] = 0;
  __syncthreads();
}

// Once all keys are counted: which digit holds the wanted rank. The whole block calls it.
__device__ Search choose_digit(unsigned* histogram, const Search& search, int shift) {
  __shared__ Search found;
  __syncthreads();
  if (warp() == 0) {
    unsigned own = 0;  // each lane has eight bins
    for (int bin = 0; bin < 8; ++bin) own += histogram[8 * lane() + bin];
    unsigned up_to = own;  // inclusive sum over the lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned below = __shfl_up_sync(kAllLanes, up_to, distance);
      if (lane() >= distance) up_to += below;
    }
    unsigned before = up_to - own;
    if (search.rank >= before && search.rank < up_to) {  // one lane
      int bin = 8 * lane();
      while (search.rank >= before + histogram[bin]) before += histogram[bin++];
      found.prefix = search.prefix | unsigned(bin) << shift;
      found.rank = search.rank - before;
    }
  }
  __syncthreads();
  const Search next = found;
  clear_histogram(histogram);
  return next;
}

// ---- brute force: the k-th smallest distance digit by digit, all distances computed anew for each
// of the four. `only` (may be null) marks the queries to do.
__global__ void __launch_bounds__(kThreads)
    knn_brute_kernel(const float* queries, int64_t n, const float* reference, int64_t m, int64_t d,
                     int64_t k, const int* only, float* out) {
  __shared__ unsigned histogram[256];
  for (int64_t q = blockIdx.x; q < n; q += gridDim.x) {
    if (only != nullptr && only[q] == 0) continue;
    clear_histogram(histogram);
    Search search = {0u, unsigned(k - 1)};
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int64_t row = warp(); row < m; row += kWarps) {
        const float distance = exact_distance(queries + q * d, reference + row * d, d);
        // the bits of floats >= 0 sort as the floats do
        if (lane() == 0) count_key(histogram, __float_as_uint(distance), search, shift);
      }
      search = choose_digit(histogram, search, shift);
    }
    if (threadIdx.x == 0) out[q] = __uint_as_float(search.prefix);
  }
}

// ---- the five steps ----
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
typedef __half Narrow;
__device__ float widen(Narrow value) { return __half2float(value); }
__device__ Narrow narrow(float value) {
  return __float2half_rn(fminf(fmaxf(value, -65504.0f), 65504.0f));
}
#else
typedef __nv_bfloat16 Narrow;
__device__ float widen(Narrow value) { return __bfloat162float(value); }
__device__ Narrow narrow(float value) { return __float2bfloat16_rn(value); }
#endif

constexpr int kTile = 128;        // queries and reference rows of a block
constexpr int kDepth = 32;        // columns of a step
constexpr int kPitch = kDepth + 8;  // of a shared row: 80 bytes, so that eight rows hit all banks
constexpr int kPatchPitch = 20;
constexpr int kWarpQueries = 64, kWarpRows = 32;  // a warp's part of the tile: 4 x 2 fragments
constexpr int64_t kFirstSlab = 16 * kTile, kGrowth = 8;

struct RowNorms {
  float full, rounded, residual;  // |x|, |x'|, |x - x'|, rounded up
  float half_square;              // |x|^2 / 2, rounded to nearest
};
// Over the reference, as the bits of floats >= 0: integer atomics, so the order is no matter.
struct Maxima {
  unsigned rounded, residual, half_square;
};
struct Survivor {
  unsigned row;  // of the reference as packed
  float score;
};

__device__ double warp_sum(double value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}
__device__ float rounded_up(double value) { return float(value * (1.0 + 1e-6)); }

// What the steps know of each query.
struct Queries {
  RowNorms* norms;
  float* bound;
  unsigned* counts;  // of its survivors, also of those for which there was no room
  int* redo;         // 1: undecided
  Survivor* survivors;  // [capacity] each
  int64_t capacity;
};

// A warp per packed row p, which is row (p * stride) mod count; rows and columns beyond the end
// become zeros. maxima is null for the queries, which are made ready here.
__global__ void __launch_bounds__(kThreads)
    knn_pack_kernel(const float* rows, int64_t count, int64_t padded, int64_t d, int64_t padded_d,
                    int64_t stride, const float* centre, uint16_t* packed, RowNorms* norms,
                    Maxima* maxima, Queries queries) {
  const int64_t p = blockIdx.x * int64_t(kWarps) + warp();
  if (p >= padded) return;
  const float* row = rows + (p < count ? p * stride % count : 0) * d;
  double full = 0.0, rounded = 0.0, residual = 0.0;
  for (int64_t i = lane(); i < padded_d; i += 32) {
    const double centred = p < count && i < d ? double(row[i]) - double(centre[i]) : 0.0;
    const Narrow value = narrow(float(centred));
    const double kept = widen(value), lost = centred - kept;
    full += centred * centred;
    rounded += kept * kept;
    residual += lost * lost;
    reinterpret_cast<Narrow*>(packed)[p * padded_d + i] = value;
  }
  full = warp_sum(full);
  rounded = warp_sum(rounded);
  residual = warp_sum(residual);
  if (lane() != 0) return;
  norms[p] = {rounded_up(sqrt(full)), rounded_up(sqrt(rounded)), rounded_up(sqrt(residual)),
              float(full / 2.0)};
  if (maxima == nullptr) {
    queries.bound[p] = -INFINITY;
    queries.counts[p] = 0;
    queries.redo[p] = 0;
  } else if (p < count) {
    atomicMax(&maxima->rounded, __float_as_uint(norms[p].rounded));
    atomicMax(&maxima->residual, __float_as_uint(norms[p].residual));
    atomicMax(&maxima->half_square, __float_as_uint(norms[p].half_square));
  }
}

// E(x) of the header; infinite where a score could overflow.
__device__ float band(const RowNorms& x, const Maxima& maxima, int64_t d) {
  const double rounded = __uint_as_float(maxima.rounded),
               residual = __uint_as_float(maxima.residual);
  const double tiny = 7.9e-31;  // 2^-100: in case tensor cores take subnormal numbers for 0
  const double largest =
      (x.rounded + tiny) * (rounded + tiny) + __uint_as_float(maxima.half_square) + tiny;
  if (!(largest < 1e37)) return INFINITY;
  return rounded_up(x.full * residual + x.residual * rounded + double(d + 8) / 4194304.0 * largest);
}

// A block compares a tile of queries with one of packed reference rows, begin + 128 blockIdx.y on.
__global__ void __launch_bounds__(kThreads, 2)
    knn_filter_kernel(const uint16_t* packed_queries, int64_t n, const uint16_t* packed_reference,
                      int64_t begin, int64_t m, int64_t padded_d, const RowNorms* reference_norms,
                      Queries queries) {
  using namespace nvcuda::wmma;
  __shared__ __align__(32) Narrow tile_q[kTile * kPitch];
  __shared__ __align__(32) Narrow tile_r[kTile * kPitch];
  __shared__ __align__(32) float patch[kWarps][16 * kPatchPitch];
  const int64_t first_q = blockIdx.x * int64_t(kTile),
                first_r = begin + blockIdx.y * int64_t(kTile);
  const int warp_q = warp() / 4 * kWarpQueries, warp_r = warp() % 4 * kWarpRows;

  fragment<accumulator, 16, 16, 16, float> scores[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) fill_fragment(scores[i][j], 0.0f);

  // A row of a step is four pieces of 16 bytes; thread t moves piece t % 4 of rows t / 4 and
  // t / 4 + 64. The next step's pieces are fetched while this one is multiplied.
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
  const uint16_t* from_q = packed_queries + (first_q + row) * padded_d + column;
  const uint16_t* from_r = packed_reference + (first_r + row) * padded_d + column;
  uint4 next[4];
  const auto fetch = [&] {
    next[0] = *reinterpret_cast<const uint4*>(from_q);
    next[1] = *reinterpret_cast<const uint4*>(from_q + kTile / 2 * padded_d);
    next[2] = *reinterpret_cast<const uint4*>(from_r);
    next[3] = *reinterpret_cast<const uint4*>(from_r + kTile / 2 * padded_d);
    from_q += kDepth;
    from_r += kDepth;
  };
  fetch();
  for (int steps = int(padded_d / kDepth); steps > 0; --steps) {
    *reinterpret_cast<uint4*>(&tile_q[row * kPitch + column]) = next[0];
    *reinterpret_cast<uint4*>(&tile_q[(row + kTile / 2) * kPitch + column]) = next[1];
    *reinterpret_cast<uint4*>(&tile_r[row * kPitch + column]) = next[2];
    *reinterpret_cast<uint4*>(&tile_r[(row + kTile / 2) * kPitch + column]) = next[3];
    __syncthreads();
    if (steps > 1) fetch();
#pragma unroll
    for (int inner = 0; inner < kDepth; inner += 16) {
      fragment<matrix_b, 16, 16, 16, Narrow, col_major> right[2];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrix_sync(right[j], &tile_r[(warp_r + 16 * j) * kPitch + inner], kPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragment<matrix_a, 16, 16, 16, Narrow, row_major> left;
        load_matrix_sync(left, &tile_q[(warp_q + 16 * i) * kPitch + inner], kPitch);
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_sync(scores[i][j], left, right[j], scores[i][j]);
      }
    }
    __syncthreads();
  }

  // Which lane holds which score is known only after a store: each warp has a patch of 16 x 16.
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int64_t r = first_r + warp_r + 16 * j + lane() % 16;
    const float half_square = r < m ? reference_norms[r].half_square : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_matrix_sync(patch[warp()], scores[i][j], kPatchPitch, mem_row_major);
      __syncwarp();
      for (int in_patch = lane() / 16; in_patch < 16; in_patch += 2) {
        const int64_t q = first_q + warp_q + 16 * i + in_patch;
        if (q >= n || r >= m) continue;
        const float score = patch[warp()][in_patch * kPatchPitch + lane() % 16] - half_square;
        if (score < queries.bound[q]) continue;  // nearly always
        const unsigned slot = atomicAdd(&queries.counts[q], 1u);
        if (slot < queries.capacity)
          queries.survivors[q * queries.capacity + slot] = {unsigned(r), score};
      }
      __syncwarp();
    }
  }
}

// Keys that sort the best (largest) score first, NaN and all.
__device__ unsigned score_key(float score) {
  const unsigned bits = __float_as_uint(score);
  return bits >> 31 ? bits : ~bits ^ 0x80000000u;
}
__device__ float key_score(unsigned key) {
  return __uint_as_float(key >> 31 ? key : ~key ^ 0x80000000u);
}

// The rank-th best score of a query's survivors; rank counts from 1. The whole block calls it.
__device__ float rank_score(const Survivor* survivors, unsigned count, unsigned rank) {
  __shared__ unsigned histogram[256];
  clear_histogram(histogram);
  Search search = {0u, rank - 1};
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (unsigned i = threadIdx.x; i < count; i += kThreads)
      count_key(histogram, score_key(survivors[i].score), search, shift);
    search = choose_digit(histogram, search, shift);
  }
  return key_score(search.prefix);
}

__global__ void __launch_bounds__(kThreads)
    knn_bound_kernel(const Maxima* maxima, int64_t d, unsigned rank, Queries queries) {
  const int64_t q = blockIdx.x;
  const unsigned count = queries.counts[q];
  // the old bound stays; refine sees a list that ran over
  if (count < rank || count > queries.capacity) return;
  const float best = rank_score(queries.survivors + q * queries.capacity, count, rank);
  if (threadIdx.x == 0)
    queries.bound[q] = fmaxf(queries.bound[q], best - 2.0f * band(queries.norms[q], *maxima, d));
}

__global__ void __launch_bounds__(kThreads)
    knn_refine_kernel(const float* rows, const float* reference, int64_t m, int64_t d, unsigned k,
                      int64_t stride, const Maxima* maxima, Queries queries, float* out) {
  __shared__ unsigned histogram[256];
  const int64_t q = blockIdx.x;
  const unsigned count = queries.counts[q];
  Survivor* list = queries.survivors + q * queries.capacity;
  const float e = band(queries.norms[q], *maxima, d);
  // the same in all threads
  bool decided = count >= k && count <= queries.capacity && e < INFINITY;
  float low = 0.0f, high = 0.0f;
  if (decided) {
    const float best = rank_score(list, count, k);
    low = best - 2.0f * e;
    high = best + 2.0f * e;
    decided = low >= queries.bound[q];
  }
  if (!decided) {
    if (threadIdx.x == 0) queries.redo[q] = 1;
    return;
  }
  // Scores become distances: 0 for nearer than the k-th, the largest key for farther, exact for
  // those in between.
  for (unsigned begin = warp() * 32; begin < count; begin += kThreads) {
    const unsigned i = begin + lane();
    const Survivor mine = i < count ? list[i] : Survivor{0u, -INFINITY};
    unsigned key = mine.score > high ? 0u : 0xffffffffu;
    unsigned open = __ballot_sync(kAllLanes, mine.score >= low && mine.score <= high);
    for (; open != 0; open &= open - 1) {  // the warp works on one lane's row at a time
      const int owner = __ffs(open) - 1;
      const int64_t row = __shfl_sync(kAllLanes, mine.row, owner) * stride % m;
      const float distance = exact_distance(rows + q * d, reference + row * d, d);
      if (lane() == owner) key = __float_as_uint(distance);
    }
    if (i < count) list[i].row = key;
  }
  clear_histogram(histogram);
  Search search = {0u, k - 1};
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (unsigned i = threadIdx.x; i < count; i += kThreads)
      count_key(histogram, list[i].row, search, shift);
    search = choose_digit(histogram, search, shift);
  }
  if (threadIdx.x == 0) out[q] = __uint_as_float(search.prefix);
}

// ---- host ----
const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t rounded_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rank of the bound after `seen` of m rows: k where all are seen, else so far out that a fair
// sample reaches it with a chance of about 1e-9 per query of setting the bound too high (which
// refine notices).
int64_t bound_rank(int64_t k, int64_t m, int64_t seen) {
  const double expected = double(k) * double(seen) / double(m);
  const int64_t rank = int64_t(ceil(expected + 6.0 * sqrt(expected) + 8.0));
  return rank < k ? rank : k;
}

// Sizes, and where things lie in the scratch.
struct Plan {
  int64_t padded_m, padded_d, stride, batch, bytes;
  Maxima* maxima;
  uint16_t *reference, *packed_queries;
  RowNorms* reference_norms;
  Queries queries;
};

template <class T>
void place(T*& array, int64_t count, uintptr_t& free) {
  array = reinterpret_cast<T*>(free);
  free += uintptr_t(rounded_to(count * int64_t(sizeof(T)), 256));
}

int64_t greatest_common_divisor(int64_t a, int64_t b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

Plan make_plan(int64_t n, int64_t m, int64_t d, int64_t k, void* scratch) {
  Plan plan;
  plan.padded_m = rounded_to(m, kTile);
  plan.padded_d = rounded_to(d, kDepth);
  // golden section: first parts are spread evenly
  plan.stride = int64_t(double(m) * 0.6180339887) + 1;
  while (greatest_common_divisor(plan.stride, m) != 1) ++plan.stride;
  // Room for the first slab whole, and for six times the survivors of the others that an empty band
  // would give: CLIP-like rows need 1.5 times, tight classes more.
  double expected = double(kFirstSlab);
  for (int64_t seen = kFirstSlab; seen < m; seen *= kGrowth) {
    const int64_t next = seen * kGrowth < m ? seen * kGrowth : m;
    expected += 6.0 * double(bound_rank(k, m, seen)) * double(next - seen) / double(seen) + 64.0;
  }
  const int64_t capacity = expected < double(m) ? int64_t(expected) : m;
  const int64_t fitting =
      (int64_t(256) << 20) / (capacity * int64_t(sizeof(Survivor))) / kTile * kTile;
  plan.batch = rounded_to(n, kTile) < 8192 ? rounded_to(n, kTile) : 8192;
  if (plan.batch > fitting) plan.batch = fitting > kTile ? fitting : kTile;
  plan.queries.capacity = capacity;
  uintptr_t free = reinterpret_cast<uintptr_t>(scratch);
  place(plan.maxima, 1, free);
  place(plan.reference, plan.padded_m * plan.padded_d, free);
  place(plan.reference_norms, plan.padded_m, free);
  place(plan.packed_queries, plan.batch * plan.padded_d, free);
  place(plan.queries.norms, plan.batch, free);
  place(plan.queries.bound, plan.batch, free);
  place(plan.queries.counts, plan.batch, free);
  place(plan.queries.redo, plan.batch, free);
  place(plan.queries.survivors, plan.batch * capacity, free);
  plan.bytes = int64_t(free - reinterpret_cast<uintptr_t>(scratch));
  return plan;
}

unsigned blocks(int64_t items, int64_t per_block) {
  return unsigned((items + per_block - 1) / per_block);
}

const char* brute(const float* queries, int64_t n, const float* reference, int64_t m, int64_t d,
                  int64_t k, const int* only, float* out, cudaStream_t stream) {
  const unsigned grid = n < (1 << 20) ? unsigned(n) : 1u << 20;
  knn_brute_kernel<<<grid, kThreads, 0, stream>>>(queries, n, reference, m, d, k, only, out);
  return launch_error();
}

// One batch: all slabs of the reference against n queries x.
const char* search(const Plan& p, const float* x, int64_t n, const float* reference, int64_t m,
                   int64_t d, int64_t k, const float* centre, float* out, cudaStream_t queue) {
  const int64_t padded = rounded_to(n, kTile);
  knn_pack_kernel<<<blocks(padded, kWarps), kThreads, 0, queue>>>(
      x, n, padded, d, p.padded_d, 1, centre, p.packed_queries, p.queries.norms, nullptr,
      p.queries);
  for (int64_t seen = 0, end; seen < m; seen = end) {
    end = seen == 0 ? kFirstSlab : seen * kGrowth;
    const int64_t most = seen + int64_t(65535) * kTile;  // the grid's limit
    if (end > most) end = most;
    if (end > m) end = m;
    const dim3 grid(blocks(n, kTile), blocks(end - seen, kTile));
    knn_filter_kernel<<<grid, kThreads, 0, queue>>>(p.packed_queries, n, p.reference, seen, end,
                                                    p.padded_d, p.reference_norms, p.queries);
    if (const char* error = launch_error()) return error;
    if (end == m) break;
    knn_bound_kernel<<<unsigned(n), kThreads, 0, queue>>>(
        p.maxima, d, unsigned(bound_rank(k, m, end)), p.queries);
  }
  knn_refine_kernel<<<unsigned(n), kThreads, 0, queue>>>(x, reference, m, d, unsigned(k), p.stride,
                                                         p.maxima, p.queries, out);
  if (const char* error = launch_error()) return error;
  return brute(x, n, reference, m, d, k, p.queries.redo, out, queue);
}

}  // namespace

extern "C" int64_t knn_kth_distance_cuda_scratch(int64_t n, int64_t m, int64_t d, int64_t k) {
  return n == 0 || k > kLargestFastK ? 0 : make_plan(n, m, d, k, nullptr).bytes;
}

extern "C" const char* knn_kth_distance_cuda(const float* queries, int64_t n,
                                             const float* reference, int64_t m, int64_t d,
                                             int64_t k, const float* centre, float* out,
                                             void* scratch, void* stream) {
  if (m > INT32_MAX) return "knn_kth_distance: more than 2^31 - 1 reference rows";
  if (n == 0) return nullptr;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (k > kLargestFastK) return brute(queries, n, reference, m, d, k, nullptr, out, queue);
  const Plan p = make_plan(n, m, d, k, scratch);
  if (cudaMemsetAsync(p.maxima, 0, sizeof(Maxima), queue) != cudaSuccess) return launch_error();
  knn_pack_kernel<<<blocks(p.padded_m, kWarps), kThreads, 0, queue>>>(
      reference, m, p.padded_m, d, p.padded_d, p.stride, centre, p.reference, p.reference_norms,
      p.maxima, p.queries);
  if (const char* error = launch_error()) return error;
  for (int64_t done = 0; done < n; done += p.batch) {
    const int64_t some = n - done < p.batch ? n - done : p.batch;
    const char* error = search(p, queries + done * d, some, reference, m, d, k, centre, out + done,
                               queue);
    if (error) return error;
  }
  return nullptr;
}
