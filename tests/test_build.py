"""The build at first use: one line says what happened, a killed build blocks nobody, no compiler
means PyTorch.
"""

import compiled
import pytest

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


def test_spd_py_alone_trains_beside_a_foreign_common_and_csrc_without_kernels():
    assert "spd.py alone trained; kernels: None" in compiled.said()
    assert "a copy of spd.py has AdamSPD alone" in compiled.said()


def test_csrc_in_a_package_builds_at_first_use_over_the_lock_of_a_killed_build():
    compiled.kernels()
    said = compiled.said()
    assert "imported, built nothing: True" in said
    assert "kernels: built in" in said and "k-NN by" in said
    assert "distance 5.0 weight [0.5, 0.5]" in said


def test_a_warm_start_needs_no_compiler(load):
    kernels, said = load(CXX="/nowhere/c++")
    assert kernels and said.startswith("kernels: found in")


def test_without_a_compiler_one_line_gives_the_reason(load, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)
    kernels, said = load(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/nowhere/c++")
    assert kernels is None and said.count("\n") == 1
    assert "kernels: not built (" in said and "c++: not found), using PyTorch" in said


def test_a_folder_that_cannot_be_written_to_means_pytorch(load, tmp_path):
    (tmp_path / "file").touch()
    kernels, said = load(TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    assert kernels is None and "using PyTorch" in said


@pytest.mark.parametrize("value", ["off", "OFF", "0", "no", "False"])
def test_the_environment_switches_the_kernels_off(load, value):
    kernels, said = load(KERNELS=value)
    assert kernels is None and said == f"kernels: switched off by KERNELS={value}, using PyTorch\n"


def test_an_unknown_value_of_the_variable_is_refused(load):
    with pytest.raises(ValueError, match="KERNELS must be on or off, got avx2"):
        load(KERNELS="avx2")
    assert load(KERNELS="1")[0]


def test_little_work_builds_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert common.kernels(work=1e10) is None and not any(tmp_path.iterdir())
