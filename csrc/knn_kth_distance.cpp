// knn_kth_distance: d(x; V, k) = |x - v_(k)|, the distance of each query to its k-th nearest
// reference row (VRF, Eq. 4). Reference in PyTorch: vrf.knn_kth_distance.
// queries [N, D], reference [M, D], both row-major fp32 -> [N] fp32.
//
// Method. With a centre c, X = x - c, Y = y - c, the nearest row has the largest score
//     s_j = X.Y_j - |Y_j|^2 / 2            (|x - y_j|^2 = |X|^2 - 2 s_j).
//   filter   cheap scores s'_j: bf16 products accumulated in fp32 (fp32 products where the CPU has
//            no bf16)
//   bound    a running lower bound of the k-th best score; nearly every row fails it and is
//            forgotten
//   band     rigorous intervals [s'_j - e_j, s'_j + e_j] around the survivors: most are certainly
//            nearer, or certainly farther, than the k-th; only those whose interval meets the
//            k-th's stay undecided
//   refine   sum (x - y)^2 in fp64 for the undecided ones; the (k - certainly nearer)-th is the
//            answer
// The four functions below carry these names. Where the filter decides nothing (thousands of equal
// distances, a guess that was too high) all rows are undecided: brute force in fp64.
//
// The error e_j. Let X', Y' be the rounded vectors that are multiplied, dx >= |X - X'|,
// dy_j >= |Y_j - Y'_j| their residual norms as measured while rounding, nx >= |X|, ny_j >= |Y_j|.
// By Cauchy-Schwarz
//     |X.Y - X'.Y'| = |X.(Y - Y') + (X - X').Y'| <= nx dy + dx (ny + dy).
// The fp32 sum of D products (exact for bf16, once rounded for fp32) started at -|Y|^2/2 errs, in
// any order of summation, by at most gamma (|X'||Y'| + |Y|^2/2), gamma = (2 D + 8) 2^-24. Of this,
// D + 2 roundings to nearest are the products' and their sum's, min(D, l) + D / l + 2 are those
// of |Y|^2/2, itself an fp32 sum in l lanes, and the rest covers those of s' - e_j and s' + e_j:
//     e_j = nx dy + dx (ny + dy) + gamma ((nx + dx)(ny + dy) + ny^2 / 2) + tiny
// where tiny = (D + 4) 2^-124 covers what underflows, also where the process flushes subnormal
// numbers to zero. Centring shrinks nx and ny, and so the band; any centre is right.
//
// Why the band is enough. k rows have s_j >= L = the k-th largest lower end, and at most k - 1 rows
// have s_j > U = the k-th largest upper end, so the k-th best score lies in [L, U]. A row with
// s'_j - e_j > U is strictly nearer, one with s'_j + e_j < L strictly farther; neither can be the
// k-th. While streaming, L may be replaced by anything not above it; a *guess* from a sample is
// used (see `bound`) and verified at the end, when L is known.
//
// Memory traffic: inputs are read once per pass over the queries (4,000 or more at small k); scores
// live in registers and a 4 KiB buffer, so no distance matrix exists. Scratch is at most about
// 64 + 16 MiB.
// Result: fp64 differences summed in one fixed order, so the same bits for any number of threads
// and for any instruction set; near-duplicates keep full relative precision, unlike
// |x|^2 + |y|^2 - 2 x.y.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>

#include "kernels.h"
#include "knn_levels.h"
#include "parallel.h"

namespace {

constexpr int64_t kBlockBytes = 1 << 18;  // packed references at work: they stay in L2
constexpr int64_t kSpan = 64;   // blocks packed between two barriers: waiting is dear when busy
constexpr int64_t kTeam = 192;  // queries that share a block while it is in a thread's L2
constexpr int64_t kBufferBytes = 64 << 20;  // survivors of all queries of one pass
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- the four steps ----

struct Survivor {
  float score;
  uint32_t place;
};

struct Query {  // under way
  const float* row = nullptr;
  float norm = 0, residual = 0;
  float lower = -kInfinity;  // best known lower bound of its k-th best score
  bool decided = true;       // false: too many survivors, brute force
  std::vector<Survivor> survivors;
};

// Panels of packed rows, of the reference a span of blocks at a time. For all rows: upper bounds of
// the norms and of the residuals' norms, and -|Y|^2 / 2, where the products start.
struct Packed {
  std::vector<uint32_t> storage;
  uint32_t* words = nullptr;  // in `storage`, on a cache line: straddling costs 1.5 times the time
  std::vector<float> norm, residual, start;
};

struct Search {
  const Level& level;
  const float *queries, *rows;
  int64_t m, d, k;
  int threads;
  int64_t words = 0, block = 0, stride = 0;  // words of a row; rows of the reference in a block
  float slack = 0;  // a factor for the fp32 rounding of the norms and of the error terms themselves
  float gamma = 0, tiny = 0;  // of the header
  float floor = 0;            // covers squares that underflow in a sum of squares
  std::vector<float> centre = {};
  Packed reference = {};

