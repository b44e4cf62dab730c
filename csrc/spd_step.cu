// spd_step on CUDA: one Adam step followed by selective projection decay (SPD Eqs. 3, 4 and 9), in
// place, for all tensors at once. Reference in PyTorch: the for-loop of spd.AdamSPD. Layout: each
// tensor a contiguous run of fp32; pointers of all in a table on the device (kernels_cuda.h).
//
//   pass A  spd_adam_kernel    a block per chunk: Adam; while the values are in registers, the
//                              chunk's share of S1 = sum g D, S2 = sum D^2, S3 = sum u (2D + u),
//                              D = w - w0, u = new w - w
//   pass B  spd_factor_kernel  a block per tensor: adds the shares and derives
//                              f = 1 - lambda S3 / (gamma_t (gamma_t + gamma_{t-1})), where
//                              c = -S1 < 0 and S3 > 0, else 1; gamma_{t-1}^2 = S2,
//                              gamma_t^2 = S2 + S3
//   pass C  spd_project_kernel a block per chunk: w = w0 + f (w - w0); a block with f = 1 ends at
//                              once
//
// Memory traffic: A 32 bytes per parameter (28 with the zero anchor), the least possible; C 12 (8)
// more for the projected tensors, less what the L2 cache still holds: C walks the chunks backwards
// for its sake.
// Adam is computed in fp32, the sums in fp32 over four elements of one thread and in fp64 from
// there, always in the same order and without atomics: the result is repeatable bit for bit.
// The naive form does the same with one block per tensor and no table of chunks.
#include <cuda_runtime.h>

#include "kernels_cuda.h"

namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements that a thread handles at a time
constexpr unsigned kAllLanes = 0xffffffffu;

struct Adam {  // what the whole tensor shares, rounded to fp32 as PyTorch does
  float rest1, beta2, rest2, step_size, root_bias2, eps;  // rest = 1 - beta
};

__device__ Adam adam_constants(float step, float lr, double beta1, double beta2, double eps) {
  const double bias1 = 1.0 - pow(beta1, double(step)), bias2 = 1.0 - pow(beta2, double(step));
  return {float(1.0 - beta1), float(beta2),       float(1.0 - beta2),
          float(lr / bias1),  float(sqrt(bias2)), float(eps)};
}

struct Sums {
  double gd, dd, uu;  // S1, S2, S3
};

// Adds over the block in a fixed order. Thread 0 gets the sums, the others something else.
__device__ Sums block_sum(Sums sums) {
  __shared__ Sums of_warp[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.gd += __shfl_down_sync(kAllLanes, sums.gd, distance);
    sums.dd += __shfl_down_sync(kAllLanes, sums.dd, distance);
    sums.uu += __shfl_down_sync(kAllLanes, sums.uu, distance);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      sums.gd += of_warp[warp].gd;
      sums.dd += of_warp[warp].dd;
      sums.uu += of_warp[warp].uu;
    }
  }
  return sums;
}

// All pointers of a tensor are multiples of 16 bytes: four elements travel in one instruction.
__device__ bool is_aligned(const SpdCudaTensor& t) {
  const uintptr_t all =
      reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.anchor) |
      reinterpret_cast<uintptr_t>(t.grad) | reinterpret_cast<uintptr_t>(t.exp_avg) |
      reinterpret_cast<uintptr_t>(t.exp_avg_sq);
  return all % 16 == 0;
}

__device__ void load(float (&to)[kVector], const float* from, int count, bool aligned) {
  if (aligned && count == kVector) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) to[e] = e < count ? from[e] : 0.0f;
  }
}

__device__ void store(float* to, const float (&from)[kVector], int count, bool aligned) {
  if (aligned && count == kVector) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (e < count) to[e] = from[e];
  }
}

__device__ int count_from(int64_t i, int64_t end) {
  return end - i < kVector ? int(end - i) : kVector;
}

