"""All that a machine with a GPU can say about this repository, in one command: python lab/gpu.py

It needs the packages of requirements.txt, an nvcc that fits PyTorch (CUDA_HOME), and about 40 GB of
memory; eight minutes are planned. `pip install flashlib` adds a peer. (KeOps 2.3, tried on an H200,
ended the process with a segmentation fault at D = 512.) Rows are printed as they come, a part that
fails says so and the next one goes on, and at the end stands a table in Markdown for the README.
Parts: tests, knn, spd, vit, scripts, compiled; `python lab/gpu.py knn spd` runs two of them.

Without a GPU everything runs at tiny sizes on the CPU, which says nothing about speed.

Method: the candidates of a row in turn (A B A B ...), medians after one warm-up, wall time up to a
synchronisation. Errors are against fp64, on 8 queries.
"""

import argparse
import contextlib
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bench_kernels  # noqa: E402

import carot  # noqa: E402
import spd  # noqa: E402
import vrf  # noqa: E402
from csrc import build  # noqa: E402

KNN_SIZES = [(10_000, 100_000, 512, 1), (10_000, 100_000, 512, 100), (10_000, 100_000, 768, 1000),
             (50_000, 400_000, 512, 400), (50_000, 400_000, 768, 1000)]  # fmt: skip
TINY_SIZES = [(40, 600, 64, 1), (40, 600, 64, 50)]
ADAM = dict(lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8)
SCALARS = dict(step=10, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, spd_lambda=1.0)


class Report:
    """Rows of the final table, printed as they come, and the deadline of the whole run."""

    def __init__(self, minutes):
        self.rows, self.deadline = [], time.monotonic() + 60 * minutes

    def add(self, what, name, value, remark=""):
        self.rows.append((what, name, value, remark))
        print(f"{what:40} {name:28} {value:>14}  {remark}", flush=True)

    def seconds_left(self):
        return self.deadline - time.monotonic()

    def markdown(self, machine):
        lines = [machine, "", "| what | how | result | |", "|---|---|---|---|"]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows])


def medians(calls, device, rounds=3, before=lambda: None):
    """Median seconds of each call, taken in turn.  {name: call} -> {name: seconds}

    A call that fails is said, and left out.
    """
    found, failed = {name: [] for name in calls}, set()
    for turn in range(rounds + 1):
        for name in [name for name in calls if name not in failed]:
            before()
            synchronise(device)
            start = time.perf_counter()
            try:
                calls[name]()
                synchronise(device)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                print(f"  {name} failed: {str(error).splitlines()[0][:150]}", flush=True)
                failed.add(name)
                continue
            if turn:  # the first round warms up
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(x) for name, x in found.items() if name not in failed}


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- the parts ------------------------------------------------------------------------------------


