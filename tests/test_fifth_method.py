"""A method of one's own is one file: that of docs/add_a_method.md, trained on the digits."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from small import few_digits, use_digits

import common

HERE = Path(common.__file__).parent
METHOD = (HERE / "docs/add_a_method.md").read_text().split("```")[1].removeprefix("python\n")


@pytest.fixture
def method(tmp_path, monkeypatch):
    """The module smooth.py, written where Python finds it; the digits are few."""
    use_digits(monkeypatch, few_digits(tmp_path / "digits"))
    (tmp_path / "smooth.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    import smooth

    yield smooth
    del sys.modules["smooth"]


def test_a_fifth_method_gets_its_row_its_interval_and_its_figure(method, tmp_path, capsys):
    out = tmp_path / "out"
    words = "--epochs 1 --batch 64 --warmup 1 --lr 1e-3 --device cpu --out".split()
    rows = method.main([*words, str(out)])
    assert [row.method for row in rows] == ["FT", "Smooth"]
    said = capsys.readouterr().out
    assert "Smooth less FT, ID: " in said and "Smooth less FT, shift: " in said
    assert len((out / "results.jsonl").read_text().splitlines()) == 2
    (line,) = [line for line in said.splitlines() if line.startswith("Smooth  ")]
    assert len(line.split()) == 2 + len(rows[0].right)  # the method, its sets, their mean
    assert (out / "figures/smooth.csv").read_text().startswith("method,id,shift\nFT,")
    Image.open(out / "figures/smooth.png").verify()
    assert len(list((out / "checkpoints").glob("*.pt"))) == 2
    again = method.main([*words, str(out), "--smoothing", "0.2"])
    assert len(list((out / "checkpoints").glob("*.pt"))) == 3  # FT is read, Smooth trained anew
    for split, right in rows[0].right.items():
        assert (again[0].right[split] == right).all()


def test_readme_shows_its_heart():
    readme = (HERE / "README.md").read_text()
    start = readme.index("## Add a method")
    shown = readme[start : readme.index("## ", start + 1)].split("```")[1].splitlines()
    whole = METHOD.replace("smoothing=strength", "smoothing=config.smoothing")
    whole = whole.replace('"smoothing": strength', '"smoothing": config.smoothing')
    for line in filter(None, shown[1:]):
        assert line in whole.splitlines()


def test_its_help_has_the_shared_settings_and_its_own(method, capsys):
    with pytest.raises(SystemExit) as stopped:
        method.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and said.index("--seeds") < said.index("--smoothing")
    with pytest.raises(common.InputError, match="--smoothing 2.0: expected a number, at most 1"):
        method.main(["--smoothing", "2"])
