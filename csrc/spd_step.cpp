// spd_step: one step of Adam with selective projection decay (SPD), in place, for a list of
// tensors. Reference in PyTorch: spd.spd_step. Per tensor, with w0 the anchor and D = w - w0:
//   Adam      m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2
//             w~ = w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps);   u = w~ - w
//   Eq. (3)   c_t = -S1,  S1 = sum g D;   Alg. 2:  c_t = c_{t-1} - S1
//   Eq. (9)   r_t = S3 / (gamma_t (gamma_t + gamma_{t-1})),  gamma_{t-1}^2 = S2,
//             gamma_t^2 = S2 + S3,  S2 = sum D^2,  S3 = sum u (2 D + u):
//             gamma_t - gamma_{t-1} without its cancellation
//   Eq. (4)   if c_t < 0 and S3 > 0:  w = w0 + f (w~ - w0),  f = 1 - lambda r_t;   else w = w~
// Layout: each tensor a contiguous run; fp32 or fp64; no alignment needed. In place: param,
// exp_avg, exp_avg_sq.
//
// Fused: the three sums are taken in the Adam pass, while g, w, w0 are in registers: 32 bytes per
// fp32 parameter (28 with the zero anchor) where a loop of torch operations moves 132. f needs the
// whole tensor, so a projected tensor is visited twice: at once, last chunk first, by the thread
// that has finished its sums. It finds w~ and w0 in the cache if that is large enough (else +12
// bytes). No thread waits for another.
// Sums: in the parameters' type over blocks of 128 elements, 8 to a running sum, then in fp64:
// off by 2^-20 of the sum of the terms' sizes at most. Chunks are added in order: the same bits for
// any number of threads and any instruction set.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace {

#define INLINE inline __attribute__((always_inline))
#ifndef CLONES
#if defined(__x86_64__) && defined(__GLIBC__)
// Compiled for both, the loader takes one. AVX-512 would bring nothing: memory is the limit.
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif
#endif

constexpr int64_t kChunk = 32768;  // elements a thread takes at a time: five arrays of 128 KiB
constexpr int kLanes = 16;
constexpr int64_t kBlock = 8 * kLanes;  // elements summed before fp64
constexpr int64_t kAhead = 256;         // elements fetched ahead: a seventh less time on a Xeon

struct Sums {
  double gd = 0, dd = 0, uu = 0;  // S1, S2, S3
};

template <class T>
struct Scalars {
  T one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inverse_root2;
};

template <class T>
struct Chunk {
  T* w;
  const T *w0, *g;
  T *m, *v;
  int64_t size, tensor;
};

// Adam on a few elements, whose terms of the three sums go to a lane each: the loop is what the
// compiler makes vectors of.
template <class T, bool anchored>
INLINE void adam(T* __restrict w, const T* __restrict w0, const T* __restrict g, T* __restrict m,
                 T* __restrict v, int lanes, const Scalars<T>& s, T (&sums)[3][kLanes]) {
  for (int l = 0; l < lanes; ++l) {
    const T before = w[l], distance = anchored ? before - w0[l] : before;
    m[l] += s.one_minus_beta1 * (g[l] - m[l]);
    v[l] = v[l] * s.beta2 + s.one_minus_beta2 * g[l] * g[l];
    w[l] = before - s.step_size * (m[l] / (std::sqrt(v[l]) * s.inverse_root2 + s.eps));
    const T update = w[l] - before;
    sums[0][l] += g[l] * distance;
    sums[1][l] += distance * distance;
    sums[2][l] += update * (distance + distance + update);
  }
}

// Pass A: Adam and the partial sums of one chunk.
template <class T, bool anchored>
INLINE Sums adam_chunk(const Chunk<T>& c, const Scalars<T>& s) {
  double totals[3][kLanes] = {};
  for (int64_t i = 0; i < c.size;) {
    T sums[3][kLanes] = {};
    const int64_t end = std::min(c.size, i + kBlock);
    for (; i + kLanes <= end; i += kLanes) {
      for (const T* array : {(const T*)c.w, c.w0, c.g, (const T*)c.m, (const T*)c.v})
        __builtin_prefetch(array + i + kAhead);
      adam<T, anchored>(c.w + i, c.w0 + i, c.g + i, c.m + i, c.v + i, kLanes, s, sums);
    }
    if (i < end)  // the tail
      adam<T, anchored>(c.w + i, c.w0 + i, c.g + i, c.m + i, c.v + i, int(end - i), s, sums);
    i = end;
    for (int j = 0; j < 3; ++j)
      for (int l = 0; l < kLanes; ++l) totals[j][l] += sums[j][l];
  }
  Sums total;
  for (int l = 0; l < kLanes; ++l)
    total.gd += totals[0][l], total.dd += totals[1][l], total.uu += totals[2][l];
  return total;
}
CLONES Sums pass_a(const Chunk<float>& c, const Scalars<float>& s) {
  return c.w0 ? adam_chunk<float, true>(c, s) : adam_chunk<float, false>(c, s);
}
Sums pass_a(const Chunk<double>& c, const Scalars<double>& s) {
  return c.w0 ? adam_chunk<double, true>(c, s) : adam_chunk<double, false>(c, s);
}

