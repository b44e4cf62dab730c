"""The pages of lab/pages.py: as the command writes them, and in a browser, where they move."""

import html
import json
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pages_numbers
import pytest
import torch

import common
import er_study
import spd
import vrf
from data import testbeds

pages = pytest.importorskip("pages", reason="needs requirements-lab.txt")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A headless Chromium, spoken to in its DevTools protocol over a pipe: JSON and a zero byte."""

    def __init__(self, folder):
        read, self.to = os.pipe()
        self.of, write = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += [
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={folder}",
        ]
        start = f'exec "$@" 3<&{read} 4>&{write}'
        command = ["bash", "-c", start, "sh", BROWSER, *options, "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(read, write), **quiet)
        os.close(read), os.close(write)
        self.count, self.rest, self.events, self.session = 0, b"", [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        return self.wait(lambda m: m.get("id") == self.count)["result"]

    def wait(self, wanted):
        """The first message that is wanted; those that come before it are kept in `events`."""
        while True:
            line, found, rest = self.rest.partition(b"\0")
            if found:
                self.rest, message = rest, json.loads(line)
                if wanted(message):
                    return message
                self.events.append(message)
            else:
                part = os.read(self.of, 1 << 20)
                assert part, "the browser has ended"
                self.rest += part

    def open(self, path):
        """Loads a file. -> (what it printed or complained of, addresses that it asked for)"""
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        if not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.wait(lambda m: m.get("method") == "Page.loadEventFired"))
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        bad = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        said = [e["params"] for e in self.events if e["method"] in bad]
        asked = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return said, [p["request"]["url"] for p in asked]

    def run(self, script):
        """The value of a JavaScript expression."""
        given = {"awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", expression=script, **given)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def move(self, **values):
        """Sets sliders and choices as a user does, by value and an input event."""
        for name, value in values.items():
            self.run(f"$('{name}').value = {json.dumps(value)}; $('{name}').oninput()")

    def exact(self, name):
        return float(self.run(f"$('{name}').dataset.exact"))

    def width(self, pixels, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=pixels, height=height,
                  deviceScaleFactor=1, mobile=pixels < 600)  # fmt: skip

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to), os.close(self.of)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not BROWSER:
        pytest.skip("no Chromium here; Debian: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with all pages as the command writes them now, and the figures where they look."""
    folder = tmp_path_factory.mktemp("docs") / "pages"
    pages.main(["--out", str(folder)])
    for figure in (pages.ROOT / "docs").glob("*.png"):
        os.symlink(figure, folder.parent / figure.name)
    return folder


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pages.NAMES)
def test_the_committed_page_is_what_the_command_writes(name, built):
    committed = pages.OUT / f"{name}.html"
    same = committed.read_bytes() == (built / f"{name}.html").read_bytes()
    assert same, f"{committed} is not made from the files as they are: run python lab/pages.py"


@pytest.mark.parametrize("name", pages.NAMES)
def test_a_page_has_every_difference_once_and_links_to_files_that_are_there(name, built):
    text = (built / f"{name}.html").read_text()
    wanted = tuple(pages.read_plan(name)["page"]["ids"].split())
    for identity in (i for i in pages.differences() if i.startswith(wanted)):
        assert text.count(f"<h3>Differs: {identity}</h3>") == 1, identity
    links = re.findall(r"""(?:href|src)=["']([^"'#][^"'#]*)""", text)
    files = [x for x in links if not x.startswith(("https://", "data:"))]
    assert len(files) > 20 and [x for x in files if not (pages.OUT / x).is_file()] == []


@pytest.mark.parametrize("name", pages.NAMES)
def test_a_page_can_be_read_aloud(name, built):
    text = (built / f"{name}.html").read_text()
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert all(len(alt) > 40 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', text))
    assert text.count("<img ") == len(re.findall(r'<img [^>]*alt="', text)) > 0
    assert text.count("<math ") > 3 and not re.search(r"<m\w+[^>]*>[^<]*\\", text)  # LaTeX unread
    assert len(re.findall("<(?:input|select)", text)) == text.count("<label>")
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names)) > 5


