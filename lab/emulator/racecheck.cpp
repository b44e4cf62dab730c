// Judges every load and store of a kernel by CUDA's rules.
//
// g++ -fsanitize=thread turns each access into a call such as __tsan_read4(address). The libraries
// are linked without that sanitizer's runtime, so these symbols are ours and live in any process.
// * Race: two accesses to one place, at least one a write, not both atomic, are in order only if
//   they come from one thread, or from one block with a __syncthreads() between, or from one warp
//   with a __syncwarp() between (a shuffle orders no memory). Two blocks of a launch are never in
//   order.
// * Read of shared memory that nobody in this block wrote, or of a tensor registered as
//   uninitialised.
// * Access outside shared memory and the registered tensors, write to a read-only tensor,
//   misaligned address, index outside an array. These stop the launch before the access takes
//   place, so a wrong kernel cannot harm the process.
// A place is one element of a tensor, but two bytes (an fp16 value) of shared memory.
// Two readers of a place are remembered: a third thread's write then meets one that is not itself.
// Not judged: bank conflicts, volatile and fence protocols, weak order of atomics.
#include <stdarg.h>
#include <stdio.h>

#include <map>
#include <vector>

#include "engine.h"

#define HIDDEN extern "C" __attribute__((weak, visibility("hidden"))) char  // set by the linker
HIDDEN __start_cuda_shared[], __stop_cuda_shared[];
HIDDEN __ehdr_start[], _end[];  // this library

