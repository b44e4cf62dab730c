// What fibers.cpp and racecheck.cpp tell each other.
#pragma once
#include <string>

#include "cuda_runtime.h"

namespace emu {
extern unsigned block_number, thread_number, launch_number;  // of the running CUDA thread
extern bool in_fiber;               // false while host code runs
extern unsigned barriers;           // counts releases of __syncthreads()
extern unsigned warp_barriers[32];  // counts releases of __syncwarp(), by warp
extern char *stacks, *stacks_end;   // of all fibers
extern std::string problems;        // one line each

void fill_shared();                 // a new block: shared memory holds NaN that nobody wrote
void allow_arguments(const void* start, size_t bytes);
void forget_tensors();
}  // namespace emu
