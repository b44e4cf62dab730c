// spd_step on CUDA: one Adam step followed by selective projection decay (SPD Eqs. 3, 4 and 9), in
// place, for all tensors at once. Reference in PyTorch: spd.spd_step. Layout: each tensor a
// contiguous run of fp32; pointers of all in a table on the device (kernels.h).
//
//   pass A  spd_adam_kernel    a block per chunk: Adam; while the values are in registers, the
//                              chunk's share of s1 = sum g D, s2 = sum D^2, s3 = sum u (2D + u),
//                              D = w - w0, u = new w - w
//   pass B  spd_factor_kernel  a block per tensor: adds the shares and derives
//                              f = 1 - lambda s3 / (gamma_t (gamma_t + gamma_{t-1})), where
//                              c < 0 and s3 > 0, else 1; c = -s1, or with `conditions` (Alg. 2)
//                              the c before - s1; gamma_{t-1}^2 = s2, gamma_t^2 = s2 + s3
//   pass C  spd_project_kernel a block per chunk: w = w0 + f (w - w0); a block with f = 1 ends at
//                              once
//
// Memory traffic: A 32 bytes per parameter (28 with the zero anchor), the least possible; C 12 (8)
// more for the projected tensors, less what the L2 cache still holds: C walks the chunks backwards
// for its sake.
// Adam is computed in fp32, the sums in fp32 over four elements of one thread and in fp64 from
// there, always in the same order and without atomics: the result is repeatable bit for bit.
#include <cuda_runtime.h>

#include <math.h>

#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements that a thread handles at a time
constexpr unsigned kAllLanes = 0xffffffffu;

struct Adam {  // what all tensors share, rounded to fp32 as PyTorch does
  float rest1, beta2, rest2, step_size, root_bias2, eps;  // rest = 1 - beta
};

struct Sums {
  double gd, dd, uu;  // s1, s2, s3
  __device__ void operator+=(const Sums& other) {
    gd += other.gd, dd += other.dd, uu += other.uu;
  }
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
  for (int warp = 1; threadIdx.x == 0 && warp < kThreads / 32; ++warp) sums += of_warp[warp];
  return sums;
}

struct Range {  // elements of a chunk
  int64_t begin, end;
  bool aligned;  // all pointers are multiples of 16 bytes: four elements travel in one instruction
};

__device__ Range range_of(const SpdTensor& t, int64_t chunk) {
  const uintptr_t all = (uintptr_t)t.param | (uintptr_t)t.anchor | (uintptr_t)t.grad |
                        (uintptr_t)t.exp_avg | (uintptr_t)t.exp_avg_sq;
  const int64_t begin = (chunk - t.first_chunk) * SPD_CHUNK, end = begin + SPD_CHUNK;
  return {begin, end < t.size ? end : t.size, all % 16 == 0};
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

// ---- pass A
__global__ void __launch_bounds__(kThreads)
    spd_adam_kernel(const SpdTensor* tensors, const int32_t* chunk_tensor, Adam adam,
                    Sums* partial) {
  const int64_t chunk = blockIdx.x;
  const SpdTensor t = tensors[chunk_tensor[chunk]];
  const Range r = range_of(t, chunk);
  Sums sums = {0.0, 0.0, 0.0};
  for (int64_t i = r.begin + kVector * threadIdx.x; i < r.end; i += kVector * kThreads) {
    const int count = r.end - i < kVector ? int(r.end - i) : kVector;
    float w[kVector], w0[kVector] = {0.0f, 0.0f, 0.0f, 0.0f}, g[kVector], m[kVector], v[kVector];
    load(w, t.param + i, count, r.aligned);
    load(g, t.grad + i, count, r.aligned);
    load(m, t.exp_avg + i, count, r.aligned);
    load(v, t.exp_avg_sq + i, count, r.aligned);
    if (t.anchor != nullptr) load(w0, t.anchor + i, count, r.aligned);
    float gd = 0.0f, dd = 0.0f, uu = 0.0f;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e >= count) continue;  // eps = 0 would make 0 / 0 of the padding
      m[e] += adam.rest1 * (g[e] - m[e]);
      v[e] = adam.beta2 * v[e] + adam.rest2 * g[e] * g[e];
      const float before = w[e], distance = before - w0[e];
      w[e] = before - adam.step_size * m[e] / (sqrtf(v[e]) / adam.root_bias2 + adam.eps);
      const float moved = w[e] - before;  // of the rounded, stored weight
      gd += g[e] * distance;
      dd += distance * distance;
      uu += moved * (2.0f * distance + moved);
    }
    sums += {gd, dd, uu};
    store(t.param + i, w, count, r.aligned);
    store(t.exp_avg + i, m, count, r.aligned);
    store(t.exp_avg_sq + i, v, count, r.aligned);
  }
  sums = block_sum(sums);
  if (threadIdx.x == 0) partial[chunk] = sums;
}

