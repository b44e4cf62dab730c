"""Beside the paper: a page for each paper, its walk on the left, the code of it on the right.

    python lab/pages.py    # docs/pages/*.html from the files as they are: 2 seconds

Open docs/pages/vrf.html in a browser; nothing is fetched from a network. A page follows a plan,
lab/pages/NAME.ini, which has for each step the section of the paper, its equation in LaTeX, a few
sentences of ours, the functions, and the tests that pin them. All else is read where it stands:
source and introductions in the scripts, worked numbers in the tests, differences in
docs/differences.md, results and captions in docs/ and README.md. The numbers under the sliders are
made by lab/pages_numbers.py.
"""

import argparse
import ast
import configparser
import difflib
import functools
import html
import json
import os
import re
import string
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parents[1]
PLANS = ROOT / "lab" / "pages"
OUT = ROOT / "docs" / "pages"
HERE = "../.."  # the repository as it is seen from a page
NAMES = ("vrf", "carot", "spd", "er_study", "error_bound")
MARKDOWN = MarkdownIt("commonmark").enable("table")
# Kept of Pygments' many kinds of token: keywords, strings, comments, numbers, defined names
PLAIN = re.compile(r'<span class="(?!k|s|c|m|nf|nc|nd|ow)\w+">([^<]*)</span>')
ID = re.compile(r"Differs\s+\((\w+)\)")


class PageError(Exception):
    """A plan names what is not there."""


# --- files: source, docstrings, tests, documents --------------------------------------------------


@functools.cache
def text(path):
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except OSError as error:
        raise PageError(f"{path} cannot be read: {error.strerror}") from error


@functools.cache
def tree(path):
    return ast.parse(text(path))


def find(path, name):
    """The definition of `name`, "function", "Class" or "Class.method", in a Python file."""
    node = tree(path)
    for part in name.split("."):
        known = {x.name: x for x in node.body if hasattr(x, "name")}
        if part not in known:
            near = difflib.get_close_matches(part, known, 3, cutoff=0) or ["nothing"]
            raise PageError(f"{path} has no {name}; nearest: {', '.join(near)}")
        node = known[part]
    return node


def lines_of(node):
    """First and last line, decorators included."""
    return min(x.lineno for x in [node, *node.decorator_list]), node.end_lineno


def paragraphs(docstring):
    """[str] of a docstring's paragraphs, each on one line, without those that are indented."""
    parts = re.split(r"\n\s*\n", docstring or "")
    return [" ".join(p.split()) for p in parts if p and not p.startswith("    ")]


