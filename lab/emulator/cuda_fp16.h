// Stand-in for <cuda_fp16.h>: the type and its two conversions.
#pragma once
#include "cuda_runtime.h"

struct __half { _Float16 value; };
inline float __half2float(__half half) { return half.value; }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
namespace emu { inline float to_float(__half half) { return half.value; } }
