// Python's door to the kernels: plain pybind11, tensors come as addresses (integers), so that no
// PyTorch header is parsed. Shapes, types and devices are checked in Python, by ops.py.
#pragma GCC optimize("O0")  // it only hands integers on, and compiles 3 s sooner
#include <pybind11/pybind11.h>

#include "kernels.h"

using address = uintptr_t;

template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("knn_kth_distance_levels", &knn_kth_distance_levels);
  m.def("knn_kth_distance_cpu",
        [](address queries, int64_t n, address reference, int64_t rows, int64_t d, int64_t k,
           const char* level, int threads, address out) {
          return knn_kth_distance_cpu(at<float>(queries), n, at<float>(reference), rows, d, k,
                                      level, threads, at<float>(out));
        }, release_gil());
  m.def("spd_step_cpu",
        [](address tensors, int64_t count, int bytes, int64_t step, double lr, double beta1,
           double beta2, double eps, double spd_lambda, int threads, address conditions,
           address sums) {
          spd_step_cpu(at<SpdTensor>(tensors), count, bytes, step, lr, beta1, beta2, eps,
                       spd_lambda, threads, at<double>(conditions), at<double>(sums));
        }, release_gil());
#ifdef WITH_CUDA
  // The stream is torch.cuda.current_stream().cuda_stream; the caller holds the device guard.
  m.def("knn_kth_distance_cuda_scratch", &knn_kth_distance_cuda_scratch);
  m.def("knn_kth_distance_cuda",
        [](address queries, int64_t n, address reference, int64_t rows, int64_t d, int64_t k,
           address centre, address out, address scratch, address stream) {
          return knn_kth_distance_cuda(at<float>(queries), n, at<float>(reference), rows, d, k,
                                       at<float>(centre), at<float>(out), at<void>(scratch),
                                       at<void>(stream));
        }, release_gil());
  m.def("spd_step_cuda",
        [](address tensors, int64_t count, address chunk_tensor, int64_t chunks, int64_t step,
           double lr, double beta1, double beta2, double eps, double spd_lambda, address partial,
           address conditions, address report, address stream) {
          return spd_step_cuda(at<SpdTensor>(tensors), count, at<int32_t>(chunk_tensor), chunks,
                               step, lr, beta1, beta2, eps, spd_lambda, at<double>(partial),
                               at<double>(conditions), at<double>(report), at<void>(stream));
        }, release_gil());
  m.attr("SPD_CHUNK") = int(SPD_CHUNK);
#endif
}