// Adam on elements [begin, end), split over the block; returns this thread's share of the sums.
__device__ Sums adam_range(const SpdCudaTensor& t, int64_t begin, int64_t end, const Adam& adam) {
  const bool aligned = is_aligned(t);
  Sums sums = {0.0, 0.0, 0.0};
  for (int64_t i = begin + kVector * int64_t(threadIdx.x); i < end; i += kVector * kThreads) {
    const int count = count_from(i, end);
    float w[kVector], w0[kVector] = {0.0f, 0.0f, 0.0f, 0.0f}, g[kVector], m[kVector], v[kVector];
    load(w, t.param + i, count, aligned);
    load(g, t.grad + i, count, aligned);
    load(m, t.exp_avg + i, count, aligned);
    load(v, t.exp_avg_sq + i, count, aligned);
    if (t.anchor != nullptr) load(w0, t.anchor + i, count, aligned);
    float gd = 0.0f, dd = 0.0f, uu = 0.0f;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e >= count) continue;  // eps = 0 would make 0 / 0 of the padding
      m[e] += adam.rest1 * (g[e] - m[e]);
      v[e] = adam.beta2 * v[e] + adam.rest2 * g[e] * g[e];
      const float before = w[e], progress = before - w0[e];
      w[e] = before - adam.step_size * m[e] / (sqrtf(v[e]) / adam.root_bias2 + adam.eps);
      const float moved = w[e] - before;  // of the rounded, stored weight
      gd += g[e] * progress;
      dd += progress * progress;
      uu += moved * (2.0f * progress + moved);
    }
    sums.gd += gd;
    sums.dd += dd;
    sums.uu += uu;
    store(t.param + i, w, count, aligned);
    store(t.exp_avg + i, m, count, aligned);
    store(t.exp_avg_sq + i, v, count, aligned);
  }
  return sums;
}

// Eq. (9) without the cancellation of gamma_t - gamma_{t-1}, which loses every digit of a small
// step.
__device__ double factor(const Sums& sums, double spd_lambda) {
  if (!(sums.gd > 0.0 && sums.uu > 0.0)) return 1.0;  // also where a gradient is NaN
  const double before = sqrt(sums.dd), after = sqrt(sums.dd + sums.uu);
  return 1.0 - spd_lambda * sums.uu / (after * (after + before));
}

__device__ void write_report(double* row, const Sums& sums, double f) {
  row[0] = sums.gd;
  row[1] = sums.dd;
  row[2] = sums.uu;
  row[3] = f;
}

// Eq. (4) on elements [begin, end), split over the block.
__device__ void project_range(const SpdCudaTensor& t, int64_t begin, int64_t end, float f) {
  const bool aligned = is_aligned(t);
  for (int64_t i = begin + kVector * int64_t(threadIdx.x); i < end; i += kVector * kThreads) {
    const int count = count_from(i, end);
    float w[kVector], w0[kVector] = {0.0f, 0.0f, 0.0f, 0.0f};
    load(w, t.param + i, count, aligned);
    if (t.anchor != nullptr) load(w0, t.anchor + i, count, aligned);
#pragma unroll
    for (int e = 0; e < kVector; ++e) w[e] = w0[e] + f * (w[e] - w0[e]);
    store(t.param + i, w, count, aligned);
  }
}

__device__ int64_t chunk_begin(const SpdCudaTensor& t, int64_t chunk) {
  return (chunk - t.first_chunk) * SPD_CHUNK;
}
__device__ int64_t chunk_end(const SpdCudaTensor& t, int64_t chunk) {
  const int64_t end = chunk_begin(t, chunk) + SPD_CHUNK;
  return end < t.size ? end : t.size;
}

// ---- pass A
__global__ void __launch_bounds__(kThreads)
    spd_adam_kernel(const SpdCudaTensor* tensors, const int32_t* chunk_tensor, const float* step,
                    const float* lr, double beta1, double beta2, double eps, double* partial) {
  __shared__ Adam adam;  // two powers in fp64: once per block
  if (threadIdx.x == 0) adam = adam_constants(*step, *lr, beta1, beta2, eps);
  __syncthreads();
  const int64_t chunk = blockIdx.x;
  const SpdCudaTensor t = tensors[chunk_tensor[chunk]];
  const Sums sums = block_sum(adam_range(t, chunk_begin(t, chunk), chunk_end(t, chunk), adam));
  if (threadIdx.x == 0) {
    partial[3 * chunk + 0] = sums.gd;
    partial[3 * chunk + 1] = sums.dd;
    partial[3 * chunk + 2] = sums.uu;
  }
}