def test_the_code_on_a_page_is_the_files_line_by_line(built):
    text = (built / "vrf.html").read_text()
    shown = re.findall(r'aria-label="Source of (\w+) in (\S+?)">(.*?)</pre>', text, re.S)
    assert len(shown) > 5
    for function, path, rows in shown:
        lines = (pages.ROOT / path).read_text().splitlines()
        numbers = [int(n) for n in re.findall(r'data-n="(\d+)"', rows)]
        assert html.unescape(re.sub("<[^>]+>", "", rows)) == "\n".join(
            lines[n - 1] for n in numbers
        )
        assert lines[numbers[0] - 1].startswith(f"def {function}(")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("code = ose", "code = osee"), "vrf.py has no osee; nearest: ose"),
        (("::test_wse_av", "::test_wse_v"), "tests/test_vrf.py has no test_wse_v"),
        (("code = vrf\n", "code = vrf\ndiffers = A99\n"), "docs/differences.md has no A99"),
        (("docs/vrf.md#All rows", "docs/vrf.md#All"), "docs/vrf.md has no section 'All'"),
        (("figures = docs/vrf", "figures = docs/no"), "docs/no.png is missing"),
    ],
)
def test_a_plan_that_names_what_is_gone_is_refused(change, words, monkeypatch, tmp_path, capsys):
    kept = pages.text
    plan = kept("lab/pages/vrf.ini").replace(*change)
    assert plan != kept("lab/pages/vrf.ini")
    monkeypatch.setattr(pages, "text", lambda p: plan if p == "lab/pages/vrf.ini" else kept(p))
    with pytest.raises(SystemExit) as stopped:
        pages.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


# --- the numbers under the sliders ----------------------------------------------------------------


def numbers(name):
    return json.loads((pages.PLANS / f"{name}.json").read_text())


def test_a_sample_is_right_exactly_between_its_two_weights():
    torch.manual_seed(0)
    p_zs, p_ft = torch.randn(2, 5000, 5).double().mul(2).softmax(2)
    labels = torch.randint(5, (5000,))
    low, high = pages_numbers.when_right(p_zs, p_ft, labels)
    seen = set()
    for alpha in (0.0, 0.1, 0.5, 0.77, 1.0):
        right = vrf.ose(p_zs, p_ft, alpha).argmax(1) == labels
        assert torch.equal(right, (low <= alpha) & (alpha <= high))
        seen.add(int(right.sum()))
    middle = (low > 0) & (high < 1) & (low <= high)  # neither model is right, a mix is
    assert len(seen) > 3 and 0 < middle.sum() < 500


def test_a_sample_that_both_models_get_wrong_alike_is_never_right():
    p = torch.tensor([[0.2, 0.7, 0.1]])
    low, high = pages_numbers.when_right(p, p, torch.tensor([0]))
    assert low > high


def scores(weight_of):
    """(ID, mean under shift, ID val) in percent, of the shipped numbers, by functions of vrf.py."""
    found = {}
    for name, of in numbers("vrf")["sets"].items():
        d, low, high = (torch.tensor(of[c]).double() / 1e4 for c in ("d", "low", "high"))
        w = weight_of(d)
        right = of["always"] + int(((low <= w) & (w <= high)).sum())
        found[name] = 100 * right / of["n"]
    shifts = [x for name, x in found.items() if name not in ("test", "val")]
    return found["test"], sum(shifts) / len(shifts), found["val"]


def test_the_ends_of_the_curve_are_the_two_models_of_the_table():
    zero_shot, tuned = scores(torch.zeros_like), scores(torch.ones_like)
    assert zero_shot[:2] == pytest.approx((77.9, 79.2), abs=0.06)  # docs/vrf.md, any run
    assert tuned[0] > 94 and tuned[1] < 71


# --- in the browser -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", pages.NAMES)
def test_a_page_opens_from_disk_without_a_complaint_or_a_request(name, width, built, browser):
    browser.width(width)
    said, asked = browser.open(built / f"{name}.html")
    assert said == [] and len(asked) >= 2 and all(x.startswith("file:///") for x in asked)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")
    beside = browser.run("getComputedStyle(document.querySelector('.step')).display")
    assert beside == ("grid" if width == 1280 else "block")


