// spd_step: one step of Adam with selective projection decay (SPD), in place, for a list of
// tensors. Reference in PyTorch: spd.spd_step. Per tensor, with w0 the anchor and D = w - w0:
//   Adam      m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2
//             w~ = w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps);   u = w~ - w
//   Eq. (3)   c_t = -s1,  s1 = sum g D;   Alg. 2:  c_t = c_{t-1} - s1
//   Eq. (9)   r_t = s3 / (gamma_t (gamma_t + gamma_{t-1})),  gamma_{t-1}^2 = s2,
//             gamma_t^2 = s2 + s3,  s2 = sum D^2,  s3 = sum u (2 D + u):
//             gamma_t - gamma_{t-1} without its cancellation
//   Eq. (4)   if c_t < 0 and s3 > 0:  w = w0 + f (w~ - w0),  f = 1 - lambda r_t;   else w = w~
// Layout: each tensor a contiguous run of fp32; no alignment needed. In place: param, exp_avg,
// exp_avg_sq.
//
// Fused: the three sums are taken in the Adam pass, while g, w, w0 are in registers: 32 bytes per
// parameter (28 with the zero anchor) where a loop of torch operations moves 132. f needs the
// whole tensor, so a projected tensor is visited twice: at once, last chunk first, by the thread
// that has finished its sums. It finds w~ and w0 in the cache if that is large enough (else +12
// bytes). No thread waits for another.
// Sums: in fp32 over blocks of 128 elements, 8 to a running sum, then in fp64: off by 2^-20 of the
// sum of the terms' sizes at most. Chunks are added in order: the same bits for any number of
// threads and any instruction set.
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
  double gd = 0, dd = 0, uu = 0;  // s1, s2, s3
  void operator+=(const Sums& x) { gd += x.gd, dd += x.dd, uu += x.uu; }
};

struct Scalars {
  float one_minus_beta1, beta2, one_minus_beta2, eps, step_size, inverse_root2;
};

// Adam on a few elements, whose terms of the three sums go to a lane each: the loop is what the
// compiler makes vectors of.
template <bool anchored>
INLINE void adam(float* __restrict w, const float* __restrict w0, const float* __restrict g,
                 float* __restrict m, float* __restrict v, int lanes, const Scalars& s,
                 float (&sums)[3][kLanes]) {
  for (int l = 0; l < lanes; ++l) {
    const float before = w[l], distance = anchored ? before - w0[l] : before;
    m[l] += s.one_minus_beta1 * (g[l] - m[l]);
    v[l] = v[l] * s.beta2 + s.one_minus_beta2 * g[l] * g[l];
    w[l] = before - s.step_size * (m[l] / (std::sqrt(v[l]) * s.inverse_root2 + s.eps));
    const float update = w[l] - before;
    sums[0][l] += g[l] * distance;
    sums[1][l] += distance * distance;
    sums[2][l] += update * (distance + distance + update);
  }
}

template <bool anchored>
INLINE Sums adam_chunk(const SpdTensor& x, const Scalars& s) {
  float *w = x.param, *m = x.exp_avg, *v = x.exp_avg_sq;
  const float *w0 = x.anchor, *g = x.grad;
  double totals[3][kLanes] = {};
  for (int64_t i = 0; i < x.size;) {
    float sums[3][kLanes] = {};
    const int64_t end = std::min(x.size, i + kBlock);
    for (; i + kLanes <= end; i += kLanes) {
      for (const float* array : {(const float*)w, w0, g, (const float*)m, (const float*)v})
        __builtin_prefetch(array + i + kAhead);
      adam<anchored>(w + i, w0 + i, g + i, m + i, v + i, kLanes, s, sums);
    }
    if (i < end)  // the tail
      adam<anchored>(w + i, w0 + i, g + i, m + i, v + i, int(end - i), s, sums);
    i = end;
    for (int j = 0; j < 3; ++j)
      for (int l = 0; l < kLanes; ++l) totals[j][l] += sums[j][l];
  }
  Sums total;
  for (int l = 0; l < kLanes; ++l) total += {totals[0][l], totals[1][l], totals[2][l]};
  return total;
}

// Pass A: Adam and the partial sums of one chunk.
CLONES Sums pass_a(const SpdTensor& x, const Scalars& s) {
  return x.anchor ? adam_chunk<true>(x, s) : adam_chunk<false>(x, s);
}

// Pass B: f of a tensor from its finished sums; 1 where Eq. (4) leaves the Adam step alone.
float factor(const Sums& s, double c, double spd_lambda) {
  if (!(c < 0 && s.uu > 0)) return 1;  // NaN as well
  const double before = std::sqrt(s.dd), after = std::sqrt(s.dd + s.uu);
  return float(1 - spd_lambda * s.uu / (after * (after + before)));
}

// Pass C: w = w0 + f (w~ - w0) on one chunk.
CLONES void pass_c(const SpdTensor& x, float f) {
  float* w = x.param;
  if (x.anchor)
    for (int64_t i = 0; i < x.size; ++i) w[i] = x.anchor[i] + f * (w[i] - x.anchor[i]);
  else
    for (int64_t i = 0; i < x.size; ++i) w[i] *= f;
}

// A chunk of a tensor, as a tensor of its own.
SpdTensor chunk_of(const SpdTensor& x, int64_t begin) {
  const float* w0 = x.anchor ? x.anchor + begin : nullptr;
  const int64_t size = std::min(kChunk, x.size - begin);
  return {x.param + begin, w0, x.grad + begin, x.exp_avg + begin, x.exp_avg_sq + begin, size, 0};
}

}  // namespace

extern "C" void spd_step_cpu(const SpdTensor* tensors, int64_t count, int64_t step, double lr,
                             double beta1, double beta2, double eps, double spd_lambda, int threads,
                             double* conditions, double* sums) {
  const double size = lr / (1 - std::pow(beta1, step));
  const double root2 = std::sqrt(1 - std::pow(beta2, step));
  const Scalars scalars = {float(1 - beta1), float(beta2), float(1 - beta2),
                           float(eps),       float(size),  float(1 / root2)};
  std::vector<SpdTensor> chunks;
  std::vector<int64_t> owner;        // tensor of each chunk
  std::vector<int64_t> first = {0};  // where each tensor begins in `chunks`, and the end
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i == 0 || i < tensors[t].size; i += kChunk)  // one for an empty tensor, too
      chunks.push_back(chunk_of(tensors[t], i));
    first.push_back(chunks.size());
    owner.resize(chunks.size(), t);
  }
  std::vector<Sums> parts(chunks.size());
  std::vector<std::atomic<int64_t>> done(count);  // chunks of each tensor
  threads = int(std::min<int64_t>(threads, chunks.size() / 2));
  parallel(threads, chunks.size(), [&](int64_t chunk) {
    const int64_t t = owner[chunk];
    parts[chunk] = pass_a(chunks[chunk], scalars);
    if (++done[t] < first[t + 1] - first[t]) return;
    Sums total;  // all chunks of the tensor are done, this one was the last
    for (int64_t i = first[t]; i < first[t + 1]; ++i) total += parts[i];
    if (sums) std::memcpy(sums + 3 * t, &total, sizeof total);
    const double c = (conditions ? conditions[t] : 0) - total.gd;
    if (conditions) conditions[t] = c;
    const float f = factor(total, c, spd_lambda);
    for (int64_t i = first[t + 1] - 1; f != 1 && i >= first[t]; --i) pass_c(chunks[i], f);
  });
}