def prose(words):
    """HTML of plain words with `code`, as docstrings have it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words, quote=False))


def moved(body, folder):
    """HTML with links that are relative to `folder`, as they are seen from a page."""
    return re.sub(r'href="(?!https?:|#)', f'href="{folder}', body)


def document(where):
    """HTML of a section, "docs/vrf.md#What it shows", of a document, without its figures."""
    path, heading = where.split("#")
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text(path), re.M | re.S)
    if not found:
        raise PageError(f"{path} has no section {heading!r}")
    title = f'<h3>{html.escape(heading)} <a href="{HERE}/{path}">{path}</a></h3>'
    words = re.sub(r"!\[[^\]]*\]\([^)]*\)\s+(\*[^*]+\*)?", "", found[1])
    folder = f"{HERE}/{Path(path).parent}/".replace("/./", "/")
    body = moved(MARKDOWN.render(words), folder)
    box = '<div class="wide" tabindex="0" role="region" aria-label="table"><table>'
    return title + body.replace("<table>", box).replace("</table>", "</table></div>")


def figure(path):
    """The figure with the alternative text and the caption that README.md or docs/ give it."""
    places = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
    for place in places:
        link = re.escape(path if place == "README.md" else Path(path).name)
        found = re.search(rf"!\[([^\]]+)\]\({link}\)\s+\*([^*]+)\*", text(place))
        if found and (ROOT / path).is_file():
            caption = MARKDOWN.renderInline(" ".join(found[2].split()))
            alt = f"{html.escape(found[1])}: {re.sub('<[^>]+>', '', caption)}"
            image = f'<img src="../{Path(path).name}" alt="{alt}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    raise PageError(f"{path} is missing, or no document shows it with a caption in *...* below it")


@functools.cache
def differences():
    """{ID: {column: cell}} of docs/differences.md."""
    found, columns = {}, []
    for line in text("docs/differences.md").splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells or cells[0] == "ID":
            columns = cells
        elif cells[0].strip("-"):
            for identity in cells[0].split(", "):
                found[identity] = dict(zip(columns, cells, strict=True))
    return found


def docstring(path):
    return ast.get_docstring(tree(path)) or ""


def script(name):
    return "synthetic/error_bound.py" if name == "error_bound" else f"{name}.py"


# --- parts of a page ------------------------------------------------------------------------------


@functools.cache
def highlighted(path):
    """[HTML] of the lines of a Python file."""
    marked_up = highlight(text(path), PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    return PLAIN.sub(r"\1", marked_up).split("\n")


def listing(path, first, last, label):
    lines = highlighted(path)[first - 1 : last]
    rows = "\n".join(f'<span data-n="{n}">{line}</span>' for n, line in enumerate(lines, first))
    return f'<pre tabindex="0" role="region" aria-label="{html.escape(label)}">{rows}</pre>'


def source(path, name):
    """A function as it stands in its file, with a link to its first line."""
    first, last = lines_of(find(path, name))
    link = f'<a href="{HERE}/{path}#L{first}">{path}, lines {first} to {last}</a>'
    label = f"Source of {name} in {path}"
    return f"<h3><code>{name}</code> {link}</h3>{listing(path, first, last, label)}"


def pinned(where):
    """A test, "tests/test_vrf.py::test_...": its name as a sentence; its source, closed if long."""
    path, name = where.split("::")
    first, last = lines_of(find(path, name))
    words = html.escape(name.removeprefix("test_").replace("_", " "))
    link = f'<a href="{HERE}/{path}#L{first}">{path}, line {first}</a>'
    body = listing(path, first, last, f"Source of the test: {words}")
    state = " open" if last - first < 8 else ""
    return f"<details{state}><summary>Test: {words}</summary><p>{link}</p>{body}</details>"


def equations(latex):
    """MathML of LaTeX, an equation a line."""
    return "".join(convert(line, display="block") for line in latex.splitlines() if line.strip())


def shapes(path, name):
    """What a docstring says of shapes at the end of its first paragraph, behind two spaces."""
    first = (ast.get_docstring(find(path, name)) or "").split("\n\n")[0]
    found = re.search(r"(?:  |\n)((?:(?!  ).)*\S -> \S[^\n]*)$", first)
    return found[1].strip() if found else ""


def marked(path, name):
    """IDs of the differences that are marked in a function, in order."""
    first, last = lines_of(find(path, name))
    lines = "\n".join(text(path).splitlines()[first - 1 : last])
    return ID.findall(lines)


def difference(identity):
    """What the paper, the authors' code and this repository do, and why."""
    if identity not in differences():
        raise PageError(f"docs/differences.md has no {identity}")
    rows = []
    for column, cell in differences()[identity].items():
        if cell and column != "ID":
            words = moved(MARKDOWN.renderInline(cell), f"{HERE}/docs/")
            rows.append(f"<dt>{column}</dt><dd>{words}</dd>")
    return f'<div class="differs"><h3>Differs: {identity}</h3><dl>{"".join(rows)}</dl></div>'


def pair(where, name):
    """("vrf.py", "ose") of "ose" or "lab/vrf_ablations.py::g_star"."""
    path, _, function = where.rpartition("::")
    return path or script(name), function