  // The reference is packed in a scattered order: every first part of it is a fair sample, however
  // the rows are sorted (by class is the usual case).
  const float* row(int64_t place) const { return rows + place * stride % m * d; }
  // Survivors of a query for which there is room to begin with.
  int64_t room() const { return std::min(m, std::max(block, 2 * k) + 1024) + kMostRows; }

  // e_j of the header.
  float error(const Query& q, float ny, float dy) const {
    return slack * (q.norm * dy + q.residual * (ny + dy) +
                    gamma * ((q.norm + q.residual) * (ny + dy) + 0.5f * ny * ny) + tiny);
  }
  float error(const Query& q, const Survivor& v) const {
    return error(q, reference.norm[v.place], reference.residual[v.place]);
  }
};

float nth_largest(std::vector<float> values, int64_t rank) {  // rank counts from 1
  std::nth_element(values.begin(), values.begin() + (rank - 1), values.end(), std::greater<>());
  return values[rank - 1];
}

// Bound: raises q.lower and drops the survivors below it. The first `seen` of all M rows hold about
// e = k seen / M of the k best, and more than e + 6 sqrt(e) + 8 almost never: the survivor of that
// rank bounds the k-th best from below long before k rows are known. It is a guess, and `band`
// verifies it.
void bound(const Search& s, Query& q, int64_t seen) {
  const double expected = double(s.k) * double(seen) / double(s.m);
  const int64_t far = int64_t(std::ceil(expected + 6 * std::sqrt(expected) + 8));
  const int64_t rank = std::min(s.k, far);
  if (int64_t(q.survivors.size()) < rank) return;
  std::vector<float> low;
  for (const auto& v : q.survivors) low.push_back(v.score - s.error(q, v));
  q.lower = std::max(q.lower, nth_largest(std::move(low), rank));
  const auto farther = [&](const auto& v) { return v.score + s.error(q, v) < q.lower; };
  auto& all = q.survivors;
  all.erase(std::remove_if(all.begin(), all.end(), farther), all.end());
}

// Room for 32 more survivors: some are dropped where the bound has risen; else the list grows, up
// to a limit.
void make_room(const Search& s, Query& q, int64_t seen) {
  bound(s, q, seen);
  if (2 * q.survivors.size() <= q.survivors.capacity()) return;
  q.decided = int64_t(q.survivors.size()) <= 4 * s.k + 16384;
  if (q.decided) q.survivors.reserve(2 * q.survivors.capacity());
  else std::vector<Survivor>().swap(q.survivors);
}

// Filter: scores of a team of queries against a block, the places begin, ..., end - 1 of the
// reference; rows that reach a query's bound survive, about 1 in 50 and fewer. `worst` is the largest
// e_j of the block, so no row that may matter is dropped.
void filter(const Search& s, Query* team, int64_t count, const uint32_t* queries,
            const uint32_t* block, int64_t begin, int64_t end) {
  alignas(64) float scores[kMostQueries * kMostRows], limit[kMostQueries], worst[kMostQueries];
  uint32_t mask[kMostQueries];
  const auto &norm = s.reference.norm, &residual = s.reference.residual;
  const float ny = *std::max_element(&norm[begin], &norm[0] + end);
  const float dy = *std::max_element(&residual[begin], &residual[0] + end);
  const int width = s.level.queries, rows = s.level.rows;
  for (; count > 0; team += width, count -= width, queries += width * s.words) {
    for (int i = 0; i < width; ++i) {
      worst[i] = i < count ? s.error(team[i], ny, dy) : 0;
      limit[i] = i < count && team[i].decided ? team[i].lower - worst[i] : kInfinity;
    }
    const uint32_t* panel = block;
    for (int64_t place = begin; place < end; place += rows, panel += rows * s.words) {
      s.level.scores(queries, panel, s.words, &s.reference.start[place], limit, scores, mask);
      const uint32_t real = end - place < 32 ? (1u << (end - place)) - 1 : ~0u;  // no padding
      for (int i = 0; i < width; ++i) {
        uint32_t hits = mask[i] & real;
        if (!hits) continue;
        Query& q = team[i];
        if (q.survivors.size() + rows > q.survivors.capacity()) {
          make_room(s, q, end);
          limit[i] = q.decided ? q.lower - worst[i] : kInfinity;
        }
        for (; hits && q.decided; hits &= hits - 1) {
          const int j = __builtin_ctz(hits);
          q.survivors.push_back({scores[i * rows + j], uint32_t(place + j)});
        }
      }
    }
  }
}

// Band: leaves the undecided rows in q.survivors and returns which of them, counted from 1 by
// distance, is the k-th of all; 0 if a guess was too high and rows are missing.
int64_t band(const Search& s, Query& q) {
  if (int64_t(q.survivors.size()) < s.k) return 0;
  std::vector<float> low, high;
  for (const auto& v : q.survivors) {
    low.push_back(v.score - s.error(q, v));
    high.push_back(v.score + s.error(q, v));
  }
  const float lower = nth_largest(low, s.k), upper = nth_largest(high, s.k);
  if (lower < q.lower) return 0;
  int64_t nearer = 0, kept = 0;
  for (size_t i = 0; i < q.survivors.size(); ++i) {
    if (low[i] > upper) ++nearer;
    else if (high[i] >= lower) q.survivors[kept++] = q.survivors[i];
  }
  q.survivors.resize(kept);
  return s.k - nearer;
}

// Refine: exact distances of the undecided rows; the answer is the rank-th of them.
float refine(const Search& s, const Query& q, int64_t rank) {
  std::vector<double> distances;
  for (const auto& v : q.survivors)
    distances.push_back(s.level.exact(q.row, s.row(v.place), s.d));
  std::nth_element(distances.begin(), distances.begin() + (rank - 1), distances.end());
  return float(std::sqrt(distances[rank - 1]));
}

// ---- around them ----

// Packs the rows `row(i)`, begin <= i < end, in panels of `width`, the last one filled up with its
// last row, and takes their norms. False if one is not finite or too long.
template <class Row>
bool pack_rows(const Search& s, const Row& row, int64_t begin, int64_t end, int width, bool tiles,
               Packed& out) {
  const int64_t panels = (end - begin - 1) / width + 1;
  out.storage.resize(panels * width * s.words + 16);
  out.words = (uint32_t*)((uintptr_t(out.storage.data()) + 63) & ~uintptr_t(63));
  for (auto* column : {&out.norm, &out.residual, &out.start}) column->resize(begin + panels * width);
  std::atomic<bool> good{true};
  parallel(s.threads, panels, [&](int64_t panel) {
    const float* rows[kMostRows];
    float square[kMostRows], lost[kMostRows];
    const int64_t first = begin + panel * width;
    for (int r = 0; r < width; ++r) rows[r] = row(std::min(first + r, end - 1));
    s.level.pack(rows, width, tiles, s.centre.data(), s.d, out.words + panel * width * s.words,
                 square, lost);
    for (int r = 0; r < width; ++r) {
      const int64_t i = first + r;
      if (!(square[r] < 1e36f)) good = false;  // NaN as well
      out.start[i] = -0.5f * square[r];
      out.norm[i] = std::sqrt(square[r]) * s.slack + s.floor;
      // x - c is itself rounded
      out.residual[i] = std::sqrt(lost[r]) * s.slack + out.norm[i] * 0x1p-23f + s.floor;
    }
  });
  return good;
}

// One pass: the whole reference against `count` queries. False if a row is not finite or too long.
bool pass(Search& s, const float* queries, int64_t count, float* out) {
  const int width = s.level.queries;
  std::vector<Query> group(count);
  Packed packed;
  const auto query = [&](int64_t i) { return queries + i * s.d; };
  if (!pack_rows(s, query, 0, count, width, s.level.tiles, packed)) return false;
  for (int64_t i = 0; i < count; ++i) {
    group[i].row = query(i);
    group[i].norm = packed.norm[i];
    group[i].residual = packed.residual[i];
    group[i].survivors.reserve(s.room());
  }
  const int64_t team = std::min(kTeam, (count - 1) / s.threads + 1) / width * width + width;
  for (int64_t from = 0; from < s.m; from += kSpan * s.block) {
    const int64_t to = std::min(from + kSpan * s.block, s.m);
    const auto row = [&](int64_t i) { return s.row(i); };
    if (!pack_rows(s, row, from, to, s.level.rows, false, s.reference)) return false;
    parallel(s.threads, (count - 1) / team + 1, [&](int64_t t) {
      const int64_t first = t * team, last = std::min(first + team, count);
      for (int64_t begin = from; begin < to; begin += s.block) {
        const int64_t end = std::min(begin + s.block, to), done = end / s.block;
        filter(s, &group[first], last - first, packed.words + first * s.words,
               s.reference.words + (begin - from) * s.words, begin, end);
        // a fresh guess at 1, 4, 16, 64 ... blocks: the sample grows, the guess sharpens
        if ((done & (done - 1)) == 0 && (done & 0x5555555555555555))
          for (int64_t i = first; i < last; ++i) bound(s, group[i], end);
      }
    });
  }
  parallel(s.threads, count, [&](int64_t i) {
    int64_t rank = group[i].decided ? band(s, group[i]) : 0;
    if (!rank) {  // all rows are undecided
      rank = s.k;
      group[i].survivors.resize(s.m);
      for (int64_t j = 0; j < s.m; ++j) group[i].survivors[j].place = uint32_t(j);
    }
    out[i] = refine(s, group[i], rank);
  });
  return true;
}

void prepare(Search& s) {
  s.words = s.level.bf16 ? s.d / 2 : s.d;
  s.block = std::max<int64_t>(kBlockBytes / (4 * s.words) / kMostRows, 4) * kMostRows;
  s.stride = int64_t(double(s.m) * 0.6180339887) + 1;  // golden section: spreads first parts evenly
  while (std::gcd(s.stride, s.m) != 1) ++s.stride;
  s.slack = 1.0001f + s.d * 0x1p-27f;
  s.gamma = (2.0f * s.d + 8) * 0x1p-24f;
  s.tiny = (s.d + 4.0f) * 0x1p-124f;
  s.floor = std::sqrt(float(s.d)) * 0x1p-62f;
  const int64_t sample = std::min(s.m, s.block);
  std::vector<double> sum(s.d, 0);  // centre: the mean of the first block
  for (int64_t j = 0; j < sample; ++j)
    for (int64_t i = 0; i < s.d; ++i) sum[i] += s.row(j)[i];
  for (int64_t i = 0; i < s.d; ++i) s.centre.push_back(float(sum[i] / double(sample)));
}

}  // namespace

extern "C" const char* knn_kth_distance_levels() {
  static thread_local std::string names;
  names.clear();
  for (const auto& level : kLevels)
    if (level.supported()) names += std::string(level.name) + " ";
  return names.c_str();
}

extern "C" int knn_kth_distance_cpu(const float* queries, int64_t n, const float* reference,
                                    int64_t m, int64_t d, int64_t k, const char* level_name,
                                    int threads, float* out) {
  const auto level = std::find_if(kLevels.begin(), kLevels.end(), [&](const Level& l) {
    return !std::strcmp(l.name, level_name);
  });
  const double worth = double(n) * m * d / (1 << 24);  // a thread for each 16 M multiply-adds
  Search s{*level, queries, reference, m, d, k, int(std::clamp<double>(worth, 1, threads))};
  prepare(s);
  const int64_t each = 8 * s.room() + 4 * s.words;  // bytes of a query
  const int64_t panels = std::max<int64_t>(kBufferBytes / each / s.level.queries, threads);
  for (int64_t first = 0; first < n; first += panels * s.level.queries) {
    const int64_t count = std::min(panels * s.level.queries, n - first);
    if (!pass(s, queries + first * d, count, out + first)) return 0;
  }
  return 1;
}
