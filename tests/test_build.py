"""The lazy build: one line says what happened, a killed build blocks nobody, no compiler means
PyTorch.
"""

import compiled
import pytest
import torch

import common
from csrc import build


@pytest.fixture
def load(monkeypatch, capsys):
    """load(NAME=value, ...) -> the kernels and what was printed, under these variables."""
    compiled.kernels()

    def load_with(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        return build.load.__wrapped__(), capsys.readouterr().out

    return load_with


def test_importing_builds_nothing():
    assert "imported, built nothing: True" in compiled.said()


def test_a_cold_build_over_the_lock_of_a_killed_one_says_so_and_works():
    compiled.kernels()
    assert "kernels: built in" in compiled.said() and "CPU path" in compiled.said()
    assert "distance 5.0" in compiled.said()


def test_a_warm_start_needs_no_compiler(load):
    kernels, said = load(CXX="/nowhere/c++")
    assert kernels and said.startswith("kernels: found in")


def test_without_a_compiler_one_line_gives_the_reason(load, tmp_path):
    kernels, said = load(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/nowhere/c++", KERNELS="on")
    lines = 2 if compiled.TOOLKIT and torch.cuda.is_available() else 1  # with CUDA, then without
    assert kernels is None and said.count("\n") == lines
    assert "kernels: not built (" in said and "c++: not found), using PyTorch" in said


@pytest.mark.skipif(compiled.TOOLKIT is None, reason="no nvcc, or PyTorch is no CUDA build")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU says for which generation to build")
def test_cuda_kernels_without_a_gpu_need_a_target(load, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    _, said = load(TORCH_EXTENSIONS_DIR=str(tmp_path), KERNELS="cuda", CXX="/nowhere/c++")
    assert "set TORCH_CUDA_ARCH_LIST, as to 9.0), trying without CUDA" in said


def test_a_folder_that_cannot_be_written_to_means_pytorch(load, tmp_path):
    (tmp_path / "file").touch()
    kernels, said = load(TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    assert kernels is None and "using PyTorch" in said


def test_the_environment_switches_the_kernels_off(load):
    assert load(KERNELS="off") == (None, "kernels: switched off by KERNELS=off, using PyTorch\n")


@pytest.mark.parametrize("isa", ["amx", "avx512bf16", "avx512", "avx2", "portable"])
def test_the_environment_forces_an_instruction_set(load, isa):
    if not compiled.kernels().module.has_instruction_set(isa):
        with pytest.raises(
            common.InputError, match=f"KERNELS_ISA={isa} is not offered by this CPU"
        ):
            load(KERNELS_ISA=isa)
    else:
        kernels, said = load(KERNELS_ISA=isa)
        assert kernels.isa == isa and f"CPU path {isa}" in said


def test_an_unknown_instruction_set_is_refused(load):
    with pytest.raises(common.InputError, match="KERNELS_ISA=mmx is not offered by this CPU"):
        load(KERNELS_ISA="mmx")


def test_little_work_builds_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert common.kernels(work=1e10) is None and not any(tmp_path.iterdir())


def test_kernel_sources_include_no_pytorch_header():
    for path in build.CSRC.glob("*.[ch]*"):
        assert "#include <torch" not in path.read_text(), path
        assert "#include <ATen" not in path.read_text(), path
