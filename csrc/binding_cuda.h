// The CUDA half of binding.cpp: the launchers of kernels_cuda.h as Python functions. Addresses and
// the stream (torch.cuda.current_stream().cuda_stream) come as integers; the caller holds the
// device guard.
#pragma once
#include <pybind11/pybind11.h>

#include "kernels_cuda.h"

inline void bind_cuda(pybind11::module_& m) {
  using address = uintptr_t;
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  const auto f32 = [](address a) { return reinterpret_cast<float*>(a); };
  const auto f64 = [](address a) { return reinterpret_cast<double*>(a); };
  const auto any = [](address a) { return reinterpret_cast<void*>(a); };
  const auto table = [](address a) { return reinterpret_cast<const SpdCudaTensor*>(a); };

  m.def("knn_kth_distance_cuda_scratch", &knn_kth_distance_cuda_scratch);
  m.def(
      "knn_kth_distance_cuda",
      [=](address queries, int64_t n, address reference, int64_t rows, int64_t d, int64_t k,
          address out, address scratch, address stream) {
        return knn_kth_distance_cuda(f32(queries), n, f32(reference), rows, d, k, f32(out),
                                     any(scratch), any(stream));
      },
      release_gil());
  m.def(
      "knn_kth_distance_naive_cuda",
      [=](address queries, int64_t n, address reference, int64_t rows, int64_t d, int64_t k,
          address out, address stream) {
        return knn_kth_distance_naive_cuda(f32(queries), n, f32(reference), rows, d, k, f32(out),
                                           any(stream));
      },
      release_gil());
  // tensors: int64 [count, 7], rows in the order of SpdCudaTensor; chunk_tensor: int32 [chunks]
  m.def(
      "spd_step_cuda",
      [=](address tensors, int64_t count, address chunk_tensor, int64_t chunks, address step,
          address lr, double beta1, double beta2, double eps, double spd_lambda, address partial,
          address report, address stream) {
        return spd_step_cuda(table(tensors), count, reinterpret_cast<const int32_t*>(chunk_tensor),
                             chunks, f32(step), f32(lr), beta1, beta2, eps, spd_lambda,
                             f64(partial), f64(report), any(stream));
      },
      release_gil());
  m.def(
      "spd_step_naive_cuda",
      [=](address tensors, int64_t count, address step, address lr, double beta1, double beta2,
          double eps, double spd_lambda, address report, address stream) {
        return spd_step_naive_cuda(table(tensors), count, f32(step), f32(lr), beta1, beta2, eps,
                                   spd_lambda, f64(report), any(stream));
      },
      release_gil());
  m.attr("SPD_CHUNK") = int(SPD_CHUNK);
}
