// spd_step: one step of Adam with selective projection decay (SPD), in place, for a list of
// tensors. Reference in PyTorch: the for-loop of spd.AdamSPD. Per tensor, with w0 the anchor and D
// = w - w0:
//   Adam      m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2
//             w~ = w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps);   u = w~ - w
//   Eq. (3)   c_t = -S1,  S1 = sum g D
//   Eq. (9)   r_t = S3 / (gamma_t (gamma_t + gamma_{t-1})),  gamma_{t-1}^2 = S2,
//             gamma_t^2 = S2 + S3,  S2 = sum D^2,  S3 = sum u (2 D + u):
//             gamma_t - gamma_{t-1} without its cancellation
//   Eq. (4)   if c_t < 0 and S3 > 0:  w = w0 + f (w~ - w0),  f = 1 - lambda r_t;   else w = w~
// Layout: each tensor a contiguous run; fp32 or fp64; no alignment needed. In place: param,
// exp_avg, exp_avg_sq.
//
// Fused: the three sums are taken in the Adam pass, while g, w, w0 are in registers: 32 bytes per
// fp32 parameter (28 with the zero anchor) where a loop of torch operations moves 132. f needs the
// whole tensor, so projected tensors are visited twice. Tensors are therefore worked through in
// groups that fit the cache; the second visit of a group comes at once, last chunk first, and
// finds w~ and w0 there if the cache is large and near enough (else +12 bytes).
// Sums: in the parameters' type over blocks of 128 elements, 8 to a running sum, then in fp64:
// off by 2^-20 of the sum of the terms' sizes at most. Chunks are added in order: the same bits for
// any number of threads and any instruction set.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int64_t kChunk = 8192;       // elements a thread takes at a time: five arrays of 32 KiB
constexpr int64_t kGroup =
    3 << 19;  // elements whose w~ and w0 (12 MiB in fp32) should stay in the cache
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

// Adam on kLanes elements, adding to the sums of a block.
template <class T, bool anchored, class V>
INLINE void adam(T* pw, const T* pw0, const T* pg, T* pm, T* pv, const Scalars<T>& s, V& gd, V& dd,
                 V& uu) {
  V w, w0 = {}, g, m, v, root;
  std::memcpy(&w, pw, sizeof w);
  if (anchored) std::memcpy(&w0, pw0, sizeof w0);
  std::memcpy(&g, pg, sizeof g);
  std::memcpy(&m, pm, sizeof m);
  std::memcpy(&v, pv, sizeof v);
  m += s.one_minus_beta1 * (g - m);
  v = v * s.beta2 + s.one_minus_beta2 * g * g;
  for (int l = 0; l < kLanes; ++l) root[l] = std::sqrt(v[l]);
  const V moved = w - s.step_size * (m / (root * s.inverse_root2 + s.eps));
  std::memcpy(pw, &moved, sizeof moved);
  std::memcpy(pm, &m, sizeof m);
  std::memcpy(pv, &v, sizeof v);
  const V distance = w - w0, update = moved - w;
  gd += g * distance;
  dd += distance * distance;
  uu += update * (distance + distance + update);
}

// Pass A: Adam and the partial sums of one chunk.
template <class T, bool anchored>
INLINE Sums adam_chunk(const Chunk<T>& c, const Scalars<T>& s) {
  typedef T V __attribute__((vector_size(kLanes * sizeof(T))));
  double gd[kLanes] = {}, dd[kLanes] = {}, uu[kLanes] = {};
  for (int64_t i = 0; i < c.size;) {
    V a = {}, b = {}, e = {};
    const int64_t end = std::min(c.size, i + kBlock);
    for (; i + kLanes <= end; i += kLanes) {
      for (const T* array : {(const T*)c.w, c.w0, c.g, (const T*)c.m, (const T*)c.v})
        __builtin_prefetch(array + i + kAhead);
      adam<T, anchored>(c.w + i, anchored ? c.w0 + i : c.w0, c.g + i, c.m + i, c.v + i, s, a, b, e);
    }
    if (i < end) {  // the tail, filled up with elements that stay at 0
      T x[5][kLanes] = {}, *from[5] = {c.w, (T*)c.w0, (T*)c.g, c.m, c.v};
      for (T& v : x[4]) v = 1;
      for (int j = 0; j < 5; ++j)
        if (from[j]) std::memcpy(x[j], from[j] + i, (end - i) * sizeof(T));
      adam<T, anchored>(x[0], x[1], x[2], x[3], x[4], s, a, b, e);
      for (int j : {0, 3, 4}) std::memcpy(from[j] + i, x[j], (end - i) * sizeof(T));
      i = end;
    }
    for (int l = 0; l < kLanes; ++l) gd[l] += a[l], dd[l] += b[l], uu[l] += e[l];
  }
  Sums total;
  for (int l = 0; l < kLanes; ++l) total.gd += gd[l], total.dd += dd[l], total.uu += uu[l];
  return total;
}

// Pass B: f of a tensor from its finished sums; 1 where Eq. (4) leaves the Adam step alone.
double factor(const Sums& s, double spd_lambda) {
  if (!(s.gd > 0 && s.uu > 0)) return 1;
  const double before = std::sqrt(s.dd), after = std::sqrt(s.dd + s.uu);
  return 1 - spd_lambda * s.uu / (after * (after + before));
}