// ---- pass B
__global__ void __launch_bounds__(kThreads)
    spd_factor_kernel(const SpdCudaTensor* tensors, const double* partial, double spd_lambda,
                      double* report) {
  const SpdCudaTensor t = tensors[blockIdx.x];
  const int64_t end = t.first_chunk + (t.size + SPD_CHUNK - 1) / SPD_CHUNK;
  Sums sums = {0.0, 0.0, 0.0};
  for (int64_t chunk = t.first_chunk + threadIdx.x; chunk < end; chunk += kThreads) {
    sums.gd += partial[3 * chunk + 0];
    sums.dd += partial[3 * chunk + 1];
    sums.uu += partial[3 * chunk + 2];
  }
  sums = block_sum(sums);
  if (threadIdx.x == 0)
    write_report(report + 4 * int64_t(blockIdx.x), sums, factor(sums, spd_lambda));
}

// ---- pass C
__global__ void __launch_bounds__(kThreads)
    spd_project_kernel(const SpdCudaTensor* tensors, const int32_t* chunk_tensor,
                       const double* report) {
  const int64_t chunk =
      gridDim.x - 1 - int64_t(blockIdx.x);  // backwards: what A wrote last is still in L2
  const int64_t tensor = chunk_tensor[chunk];
  const float f = float(report[4 * tensor + 3]);
  if (f == 1.0f) return;
  const SpdCudaTensor t = tensors[tensor];
  project_range(t, chunk_begin(t, chunk), chunk_end(t, chunk), f);
}

// ---- the naive form: a block does all of one tensor
__global__ void __launch_bounds__(kThreads)
    spd_naive_kernel(const SpdCudaTensor* tensors, const float* step, const float* lr, double beta1,
                     double beta2, double eps, double spd_lambda, double* report) {
  __shared__ Adam adam;
  __shared__ float f;
  if (threadIdx.x == 0) adam = adam_constants(*step, *lr, beta1, beta2, eps);
  __syncthreads();
  const SpdCudaTensor t = tensors[blockIdx.x];
  const Sums sums = block_sum(adam_range(t, 0, t.size, adam));
  if (threadIdx.x == 0) {
    const double of_tensor = factor(sums, spd_lambda);
    write_report(report + 4 * int64_t(blockIdx.x), sums, of_tensor);
    f = float(of_tensor);
  }
  __syncthreads();
  if (f != 1.0f) project_range(t, 0, t.size, f);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

extern "C" const char* spd_step_cuda(const SpdCudaTensor* tensors, int64_t n_tensors,
                                     const int32_t* chunk_tensor, int64_t n_chunks,
                                     const float* step, const float* lr, double beta1, double beta2,
                                     double eps, double spd_lambda, double* partial, double* report,
                                     void* stream) {
  if (n_tensors == 0) return nullptr;
  if (n_tensors > INT32_MAX || n_chunks > INT32_MAX)
    return "spd_step: more than 2^31 - 1 tensors or chunks in one call";
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (n_chunks > 0) {
    spd_adam_kernel<<<unsigned(n_chunks), kThreads, 0, queue>>>(tensors, chunk_tensor, step, lr,
                                                                beta1, beta2, eps, partial);
    if (const char* error = launch_error()) return error;
  }
  spd_factor_kernel<<<unsigned(n_tensors), kThreads, 0, queue>>>(tensors, partial, spd_lambda,
                                                                 report);
  if (const char* error = launch_error()) return error;
  if (n_chunks > 0) {
    spd_project_kernel<<<unsigned(n_chunks), kThreads, 0, queue>>>(tensors, chunk_tensor, report);
  }
  return launch_error();
}

extern "C" const char* spd_step_naive_cuda(const SpdCudaTensor* tensors, int64_t n_tensors,
                                           const float* step, const float* lr, double beta1,
                                           double beta2, double eps, double spd_lambda,
                                           double* report, void* stream) {
  if (n_tensors == 0) return nullptr;
  if (n_tensors > INT32_MAX) return "spd_step: more than 2^31 - 1 tensors in one call";
  spd_naive_kernel<<<unsigned(n_tensors), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      tensors, step, lr, beta1, beta2, eps, spd_lambda, report);
  return launch_error();
}
