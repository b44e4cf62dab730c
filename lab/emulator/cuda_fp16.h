// Stand-in for <cuda_fp16.h>: the type.
#pragma once
#include "cuda_runtime.h"

struct __half { _Float16 value; };
