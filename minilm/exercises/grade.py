"""Grade a learner's notebook: run it in a fresh kernel and add up what `check` found.

The notebook is only read. Its code runs on this machine, with the rights of who runs the command,
in an empty temporary folder; a cell may take `timeout` seconds. A cell that raises does not stop
the ones below it. Each call of `check` leaves a line in a file of the run; the last one of a
question counts, and a question that left none earns nothing. The kernel and the processes that it
started are killed at the end.

`as_json` gives what `minilm grade --json` writes:

    {"schema": 1,                  # rises when the meaning of a field changes
     "minilm": "0.1.0",            # version that graded
     "points": 3, "of": 12,        # over all notebooks
     "notebooks": [
       {"notebook": "exercises/01_language_as_probability.ipynb",
        "chapter": 1, "points": 3, "of": 12, "seconds": 2.1,
        "ended": "",               # why the run ended before the last cell, if it did
        "questions": [
          {"question": "ngram.add_k", "kind": "implement", "points": 0, "of": 2,
           "status": "wrong",      # "right", "wrong" or "not reached"
           "diagnosis": "You add 1 where k is asked for."}, ...]}, ...]}
"""

import json
import re
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat

from minilm import __version__
from minilm.errors import ConfigError, DataError
from minilm.exercises.engine import REPORT_FILE, REPORT_NONCE, questions
from minilm.exercises.kernel import Kernel, KernelGone

__all__ = ["Graded", "Report", "as_json", "details", "grade", "notebooks", "progress"]

SCHEMA = 1
NUMBERED = re.compile(r"(\d\d)_.+")


@dataclass(frozen=True)
class Graded:
    """One question of a notebook. `status`: "right", "wrong" or "not reached"."""

    question: str
    kind: str
    points: int
    of: int
    status: str
    diagnosis: str


@dataclass(frozen=True)
class Report:
    """One notebook. `ended` says why the run ended before the last cell, if it did."""

    notebook: Path
    chapter: int
    questions: tuple[Graded, ...]
    ended: str
    seconds: float

    @property
    def points(self) -> int:
        """Points earned."""
        return sum(one.points for one in self.questions)

    @property
    def of(self) -> int:
        """Points that full marks are."""
        return sum(one.of for one in self.questions)


