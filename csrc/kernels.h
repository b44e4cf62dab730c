// The CPU kernels in one page: raw pointers and sizes, no PyTorch header.
//
// Every launcher returns nullptr, or a sentence saying what was wrong (valid until the thread's
// next call). Their references in PyTorch are vrf.kth_distance and the for-loop of spd.AdamSPD.
#pragma once
#include <cstdint>

// Instruction sets in rising order; each is chosen at run time, nothing is compiled with
// -march=native.
//   portable    plain C++, fp32            any CPU the compiler knows
//   avx2        AVX2 + FMA, fp32           x86 since 2013
//   avx512      AVX-512, fp32              Intel Skylake-SP; chosen before avx512bf16 on Intel
//   avx512bf16  bf16 dot products          AMD Zen 4, Intel Cooper Lake
//   amx         bf16 tile products         Intel Sapphire Rapids
extern "C" const char* best_instruction_set();  // the best one this CPU and kernel offer
extern "C" bool has_instruction_set(const char* name);

// Eq. (4) of VRF: distance of each query to its k-th nearest reference row, exact.
//   queries [N, D], reference [M, D], out [N], all contiguous fp32; 1 <= k <= M; finite, norms
//   below 5e17.
extern "C" const char* knn_kth_distance_cpu(const float* queries, int64_t n, const float* reference,
                                            int64_t m, int64_t d, int64_t k,
                                            const char* instruction_set, int threads, float* out);

// One parameter tensor of SPD. anchor == nullptr means the zero anchor of the PEFT variant.
struct SpdTensor {
  void* param;
  const void* anchor;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  int64_t size;
};

// One optimiser step of Adam + selective projection (SPD Eqs. 3, 4, 9), in place, for tensors of
// one dtype: fp32 (bytes = 4) or fp64 (bytes = 8). `step` counts from 1. sums [count, 3] receives
// S1, S2, S3 of each tensor (spd_step.cpp says what they are), or is nullptr.
extern "C" const char* spd_step_cpu(const SpdTensor* tensors, int64_t count, int bytes,
                                    int64_t step, double lr, double beta1, double beta2, double eps,
                                    double spd_lambda, const char* instruction_set, int threads,
                                    double* sums);
