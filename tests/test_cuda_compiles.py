"""nvcc compiles the CUDA kernels for all GPU generations from Turing to Blackwell, in compiled.py,
into PyTorch's extension. `pytest -rP` shows each kernel's registers and shared memory.
"""

import re
from pathlib import Path

import pytest
from compiled import ARCHITECTURES, TOOLKIT, kernels, said

pytestmark = pytest.mark.skipif(
    not TOOLKIT, reason="no nvcc, or PyTorch is no CUDA build: CUDA kernels not compiled"
)
TARGETS = re.findall(r"\d+\w*", ARCHITECTURES.replace(".", ""))  # 75, or 90a


def ptxas_table(text):
    """(architecture, kernel) -> (registers, shared bytes, spilled bytes), from `ptxas -v`."""
    rows = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        mangled, architecture = re.match(r"'(\S+)' for 'sm_(\w+)'", part).groups()
        kernel = re.search(r"\d((?:knn|spd)_\w+?_kernel)", mangled)[1]
        shared = re.search(r"(\d+) bytes smem", part)
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        rows[architecture, kernel] = registers, int(shared[1]) if shared else 0, spilled
    return rows


def test_the_cuda_kernels_compile_without_a_warning_and_link():
    complaints = [x for x in said().splitlines() if re.search(r"error|warning.*(\.cu|ptxas)", x)]
    assert kernels().devices == ("cpu", "cuda"), "\n".join(complaints)


def test_no_kernel_spills_registers():
    table = ptxas_table(said())
    names = sorted({kernel for _, kernel in table})
    assert sorted(table) == sorted((a, k) for a in TARGETS for k in names) and len(names) == 7
    print(f"\n{'registers / shared bytes':26}" + "".join(f"{f'sm_{a}':>12}" for a in TARGETS))
    for kernel in names:
        cells = ("{} / {}".format(*table[a, kernel][:2]) for a in TARGETS)
        print(f"{kernel:26}" + "".join(f"{cell:>12}" for cell in cells))
    spills = [f"{kernel} on sm_{a}: {row[2]} bytes" for (a, kernel), row in table.items() if row[2]]
    assert not spills, "registers spilled: " + "; ".join(spills)


def test_a_launcher_says_so_where_no_driver_is():
    """Without a GPU it returns CUDA's sentence instead of crashing."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("a GPU is here: test_cuda_gpu.py runs the launchers")
    error = kernels().module.spd_step_cuda(0, 1, 0, 1, 1, 0.1, 0.9, 0.99, 0.0, 1.0, 0, 0, 0, 0)
    assert "driver" in error or "no CUDA-capable device" in error
