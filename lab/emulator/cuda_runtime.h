// CUDA on the CPU, for tests: g++ finds this file instead of NVIDIA's <cuda_runtime.h> and compiles
// the unchanged .cu files with it.
//
// A CUDA thread is a fiber; the blocks of a launch run one after the other. A fiber runs until it
// reaches __syncthreads(), a warp intrinsic or its end, so every thread runs as far ahead of the
// others as the program lets it: a hostile schedule. The order of threads and blocks is chosen by
// emu_begin(): 0 ascending, 1 descending, n > 1 shuffled anew at every pass.
//
// Reported as errors (through cudaGetLastError(), as on a GPU): threads waiting at different
// barriers, a barrier after a thread has returned, a warp intrinsic that not all lanes of its mask
// reach or whose mask lacks the caller, an illegal launch; and all that racecheck.cpp finds.
// Not covered: dynamic shared memory, cooperative groups, asynchronous copies, overlapping streams,
// __threadfence protocols, nvcc's code generation, speed.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cuda_shared")))

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct CUstream_st* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
extern "C" cudaError_t cudaGetLastError();
extern "C" const char* cudaGetErrorString(cudaError_t);

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emu {
using Where = std::source_location;  // where the kernel called: the default argument below
struct Config { dim3 grid, block; size_t shared = 0; cudaStream_t stream = nullptr; };

void run(Config, void (*body)(const void*), const void* arguments, size_t argument_bytes);
void barrier(Where);
// Waits for every lane of `mask` at this place of the source, then gives all 32 lanes' words to
// each. The last lane to arrive calls `complete` first.
void exchange(unsigned mask, uint64_t word, uint64_t words[32], Where,
              void (*complete)(uint64_t[32]) = nullptr);
void warp_barrier(unsigned mask, Where);
void multiply(const float a[256], const float b[256], float c[256]);  // c += a b, for mma.h

enum Kind { read = 0, write = 1, atomic = 2 };
void access(const void* address, size_t bytes, Kind, const void* code);  // racecheck.cpp
void fail(const char* format, ...);  // stops the launch; never returns when called by a CUDA thread

// kernel<<<grid, block, 0, stream>>>(a) becomes emu::launch({grid, block, 0, stream}, kernel, a)
template <class... P, class... A>
void launch(Config config, void (*kernel)(P...), A... arguments) {
  const auto body = [=] { kernel(static_cast<P>(arguments)...); };
  run(config, [](const void* p) { (*static_cast<decltype(body)*>(p))(); }, &body, sizeof body);
}

template <class T>
T from_lane(unsigned mask, T value, int lane, Where where) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0, words[32];
  memcpy(&word, &value, sizeof(T));
  exchange(mask, word, words, where);
  if (lane < 0 || lane > 31) return value;
  if (!(mask >> lane & 1))
    fail("line %u: a shuffle reads lane %d, not in its mask", where.line(), lane);
  memcpy(&value, &words[lane], sizeof(T));
  return value;
}
inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}
}  // namespace emu

#define EMU_HERE emu::Where where = emu::Where::current()
inline void __syncthreads(EMU_HERE) { emu::barrier(where); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_HERE) { emu::warp_barrier(mask, where); }
template <class T> T __shfl_sync(unsigned mask, T value, int source, EMU_HERE) {
  return emu::from_lane(mask, value, source & 31, where);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned distance, EMU_HERE) {
  return emu::from_lane(mask, value, emu::lane() - int(distance), where);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned distance, EMU_HERE) {
  return emu::from_lane(mask, value, emu::lane() + int(distance), where);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, EMU_HERE) {
  return emu::from_lane(mask, value, emu::lane() ^ bits, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_HERE) {
  uint64_t words[32];
  unsigned votes = 0;
  emu::exchange(mask, predicate != 0, words, where);
  for (int i = 0; i < 32; ++i) votes |= unsigned(mask >> i & 1 && words[i]) << i;
  return votes;
}

// Noinline and not instrumented, so that the checker sees one atomic access and no other.
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* address, T value) {
  emu::access(address, sizeof(T), emu::atomic, __builtin_return_address(0));
  const T old = *address;
  *address = old + value;
  return old;
}

inline unsigned __float_as_uint(float value) { unsigned u; memcpy(&u, &value, 4); return u; }
inline float __uint_as_float(unsigned value) { float f; memcpy(&f, &value, 4); return f; }
inline int __ffs(int value) { return __builtin_ffs(value); }
