"""Times the two CPU kernels against what people use. Not a test: python lab/bench_kernels.py [--help]

Method: one process, the candidates in turn (A B C A B C ...), medians of the rounds after one warm-up, and ratios
of them; on a shared machine differences under 10 % are noise; on a busy one --clock cpu --threads 1 counts a thread's
seconds of work instead of the time on the wall. Optional peers: pip install faiss-cpu scikit-learn;
an absent one is named. "of mm": the share of torch.mm's rate on 2048 x 2048 matrices, at the precision that the
candidate multiplies in. MiB: what a call adds in a process of its own, where that was measured.
About 10 minutes on two quiet cores; --quick about 1.
"""

# ruff: noqa: B023, E501  (candidates are called before the loop goes on; table rows are wide)
import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path


def peers_at_their_best():
    """OpenBLAS inside faiss does not know some newer Intel CPUs and falls back to SSE3 ("Prescott"),
    which makes faiss up to 6 times slower than it is; name the kernels for it unless the user did.
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
from csrc import build  # noqa: E402

KNN_SIZES = [(1000, 20_000, 512, 1), (1000, 20_000, 512, 20), (1000, 20_000, 512, 200)]
KNN_SIZES += [(2000, 100_000, 512, 100), (2000, 100_000, 512, 1000), (500, 400_000, 512, 400)]


def interleaved(candidates, options, before=lambda: None):
    """Median seconds of each candidate, by the clock asked for; `before` runs untimed ahead of every call.  {name: call} -> {name: s}"""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds = {name: [] for name in candidates}
    for turn in range(options.rounds + 1):
        for name, call in candidates.items():
            before()
            start = clock()
            call()
            if turn:  # the first round warms up
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_memory(call):
    """Peak resident MiB that a call adds (Linux; nan elsewhere); too little where the process has freed memory at hand."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    try:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        start = status("VmRSS")
        call()
        return status("VmHWM") - start
    except OSError:
        return math.nan


def optional(name):
    try:
        return __import__(name)
    except ImportError:
        print(f"{name} is not installed, its rows are left out")
        return None


