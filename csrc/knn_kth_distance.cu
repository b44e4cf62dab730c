// knn_kth_distance on CUDA: Euclidean distance of each query to its k-th nearest reference row (VRF
// Eq. 4), exact. Reference in PyTorch: vrf.knn_kth_distance.
// queries [n, d], reference [m, d], both row-major fp32 -> [n] fp32.
//
// Method: five steps per batch of queries, no distance matrix in device memory. The few queries
// that the filter cannot decide are done by brute force, a block each, see knn_brute_kernel.
//   pack    (ops.py) both sides, centred by the mean of some rows (distances do not change), rounded
//           to fp16; the lengths of the rounded rows and of what the rounding cut off. The reference
//           is packed in a scattered order, so that any first part of it is a fair sample even where
//           the rows are sorted by class.
//   filter  scores s' = x.y - |y|^2 / 2 on tensor cores (wmma, fp32 accumulation);
//           s = (|x|^2 - |x - y|^2) / 2, so the largest score is the nearest row. Rows with
//           s' >= bound(x) are appended to the query's survivors.
//   bound   the reference goes through the filter in slabs, each eight times the rows before it.
//           After a slab of `seen` rows, bound(x) = (the rank-th best score so far) - 2 E(x),
//           rank = min(k, e + 6 sqrt(e) + 8), e = k seen / m: below the k-th best score of all rows
//           but for chance, see `refine`.
//   band    (E in ops.py) |s - s'| <= E(x) = |x| max|y - y'| + |x - x'| max|y'|
//                                            + (d + 16) 2^-22 (|x'| max|y'| + max|y|^2 / 2).
//           The first two terms are x.y - x'.y' = x.(y - y') + (x - x').y'; the third covers fp32
//           sums in any order and with truncation, as tensor cores do them (at most 5/4 d steps of
//           2^-23 of the largest), the rounding of y and |y|^2 / 2, and of comparisons.
//   refine  T = k-th best s'. A row with s' > T + 2 E is nearer than the k-th: at most k - 1 rows
//           can have s > T + E. One with s' < T - 2 E is farther: k rows have s >= T - E. Those
//           between are computed again by differences in fp64, and the k-th smallest of all is the
//           answer. Where T - 2 E < bound, or a list ran over, or numbers overflowed, the filter
//           has decided nothing, and the query is done by brute force.
//
// Memory traffic: a tile of 128 queries x 128 rows is multiplied out of shared memory and ends in
// registers; the reference is read once per 128 queries, mostly from L2. Scratch: the fp16 copies,
// twice the reference while they are made, and room for about 10 k survivors a query, 256 MiB of
// them at a time.
// Result: exact distances are fp64 sums in one fixed order, rounded once. Survivors are appended in
// any order, but a k-th smallest does not depend on it: repeatable bit for bit.
// fp16, not bf16: it keeps three bits more, so the band is 8 times as narrow, and every GPU from
// Volta on multiplies it. Rows with values above 65504 are done by brute force.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <mma.h>

#include <algorithm>

#include "kernels.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

// The distance as Eq. 4 has it, by its bits: those of floats >= 0 sort as the floats do. The whole
// warp calls it; every lane gets the result.
__device__ unsigned exact_distance(const KnnBatch& b, int64_t q, int64_t row) {
  const float *x = b.queries + q * b.d, *y = b.reference + row * b.d;
  double sum = 0.0;
  for (int64_t i = lane(); i < b.d; i += 32) {
    const double difference = double(x[i]) - double(y[i]);
    sum += difference * difference;
  }
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  return __float_as_uint(float(sqrt(sum)));
}

// ---- the k-th smallest of many 32-bit keys, eight bits at a time, nothing stored or sorted ----

__shared__ unsigned histogram[256];  // how many of the keys that are left have which digit

// Appends the digit at `shift` to the wanted key's prefix. rank: how many of the keys with this
// prefix are smaller than the wanted one. The whole block calls it.
__device__ void choose_digit(int shift, unsigned& prefix, unsigned& rank) {
  __shared__ unsigned found[2];
  if (warp() == 0) {
    unsigned own = 0;  // each lane has eight bins
    for (int bin = 0; bin < 8; ++bin) own += histogram[8 * lane() + bin];
    unsigned up_to = own;  // inclusive sum over the lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned below = __shfl_up_sync(kAllLanes, up_to, distance);
      if (lane() >= distance) up_to += below;
    }
    unsigned before = up_to - own;
    if (rank >= before && rank < up_to) {  // one lane
      int bin = 8 * lane();
      while (rank >= before + histogram[bin]) before += histogram[bin++];
      found[0] = prefix | unsigned(bin) << shift;
      found[1] = rank - before;
    }
  }
  __syncthreads();
  prefix = found[0];
  rank = found[1];
}

