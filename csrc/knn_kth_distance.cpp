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
// The four functions below carry these names. Queries that the filter cannot decide (thousands of
// equal distances, a guess that was too high) are done by brute force in fp64.
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
#include <limits>
#include <numeric>
#include <string>

#include "kernels.h"
#include "knn_levels.h"
#include "parallel.h"

namespace {

constexpr int64_t kBlockBytes = 1 << 18;  // packed references at work: they stay in L2
constexpr int64_t kSpan = 64;  // blocks packed between two barriers: waiting is dear when busy
constexpr int64_t kTeam = 8;   // groups of queries that share a block while it is in a thread's L2
constexpr int64_t kBufferBytes = 64 << 20;  // survivors of all queries of one pass
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- the four steps ----

struct Survivor {
  float score;
  uint32_t place;
};

// A query under way: its norms, the best known lower bound of its k-th best score, survivors.
struct Query {
  float norm = 0, residual = 0;
  float lower = -kInfinity;
  bool decided = true;  // false: by brute force
  std::vector<Survivor> survivors;
  std::vector<double> distances;  // of the survivors, in `refine`
};

// Packed rows: panels of `panel_words`, of the reference a span of blocks at a time; and of all
// rows upper bounds of the norms and of the residuals' norms, and -|Y|^2 / 2, where the products
// start.
struct Packed {
  int64_t panel_words = 0;
  std::vector<uint32_t> storage;
  uint32_t* words = nullptr;  // in `storage`, on a cache line: straddling costs 1.5 times the time
  std::vector<float> norm, residual, start;
};

struct Search {
  const Level& level;
  const float *queries, *rows;
  int64_t m, d, k, chunks, block;  // block: rows of the reference in one
  int threads = 1;
  int64_t stride = 1;
  float slack = 0;  // a factor for the fp32 rounding of the norms and of the error terms themselves
  float gamma = 0, tiny = 0;  // of the header
  float floor = 0;            // covers squares that underflow in a sum of squares
  std::vector<float> centre = {};
  Packed reference = {};

