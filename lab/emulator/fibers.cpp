// The engine behind cuda_runtime.h: fibers, blocks, barriers and warp exchanges. See there.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <random>
#include <vector>

#include "engine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
unsigned block_number, thread_number, launch_number, barriers, warp_barriers[32];
char *stacks, *stacks_end;
std::string problems;
bool in_fiber;

namespace {
enum State { ready, at_barrier, in_warp, returned };
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  State state;
  uint3 index;
  Where where;          // of the barrier or intrinsic it waits in
  unsigned mask;        // of that intrinsic
  uint64_t word, *words;
};
constexpr size_t kStack = 64 << 10, kMostThreads = 1024;
Fiber fibers[kMostThreads];
unsigned threads;
jmp_buf scheduler;
bool failed;
void (*kernel_body)(const void*);
const void* kernel_arguments;
unsigned schedule;
std::mt19937 random_order;

// Switching by _setjmp/_longjmp, since swapcontext makes two system calls. No local variable is
// live across the jump.
[[gnu::noinline]] void enter(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}
[[gnu::noinline]] void leave(Fiber& fiber) {
  if (!_setjmp(fiber.resume)) _longjmp(scheduler, 1);
}
void fiber_main() {
  kernel_body(kernel_arguments);
  fibers[thread_number].state = returned;
  _longjmp(scheduler, 1);
}

void arrange(std::vector<unsigned>& order) {
  if (schedule == 1) std::reverse(order.begin(), order.end());
  if (schedule > 1) std::shuffle(order.begin(), order.end(), random_order);
}
std::vector<unsigned> numbers(size_t n) {
  std::vector<unsigned> order(n);
  for (size_t i = 0; i < n; ++i) order[i] = unsigned(i);
  arrange(order);
  return order;
}

void start_block() {
  fill_shared();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + t * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, fiber_main, 0);
    fiber.started = false;
    fiber.state = ready;
    fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
  }
}

// No fiber can run: either all wait at one barrier, or the kernel is wrong.
bool release_barrier() {
  const Fiber* first = nullptr;
  unsigned gone = 0;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = fibers[t];
    if (fiber.state == returned) { ++gone; continue; }
    if (fiber.state == in_warp)
      fail("warp intrinsic at line %u: thread %u waits for lanes of mask %08x that never arrive",
           fiber.where.line(), t, fiber.mask);
    else if (first && first->where.line() != fiber.where.line())
      fail("threads of block %u wait at different barriers, lines %u and %u", block_number,
           first->where.line(), fiber.where.line());
    if (failed) return false;
    first = &fiber;
  }
  if (gone == threads) return false;
  if (gone)
    fail("barrier at line %u: %u threads of block %u have returned", first->where.line(), gone,
         block_number);
  for (unsigned t = 0; t < threads; ++t) fibers[t].state = ready;
  ++barriers;
  return !failed;
}

void run_block() {
  start_block();
  std::vector<unsigned> order = numbers(threads);
  do {
    for (bool progress = true; progress;) {
      progress = false;
      if (schedule > 1) arrange(order);
      for (unsigned t : order) {
        if (fibers[t].state != ready) continue;
        progress = in_fiber = true;
        thread_number = t;
        threadIdx = fibers[t].index;
        enter(fibers[t]);
        in_fiber = false;
        if (failed) return;
      }
    }
  } while (release_barrier());
}
}  // namespace

void run(Config config, void (*body)(const void*), const void* arguments, size_t bytes) {
  if (failed) return;  // as on a GPU, nothing runs after an error
  const size_t blocks = size_t(config.grid.x) * config.grid.y * config.grid.z;
  threads = config.block.x * config.block.y * config.block.z;
  if (!blocks || config.grid.x > 0x7fffffffu || config.grid.y > 65535 || config.grid.z > 65535 ||
      !threads || threads > kMostThreads || config.shared)
    return fail("illegal launch: grid %u x %u x %u, %u threads, %zu bytes of dynamic shared memory",
                config.grid.x, config.grid.y, config.grid.z, threads, config.shared);
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    stacks_end = stacks + kMostThreads * kStack;
  }
  kernel_body = body;
  kernel_arguments = arguments;
  gridDim = config.grid;
  blockDim = config.block;
  ++launch_number;
  allow_arguments(arguments, bytes);
  for (unsigned b : numbers(blocks)) {
    block_number = b;
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    run_block();
    if (failed) break;
  }
  if (!problems.empty()) failed = true;
}

void barrier(Where where) {
  Fiber& self = fibers[thread_number];
  self.state = at_barrier;
  self.where = where;
  leave(self);
}

void exchange(unsigned mask, uint64_t word, uint64_t words[32], Where where,
              void (*complete)(uint64_t[32])) {
  Fiber& self = fibers[thread_number];
  Fiber* warp = &fibers[thread_number / 32 * 32];
  const unsigned size = std::min(32u, threads - thread_number / 32 * 32);
  if (!(mask >> thread_number % 32 & 1))
    fail("line %u: the mask lacks the calling lane", where.line());
  self.state = in_warp;
  self.where = where;
  self.mask = mask;
  self.word = word;
  self.words = words;
  uint64_t all[32] = {};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Fiber& other = warp[lane];
    const bool here = other.where.line() == where.line() && other.where.column() == where.column();
    if (lane >= size || other.state != in_warp || other.mask != mask || !here)
      return leave(self);  // not the last to arrive: the last one fills `words`
    all[lane] = other.word;
  }
  if (complete) complete(all);
  for (unsigned lane = 0; lane < size; ++lane)
    if (mask >> lane & 1) {
      memcpy(warp[lane].words, all, sizeof all);
      warp[lane].state = ready;
    }
}

void warp_barrier(unsigned mask, Where where) {
  uint64_t words[32];
  exchange(mask, 0, words, where, [](uint64_t*) { ++warp_barriers[thread_number / 32]; });
  if (mask != 0xffffffffu)
    fail("line %u: the checker knows __syncwarp() of a full warp only", where.line());
}

void multiply(const float a[256], const float b[256], float c[256]) {
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 16; ++column)
        c[row * 16 + column] += a[row * 16 + k] * b[k * 16 + column];
}

void fail(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  problems += std::string(text) + "\n";
  failed = true;
  if (in_fiber) _longjmp(scheduler, 1);  // an exception has no caller to go to above makecontext
}
}  // namespace emu

extern "C" {
cudaError_t cudaGetLastError() { return emu::failed ? 719 : 0; }
const char* cudaGetErrorString(cudaError_t error) {
  return error ? emu::problems.c_str() : "no error";
}
// Starts a test: forgets tensors and errors and sets the schedule.
void emu_begin(unsigned schedule) {
  emu::problems.clear();
  emu::failed = false;
  emu::schedule = schedule;
  emu::random_order.seed(schedule);
  emu::forget_tensors();
}
}
