// Stand-in for <mma.h>: nvcuda::wmma with 16 x 16 x 16 tiles, fp32 accumulation.
//
// What the documentation promises is what is here: every operation is collective over the warp (all
// lanes must reach it, with the same pointer and pitch); which lane holds which element is not
// said, so a different scrambled map is used for each kind of fragment; the sum is fp32 in no
// promised order. Loads and stores go through the checker like any other, element by element, by
// the lane that holds the element; alignment and pitch rules are checked. They order no memory: a
// __syncwarp() is needed.
#pragma once
#include "cuda_fp16.h"

namespace nvcuda::wmma {
struct matrix_a { static constexpr int step = 37, start = 11; };
struct matrix_b { static constexpr int step = 91, start = 3; };
struct accumulator { static constexpr int step = 149, start = 7; };
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  static constexpr int num_elements = 8;
  T x[num_elements];
  static int element(int lane, int i) { return ((lane * 8 + i) * Use::step + Use::start) & 255; }
};

template <class T>
void together(const T* pointer, unsigned pitch, emu::Where where) {
  uint64_t words[32];
  emu::exchange(0xffffffffu, reinterpret_cast<uint64_t>(pointer) * 31 + pitch, words, where);
  for (int lane = 1; lane < 32; ++lane)
    if (words[lane] != words[0])
      emu::fail("line %u: lanes differ in pointer or pitch", where.line());
  if (reinterpret_cast<uintptr_t>(pointer) % 32 || pitch * sizeof(T) % 16)
    emu::fail("line %u: a matrix must start at a multiple of 32 bytes, its pitch be one of 16",
              where.line());
}
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned pitch,
                      EMU_HERE) {
  together(from, pitch, where);
  for (int i = 0; i < 8; ++i) {
    const int e = to.element(emu::lane(), i), row = e / 16, column = e % 16;
    to.x[i] =
        std::is_same_v<Layout, row_major> ? from[row * pitch + column] : from[column * pitch + row];
  }
}
template <class T>
void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& from, unsigned pitch,
                       layout_t layout, EMU_HERE) {
  together(to, pitch, where);
  for (int i = 0; i < 8; ++i) {
    const int e = from.element(emu::lane(), i), row = e / 16, column = e % 16;
    to[layout == mem_row_major ? row * pitch + column : column * pitch + row] = from.x[i];
  }
}
template <class Use, class T, class Layout>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& to, T value) {
  for (T& x : to.x) x = value;
}
template <class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
              const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c, EMU_HERE) {
  struct Operands {
    decltype(&a) pa;
    decltype(&b) pb;
    decltype(&c) pc;
    decltype(&d) pd;
  } mine{&a, &b, &c, &d};
  uint64_t words[32];
  emu::exchange(0xffffffffu, reinterpret_cast<uint64_t>(&mine), words, where,
                [](uint64_t* all) __attribute__((no_sanitize("thread"))) {
    float left[256], right[256], sum[256];  // the last lane works for the warp
    for (int e = 0; e < 256; ++e) {
      const Operands& o = *reinterpret_cast<const Operands*>(all[e / 8]);
      left[o.pa->element(e / 8, e % 8)] = o.pa->x[e % 8].value;
      right[o.pb->element(e / 8, e % 8)] = o.pb->x[e % 8].value;
      sum[o.pc->element(e / 8, e % 8)] = o.pc->x[e % 8];
    }
    emu::multiply(left, right, sum);
    for (int e = 0; e < 256; ++e) {
      const Operands& o = *reinterpret_cast<const Operands*>(all[e / 8]);
      o.pd->x[e % 8] = sum[o.pd->element(e / 8, e % 8)];
    }
  });
}
}  // namespace nvcuda::wmma