// Pass C: w = w0 + f (w~ - w0) on one chunk.
template <class T, bool anchored>
INLINE void project_chunk(const Chunk<T>& c, T f) {
  for (int64_t i = 0; i < c.size; ++i) {
    const T w0 = anchored ? c.w0[i] : T(0);
    c.w[i] = w0 + f * (c.w[i] - w0);
  }
}

template <class T>
struct InstructionSet {
  const char* name;
  Sums (*adam)(const Chunk<T>&, const Scalars<T>&);
  void (*project)(const Chunk<T>&, T);
};

// The same source, compiled once per instruction set.
#define PIECES(NAME, TARGET)                                                     \
  template <class T>                                                             \
  TARGET Sums adam_##NAME(const Chunk<T>& c, const Scalars<T>& s) {              \
    return c.w0 ? adam_chunk<T, true>(c, s) : adam_chunk<T, false>(c, s);        \
  }                                                                              \
  template <class T>                                                             \
  TARGET void project_##NAME(const Chunk<T>& c, T f) {                           \
    return c.w0 ? project_chunk<T, true>(c, f) : project_chunk<T, false>(c, f);  \
  }

PIECES(portable, )
#if defined(__x86_64__)
PIECES(avx2, __attribute__((target("avx2,fma"))))
PIECES(avx512, __attribute__((target("avx512f,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

template <class T>
InstructionSet<T> choose(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "amx") || !std::strncmp(name, "avx512", 6))
    return {name, adam_avx512<T>, project_avx512<T>};
  if (!std::strcmp(name, "avx2")) return {name, adam_avx2<T>, project_avx2<T>};
#endif
  return {name, adam_portable<T>, project_portable<T>};
}

template <class T>
void step_all(const SpdTensor* tensors, int64_t count, int64_t step, double lr, double beta1,
              double beta2, double eps, double spd_lambda, const InstructionSet<T>& set,
              int threads, double* sums_out) {
  const Scalars<T> scalars = {T(1 - beta1),
                              T(beta2),
                              T(1 - beta2),
                              T(eps),
                              T(lr / (1 - std::pow(beta1, step))),
                              T(1 / std::sqrt(1 - std::pow(beta2, step)))};
  std::vector<Chunk<T>> chunks;  // of the group at work
  std::vector<Sums> parts;
  std::vector<T> f;
  for (int64_t first = 0, last = 0; first < count; first = last) {
    chunks.clear();
    for (int64_t elements = 0; last < count; ++last) {
      const SpdTensor& t = tensors[last];
      if (last > first && elements + t.size > kGroup) break;
      elements += t.size;
      for (int64_t i = 0; i < t.size; i += kChunk) {
        chunks.push_back({(T*)t.param + i, t.anchor ? (const T*)t.anchor + i : nullptr,
                          (const T*)t.grad + i, (T*)t.exp_avg + i, (T*)t.exp_avg_sq + i,
                          std::min(kChunk, t.size - i), last - first});
      }
    }
    const int64_t n = int64_t(chunks.size());
    parts.resize(n);
    f.assign(last - first, T(1));
#pragma omp parallel num_threads(threads)
    {
      int64_t begin = 0, end = n;  // this thread's chunks, in both visits
#ifdef _OPENMP
      begin = n * omp_get_thread_num() / omp_get_num_threads();
      end = n * (omp_get_thread_num() + 1) / omp_get_num_threads();
#endif
      for (int64_t i = begin; i < end; ++i) parts[i] = set.adam(chunks[i], scalars);
#pragma omp barrier
#pragma omp single
      for (int64_t i = 0, tensor; i < n;) {
        Sums total;
        for (tensor = chunks[i].tensor; i < n && chunks[i].tensor == tensor; ++i)
          total.gd += parts[i].gd, total.dd += parts[i].dd, total.uu += parts[i].uu;
        f[tensor] = T(factor(total, spd_lambda));
        if (sums_out) std::memcpy(sums_out + 3 * (first + tensor), &total, sizeof total);
      }
      for (int64_t i = end - 1; i >= begin; --i)  // last chunk first: it is still in the cache
        if (f[chunks[i].tensor] != 1) set.project(chunks[i], f[chunks[i].tensor]);
    }
  }
}

}  // namespace

extern "C" const char* spd_step_cpu(const SpdTensor* tensors, int64_t count, int bytes,
                                    int64_t step, double lr, double beta1, double beta2, double eps,
                                    double spd_lambda, const char* instruction_set, int threads,
                                    double* sums) {
  if (!has_instruction_set(instruction_set))
    return "spd_step: this CPU does not offer the instruction set asked for";
  if (step < 1) return "spd_step: step counts from 1";
  threads = std::max(threads, 1);
  if (bytes == 4) {
    step_all<float>(tensors, count, step, lr, beta1, beta2, eps, spd_lambda,
                    choose<float>(instruction_set), threads, sums);
  } else if (bytes == 8) {
    step_all<double>(tensors, count, step, lr, beta1, beta2, eps, spd_lambda,
                     choose<double>(instruction_set), threads, sums);
  } else {
    return "spd_step: elements must be fp32 (4 bytes) or fp64 (8 bytes)";
  }
  return nullptr;
}