  // The reference is packed in a scattered order: every first part of it is a fair sample, however
  // the rows are sorted (by class is the usual case).
  const float* row(int64_t place) const { return rows + place * stride % m * d; }
  // Survivors of a query for which there is room to begin with.
  int64_t room() const { return std::min(m, std::max(block, 2 * k) + 1024) + kStep; }

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
  std::erase_if(q.survivors, [&](const auto& v) { return v.score + s.error(q, v) < q.lower; });
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

// Filter: scores of a group of queries against one block; rows that reach a query's bound survive,
// about 1 in 50 and fewer. `worst` is the largest e_j of the block for each query, so no row that
// may matter is dropped. block_panels: the block's panels; begin, end: its places.
void filter(const Search& s, Query* group, int count, const uint32_t* query_panels,
            const uint32_t* block_panels, int64_t begin, int64_t end) {
  alignas(64) float scores[kGroup * kStep], limit[kGroup], worst[kGroup];
  uint32_t mask[kGroup];
  const float *norm = s.reference.norm.data(), *residual = s.reference.residual.data();
  const float ny = *std::max_element(norm + begin, norm + end);
  const float dy = *std::max_element(residual + begin, residual + end);
  for (int i = 0; i < s.level.group; ++i) {
    worst[i] = i < count ? s.error(group[i], ny, dy) : 0;
    limit[i] = i < count && group[i].decided ? group[i].lower - worst[i] : kInfinity;
  }
  for (int64_t place = begin; place < end; place += kStep) {
    const int64_t panel = (place - begin) / kTile;
    s.level.scores(query_panels, block_panels + panel * s.reference.panel_words,
                   &s.reference.start[place], s.chunks, scores);
    s.level.passing(scores, limit, s.level.group, mask);
    const uint32_t real = end - place < kStep ? (1u << (end - place)) - 1 : ~0u;  // no padding
    for (int i = 0; i < count; ++i) {
      uint32_t hits = mask[i] & real;
      if (!hits) continue;
      Query& q = group[i];
      if (q.survivors.size() + kStep > q.survivors.capacity()) {
        make_room(s, q, end);
        limit[i] = q.decided ? q.lower - worst[i] : kInfinity;
      }
      for (; hits && q.decided; hits &= hits - 1) {
        const int j = __builtin_ctz(hits);
        q.survivors.push_back({scores[i * kStep + j], uint32_t(place + j)});
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

// Refine: exact distances of the undecided rows, and the rank-th of them for each query. Rows are
// visited 256 at a time for all queries, so that they come from the cache and not once per pair
// from memory.
void refine(const Search& s, int64_t first, std::vector<Query>& group,
            const std::vector<int64_t>& rank, float* out) {
  constexpr int64_t kBucket = 256;
  std::vector<std::vector<std::pair<uint32_t, uint32_t>>> buckets(s.m / kBucket + 1);
  for (size_t i = 0; i < group.size(); ++i) {
    if (!rank[i]) continue;
    group[i].distances.resize(group[i].survivors.size());
    for (size_t j = 0; j < group[i].survivors.size(); ++j)
      buckets[group[i].survivors[j].place / kBucket].push_back({i, j});
  }
  parallel(s.threads, int64_t(buckets.size()), [&](int64_t b) {
    for (const auto& [i, j] : buckets[b]) {
      const float *x = s.queries + (first + i) * s.d, *y = s.row(group[i].survivors[j].place);
      group[i].distances[j] = s.level.exact(x, y, s.d);
    }
  });
  parallel(s.threads, int64_t(group.size()), [&](int64_t i) {
    if (!rank[i]) return;
    const auto begin = group[i].distances.begin(), kth = begin + (rank[i] - 1);
    std::nth_element(begin, kth, group[i].distances.end());
    out[first + i] = float(std::sqrt(*kth));
  });
}

// ---- around them ----

float brute(const Search& s, const float* query) {
  std::vector<double> distances(s.m);
  for (int64_t j = 0; j < s.m; ++j) distances[j] = s.level.exact(query, s.rows + j * s.d, s.d);
  std::nth_element(distances.begin(), distances.begin() + (s.k - 1), distances.end());
  return float(std::sqrt(distances[s.k - 1]));
}

// Packs `count` rows given by `row(i)`, `width` in a panel, and takes their norms, to be found from
// `offset` on. False if one is not finite or too long.
template <class Row>
bool pack_rows(const Search& s, bool queries, int64_t count, const Row& row, Packed& out,
               int64_t offset) {
  const int step = queries ? s.level.group : kStep, width = queries ? s.level.panel : kTile;
  const int pitch = queries ? s.level.pitch : kTile;
  const int64_t panels = (count + step - 1) / step * step / width;
  out.panel_words = s.chunks * kTile * pitch;
  out.storage.resize(panels * out.panel_words + kTile);
  out.words = (uint32_t*)((uintptr_t(out.storage.data()) + 63) & ~uintptr_t(63));
  for (auto* column : {&out.norm, &out.residual, &out.start})
    column->resize(std::max<size_t>(column->size(), offset + panels * width));
  std::atomic<bool> good = true;
  parallel(s.threads, panels, [&](int64_t p) {
    const float* from[kTile] = {};
    float square[kTile], lost[kTile];
    for (int r = 0; r < width; ++r)
      if (p * width + r < count) from[r] = row(p * width + r);
    s.level.pack(from, pitch, !queries || !s.level.tiles, s.centre.data(), s.d,
                 out.words + p * out.panel_words, square, lost);
    for (int r = 0; r < width; ++r) {
      const int64_t i = offset + p * width + r;
      if (!(square[r] < 1e36f)) good = false;  // NaN as well
      out.start[i] = -0.5f * square[r];
      out.norm[i] = std::sqrt(square[r]) * s.slack + s.floor;
      // x - c is itself rounded
      out.residual[i] = std::sqrt(lost[r]) * s.slack + out.norm[i] * 0x1p-23f + s.floor;
    }
  });
  return good;
}

// Which row made `pack_rows` complain: a centre spoilt by one row makes all the others look bad, so
// search them.
std::string complaint(const Search& s, int64_t n) {
  for (int64_t j = 0; j < n + s.m; ++j) {
    const float* row = j < n ? s.queries + j * s.d : s.rows + (j - n) * s.d;
    const double square = std::inner_product(row, row + s.d, row, 0.0, std::plus<>(),
                                             [](double a, double b) { return a * b; });
    if (square < 0.25e36) continue;
    return std::string("knn_kth_distance: ") + (j < n ? "queries" : "reference") + " row " +
           std::to_string(j < n ? j : j - n) +
           (std::isfinite(square) ? " is longer than 5e17; scale both arguments down"
                                  : " holds NaN or infinity");
  }
  return "knn_kth_distance: rows are too long; scale both arguments down";
}

// One pass: the whole reference against queries first, ..., first + count - 1. False if a row is
// not finite or too long.
bool pass(Search& s, int64_t first, int64_t count, float* out) {
  const int size = s.level.group, width = s.level.panel;
  std::vector<Query> group(count);
  Packed packed;
  const auto query_row = [&](int64_t i) { return s.queries + (first + i) * s.d; };
  if (!pack_rows(s, true, count, query_row, packed, 0)) return false;
  for (int64_t i = 0; i < count; ++i) {
    group[i].norm = packed.norm[i];
    group[i].residual = packed.residual[i];
    group[i].survivors.reserve(s.room());
  }
  const int64_t groups = (count - 1) / size + 1;
  const int64_t team = std::min(kTeam, (groups - 1) / s.threads + 1);
  for (int64_t from = 0; from < s.m; from += kSpan * s.block) {
    const int64_t to = std::min(from + kSpan * s.block, s.m);
    const auto row = [&](int64_t i) { return s.row(from + i); };
    if (!pack_rows(s, false, to - from, row, s.reference, from)) return false;
    parallel(s.threads, (groups - 1) / team + 1, [&](int64_t t) {
      for (int64_t begin = from; begin < to; begin += s.block) {
        const int64_t end = std::min(begin + s.block, to), done = end / s.block;
        const uint32_t* panels =
            s.reference.words + (begin - from) / kTile * s.reference.panel_words;
        for (int64_t g = t * team; g < std::min((t + 1) * team, groups); ++g) {
          Query* queries = &group[g * size];
          const int some = int(std::min<int64_t>(size, count - g * size));
          filter(s, queries, some, packed.words + g * (size / width) * packed.panel_words, panels,
                 begin, end);
          // a fresh guess at 1, 4, 16, 64 ... blocks: the sample grows, the guess sharpens
          if ((done & (done - 1)) == 0 && (done & 0x5555555555555555))
            for (int i = 0; i < some; ++i) bound(s, queries[i], end);
        }
      }
    });
  }
  std::vector<int64_t> rank(count, 0);
  parallel(s.threads, count, [&](int64_t i) {
    if (group[i].decided) rank[i] = band(s, group[i]);
    if (!rank[i]) out[first + i] = brute(s, query_row(i));
  });
  refine(s, first, group, rank, out);
  return true;
}

}  // namespace

extern "C" const char* knn_kth_distance_levels() {
  static const std::string names = [] {
    std::string text;
    for (const bool slow : {false, true})
      for (const auto& level : kLevels)
        if (level.supported() && is_slow(level.name) == slow) text += std::string(" ") + level.name;
    return text.substr(1);
  }();
  return names.c_str();
}

extern "C" const char* knn_kth_distance_cpu(const float* queries, int64_t n, const float* reference,
                                            int64_t m, int64_t d, int64_t k, const char* level_name,
                                            int threads, float* out) {
  static thread_local std::string problem;
  const auto level = std::find_if(std::begin(kLevels), std::end(kLevels), [&](const Level& l) {
    return !std::strcmp(l.name, level_name) && l.supported();
  });
  if (level == std::end(kLevels))
    return "knn_kth_distance: this CPU does not offer the level asked for";
  if (m >= int64_t(1) << 31) return "knn_kth_distance: needs fewer than 2^31 reference rows";
  if (n == 0) return nullptr;
  const int64_t width = level->bf16 ? 32 : 16, chunks = (d + width - 1) / width;
  const int64_t fitting = kBlockBytes / (chunks * kTile * 4) / kStep * kStep;
  Search s{*level, queries, reference, m, d, k, chunks, std::max<int64_t>(fitting, 4 * kStep)};
  s.threads = int(std::clamp<double>(double(n) * m * d / (1 << 24), 1, std::max(threads, 1)));
  s.stride = int64_t(double(m) * 0.6180339887) + 1;  // golden section: first parts spread evenly
  while (std::gcd(s.stride, m) != 1) ++s.stride;
  s.slack = 1.0001f + d * 0x1p-27f;
  s.gamma = (2.0f * d + 8) * 0x1p-24f;
  s.tiny = (d + 4.0f) * 0x1p-124f;
  s.floor = std::sqrt(float(d)) * 0x1p-62f;
  const int64_t sample = std::min(m, s.block);
  std::vector<double> sum(d, 0);  // centre: the mean of the first block
  for (int64_t j = 0; j < sample; ++j)
    for (int64_t i = 0; i < d; ++i) sum[i] += s.row(j)[i];
  for (int64_t i = 0; i < d; ++i) s.centre.push_back(float(sum[i] / double(sample)));

  const int64_t each = 8 * s.room() + 4 * width * chunks;  // bytes of a query
  const int64_t at_once =
      std::max<int64_t>(kBufferBytes / each / level->group, s.threads) * level->group;
  for (int64_t first = 0; first < n; first += at_once) {
    if (pass(s, first, std::min(at_once, n - first), out)) continue;
    problem = complaint(s, n);
    return problem.c_str();
  }
  return nullptr;
}