// The key that has `rank` smaller ones among key_of(0), ..., key_of(count - 1); `lanes` threads work
// on the same key. The whole block calls it.
template <int lanes, class KeyOf>
__device__ unsigned select(unsigned count, unsigned rank, const KeyOf& key_of) {
  unsigned prefix = 0;  // the digits found so far
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < 256; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
    const unsigned known = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    for (unsigned i = threadIdx.x / lanes; i < count; i += kThreads / lanes) {
      const unsigned key = key_of(i);
      if (threadIdx.x % lanes == 0 && (key & known) == prefix)
        atomicAdd(&histogram[key >> shift & 255], 1u);
    }
    __syncthreads();
    choose_digit(shift, prefix, rank);
  }
  return prefix;
}

// ---- filter, bound, refine ----
constexpr int kTile = 128;          // queries and reference rows of a block
constexpr int kDepth = 32;          // columns of a step
constexpr int kPitch = kDepth + 8;  // of a shared row: 80 bytes, so that eight rows hit all banks
constexpr int kPatchPitch = 20;
constexpr int kWarpQueries = 64, kWarpRows = 32;  // a warp's part of the tile: 4 x 2 fragments
constexpr float kUndecided = -1.0f;               // instead of a distance
constexpr int64_t kFirstSlab = 16 * kTile, kGrowth = 8;

struct Survivor {
  unsigned row;  // of reference16
  float score;
};
__device__ Survivor* survivors_of(const KnnBatch& b, int64_t q) {
  return static_cast<Survivor*>(b.survivors) + q * b.capacity;
}

// A block compares a tile of queries with one of packed reference rows, begin + 128 blockIdx.y on.
__global__ void __launch_bounds__(kThreads, 2)
    knn_filter_kernel(KnnBatch b, int64_t begin, int64_t end) {
  using namespace nvcuda::wmma;
  __shared__ __align__(32) __half tile[2 * kTile * kPitch];  // the queries, then the reference
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
  // t / 4 + 64, beyond the end that of the last row. The next step's pieces are fetched while this
  // one is multiplied.
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
  const auto piece = [&](const void* rows, int64_t i, int64_t count) {
    return static_cast<const __half*>(rows) + (i < count ? i : count - 1) * b.d + column;
  };
  const __half* from[4] = {piece(b.queries16, first_q + row, b.n),
                           piece(b.queries16, first_q + row + 64, b.n),
                           piece(b.reference16, first_r + row, b.m),
                           piece(b.reference16, first_r + row + 64, b.m)};
  uint4 next[4];
  const auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      next[i] = *reinterpret_cast<const uint4*>(from[i]);
      from[i] += kDepth;
    }
  };
  fetch();
  for (int steps = int(b.d / kDepth); steps > 0; --steps) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<uint4*>(&tile[(row + 64 * i) * kPitch + column]) = next[i];
    __syncthreads();
    if (steps > 1) fetch();