// ---- pass B
__global__ void __launch_bounds__(kThreads)
    spd_factor_kernel(const SpdTensor* tensors, const Sums* partial, double spd_lambda,
                      double* conditions, double* report) {
  const int64_t tensor = blockIdx.x;
  const SpdTensor t = tensors[tensor];
  const int64_t end = t.first_chunk + (t.size + SPD_CHUNK - 1) / SPD_CHUNK;
  Sums sums = {0.0, 0.0, 0.0};
  for (int64_t chunk = t.first_chunk + threadIdx.x; chunk < end; chunk += kThreads)
    sums += partial[chunk];
  sums = block_sum(sums);
  if (threadIdx.x != 0) return;
  const double c = (conditions != nullptr ? conditions[tensor] : 0.0) - sums.gd;
  if (conditions != nullptr) conditions[tensor] = c;
  double f = 1.0;
  if (c < 0.0 && sums.uu > 0.0) {  // false where a gradient is NaN
    // Eq. (9) without the cancellation of gamma_t - gamma_{t-1}, which loses every digit of a small
    // step
    const double before = sqrt(sums.dd), after = sqrt(sums.dd + sums.uu);
    f = 1.0 - spd_lambda * sums.uu / (after * (after + before));
  }
  double* row = report + 4 * tensor;
  row[0] = sums.gd, row[1] = sums.dd, row[2] = sums.uu, row[3] = f;
}

// ---- pass C: Eq. (4)
__global__ void __launch_bounds__(kThreads)
    spd_project_kernel(const SpdTensor* tensors, const int32_t* chunk_tensor,
                       const double* report) {
  // backwards: what A wrote last is still in L2
  const int64_t chunk = gridDim.x - 1 - int64_t(blockIdx.x);
  const int64_t tensor = chunk_tensor[chunk];
  const float f = float(report[4 * tensor + 3]);
  if (f == 1.0f) return;
  const SpdTensor t = tensors[tensor];
  const Range r = range_of(t, chunk);
  for (int64_t i = r.begin + kVector * threadIdx.x; i < r.end; i += kVector * kThreads) {
    const int count = r.end - i < kVector ? int(r.end - i) : kVector;
    float w[kVector], w0[kVector] = {0.0f, 0.0f, 0.0f, 0.0f};
    load(w, t.param + i, count, r.aligned);
    if (t.anchor != nullptr) load(w0, t.anchor + i, count, r.aligned);
#pragma unroll
    for (int e = 0; e < kVector; ++e) w[e] = w0[e] + f * (w[e] - w0[e]);
    store(t.param + i, w, count, r.aligned);
  }
}

}  // namespace

extern "C" const char* spd_step_cuda(const SpdTensor* tensors, int64_t count,
                                     const int32_t* chunk_tensor, int64_t chunks, int64_t step,
                                     double lr, double beta1, double beta2, double eps,
                                     double spd_lambda, double* partial, double* conditions,
                                     double* report, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  Sums* sums = reinterpret_cast<Sums*>(partial);
  const double bias1 = 1.0 - pow(beta1, double(step)), bias2 = 1.0 - pow(beta2, double(step));
  const Adam adam = {float(1.0 - beta1), float(beta2),       float(1.0 - beta2),
                     float(lr / bias1),  float(sqrt(bias2)), float(eps)};
  const unsigned blocks = unsigned(chunks);
  if (blocks > 0)
    spd_adam_kernel<<<blocks, kThreads, 0, queue>>>(tensors, chunk_tensor, adam, sums);
  spd_factor_kernel<<<unsigned(count), kThreads, 0, queue>>>(tensors, sums, spd_lambda,
                                                             conditions, report);
  if (blocks > 0)
    spd_project_kernel<<<blocks, kThreads, 0, queue>>>(tensors, chunk_tensor, report);
  const cudaError_t error = cudaGetLastError();  // of any of the three
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