def test_a_request_to_the_network_would_be_seen(built, browser, tmp_path):
    text = (built / "vrf.html").read_text()
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("</main>", '<img src="https://example.org/x.png"></main>'))
    said, _ = browser.open(bad)
    assert "Content Security Policy" in json.dumps(said)


def test_a_page_is_dark_where_the_reader_wants_it_dark(built, browser):
    browser.open(built / "spd.html")
    found = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.call("Emulation.setEmulatedMedia", features=[feature])
        found.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert found == ["rgb(255, 255, 255)", "rgb(22, 24, 28)"]


def test_the_sliders_of_vrf_give_the_scripts_numbers(built, browser):
    browser.open(built / "vrf.html")
    start = [float(browser.run(f"$('{x}').value")) for x in ("alpha", "a", "b")]
    assert start == [numbers("vrf")[x] for x in ("alpha", "a", "b")]
    seen = set()
    for alpha, a, b in (start, (0, 0.02, 0.02), (1, 2, 1), (0.37, 0.5, 0.1), (0.5, 1.5, 0.6)):
        browser.move(alpha=alpha, a=a, b=b)
        for method, weight_of in (
            ("ose", lambda d, alpha=alpha: torch.full_like(d, alpha)),
            ("vrf", lambda d, a=a, b=b: vrf.weight(d, a, b)),
        ):
            shown = tuple(browser.exact(f"{method}-{part}") for part in ("id", "shift", "val"))
            assert shown == pytest.approx(scores(weight_of), abs=1e-6)
            seen.add(shown)
    assert len(seen) > 8


def test_a_slider_obeys_the_keyboard(built, browser):
    browser.open(built / "vrf.html")
    browser.run("$('alpha').focus()")
    before = browser.exact("show-alpha")
    for kind in ("keyDown", "keyUp"):
        key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
        browser.call("Input.dispatchKeyEvent", type=kind, **key)
    assert browser.exact("show-alpha") == pytest.approx(before + 0.01)


@pytest.mark.parametrize("condition", ["code", "paper"])
@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
def test_the_demo_of_spd_steps_as_the_optimiser_does(strength, condition, built, browser):
    browser.open(built / "spd.html")
    browser.move(**{"lambda": strength, "condition": condition})
    x, y = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.0, -2.0))
    optimiser = spd.AdamSPD([x, y], lr=0.6, spd_lambda=strength, condition=condition, fused=False)
    for t in range(101):
        if t % 10 == 0:
            browser.move(t=t)
            shown = browser.exact("x"), browser.exact("y")
            assert shown == pytest.approx((x.item(), y.item()), abs=1e-6), t
        optimiser.zero_grad()
        ((x * x + y - 11) ** 2 + (x + y * y - 7) ** 2).sum().backward()
        optimiser.step()


def test_the_run_of_er_study_is_above_the_line_by_what_the_script_says(built, browser):
    testbed = testbeds.read(common.EMBEDDED / "testbeds" / "digits.npz")
    given = numbers("er_study")
    line = er_study.baseline(testbed, given["shift"])
    assert (given["slope"], given["intercept"]) == (line.slope, line.intercept)
    browser.open(built / "er_study.html")
    names = browser.run("[...$('run').options].map(option => option.value)")
    assert names == list(given["runs"]) and len(names) == 6
    for name, run in given["runs"].items():
        browser.move(run=name)
        for i in (0, len(run["step"]) // 2, len(run["step"]) - 1):
            browser.move(checkpoint=i)
            acc_id, acc_ood = (
                run[k][i] / n for k, n in zip(("k_id", "k_ood"), given["n"], strict=True)
            )
            er = er_study.effective_robustness(acc_id, acc_ood, line.slope, line.intercept)
            assert browser.exact("er") == pytest.approx(100 * er, abs=1e-6)
            assert browser.exact("step") == run["step"][i]