def clip_like(n, m, d):
    """Unit vectors: a common direction, 1000 class centres, the reference sorted by class.  -> [n, d], [m, d]"""
    g = torch.Generator().manual_seed(0)
    shared, centres = torch.randn(d, generator=g), torch.randn(1000, d, generator=g)

    def make(labels):
        rows = shared + 0.6 * centres[labels] + 0.6 * torch.randn(len(labels), d, generator=g)
        return torch.nn.functional.normalize(rows, dim=1)

    return make(torch.randint(1000, (n,), generator=g)), make(torch.arange(m) * 1000 // m)


def in_tiles(product, queries, reference, k):
    """k-th smallest distance from |y|^2 - 2 x.y, 64 M scores at a time."""
    norms, out = reference.square().sum(1), []
    for q in queries.split(max(1, 2**26 // len(reference))):
        score = (
            torch.addmm(norms, q, reference.T, alpha=-2) if product else torch.cdist(q, reference)
        )
        kth = score.topk(k, largest=False).values[:, -1]
        out.append((kth + q.square().sum(1)).clamp_min(0).sqrt() if product else kth)
    return torch.cat(out)


def knn_calls(native, peers, options, queries, reference, k):
    """{name: call -> [N]}"""
    faiss, sklearn = peers
    calls = {}
    for level in native.levels:
        if options.baseline or level != "baseline" or level == native.levels[0]:
            calls[f"ours {level}"] = lambda level=level: (
                setattr(native, "level", level) or native.knn_kth_distance(queries, reference, k)
            )
    if faiss:
        faiss.omp_set_num_threads(options.threads)
        index = faiss.IndexFlatL2(reference.shape[1])
        index.add(reference.numpy())
        calls["faiss IndexFlatL2"] = lambda: torch.from_numpy(
            index.search(queries.numpy(), k)[0][:, -1]
        ).sqrt()
    calls["torch.mm + topk"] = lambda: in_tiles(True, queries, reference, k)
    calls["torch.cdist + topk"] = lambda: in_tiles(False, queries, reference, k)
    if sklearn:
        from sklearn.neighbors import NearestNeighbors

        brute = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=options.threads)
        brute.fit(reference.numpy())
        calls["sklearn brute"] = lambda: torch.from_numpy(
            brute.kneighbors(queries.numpy())[0][:, -1]
        )
    return calls


def memory_alone(native, options):
    """What --memory prints: MiB that one call adds to a process that has called it on little data only."""
    name, *size = options.memory
    n, m, d, k = map(int, size)
    peers = (
        optional("faiss") if "faiss" in name else None,
        optional("sklearn") if "skl" in name else None,
    )
    knn_calls(native, peers, options, *clip_like(64, 640, d), 1)[name]()
    call = knn_calls(native, peers, options, *clip_like(n, m, d), k)[name]
    print(extra_memory(call))


def fresh_memory(name, size, options):
    """`memory_alone` in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(options.threads), "--memory", name]
    done = subprocess.run([*command, *map(str, size)], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else math.nan


def bench_knn(native, options, mm):
    peers, best = (optional("faiss"), optional("sklearn")), f"ours {native.levels[0]}"
    rows = []
    for n, m, d, k in KNN_SIZES[:3] if options.quick else KNN_SIZES:
        queries, reference = clip_like(n, m, d)
        calls = knn_calls(native, peers, options, queries, reference, k)
        truth = torch.stack(
            [(reference.double() - q).norm(dim=1).kthvalue(k).values for q in queries[:8].double()]
        )
        error = {
            name: (call()[:8].double() - truth).abs().max().item() for name, call in calls.items()
        }
        calls["torch.mm alone"] = lambda: [
            q @ reference.T for q in queries.split(max(1, 2**26 // m))
        ]
        seconds = interleaved(calls, options)
        peer = seconds.get("faiss IndexFlatL2", math.nan)
        print(f"\nknn_kth_distance N={n} M={m} D={d} k={k}")
        print(
            f"  {'':20} {'ms':>8} {'faiss/x':>8} {'mm+topk/x':>9} {'GFLOP/s':>8} {'of mm':>5} {'error':>8} {'MiB':>6}"
        )
        for name, value in seconds.items():
            measured = name in (best, "faiss IndexFlatL2", "torch.mm + topk")
            memory = fresh_memory(name, (n, m, d, k), options) if measured else math.nan
            row = dict(
                op="knn_kth_distance",
                size=[n, m, d, k],
                name=name,
                seconds=value,
                faiss_ratio=peer / value,
            )
            row |= dict(
                mm_topk_ratio=seconds["torch.mm + topk"] / value, gflops=2e-9 * n * m * d / value
            )
            narrow = any(word in name for word in ("amx", "bf16"))
            row |= dict(of_mm=row["gflops"] / mm["bf16" if narrow else "fp32"])
            row |= dict(error=error.get(name, math.nan), extra_mib=memory)
            rows.append(row)
            print(
                f"  {name:20} {1e3 * value:8.1f} {row['faiss_ratio']:8.2f} {row['mm_topk_ratio']:9.2f} "
                f"{row['gflops']:8.0f} {row['of_mm']:5.0%} {row['error']:8.1e} {memory:6.0f}",
                flush=True,
            )
    for name in dict.fromkeys(row["name"] for row in rows):
        logs = [math.log(row["faiss_ratio"]) for row in rows if row["name"] == name]
        print(
            f"geometric mean, times as fast as faiss: {name:20} {math.exp(statistics.fmean(logs)):.2f}"
        )
    return rows


def vit_b_16(layers=12, width=768):
    """Shapes of ViT-B/16 with its 1000-way head: 152 tensors, 86.6 M parameters."""
    block = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (width,),
        (width,),
    ]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    stem = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return stem + layers * block + [(width,), (width,), (1000, width), (1000,)]


def bench_spd(native, options):
    shapes, g = vit_b_16(1 if options.quick else 12), torch.Generator().manual_seed(0)
    anchors = [0.02 * torch.randn(shape, generator=g) for shape in shapes]
    away = [1e-3 * torch.randn(shape, generator=g) for shape in shapes]
    count, rows = sum(a.numel() for a in anchors), []
    v = [torch.full_like(a, 1e-6) for a in anchors]
    m, params = [torch.empty_like(a) for a in anchors], [torch.empty_like(a) for a in anchors]
    for case, sign in (("all projected", 1), ("none projected", -1)):
        # gradient along the distance travelled (or against), momentum outwards: every (no) tensor is projected
        grads = [sign * x for x in away]

        def reset():
            torch._foreach_copy_(m, away)
            torch._foreach_mul_(m, -10.0)
            torch._foreach_copy_(params, anchors)
            torch._foreach_add_(params, away)

        steps = [torch.tensor(10.0) for _ in shapes]
        scalars = dict(step=10, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, spd_lambda=1.0)
        tensors = params, anchors, grads, m, v
        calls = {}
        calls["ours"] = lambda: native.spd_step(*tensors, **scalars)
        calls["for-loop"] = lambda: spd.spd_step(*tensors, **scalars)
        calls["foreach"] = lambda: spd.spd_step_foreach(*tensors, **scalars)
        calls["torch AdamW fused"] = lambda: torch._fused_adamw_(
            params, grads, m, v, [], steps, lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        # reading 4 and writing 3 arrays of 4 bytes: three copies and one more read
        calls["28 B of copies"] = lambda: (
            torch._foreach_copy_(m, away), torch._foreach_copy_(v, v), torch._foreach_copy_(params, anchors),
            [x.sum() for x in grads],
        )  # fmt: skip
        seconds = interleaved(calls, options, reset)
        fused = seconds["torch AdamW fused"]
        print(
            f"\nspd_step ViT-B/16 shapes, {count / 1e6:.1f} M parameters, {len(shapes)} tensors, {case}"
        )
        print(
            f"  {'':20} {'ms':>8} {'x/fused':>8} {'loop/x':>8} {'foreach/x':>9} {'GB/s':>6} {'MiB':>6}"
        )
        for name, value in seconds.items():
            bytes_moved = 32 + 12 * (sign == 1) if name.startswith("ours") else 28
            rate = count * bytes_moved / value / 1e9 if "for" not in name else math.nan
            reset()
            row = dict(op="spd_step", case=case, name=name, seconds=value, over_fused=value / fused)
            row |= dict(
                loop_ratio=seconds["for-loop"] / value, foreach_ratio=seconds["foreach"] / value
            )
            row |= dict(gb_per_s=rate, extra_mib=extra_memory(calls[name]))
            rows.append(row)
            print(
                f"  {name:20} {1e3 * value:8.1f} {row['over_fused']:8.2f} {row['loop_ratio']:8.2f} "
                f"{row['foreach_ratio']:9.2f} {rate:6.1f} {row['extra_mib']:6.0f}",
                flush=True,
            )
    return rows


def cpu_model():
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=["knn_kth_distance", "spd_step"], help="only this one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu, with --threads 1: on a busy machine",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument(
        "--baseline", action="store_true", help="time the lowest level as well (slow)"
    )
    parser.add_argument(
        "--memory", nargs=5, metavar="X", help="name and size of a k-NN row: only its memory"
    )
    parser.add_argument("--json", default="bench_kernels.json", help="where the rows go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native = build.load()
    if native is None:
        sys.exit("no compiled kernels on this machine, nothing to compare")
    if options.memory:
        return memory_alone(native, options)
    cpu = cpu_model()
    load = os.getloadavg()[0]
    print(
        f"{cpu}, {options.threads} threads, {options.clock} clock, torch {torch.__version__}, load {load:.1f}"
    )
    print(f"OPENBLAS_CORETYPE (faiss): {os.environ.get('OPENBLAS_CORETYPE', 'not set')}")
    a = torch.randn(2048, 2048)
    b = a.bfloat16()
    products = {"fp32": lambda: a @ a}
    if any(level in ("amx", "avx512bf16") for level in native.levels):  # else minutes a product
        products["bf16"] = lambda: b @ b
    mm = interleaved(products, options)
    rate = {name: 2e-9 * 2048**3 / value for name, value in mm.items()}
    print("torch.mm 2048^3:", ", ".join(f"{name} {x:.0f} GFLOP/s" for name, x in rate.items()))
    rows = []
    if options.op != "spd_step":
        rows += bench_knn(native, options, rate)
    if options.op != "knn_kth_distance":
        rows += bench_spd(native, options)
    machine = dict(
        cpu=cpu,
        threads=options.threads,
        clock=options.clock,
        load=load,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    Path(options.json).write_text(
        json.dumps(dict(machine=machine, mm_gflops=rate, rows=rows), indent=1)
    )
    print(f"\nrows written to {options.json}")


if __name__ == "__main__":
    main()
