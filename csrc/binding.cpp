// Python's door to the kernels: plain pybind11, tensors come as addresses (integers), so that no
// PyTorch header is parsed (torch/extension.h alone costs 27 s). Shapes, types and devices are
// checked in Python, by common.kernels(). Every launcher returns None, or a sentence saying what
// was wrong.
#pragma GCC optimize("O0")  // it only hands integers on, and compiles 3 s sooner
#include <pybind11/pybind11.h>

#include "kernels.h"
#ifdef WITH_CUDA
#include "binding_cuda.h"
#endif

namespace py = pybind11;
using address = uintptr_t;
using release_gil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("best_instruction_set", &best_instruction_set);
  m.def("has_instruction_set", &has_instruction_set);
  m.def(
      "knn_kth_distance_cpu",
      [](address queries, int64_t n, address reference, int64_t rows, int64_t d, int64_t k,
         const char* instruction_set, int threads, address out) {
        return knn_kth_distance_cpu(at<float>(queries), n, at<float>(reference), rows, d, k,
                                    instruction_set, threads, at<float>(out));
      },
      release_gil());
  // table: int64 [count, 6], a row per tensor in the order of SpdTensor
  m.def(
      "spd_step_cpu",
      [](address table, int64_t count, int bytes, int64_t step, double lr, double beta1,
         double beta2, double eps, double spd_lambda, const char* instruction_set, int threads,
         address sums) {
        return spd_step_cpu(at<SpdTensor>(table), count, bytes, step, lr, beta1, beta2, eps,
                            spd_lambda, instruction_set, threads, at<double>(sums));
      },
      release_gil());
#ifdef WITH_CUDA
  bind_cuda(m);
#endif
}
