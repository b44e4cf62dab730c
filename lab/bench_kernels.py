"""Times the two CPU kernels against what people use. Not a test: python lab/bench_kernels.py

Method: one process, the candidates in turn (A B C A B C ...), medians of the rounds after one
warm-up, and ratios of them; on a shared machine differences under 10 % are noise; on a busy one
--clock cpu --threads 1 counts a thread's seconds of work instead of the time on the wall. faiss
where it is installed (pip install faiss-cpu). Error: against fp64, on 8 queries. At the end stand
the rows of docs/kernels.md. About 8 minutes on two quiet cores; --quick about 1.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path


def peers_at_their_best():
    """OpenBLAS inside faiss takes some newer Intel CPUs for old ones without AVX ("Prescott"),
    which makes faiss up to 6 times slower than it is; name the kernels for it unless the user
    did.
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if "GenuineIntel" in cpu and "avx512f" in cpu:
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


peers_at_their_best()  # before any library that reads it

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import spd  # noqa: E402
import vrf  # noqa: E402
from csrc import build  # noqa: E402

KNN_SIZES = [(1000, 20_000, 512, 1), (1000, 20_000, 512, 20), (1000, 20_000, 512, 200)]
KNN_SIZES += [(2000, 100_000, 512, 100), (2000, 100_000, 512, 1000), (500, 400_000, 512, 400)]
ROUNDS = 7
FAISS, REFERENCE = "faiss IndexFlatL2", "vrf.knn_kth_distance"


