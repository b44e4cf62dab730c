"""Plants faults in the CUDA kernels, one at a time, and asserts that the emulator finds each, by a
report of its checker or by a wrong result; and that it reports nothing on the kernels as they are.
`pytest -rP` prints what was said of each fault. Every run plants one fault of each kind, EVERY_RUN;
FAULTS=all plants all 41, about 15 CPU seconds more."""

import concurrent.futures
import os

import emulator
import pytest
import torch
from test_cuda_emulated import indistinct, replace, small_without_fallback
from test_knn_kth_distance import assert_exact, clip_like
from test_spd_step import assert_equals_the_reference, tensors_of

pytestmark = pytest.mark.skipif(
    emulator.compiler() is None, reason="g++ not found: it compiles the CUDA kernels for the CPU"
)

SPD_FAULTS = {
    "sum: barrier before the warps' sums are added is missing": (
        "/ 32] = sums;\n  __syncthreads();",
        "/ 32] = sums;",
    ),
    "sum: barrier in a divergent branch": (
        "of_warp[threadIdx.x / 32] = sums;\n  __syncthreads();",
        "{ of_warp[threadIdx.x / 32] = sums; __syncthreads(); }",
    ),
    "sum: starts at half the shuffle distance": ("distance = 16", "distance = 8"),
    "sum: mask without lane 31": (
        "sums.uu += __shfl_down_sync(kAllLanes",
        "sums.uu += __shfl_down_sync(0x7fffffffu",
    ),
    "sum: slots of seven warps are never written": (
        "threadIdx.x % 32 == 0) of_warp",
        "threadIdx.x == 0) of_warp",
    ),
    "sum: the last warp is left out": ("warp < kThreads / 32;", "warp < kThreads / 32 - 1;"),
    "adam: the last chunk runs over the end": ("end < t.size ? end : t.size,", "end,"),
    "adam: tail one too short": ("if (e >= count) continue;", "if (e >= count - 1) continue;"),
    "adam: tail one too long": ("if (e < count) to[e]", "if (e <= count) to[e]"),
    "adam: vectors without regard to alignment": ("all % 16 == 0}", "all % 4 == 0}"),
    "adam: every thread writes the chunk's sum": (
        "if (threadIdx.x == 0) partial[",
        "if (threadIdx.x >= 0) partial[",
    ),
    "adam: chunks add to one place without atomics": ("partial[chunk] = sums", "partial[0] = sums"),
    "adam: launched with half the threads": (
        "spd_adam_kernel<<<blocks, kThreads,",
        "spd_adam_kernel<<<blocks, kThreads / 2,",
    ),
    "adam: launched with one block less": (
        "spd_adam_kernel<<<blocks",
        "spd_adam_kernel<<<blocks - 1",
    ),
    "factor: a tensor is left out": (
        "spd_factor_kernel<<<unsigned(count)",
        "spd_factor_kernel<<<unsigned(count - 1)",
    ),
    "project: wrong chunk order": (
        "gridDim.x - 1 - int64_t(blockIdx.x)",
        "gridDim.x - int64_t(blockIdx.x)",
    ),
    "factor: the condition is not kept": ("if (conditions != nullptr) conditions[tensor] = c;", ""),
    "factor: all tensors share a condition": ("conditions[tensor] : 0.0", "conditions[0] : 0.0"),
}
KNN_FAULTS = {
    "filter: barrier after filling the tiles is missing": (
        "= next[i];\n    __syncthreads();",
        "= next[i];",
    ),
    "filter: barrier before refilling the tiles is missing": (
        "    }\n    __syncthreads();\n  }\n\n  // Which",
        "    }\n  }\n\n  // Which",
    ),
    "filter: the patch is read without __syncwarp": (
        "mem_row_major);\n      __syncwarp();",
        "mem_row_major);",
    ),
    "filter: the patch is overwritten without __syncwarp": (
        "      }\n      __syncwarp();\n",
        "      }\n",
    ),
    "filter: a fragment's layout is taken for granted": (
        "patch[warp()][in_patch * kPatchPitch + lane() % 16]",
        "scores[i][j].x[in_patch / 2]",
    ),
    "filter: a matrix at a forbidden address": (
        "&tile[(kTile + warp_r + 16 * j) * kPitch + inner]",
        "&tile[(kTile + warp_r + 16 * j) * kPitch + inner + 1]",
    ),
    "filter: survivors counted without atomics": ("atomicAdd(&b.counts[q], 1u)", "b.counts[q]++"),
    "filter: the last tile of a slab is left out": (
        "blocks(end - seen)",
        "unsigned((end - seen) / kTile)",
    ),
    "filter: rows of the padding survive": (
        "if (q >= b.n || r >= end) continue;",
        "if (q >= b.n) continue;",
    ),
    "filter: pitch of the tile one step too wide": (
        "tile[(row + 64 * i) * kPitch + column]",
        "tile[(row + 64 * i + 1) * kPitch + column]",
    ),
    "filter: rows beyond the end are fetched": ("(i < count ? i : count - 1)", "i"),
    "select: keys counted without atomics": (
        "atomicAdd(&histogram[key >> shift & 255], 1u);",
        "++histogram[key >> shift & 255];",
    ),
    "select: digit chosen before all keys are counted": (
        "    __syncthreads();\n    choose_digit(",
        "    choose_digit(",
    ),
    "select: digit read before it is chosen": (
        "  __syncthreads();\n  prefix = found[0];",
        "  prefix = found[0];",
    ),
    "select: keys counted before the histogram is clear": (
        "histogram[bin] = 0;\n    __syncthreads();",
        "histogram[bin] = 0;",
    ),
    "select: wrong distance of the running sum": (
        "distance < 32; distance *= 2",
        "distance < 32; distance *= 4",
    ),
    "select: rank one too far": ("select<1>(count, k - 1,", "select<1>(count, k,"),
    "distance: half the lanes are not added": ("bits /= 2) sum +=", "bits /= 4) sum +="),
    "refine: lanes leave before a ballot": (
        "    const Survivor mine =",
        "    if (i >= count) break;\n    const Survivor mine =",
    ),
    "refine: mask without lane 31": ("__ballot_sync(kAllLanes", "__ballot_sync(0x7fffffffu"),
    "refine: the wrong lane keeps the distance": ("lane() == owner", "lane() == 0"),
    "refine: no band below": ("low = best - 2.0f * e", "low = best"),
    "refine: no band above": ("high = best + 2.0f * e", "high = best"),
}
EVERY_RUN = {
    "missing barrier, read too early": "sum: barrier before the warps' sums are added is missing",
    "missing barrier, refilled too early": "filter: barrier before refilling the tiles is missing",
    "missing __syncwarp": "filter: the patch is read without __syncwarp",
    "barrier not reached by all": "sum: barrier in a divergent branch",
    "intrinsic not reached by all": "refine: lanes leave before a ballot",
    "mask without a lane": "sum: mask without lane 31",
    "wrong shuffle distance": "sum: starts at half the shuffle distance",
    "slot never written": "sum: slots of seven warps are never written",
    "no atomics within a block": "select: keys counted without atomics",
    "no atomics between blocks": "adam: chunks add to one place without atomics",
    "over the end": "adam: the last chunk runs over the end",
    "tail off by one": "adam: tail one too long",
    "vectors at odd addresses": "adam: vectors without regard to alignment",
    "block too small": "adam: launched with half the threads",
    "grid too small": "adam: launched with one block less",
    "clamp left out": "filter: rows beyond the end are fetched",
    "unspecified fragment layout": "filter: a fragment's layout is taken for granted",
    "error bound left out": "refine: no band below",
}
ALL = os.environ.get("FAULTS") == "all"
FAULTS = {
    name: {fault: x for fault, x in faults.items() if ALL or fault in EVERY_RUN.values()}
    for name, faults in (("spd_step", SPD_FAULTS), ("knn_kth_distance", KNN_FAULTS))
}


