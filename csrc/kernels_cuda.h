// C signatures of the CUDA launchers. All pointers are device pointers; `stream` is a cudaStream_t.
// A launcher only enqueues work on `stream`: it allocates nothing, never waits for the device, and
// may be captured into a CUDA graph. It returns null, or what went wrong. The caller sets the
// device, allocates outputs and scratch, and checks shapes, types and contiguity.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// out[i] = Euclidean distance of queries[i] [n, d] to its k-th nearest row of reference [m, d].
// 1 <= k <= m < 2^31; inputs finite (not checked here: it would wait for the device). The fast form
// needs scratch of the size that knn_kth_distance_cuda_scratch gives (0: none needed), aligned to
// 256 bytes; it hands k > 16384 and all rows that its filter cannot decide to the naive form. Both
// forms give the same bits.
size_t knn_kth_distance_cuda_scratch(int64_t n, int64_t m, int64_t d, int64_t k);
const char* knn_kth_distance_cuda(const float* queries, int64_t n, const float* reference,
                                  int64_t m, int64_t d, int64_t k, float* out, void* scratch,
                                  void* stream);
const char* knn_kth_distance_naive_cuda(const float* queries, int64_t n, const float* reference,
                                        int64_t m, int64_t d, int64_t k, float* out, void* stream);

// One Adam step with selective projection decay, in place, for many tensors at once.
// Row of the descriptor table: as int64 values [tensors, 7], built once and kept on the device.
typedef struct {
  float* param;
  const float* anchor;    // null: zero anchor (spd.md, PEFT variant)
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t size;           // elements; 0 is legal
  int64_t first_chunk;    // sum over the tensors before this one of ceil(size / SPD_CHUNK)
} SpdCudaTensor;

// Elements; a multiple of 4, so that a chunk of an aligned tensor is aligned.
enum { SPD_CHUNK = 4096 };

// chunk_tensor[c] is the tensor that chunk c belongs to. step: number t of this step, counted from
// 1; lr: learning rate; both one float on the device. partial: scratch [chunks, 3]. report
// [tensors, 4] receives S1 = g.D, S2 = D.D, S3 = u.(2D + u) and the factor f. The naive form
// ignores chunk_tensor and partial.
const char* spd_step_cuda(const SpdCudaTensor* tensors, int64_t n_tensors,
                          const int32_t* chunk_tensor, int64_t n_chunks, const float* step,
                          const float* lr, double beta1, double beta2, double eps,
                          double spd_lambda, double* partial, double* report, void* stream);
const char* spd_step_naive_cuda(const SpdCudaTensor* tensors, int64_t n_tensors, const float* step,
                                const float* lr, double beta1, double beta2, double eps,
                                double spd_lambda, double* report, void* stream);

#ifdef __cplusplus
}
#endif