def step(heading, plan, name, shown):
    """A section: the paper's side, and the code's. Adds to `shown` the IDs of its differences."""
    functions = [pair(where, name) for where in plan["code"].split()]
    left = [f"<p>{prose(' '.join(plan['say'].split()))}</p>", equations(plan.get("latex", ""))]
    for path, function in functions:
        if found := shapes(path, function):
            left.append(f'<p class="shapes"><code>{function}</code>: {html.escape(found)}</p>')
    marks = [i for where in functions for i in marked(*where)] + plan.get("differs", "").split()
    left += [difference(i) for i in dict.fromkeys(marks) if i not in shown]
    shown.update(marks)
    right = [source(*where) for where in functions]
    right += [pinned(where) for where in plan["tests"].split()]
    anchor = functions[0][1]
    title = f'<h2><a href="#{anchor}">{html.escape(heading)}</a> {html.escape(plan["title"])}</h2>'
    sides = f'<div class="paper">{title}{"".join(left)}</div><div>{"".join(right)}</div>'
    return f'<section class="step" id="{anchor}">{sides}</section>'


def live(name):
    """The part that moves, for those that have one: its form, its numbers, its script."""
    if not (PLANS / f"{name}.js").is_file():
        return ""
    data = text(f"lab/pages/{name}.json") if (PLANS / f"{name}.json").is_file() else "{}"
    form = string.Template(text(f"lab/pages/{name}.html")).substitute(json.loads(data))
    code = text("lab/pages/figure.js") + text(f"lab/pages/{name}.js")
    data = f'<script type="application/json" id="live-data">{data}</script>'
    return f"{form}{data}<script>{code}</script>"


def further(differences):
    """The section of the differences that belong to no step."""
    if not differences:
        return ""
    words = "Those of a step stand there. These belong to the training, the data or the settings."
    title = f"<h2>Further differences</h2><p>{words}</p>"
    return f'<section class="results">{title}<div class="many">{differences}</div></section>'


def read_plan(name):
    plan = configparser.ConfigParser(interpolation=None)
    plan.read_string(text(f"lab/pages/{name}.ini"))
    return plan


def page(name):
    """HTML of one page."""
    path, plan, shown = script(name), read_plan(name), set()
    of_page = plan["page"]
    head, *intro = paragraphs(docstring(path))
    title, authors = head.split(". ", 1)
    intro = intro[: of_page.getint("paragraphs")]
    steps = [step(s, plan[s], name, shown) for s in plan.sections() if s != "page"]
    prefix = tuple(of_page["ids"].split())
    others = [i for i in differences() if i.startswith(prefix) and i not in shown]
    results = [figure(path) for path in of_page["figures"].split()]
    results += [document(where) for where in of_page["results"].strip().splitlines()]
    links = []
    for n in NAMES:
        here = ' aria-current="page"' if n == name else ""
        links.append(f'<a href="{n}.html"{here}>{read_plan(n)["page"]["short"]}</a>')
    parts = {
        "title": html.escape(title),
        "authors": html.escape(authors),
        "paper": of_page["paper"],
        "css": text("lab/pages/page.css"),
        "pages": " ".join(links),
        "intro": "".join(f"<p>{prose(p)}</p>" for p in intro),
        "script": path,
        "repository": HERE,
        "steps": "\n".join(steps),
        "live": live(name),
        "results": "".join(results),
        "others": further("".join(difference(i) for i in others)),
    }
    return string.Template(text("lab/pages/page.html")).substitute(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=HERE, help="a forge's address of the repository")
    parser.add_argument("--out", default=str(OUT), help="folder for the pages")
    options = parser.parse_args(argv)
    try:
        os.makedirs(options.out, exist_ok=True)
        for name in NAMES:
            path = Path(options.out) / f"{name}.html"
            whole = page(name).replace(f'href="{HERE}/', f'href="{options.base}/')
            path.write_text(whole, encoding="utf-8", newline="\n")
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    except PageError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