// Pass B: f of a tensor from its finished sums; 1 where Eq. (4) leaves the Adam step alone.
double factor(const Sums& s, double c, double spd_lambda) {
  if (!(c < 0 && s.uu > 0)) return 1;  // NaN as well
  const double before = std::sqrt(s.dd), after = std::sqrt(s.dd + s.uu);
  return 1 - spd_lambda * s.uu / (after * (after + before));
}

// Pass C: w = w0 + f (w~ - w0) on one chunk.
template <class T>
INLINE void project_chunk(const Chunk<T>& c, T f) {
  if (c.w0)
    for (int64_t i = 0; i < c.size; ++i) c.w[i] = c.w0[i] + f * (c.w[i] - c.w0[i]);
  else
    for (int64_t i = 0; i < c.size; ++i) c.w[i] *= f;
}
CLONES void pass_c(const Chunk<float>& c, float f) { project_chunk(c, f); }
void pass_c(const Chunk<double>& c, double f) { project_chunk(c, f); }

template <class T>
void step_all(const SpdTensor* tensors, int64_t count, const Scalars<T>& scalars, double spd_lambda,
              int threads, double* conditions, double* sums) {
  std::vector<Chunk<T>> chunks;
  std::vector<int64_t> first = {0};  // where each tensor begins in `chunks`, and the end
  for (int64_t t = 0; t < count; ++t) {
    const SpdTensor& x = tensors[t];
    for (int64_t i = 0; i < x.size; i += kChunk)
      chunks.push_back({(T*)x.param + i, x.anchor ? (const T*)x.anchor + i : nullptr,
                        (const T*)x.grad + i, (T*)x.exp_avg + i, (T*)x.exp_avg_sq + i,
                        std::min(kChunk, x.size - i), t});
    first.push_back(chunks.size());
  }
  std::vector<Sums> parts(chunks.size());
  std::vector<std::atomic<int64_t>> done(count);  // chunks of each tensor
  if (sums) std::fill_n(sums, 3 * count, 0.0);    // those of a tensor without elements
  threads = int(std::min<int64_t>(threads, chunks.size() / 2));
  parallel(threads, chunks.size(), [&](int64_t chunk) {
    const int64_t t = chunks[chunk].tensor;
    parts[chunk] = pass_a(chunks[chunk], scalars);
    if (++done[t] < first[t + 1] - first[t]) return;
    Sums total;  // all chunks of the tensor are done, this one was the last
    for (int64_t i = first[t]; i < first[t + 1]; ++i)
      total.gd += parts[i].gd, total.dd += parts[i].dd, total.uu += parts[i].uu;
    if (sums) std::memcpy(sums + 3 * t, &total, sizeof total);
    const double c = (conditions ? conditions[t] : 0) - total.gd;
    if (conditions) conditions[t] = c;
    const T f = T(factor(total, c, spd_lambda));
    for (int64_t i = first[t + 1] - 1; f != 1 && i >= first[t]; --i) pass_c(chunks[i], f);
  });
}

}  // namespace

extern "C" void spd_step_cpu(const SpdTensor* tensors, int64_t count, int bytes, int64_t step,
                             double lr, double beta1, double beta2, double eps, double spd_lambda,
                             int threads, double* conditions, double* sums) {
  const double size = lr / (1 - std::pow(beta1, step));
  const double root2 = std::sqrt(1 - std::pow(beta2, step));
  const Scalars<double> s = {1 - beta1, beta2, 1 - beta2, eps, size, 1 / root2};
  const Scalars<float> single = {float(s.one_minus_beta1), float(s.beta2), float(s.one_minus_beta2),
                                 float(s.eps), float(s.step_size), float(s.inverse_root2)};
  if (bytes == 4)
    step_all(tensors, count, single, spd_lambda, threads, conditions, sums);
  else
    step_all(tensors, count, s, spd_lambda, threads, conditions, sums);
}