def try_spd(library):
    """What a fault in spd_step must not survive: three schedules, ragged and unaligned tensors."""
    for library.schedule in emulator.SCHEDULES:
        lists = tensors_of([3, 9001, 4096])
        lists[0][1] = torch.cat([torch.zeros(1), lists[0][1]])[1:]
        first = library.schedule == 0
        assert_equals_the_reference(lists, 4, signs="+-", accumulated=first, kernel=library)


def try_knn(library):
    for library.schedule in emulator.SCHEDULES:
        queries = clip_like(2, 70, seed=31)
        reference = indistinct(queries, 300, 32)
        for rows, k in ((300, 6), (40, 6), (60, 45)):
            assert_exact(library.knn_kth_distance, queries, reference[:rows], k)


TRIALS = {
    "spd_step": (try_spd, lambda text: text),
    "knn_kth_distance": (try_knn, small_without_fallback),
}


@pytest.fixture(scope="module")
def mutants():
    """Libraries with one fault each, compiled by two processes while the tests run."""

    def compile_one(name, old, new):
        return emulator.compile_kernel(name, lambda text: replace(TRIALS[name][1](text), old, new))

    emulator.engine()  # before the two of them need it
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            (name, fault): pool.submit(compile_one, name, *change)
            for name, faults in FAULTS.items()
            for fault, change in faults.items()
        }


@pytest.mark.parametrize("name", TRIALS)
def test_the_correct_kernel_raises_no_alarm(name):
    trial, prepare = TRIALS[name]
    trial(emulator.load(name, prepare))


@pytest.mark.parametrize(
    "name, fault", [(name, fault) for name in FAULTS for fault in FAULTS[name]]
)
def test_the_planted_fault_is_found(mutants, name, fault):
    library = emulator.Library(mutants[name, fault].result())
    with pytest.raises(AssertionError) as found:
        TRIALS[name][0](library)
    print(f"{fault}: {str(found.value).splitlines()[0]}")