def run_tests(report, device, kernels):
    """The tests that a GPU wakes up."""
    files = ["test_cuda_gpu.py", "test_cuda_compiles.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    limit = max(10, min(240, report.seconds_left()))
    paths = [str(HERE.parent / "tests" / name) for name in files]
    with tempfile.TemporaryFile("w+") as text:
        done = subprocess.run([*command, *paths], cwd=HERE.parent, stdout=text, timeout=limit)
        text.seek(0)
        said = text.read().strip().splitlines()
    print("\n".join(line for line in said if line.startswith(("FAILED", "ERROR", "E  "))))
    verdict = "passed" if done.returncode == 0 else f"exit {done.returncode}"
    report.add("tests", " ".join(files), verdict, said[-1] if said else "")


def knn_peers(queries, reference, k):
    """{name: call -> distances [N]}; those that are not installed are named."""
    calls = {"vrf.knn_kth_distance": lambda: vrf.knn_kth_distance(queries, reference, k)}
    try:
        from flashlib import flash_knn

        if k <= 100:  # with k = 1000 a row took more than three minutes of an H100
            calls["flashlib flash_knn"] = lambda: flash_knn(queries, reference, k)[0][:, -1].sqrt()
    except ImportError:
        print("  flashlib is not installed")
    return calls


def run_knn(report, device, kernels):
    """k-NN at VRF's sizes against what people use; errors; the same bits twice; a CUDA graph."""
    for n, m, d, k in KNN_SIZES if device.type == "cuda" else TINY_SIZES:
        queries, reference = (x.to(device) for x in bench_kernels.clip_like(n, m, d))
        calls = {"ours": lambda q=queries, r=reference, k=k: kernels.knn_kth_distance(q, r, k)}
        calls |= knn_peers(queries, reference, k)
        seconds, what = medians(calls, device), f"k-NN {n} x {m}, D {d}, k {k}"
        rows = queries[:8].double()
        truth = torch.stack([(reference - q).norm(dim=1).kthvalue(k).values for q in rows])
        for name, value in seconds.items():
            error = (calls[name]()[:8].double() - truth).abs().max().item()
            rate = 2e-12 * n * m * d / value
            ratio = seconds["ours"] / value if "ours" in seconds else math.nan
            remark = f"{rate:.1f} TFLOP/s, error {error:.0e}, {ratio:.2f} x ours"
            report.add(what, name, f"{1e3 * value:.1f} ms", remark)
        same = torch.equal(calls["ours"](), calls["ours"]())
        report.add(what, "ours, twice", "same bits" if same else "OTHER BITS")
        if report.seconds_left() < 60:
            break
    if device.type == "cuda":
        replay = captured(calls["ours"])
        seconds = medians({"replayed": replay}, device)["replayed"]
        report.add(what, "ours, in a CUDA graph", f"{1e3 * seconds:.1f} ms")


def captured(call):
    """A call recorded in a CUDA graph; what comes back replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def run_spd(report, device, kernels, wanted=("ours", "fused AdamW", "foreach", "loop")):
    """One step of ViT-B/16's tensors, all projected and none, against fused AdamW and loops."""
    shapes = bench_kernels.vit_b_16(*(() if device.type == "cuda" else (1, 32)))
    generator = torch.Generator().manual_seed(0)
    anchors = [0.02 * torch.randn(shape, generator=generator).to(device) for shape in shapes]
    away = [1e-3 * torch.randn(shape, generator=generator).to(device) for shape in shapes]
    v, count = [torch.full_like(a, 1e-6) for a in anchors], sum(a.numel() for a in anchors)
    m, params = ([torch.empty_like(a) for a in anchors] for _ in range(2))
    steps = [torch.tensor(10.0, device=device) for _ in shapes]

    def reset():
        for values, start, scale, added in ((m, away, -10.0, 0), (params, anchors, 1.0, away)):
            torch._foreach_copy_(values, start)
            torch._foreach_mul_(values, scale)
            if added:
                torch._foreach_add_(values, added)

    for case, sign in (("all projected", 1), ("none projected", -1)):
        grads = [sign * x for x in away]
        tensors = params, anchors, grads, m, v
        calls = {
            "ours": lambda t=tensors: kernels.spd_step(*t, **SCALARS),
            "fused AdamW": lambda g=grads: torch._fused_adamw_(
                params, g, m, v, [], steps, **ADAM, amsgrad=False, maximize=False
            ),
            "torch.compile of the loop": lambda t=tensors: compiled_loop(*t, **SCALARS),
            "foreach": lambda t=tensors: spd.spd_step_foreach(*t, **SCALARS),
            "loop": lambda t=tensors: spd.spd_step(*t, **SCALARS),
        }
        calls = {name: calls[name] for name in wanted}
        seconds = medians(calls, device, rounds=9, before=reset)
        what = f"SPD step, {count / 1e6:.1f} M fp32, {case}"
        for name, value in seconds.items():
            bytes_moved = 28 if name == "fused AdamW" else 44 if sign > 0 else 32
            remark = f"{count * bytes_moved / value / 1e9:.0f} GB/s of {bytes_moved} B a parameter"
            if "fused AdamW" in seconds:
                remark += f", {value / seconds['fused AdamW']:.2f} x fused AdamW"
            report.add(what, name, f"{1e3 * value:.2f} ms", remark)
        if device.type == "cuda" and "foreach" in wanted:
            reset()
            replay = captured(calls["ours"])
            value = medians({"replayed": replay}, device, rounds=9, before=reset)["replayed"]
            report.add(what, "ours, in a CUDA graph", f"{1e3 * value:.2f} ms")


compiled_loop = torch.compile(spd.spd_step)


def run_compiled(report, device, kernels):
    """The same step by torch.compile of the loop: minutes of compiling, so it comes last."""
    if device.type == "cuda":
        run_spd(report, device, kernels, ("ours", "fused AdamW", "torch.compile of the loop"))


def run_vit(report, device, kernels):
    """Training steps of ViT-B/16 in bf16: SPD's on images, CaRot's and FLYP's on pairs."""
    import open_clip

    if device.type == "cuda":
        name, batch = "ViT-B-16", 512
        model = open_clip.create_model(name, pretrained=None)
    else:
        name, batch = "a tiny ViT", 4
        text = dict(context_length=77, vocab_size=49_408, width=32, heads=1, layers=1)
        image = dict(image_size=224, patch_size=56, width=32, head_width=32, layers=1)
        model = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**image), open_clip.CLIPTextCfg(**text))
    model = model.to(device).train()
    images = torch.randn(batch, 3, 224, 224, device=device)
    texts = torch.randint(1, 49_000, (batch, 77), device=device)

    def image_loss():
        return model.encode_image(images).float().square().mean()

    def pair_loss(micro):
        return carot.contrastive(carot.logits_of(model, images, texts, micro))

    losses = {
        "SPD, images": image_loss,
        "contrastive, pairs": lambda: pair_loss(0),
        "contrastive, --micro-batch": lambda: pair_loss(batch // 4 or 1),
    }
    for what, loss in losses.items():
        optimiser = spd.AdamSPD(model.parameters(), lr=1e-6)

        def step(loss=loss, optimiser=optimiser):
            optimiser.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                value = loss()
            value.backward()
            optimiser.step()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for value in medians({what: step}, device).values():
            memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
            remark = f"{batch / value:.0f} images/s, {memory:.1f} GiB"
            report.add(f"{name}, batch {batch}, bf16", what, f"{1e3 * value:.0f} ms", remark)


def run_scripts(report, device, kernels):
    """vrf.py, carot.py and spd.py on the digits, from the shell, on this device."""
    for script in ("vrf.py", "carot.py", "spd.py"):
        left = report.seconds_left()
        if left < 20 or device.type != "cuda":
            report.add(
                script, "on the digits", "not run", "no time left" if left < 20 else "no GPU"
            )
            continue
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as text:
            command = [sys.executable, str(HERE.parent / script), "--device", "cuda"]
            start = time.perf_counter()
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([*command, "--out", folder], stdout=text, stderr=text, timeout=left)
            text.seek(0)
            print(text.read()[-3000:])
            report.add(script, "on the digits", f"{time.perf_counter() - start:.0f} s")


PARTS = {"tests": run_tests, "knn": run_knn, "spd": run_spd, "vit": run_vit,
         "scripts": run_scripts, "compiled": run_compiled}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; default: all")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after these")
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report, kernels = Report(options.minutes), build.load()
    if kernels is None or device.type not in kernels.devices:
        sys.exit(f"no compiled kernels for {device}, nothing to measure")
    name = torch.cuda.get_device_name() if device.type == "cuda" else bench_kernels.cpu_model()
    machine = f"{name}, {os.cpu_count()} CPU cores, PyTorch {torch.__version__}"
    print(f"{machine}, {platform.platform()}", flush=True)
    for part in options.parts or PARTS:
        if report.seconds_left() < 0:
            report.add(part, "", "not run", "no time left")
            continue
        try:
            PARTS[part](report, device, kernels)
        except Exception as error:  # the next part may still say something
            report.add(part, "", "failed", f"{type(error).__name__}: {str(error)[:200]}")
    print("\n" + report.markdown(machine))
    return report.rows


if __name__ == "__main__":
    main()
