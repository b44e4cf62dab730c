"""Trajectory files: a CSV row per checkpoint and shift, with counts, written as training goes.

Everything that is said or drawn of a run is computed from these rows, so that a crash loses one
evaluation at most, and a report needs no model and no image. Beside the trajectories lie
`testbed.csv` (counts of the baseline's models) and, where the testbed is known by image,
`by_image.csv`.
"""

import csv
import io
from pathlib import Path

import common

# lr: of logistic regression its lambda. k, n: images right, of how many; half: of a random half of
# the shift, id_half: of its ID set; beta: what the line gives the ID accuracy, that of the half and
# of the rest; nobody: of the images that no testbed model gets right; ece: where it was measured.
# The row of shift "mean" has the first shift's ID counts
COLUMNS = (
    "run,model,init,lr,seed,step,epoch,shift,k_id,n_id,k_val,n_val,k_ood,n_ood,k_id_half,n_id_half,"
    "k_half,n_half,k_nobody,n_nobody,beta,beta_half,beta_rest,er,er_lo,er_hi,extrapolated,ece_id,"
    "ece_ood"
).split(",")
TEXT = ("run", "model", "init", "shift")


def append(path, rows):
    """Rows to a trajectory file, on disk before this returns; of several processes one writes. What
    another run in the same folder has written meanwhile is not written again.
    """
    import fcntl

    if common.rank():
        return
    text, names = io.StringIO(), ("run", "step", "shift")
    out = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", newline="", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # freed by the system if this process is killed
            file.seek(0)
            there = [tuple(r.get(n) for n in names) for r in csv.DictReader(file)]
            if not path.stat().st_size:
                out.writeheader()
            out.writerows(r for r in rows if tuple(str(r[n]) for n in names) not in there)
            common.append(path, text.getvalue())
    except OSError as error:  # these files are the result: nothing to go on for without them
        raise common.InputError(
            f"{path} cannot be written ({error.strerror or error}); the same command continues"
        ) from error


def read(path, shifts=None):
    """Rows of a trajectory file, numbers as numbers. With `shifts` (their number), only whole
    evaluations: of one that a crash cut short nothing is used.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows = [r for r in table if r.get("extrapolated")]
        if lacking := [c for c in COLUMNS if c not in (table.fieldnames or COLUMNS)]:
            raise common.InputError(
                f"{path} has no column {lacking[0]!r}, as of an older version; remove it, run again"
            )
    except (UnicodeDecodeError, csv.Error) as error:
        raise common.InputError(f"{path} cannot be read ({common.first_line(error)})") from error
    steps = [r["step"] for r in rows]
    rows = [r for r in rows if not shifts or steps.count(r["step"]) == shifts + 1]

    def number(name, text):
        if name in TEXT or not text:
            return text
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError as error:
            raise common.InputError(f"{path}: {name} is {text!r}, no number") from error

    return [{name: number(name, text) for name, text in r.items()} for r in rows]


def read_plain(folder):
    """Rows of by_image.csv beside the trajectories, as text; none where only counts are known."""
    path = Path(folder) / "by_image.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record(path, steps, shifts, rows_at, attempt, resume=True):
    """Have a run in a file at every one of `steps`; one that is there is not trained again.

    attempt(probe, resume) trains and calls probe(done, right) when `done` steps are done, where
    right() -> {set: bool [N]}; rows_at(done, right) -> rows.  -> path
    """
    for again in (resume, False):  # a checkpoint whose trajectory was lost: once more
        rows = []
        if path.exists() and not common.rank():
            header, *lines = path.read_text().splitlines() or [""]
            same = header == ",".join(COLUMNS)
            rows = read(path, shifts) if again and same else []
            if not same or len(lines) != len(rows):
                path.unlink()  # it ends in a part of an evaluation, or is not to be resumed
                append(path, rows)
        known = common.from_rank_0({int(r["step"]) for r in rows})
        if known >= set(steps):
            break

        def probe(done, right, known=known):
            if done in steps and done not in known:
                append(path, rows_at(done, right()))
                known.add(done)

        attempt(probe, again)
        if known >= set(steps):
            break
    common.everywhere(True)  # nobody reads the file before it is complete
    return path
