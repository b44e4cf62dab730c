// All C functions of this folder: raw pointers and sizes, so that no PyTorch header is parsed.
// Their references in PyTorch: vrf.knn_kth_distance and spd.spd_step. ops.py calls them.
#pragma once
#include <stdint.h>

extern "C" {

// ---- CPU ----

// Instruction sets that this CPU offers to k-NN, the best first, a blank after each: of amx,
// avx512bf16, avx512, avx2. Chosen at run time, nothing is compiled with -march=native.
const char* knn_kth_distance_levels();

// VRF Eq. (4): exact distance of each query [n, d] to its k-th nearest row of reference [m, d].
// All contiguous fp32; d a multiple of 32; 1 <= k <= m < 2^31. 0 where a row is not finite, or
// longer than 5e17, else 1.
int knn_kth_distance_cpu(const float* queries, int64_t n, const float* reference, int64_t m,
                         int64_t d, int64_t k, const char* level, int threads, float* out);

// One parameter tensor of SPD: a row of a table of int64, [tensors, 7]. anchor: null means zeros.
// first_chunk: sum over the tensors before this one of ceil(size / SPD_CHUNK); CUDA alone reads it.
struct SpdTensor {
  float* param;
  const float *anchor, *grad;
  float *exp_avg, *exp_avg_sq;
  int64_t size, first_chunk;
};

// One step of Adam + selective projection (SPD Eqs. 3, 4, 9), in place. step counts from 1.
// conditions [count]: null, or c of Alg. 2, read and written. sums [count, 3] receives s1, s2, s3
// (spd_step.cpp), or is null.
void spd_step_cpu(const SpdTensor* tensors, int64_t count, int64_t step, double lr, double beta1,
                  double beta2, double eps, double spd_lambda, int threads, double* conditions,
                  double* sums);

// ---- CUDA ----
// All pointers are device pointers, but the first of k-NN; `stream` is a cudaStream_t. A launcher
// only enqueues work: it allocates nothing, never waits for the device, and may be captured into a
// CUDA graph. It returns null, or a sentence that says what was wrong.

// A batch of queries, as 16 int64. Row p of reference16 is row p * stride % m of reference.
struct KnnBatch {
  const float *queries, *reference;      // [n, d], [m, d]
  const void *queries16, *reference16;   // the same, centred, in fp16
  const float *half_square, *band;       // [m] of reference16: |y|^2 / 2; [n]: E(x) of the .cu
  float* bound;                          // [n], -infinity before
  uint32_t* counts;                      // [n], 0 before
  void* survivors;                       // [n, capacity], 8 bytes each
  float* out;                            // [n]
  int64_t n, m, d, k, stride, capacity;  // d a multiple of 32
};
int64_t knn_kth_distance_cuda_capacity(int64_t m, int64_t k);
const char* knn_kth_distance_cuda(const KnnBatch* batch, void* stream);

// Elements; a multiple of 4, so that a chunk of an aligned tensor is aligned.
constexpr int64_t SPD_CHUNK = 4096;

// As above. chunk_tensor[c] is the tensor that chunk c belongs to. partial: scratch [chunks, 3].
// report [count, 4] receives s1, s2, s3 and the factor f of Eq. (4).
const char* spd_step_cuda(const SpdTensor* tensors, int64_t count, const int32_t* chunk_tensor,
                          int64_t chunks, int64_t step, double lr, double beta1, double beta2,
                          double eps, double spd_lambda, double* partial, double* conditions,
                          double* report, void* stream);
}
