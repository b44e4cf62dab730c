// Threads of the CPU kernels.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// work(i) for every i in [0, count), each thread taking the next i. Threads end with the call, so a
// forked child may call it as well (a pool of OpenMP would make it wait for ever); starting one
// takes about 20 us.
template <class Work>
void parallel(int threads, int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t i; (i = next++) < count;) work(i);
  };
  std::vector<std::thread> team;
  for (int64_t t = 1; t < std::min<int64_t>(threads, count); ++t) team.emplace_back(take);
  take();
  for (auto& thread : team) thread.join();
}
