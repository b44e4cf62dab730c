"""Plants faults in the CUDA kernels, one at a time, and asserts that the emulator finds each, by a
report of its checker or by a wrong result; and that it reports nothing on the kernels as they are.
`pytest -rP` prints what was said of each fault. Every run plants one fault of each kind, EVERY_RUN;
FAULTS=all plants all 41, about 15 CPU seconds more."""

import concurrent.futures
import os

import cuda_cases
import emulator
import pytest
import torch
from test_cuda_emulated import ADAM, replace, small_without_fallback

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
    "adam: tail one too short": ("? int(end - i) : kVector", "? int(end - i) - 1 : kVector"),
    "adam: tail one too long": ("if (e < count) to[e]", "if (e <= count) to[e]"),
    "adam: vectors without regard to alignment": ("all % 16 == 0}", "all % 4 == 0}"),
    "adam: every thread writes the chunk's sum": (
        "if (threadIdx.x == 0) partial[",
        "if (threadIdx.x >= 0) partial[",
    ),
    "adam: chunks add to one place without atomics": ("partial[chunk] = sums", "partial[0] = sums"),
    "adam: launched with half the threads": (
        "spd_adam_kernel<<<unsigned(chunks), kThreads,",
        "spd_adam_kernel<<<unsigned(chunks), kThreads / 2,",
    ),
    "adam: launched with one block less": (
        "spd_adam_kernel<<<unsigned(chunks)",
        "spd_adam_kernel<<<unsigned(chunks - 1)",
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
        "  __syncthreads();\n  if (warp() == 0) {",
        "  if (warp() == 0) {",
    ),
    "select: digit read before it is chosen": (
        "  __syncthreads();\n  const Search next",
        "  const Search next",
    ),
    "select: keys counted before the histogram is clear": (
        "histogram[bin] = 0;\n  __syncthreads();",
        "histogram[bin] = 0;",
    ),
    "select: wrong distance of the running sum": (
        "distance < 32; distance *= 2",
        "distance < 32; distance *= 4",
    ),
    "select: rank one too far": ("search = {0u, k - 1};", "search = {0u, k};"),
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
    for schedule in emulator.SCHEDULES:
        params, anchors, m, v = cuda_cases.spd_tensors([3, 9001, 4096], 30)
        params[1] = torch.cat([torch.zeros(1), params[1]])[1:]
        state = cuda_cases.doubles((params, anchors, m, v))
        grads = [p - a for p, a in zip(params, anchors, strict=True)]
        conditions, total = torch.zeros(3, dtype=torch.float64), 0
        for step in (1, 2):
            grads = [-3.0 * step * g for g in grads]
            given = None if schedule else conditions
            report = library.spd_step(
                params, anchors, grads, m, v, step, *ADAM.values(), 1.0, schedule, given
            )
            total = total - report[:, 0]
            wanted = cuda_cases.spd_reference(
                state, grads, step, *ADAM.values(), 1.0, None if schedule else total
            )
            assert torch.allclose(report, wanted, rtol=1e-5, atol=1e-6), "wrong sums"
            assert given is None or torch.equal(given, total), "wrong conditions"
        for found, wanted in zip(params, state[0], strict=True):
            assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6), "wrong result"


def try_knn(library):
    for schedule in emulator.SCHEDULES:
        queries = cuda_cases.features(2, 70, 31)
        reference = cuda_cases.indistinct(queries, 300, 32)
        for rows, k in ((300, 6), (40, 6), (60, 45)):  # the last one by brute force
            found = library.knn_kth_distance(queries, reference[:rows], k, schedule)
            wanted = cuda_cases.kth_distance(queries, reference[:rows], k)
            assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-7), "wrong result"


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
    with pytest.raises(AssertionError) as found:
        TRIALS[name][0](emulator.Library(mutants[name, fault].result()))
    print(f"{fault}: {str(found.value).splitlines()[0]}")