namespace emu {
namespace {
struct Event {
  unsigned launch = 0, block, barriers, warp_barriers;
  unsigned short thread;
  unsigned char kind;
  const void* code;
};
struct Place { Event write, reader[2]; };
struct Region {
  char *start, *end;
  bool writable, initialised, shared;
  unsigned grain;  // bytes of a place
  std::vector<Place> places;
};
std::map<const char*, Region> regions;  // by end address
Region* latest[16];                     // found last, by the 64 KiB of memory that they lie in
const char *arguments, *arguments_end;
constexpr int kMostRaces = 8;
int races;

Region* find(const char* address) {
  Region*& guess = latest[reinterpret_cast<uintptr_t>(address) >> 16 & 15];
  if (guess && address >= guess->start && address < guess->end) return guess;
  auto it = regions.upper_bound(address);
  return it != regions.end() && address >= it->second.start ? guess = &it->second : nullptr;
}
void add_region(char* start, size_t bytes, bool writable, bool initialised, bool shared,
                unsigned grain) {
  regions[start + bytes] = {start, start + bytes, writable, initialised, shared, grain, {}};
  regions[start + bytes].places.resize((bytes + grain - 1) / grain);
}

const char* verb(int kind) { return kind == read ? "read" : kind == write ? "write" : "atomic"; }
// "at PLACE by thread 3 of block 0"; PLACE is an offset into this library, which the test turns
// into a line.
std::string by(const Event& event) {
  char text[128];
  const long offset = static_cast<const char*>(event.code) - __ehdr_start - 1;
  snprintf(text, sizeof text, " at [+0x%lx] by thread %u of block %u", offset, event.thread,
           event.block);
  return text;
}
Event event(int kind, const void* code) {
  return {launch_number, block_number, barriers, warp_barriers[thread_number / 32],
          static_cast<unsigned short>(thread_number), static_cast<unsigned char>(kind), code};
}
void stop(const char* what, const Event& now) { fail("%s%s", what, by(now).c_str()); }

bool in_order(const Event& before, const Event& now, bool shared) {
  if (before.launch != now.launch || (before.kind == atomic && now.kind == atomic)) return true;
  if (before.block != now.block) return shared;  // each block has its own
  if (before.thread == now.thread || before.barriers != now.barriers) return true;
  return before.thread / 32 == now.thread / 32 && before.warp_barriers != now.warp_barriers;
}
// False if it is a race.
bool judge(const Event& before, const Event& now, bool shared) {
  if (!before.launch || in_order(before, now, shared)) return true;
  if (++races > kMostRaces) stop("and more races", now);
  problems += std::string("race, no barrier between: ") + verb(before.kind) + by(before) + " and " +
              verb(now.kind) + by(now) + "\n";
  return false;
}
}  // namespace

void access(const void* address, size_t bytes, Kind kind, const void* code) {
  const char* p = static_cast<const char*>(address);
  if (!in_fiber || (p >= stacks && p < stacks_end)) return;
  const Event now = event(kind, code);
  Region* region = find(p);
  if (!region) {
    const bool constant = (p >= __ehdr_start && p < _end) || (p >= arguments && p < arguments_end);
    if (constant && kind == read) return;
    stop(kind == read ? "read outside all tensors" : "write outside all tensors", now);
  }
  if (p + bytes > region->end) stop("access over the end of a tensor", now);
  if (kind != read && !region->writable) stop("write to a read-only tensor", now);

  const bool shared = region->shared;
  const size_t first = (p - region->start) / region->grain;
  const size_t last = (p - region->start + bytes - 1) / region->grain;
  bool fine = true;  // one report per access is enough
  for (size_t i = first; i <= last; ++i) {
    Place& place = region->places[i];
    const bool written = shared ? place.write.launch == now.launch && place.write.block == now.block
                                : place.write.launch || region->initialised;
    if (kind != write && !written) stop("memory that nobody wrote is read", now);
    fine = fine && judge(place.write, now, shared);
    if (kind == read) {
      Event* reader = place.reader;
      if (reader[0].thread != now.thread || reader[0].block != now.block) reader[1] = reader[0];
      reader[0] = now;
    } else {
      for (const Event& reader : place.reader) fine = fine && judge(reader, now, shared);
      place.write = now;
    }
  }
}

void fill_shared() {
  if (!__start_cuda_shared) return;
  const size_t bytes = __stop_cuda_shared - __start_cuda_shared;
  if (!find(__start_cuda_shared)) add_region(__start_cuda_shared, bytes, true, false, true, 2);
  memset(__start_cuda_shared, 0xff, bytes);  // as fp32: NaN
}
void allow_arguments(const void* start, size_t bytes) {
  arguments = static_cast<const char*>(start);
  arguments_end = arguments + bytes;
}
void forget_tensors() {
  regions.clear();
  for (Region*& guess : latest) guess = nullptr;
  races = 0;
}
}  // namespace emu

#define CODE __builtin_return_address(0)
#define HOOKS(n)                                                                 \
  void __tsan_read##n(void* p) { emu::access(p, n, emu::read, CODE); }           \
  void __tsan_write##n(void* p) { emu::access(p, n, emu::write, CODE); }         \
  void __tsan_unaligned_read##n(void* p) { emu::access(p, n, emu::read, CODE); } \
  void __tsan_unaligned_write##n(void* p) { emu::access(p, n, emu::write, CODE); }
extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(void* p, size_t n) { emu::access(p, n, emu::read, CODE); }
void __tsan_write_range(void* p, size_t n) { emu::access(p, n, emu::write, CODE); }
void __tsan_init() {}
// -fsanitize=bounds and -fsanitize=alignment, linked in the same way
void __ubsan_handle_out_of_bounds(void*, void*) {
  emu::stop("index outside its array", emu::event(emu::read, CODE));
}
void __ubsan_handle_type_mismatch_v1(void*, void*) {
  emu::stop("misaligned address", emu::event(emu::read, CODE));
}

// Registers a tensor for the coming launch. flags: 1 writable, 2 holds values already. grain: bytes
// of a place.
void emu_tensor(void* start, size_t bytes, int flags, int grain) {
  if (bytes) emu::add_region(static_cast<char*>(start), bytes, flags & 1, flags & 2, false, grain);
}
}