def notebooks(paths: Sequence[Path]) -> list[Path]:
    """The notebooks to grade: files as given; of a folder, its `NN_*.ipynb`.

    Without paths, the folder is `exercises` here, or this one.

    Raises:
        DataError: If a path does not exist, or there is nothing to grade.
    """
    found: list[Path] = []
    for path in paths or [Path("exercises") if Path("exercises").is_dir() else Path()]:
        if path.is_dir():
            inside = sorted(one for one in path.glob("*.ipynb") if NUMBERED.match(one.name))
            if not inside:
                raise DataError(
                    f"no NN_name.ipynb in {path.resolve()}; name a notebook or a folder"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no {path}; name a notebook or a folder of notebooks")
    return found


def grade(path: Path, timeout: float = 60.0) -> Report:
    """Run a notebook's code on this machine and grade it.

    Args:
        path: The notebook; it is only read.
        timeout: Seconds that each cell may take.

    Raises:
        DataError: If it is not a notebook, or not of a chapter that has questions.
        ConfigError: If `timeout` is not positive.
    """
    if not timeout > 0:
        raise ConfigError(f"timeout={timeout}; give the seconds that a cell may take")
    notebook = _read(path)
    asked = questions(_chapter(path, notebook))
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    began = time.monotonic()
    faults: dict[int, str] = {}
    ended = ""
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="minilm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        lines = folder / "checked.jsonl"
        environment = {REPORT_FILE: str(lines), REPORT_NONCE: nonce}
        place = 0
        try:
            with Kernel(folder, environment) as kernel:
                for place, source in enumerate(cells, start=1):
                    if fault := kernel.run(source, timeout):
                        faults[place] = fault
        except KernelGone as gone:
            ended = f"code cell {place} {gone}" if place else f"the kernel {gone}"
            faults[place] = str(gone)
        checked = _checked(lines, nonce)
    graded = []
    for question in asked:
        if question.name in checked:
            right, diagnosis = checked[question.name]
            status = "right" if right else "wrong"
        else:
            status, diagnosis = "not reached", _why(question.name, cells, faults, ended, place)
        points = question.points if status == "right" else 0
        graded.append(
            Graded(question.name, question.kind, points, question.points, status, diagnosis)
        )
    seconds = round(time.monotonic() - began, 1)
    return Report(path, _chapter(path, notebook), tuple(graded), ended, seconds)


def _read(path: Path) -> Any:
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # nbformat raises many kinds
        raise DataError(f"{path} is not a notebook: {type(error).__name__}") from error


def _chapter(path: Path, notebook: Any) -> int:
    chapter = notebook.metadata.get("minilm", {}).get("chapter")
    if isinstance(chapter, int):
        return chapter
    if match := NUMBERED.fullmatch(path.stem):
        return int(match[1])
    raise DataError(
        f"{path.name} does not say of which chapter it is; let its name begin with the number, "
        "as in 01_language_as_probability.ipynb"
    )


def _checked(lines: Path, nonce: str) -> dict[str, tuple[bool, str]]:
    """What `check` left: question -> (right?, diagnosis); the last line of a question counts."""
    found: dict[str, tuple[bool, str]] = {}
    if not lines.exists():
        return found
    for line in lines.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["nonce"] == nonce:
                found[record["question"]] = (record["points"] > 0, str(record["diagnosis"]))
        except (ValueError, KeyError, TypeError):
            continue  # cut off when the kernel ended, or not ours
    return found


def _why(name: str, cells: Sequence[str], faults: dict[int, str], ended: str, last: int) -> str:
    """Why a question was not checked."""
    call = re.compile(rf"check\(\s*['\"]{re.escape(name)}['\"]")
    places = [place for place, source in enumerate(cells, start=1) if call.search(source)]
    if not places:
        return f'No cell calls check("{name}", ...).'
    place = places[-1]
    if place in faults:
        return f"Code cell {place} {faults[place]}."
    if ended and place > last:
        return f"The run ended before it: {ended}."
    return f"Code cell {place} ran, but its check was not called."


def details(report: Report) -> str:
    """The points of each question of a notebook, with the diagnoses, and the total."""
    width = max(len(one.question) for one in report.questions)
    lines = []
    for one in report.questions:
        said = f"  {one.diagnosis}" if one.diagnosis else ""
        lines.append(f"  {one.question:<{width}}  {one.points:>2} of {one.of:>2}{said}")
    lines.append(f"  {'total':<{width}}  {report.points:>2} of {report.of:>2}")
    return "\n".join(lines)


def progress(reports: Sequence[Report]) -> str:
    """One line for each notebook, and the total."""
    names = [report.notebook.stem for report in reports]
    width = max(len(name) for name in [*names, "notebook"])
    lines = [f"{'notebook':<{width}}  points     right"]
    for name, report in zip(names, reports, strict=True):
        right = sum(one.status == "right" for one in report.questions)
        counts = f"{right} of {len(report.questions)} questions"
        ended = f"; {report.ended}" if report.ended else ""
        lines.append(f"{name:<{width}}  {report.points:>2} of {report.of:>2}   {counts}{ended}")
    points, of = sum(one.points for one in reports), sum(one.of for one in reports)
    lines.append(f"{'total':<{width}}  {points:>2} of {of:>2}")
    return "\n".join(lines)


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """The form that the module's docstring describes."""
    return {
        "schema": SCHEMA,
        "minilm": __version__,
        "points": sum(report.points for report in reports),
        "of": sum(report.of for report in reports),
        "notebooks": [
            {
                "notebook": report.notebook.as_posix(),
                "chapter": report.chapter,
                "points": report.points,
                "of": report.of,
                "seconds": report.seconds,
                "ended": report.ended,
                "questions": [asdict(one) for one in report.questions],
            }
            for report in reports
        ],
    }
