// Python's door to the kernels: plain pybind11, pointers come as addresses (integers), so that no
// PyTorch header is parsed. Shapes, types and devices are checked in Python, by ops.py.
#pragma GCC optimize("O0")  // it only hands integers on, and compiles sooner
#include <pybind11/pybind11.h>

#include <type_traits>

#include "kernels.h"

// How Python gives an argument of type T: pointers as integers, all else (and text) as it is.
template <class T>
constexpr bool is_address = std::is_pointer<T>::value && !std::is_same<T, const char*>::value;
template <class T>
using Given = std::conditional_t<is_address<T>, uintptr_t, T>;

template <class Result, class... Types>
void define(pybind11::module_& module, const char* name, Result (*function)(Types...)) {
  module.def(
      name, [=](Given<Types>... given) { return function((Types)given...); },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  define(module, "knn_kth_distance_levels", knn_kth_distance_levels);
  define(module, "knn_kth_distance_cpu", knn_kth_distance_cpu);
  define(module, "spd_step_cpu", spd_step_cpu);
#ifdef WITH_CUDA
  define(module, "knn_kth_distance_cuda_capacity", knn_kth_distance_cuda_capacity);
  define(module, "knn_kth_distance_cuda", knn_kth_distance_cuda);
  define(module, "spd_step_cuda", spd_step_cuda);
  module.attr("SPD_CHUNK") = SPD_CHUNK;
#endif
}