#pragma unroll
    for (int inner = 0; inner < kDepth; inner += 16) {
      fragment<matrix_b, 16, 16, 16, __half, col_major> right[2];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrix_sync(right[j], &tile[(kTile + warp_r + 16 * j) * kPitch + inner], kPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragment<matrix_a, 16, 16, 16, __half, row_major> left;
        load_matrix_sync(left, &tile[(warp_q + 16 * i) * kPitch + inner], kPitch);
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
    const float half_square = r < end ? b.half_square[r] : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_matrix_sync(patch[warp()], scores[i][j], kPatchPitch, mem_row_major);
      __syncwarp();
      for (int in_patch = lane() / 16; in_patch < 16; in_patch += 2) {
        const int64_t q = first_q + warp_q + 16 * i + in_patch;
        if (q >= b.n || r >= end) continue;
        const float score = patch[warp()][in_patch * kPatchPitch + lane() % 16] - half_square;
        if (score < b.bound[q]) continue;  // nearly always
        const unsigned slot = atomicAdd(&b.counts[q], 1u);
        if (slot < b.capacity) survivors_of(b, q)[slot] = {unsigned(r), score};
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
  const auto key_of = [&](unsigned i) { return score_key(survivors[i].score); };
  return key_score(select<1>(count, rank - 1, key_of));
}

__global__ void __launch_bounds__(kThreads) knn_bound_kernel(KnnBatch b, unsigned rank) {
  const int64_t q = blockIdx.x;
  const unsigned count = b.counts[q];
  // the old bound stays; refine sees a list that ran over
  if (count < rank || count > b.capacity) return;
  const float best = rank_score(survivors_of(b, q), count, rank);
  if (threadIdx.x == 0) b.bound[q] = fmaxf(b.bound[q], best - 2.0f * b.band[q]);
}

__global__ void __launch_bounds__(kThreads) knn_refine_kernel(KnnBatch b) {
  const int64_t q = blockIdx.x;
  const unsigned count = b.counts[q], k = unsigned(b.k);
  Survivor* list = survivors_of(b, q);
  const float e = b.band[q];
  // the same in all threads
  bool decided = count >= k && count <= b.capacity && e < INFINITY;
  float low = 0.0f, high = 0.0f;
  if (decided) {
    const float best = rank_score(list, count, k);
    low = best - 2.0f * e;
    high = best + 2.0f * e;
    decided = low >= b.bound[q];
  }
  if (!decided) {
    if (threadIdx.x == 0) b.out[q] = kUndecided;
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
      const int64_t row = __shfl_sync(kAllLanes, mine.row, owner) * b.stride % b.m;
      const unsigned exact = exact_distance(b, q, row);
      if (lane() == owner) key = exact;
    }
    if (i < count) list[i].row = key;
  }
  const unsigned key = select<1>(count, k - 1, [&](unsigned i) { return list[i].row; });
  if (threadIdx.x == 0) b.out[q] = __uint_as_float(key);
}

// Brute force: all distances, computed anew for each of the four digits.
__global__ void __launch_bounds__(kThreads) knn_brute_kernel(KnnBatch b) {
  const int64_t q = blockIdx.x;
  if (b.out[q] != kUndecided) return;
  const auto key_of = [&](unsigned row) { return exact_distance(b, q, row); };
  const unsigned key = select<32>(unsigned(b.m), unsigned(b.k - 1), key_of);
  if (threadIdx.x == 0) b.out[q] = __uint_as_float(key);
}

// ---- host ----
// Rank of the bound after `seen` of m rows: k where all are seen, else so far out that a fair
// sample reaches it with a chance of about 1e-9 per query of setting the bound too high (which
// refine notices).
int64_t bound_rank(int64_t k, int64_t m, int64_t seen) {
  const double expected = double(k) * double(seen) / double(m);
  return std::min(k, int64_t(ceil(expected + 6.0 * sqrt(expected) + 8.0)));
}

// The end of the slab that begins at `seen`.
int64_t slab_end(int64_t seen, int64_t m) {
  const int64_t wanted = seen == 0 ? kFirstSlab : seen * kGrowth;
  const int64_t most = seen + int64_t(65535) * kTile;  // the grid's limit
  return std::min({wanted, most, m});
}

unsigned blocks(int64_t items) { return unsigned((items + kTile - 1) / kTile); }

}  // namespace

// Room for the first slab whole, and for six times the survivors of the others that an empty band
// would give: CLIP-like rows need 1.5 times, tight classes more.
extern "C" int64_t knn_kth_distance_cuda_capacity(int64_t m, int64_t k) {
  double expected = 0.0;
  for (int64_t seen = 0, end; seen < m; seen = end) {
    end = slab_end(seen, m);
    const double part = seen ? double(end - seen) / double(seen) : 0.0;
    expected += seen ? 6.0 * double(bound_rank(k, m, seen)) * part + 64.0 : double(end);
  }
  return std::min(int64_t(expected), m);
}

extern "C" const char* knn_kth_distance_cuda(const KnnBatch* batch, void* stream) {
  const KnnBatch b = *batch;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const unsigned n = unsigned(b.n);
  for (int64_t seen = 0, end; seen < b.m; seen = end) {
    end = slab_end(seen, b.m);
    const dim3 grid(blocks(b.n), blocks(end - seen));
    knn_filter_kernel<<<grid, kThreads, 0, queue>>>(b, seen, end);
    const unsigned rank = unsigned(bound_rank(b.k, b.m, end));
    if (end < b.m) knn_bound_kernel<<<n, kThreads, 0, queue>>>(b, rank);
  }
  knn_refine_kernel<<<n, kThreads, 0, queue>>>(b);
  knn_brute_kernel<<<n, kThreads, 0, queue>>>(b);
  const cudaError_t error = cudaGetLastError();  // of any of them
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