def interleaved(candidates, options, before=lambda: None):
    """Median seconds of each candidate, by the clock asked for; `before` runs untimed ahead of
    every call.  {name: call} -> {name: s}
    """
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds = {name: [] for name in candidates}
    for turn in range(1 + ROUNDS):
        for name, call in candidates.items():
            before()
            start = clock()
            call()
            if turn:  # the first round warms up
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def clip_like(n, m, d):
    """Unit vectors: a common direction, 1000 class centres, the reference sorted by class.
    -> [n, d], [m, d]
    """
    g = torch.Generator().manual_seed(0)
    shared, centres = torch.randn(d, generator=g), torch.randn(1000, d, generator=g)

    def make(labels):
        rows = shared + 0.6 * centres[labels] + 0.6 * torch.randn(len(labels), d, generator=g)
        return torch.nn.functional.normalize(rows, dim=1)

    return make(torch.randint(1000, (n,), generator=g)), make(torch.arange(m) * 1000 // m)


def knn_calls(native, options, queries, reference, k):
    """{name: call -> distances [N]}"""

    def ours(level):
        native.level = level
        return native.knn_kth_distance(queries, reference, k)

    calls = {f"ours {level}": lambda level=level: ours(level) for level in native.levels}
    calls[REFERENCE] = lambda: vrf.knn_kth_distance(queries, reference, k)
    try:
        import faiss
    except ImportError:
        print("faiss is not installed")
        return calls
    faiss.omp_set_num_threads(options.threads)
    index = faiss.IndexFlatL2(reference.shape[1])
    index.add(reference.numpy())
    calls[FAISS] = lambda: torch.from_numpy(index.search(queries.numpy(), k)[0][:, -1]).sqrt()
    return calls


def bench_knn(native, options):
    """Prints times as fast as faiss by size.  -> lines of the table"""
    found, lines = {}, []
    for n, m, d, k in KNN_SIZES[:3] if options.quick else KNN_SIZES:
        queries, reference = clip_like(n, m, d)
        calls = knn_calls(native, options, queries, reference, k)
        rows = queries[:8].double()
        truth = torch.stack([(reference - q).norm(dim=1).kthvalue(k).values for q in rows])
        error = {name: (call()[:8].double() - truth).abs().max() for name, call in calls.items()}
        seconds = interleaved(calls, options)
        peer = seconds.get(FAISS, math.nan)
        print(f"\nknn_kth_distance, {n:,} x {m:,}, {d} columns, k = {k}")
        for name, value in seconds.items():
            found.setdefault(name, []).append(peer / value)
            rate = f"{2e-9 * n * m * d / value:6.0f} GFLOP/s"
            ratio = f"{peer / value:6.2f} x faiss"
            print(f"  {name:22} {1e3 * value:8.1f} ms {rate} {ratio}  error {error[name]:.1e}")
        cells = " | ".join(f"{found[name][-1]:.2f}" for name in found)
        lines.append(f"| {n:,} x {m:,}, {k:,} | {cells} |")
    cells = " | ".join(f"{statistics.geometric_mean(ratios):.2f}" for ratios in found.values())
    head = "| queries x rows, k | " + " | ".join(found) + " |"
    return [head, "|---" * (len(found) + 1) + "|", *lines, f"| geometric mean | {cells} |"]


def vit_b_16(layers=12, width=768):
    """Shapes of ViT-B/16 with its 1000-way head: 152 tensors, 86.6 M parameters."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return stem + layers * block + [(width,), (width,), (1000, width), (1000,)]


def bench_spd(native, options):
    """Prints the time of a step, all tensors projected and none.  -> lines of the table"""
    shapes, g = vit_b_16(1 if options.quick else 12), torch.Generator().manual_seed(0)
    anchors = [0.02 * torch.randn(shape, generator=g) for shape in shapes]
    away = [1e-3 * torch.randn(shape, generator=g) for shape in shapes]
    v = [torch.full_like(a, 1e-6) for a in anchors]
    m, params = [torch.empty_like(a) for a in anchors], [torch.empty_like(a) for a in anchors]
    steps, found = [torch.tensor(10.0) for _ in shapes], {}
    adam = dict(lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False)
    scalars = dict(step=10, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, spd_lambda=1.0)

    def reset():
        torch._foreach_copy_(m, away)
        torch._foreach_mul_(m, -10.0)
        torch._foreach_copy_(params, anchors)
        torch._foreach_add_(params, away)

    for case, sign in (("none projected", -1), ("all projected", 1)):
        # gradient against the distance travelled (or along), momentum outwards
        tensors = params, anchors, [sign * x for x in away], m, v
        moments = tensors[2], m, v, [], steps
        calls = {
            "ours": lambda t=tensors: native.spd_step(*t, **scalars),
            "fused AdamW": lambda m=moments: torch._fused_adamw_(
                params, *m, **adam, maximize=False
            ),
            "spd.spd_step": lambda t=tensors: spd.spd_step(*t, **scalars),
            "spd.spd_step_foreach": lambda t=tensors: spd.spd_step_foreach(*t, **scalars),
        }
        seconds = interleaved(calls, options, reset)
        count = sum(a.numel() for a in anchors)
        print(f"\nspd_step, {len(shapes)} tensors, {count / 1e6:.1f} M parameters, {case}")
        for name, value in seconds.items():
            ratio = value / seconds["fused AdamW"]
            found.setdefault(name, []).append(ratio)
            print(f"  {name:22} {1e3 * value:8.1f} ms {ratio:6.2f} x fused AdamW")
    lines = [f"| {name} | {none:.2f} | {all_:.2f} |" for name, (none, all_) in found.items()]
    return ["| x fused AdamW | none projected | all projected |", "|---|---|---|", *lines]


def cpu_model():
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    text = "cpu, with --threads 1: on a busy machine"
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help=text)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    native = build.load()
    if native is None:
        sys.exit("no compiled kernels on this machine, nothing to compare")
    machine = f"{cpu_model()}, {options.threads} threads, {options.clock} clock"
    machine += f", PyTorch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    core = os.environ.get("OPENBLAS_CORETYPE", "not set")
    print(f"{machine}, OPENBLAS_CORETYPE (faiss) {core}", flush=True)
    lines = [machine, "", *bench_knn(native, options), "", *bench_spd(native, options)]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
