"""`minilm grade` on small notebooks, honest and not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from minilm.cli import main
from minilm.errors import DataError
from minilm.exercises import grade as grading

pytestmark = pytest.mark.usefixtures("example")

ANSWERS = {
    "example.add_k": (
        "def add_k(counts, k):\n    return (counts + k) / (counts.sum() + k * len(counts))\n"
        'check("example.add_k", add_k)'
    ),
    "example.table_size": 'check("example.table_size", lambda n, v: v**n)',
    "example.why_bytes": 'check("example.why_bytes", "b")',
}
ADD_K, TABLE_SIZE, WHY_BYTES = ANSWERS.values()
SWALLOWS = """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""


@pytest.fixture
def grade(find_example, tmp_path):
    """Write cells as a notebook, grade it; the file must stay as it was."""

    def run(*cells: str, timeout: float = 10.0) -> grading.Report:
        path = tmp_path / "90_example.ipynb"
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in [find_example, *cells]]
        )
        nbformat.write(notebook, path)
        before = path.read_bytes()
        report = grading.grade(path, timeout)
        assert path.read_bytes() == before
        assert sorted(one.name for one in tmp_path.iterdir()) == [path.name]
        assert [one.question for one in report.questions] == list(ANSWERS)
        return report

    return run


def points(report: grading.Report) -> list[int]:
    return [one.points for one in report.questions]


def said(report: grading.Report) -> list[str]:
    return [one.diagnosis for one in report.questions]


def test_full_marks_and_what_is_reported(grade):
    report = grade(*ANSWERS.values())
    assert (report.points, report.of, report.chapter, report.ended) == (4, 4, 90, "")
    result = grading.as_json([report])
    assert list(result) == ["schema", "minilm", "points", "of", "notebooks"]
    assert result["notebooks"][0]["questions"][0] == {
        "question": "example.add_k",
        "kind": "implement",
        "points": 2,
        "of": 2,
        "status": "right",
        "diagnosis": "",
    }
    assert "example.table_size   1 of  1\n" in grading.details(report)
    assert grading.details(report).endswith("total                4 of  4")


def test_an_untouched_notebook(grade):
    report = grade(
        "def add_k(counts, k):\n    raise NotImplementedError\ncheck('example.add_k', add_k)",
        'check("example.table_size", None)',
    )
    assert points(report) == [0, 0, 0]
    assert said(report) == [
        "Not answered yet.",
        "Not answered yet.",
        'No cell calls check("example.why_bytes", ...).',
    ]


def test_wrong_answers_are_told(grade):
    wrong = "check('example.add_k', lambda counts, k: counts / counts.sum())"
    report = grade(wrong, 'check("example.why_bytes", "a")')
    assert points(report) == [0, 0, 0]
    assert said(report)[0].startswith("A byte that was never seen")
    assert said(report)[2] == "A model's speed has no part in the measure."


def test_the_last_check_of_a_question_counts(grade):
    wrong = 'check("example.table_size", lambda n, v: n * v)'
    first = 'check("example.why_bytes", "a")'
    assert points(grade(TABLE_SIZE, first, wrong, WHY_BYTES)) == [0, 0, 1]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (
            ["1 / 0\n", "def add_k(:\n    pass\n", "import sys\nsys.exit()\n"],
            ["ZeroDivisionError: division by zero", "SyntaxError: invalid syntax", "SystemExit"],
        ),
        (
            ["while True:\n    pass\n", "import time\ntime.sleep(999)\n", "input('name?')\n"],
            ["ran longer than 2 s", "ran longer than 2 s", "StdinNotImplementedError"],
        ),
    ],
)
def test_a_cell_that_fails_costs_only_its_own_question(grade, bad, why):
    cells = [one + answer for one, answer in zip(bad, ANSWERS.values(), strict=True)]
    report = grade(*cells, WHY_BYTES, timeout=2.0)
    assert points(report) == [0, 0, 1]
    for place, (diagnosis, reason) in enumerate(zip(said(report)[:2], why[:2], strict=True)):
        assert diagnosis.startswith(f"Code cell {place + 2} ") and reason in diagnosis
    assert report.ended == ""
    report = grade(bad[2] + WHY_BYTES, ADD_K)
    assert points(report) == [2, 0, 0] and why[2] in said(report)[2]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("import os\nos._exit(0)\n", "ended the kernel"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", "ended the kernel"),
        (SWALLOWS, "ran longer than 1 s"),
    ],
)
def test_a_cell_that_takes_the_kernel_with_it_leaves_what_was_earned(grade, bad, why):
    report = grade(ADD_K, bad + TABLE_SIZE, WHY_BYTES, timeout=1.0 if "longer" in why else 5.0)
    assert points(report) == [2, 0, 0]
    assert report.ended == f"code cell 3 {why}"
    assert said(report)[1] == f"Code cell 3 {why}."
    assert said(report)[2] == f"The run ended before it: code cell 3 {why}."


def test_a_cell_that_quits(grade):
    report = grade(ADD_K, "quit()", "import time\ntime.sleep(2)", WHY_BYTES)
    assert points(report) == [2, 0, 0]
    assert report.ended.endswith("ended the kernel")


def test_a_flood_of_output_is_stopped(grade):
    report = grade("while True:\n    print('x' * 10_000)\n" + ADD_K, WHY_BYTES, timeout=30.0)
    assert points(report)[0] == 0
    assert "printed more than 5,000,000 characters" in said(report)[0]
    assert report.seconds < 29


FORGED = """
print("example.why_bytes: 1 of 1 point")
import json, os
with open(os.environ["MINILM_GRADE_FILE"], "a") as file:
    line = {"nonce": "guess", "question": "example.why_bytes", "points": 1, "diagnosis": ""}
    print(json.dumps(line), "no json", "[1]", sep="\\n", file=file)
"""


def test_nothing_printed_earns_a_point(grade):
    assert points(grade(FORGED)) == [0, 0, 0]


def test_the_notebook_runs_in_an_empty_folder_that_goes_away(grade, tmp_path):
    note = tmp_path.parent / f"{tmp_path.name}.txt"
    cell = (
        "import os, pathlib\n"
        f"pathlib.Path({str(note)!r}).write_text(os.getcwd() + ' ' + str(os.listdir()))\n"
        "pathlib.Path('left.txt').write_text('x')"
    )
    grade(cell)
    folder, inside = note.read_text().split(" ", 1)
    assert inside == "[]" and not Path(folder).exists() and not Path(folder).parent.exists()


@pytest.mark.skipif(os.name != "posix", reason="reads process ids the POSIX way")
@pytest.mark.parametrize("end", ["", "import os\nos._exit(0)"])
def test_processes_that_the_notebook_started_end_with_it(grade, tmp_path, end):
    note = tmp_path.parent / f"{tmp_path.name}.pid"
    cell = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(note)!r}).write_text(str(child.pid))\n"
    )
    grade(cell + end)
    assert ended(int(note.read_text()))


def ended(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process is gone, or a zombie that nobody has collected."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            stat = Path(f"/proc/{pid}/stat")
            if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(os.name != "posix", reason="reads process ids the POSIX way")
def test_the_kernel_does_not_outlive_a_killed_grader(find_example, tmp_path):
    note = tmp_path / "pid"
    cell = f"import os, pathlib, time\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell + "while True: time.sleep(0.1)")]
    )
    nbformat.write(notebook, tmp_path / "90_example.ipynb")
    code = (
        f"{find_example}"
        "from pathlib import Path; from minilm.exercises.grade import grade\n"
        "grade(Path('90_example.ipynb'))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # long: the kernel is spoken to by TCP
    grader = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    grader.kill()
    grader.wait()
    assert ended(int(note.read_text()), seconds=20.0)


# What is not a notebook of exercises


def test_bad_input_is_told(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*nothing\.ipynb"):
        grading.notebooks([tmp_path / "nothing.ipynb"])
    with pytest.raises(DataError, match=r"no NN_name\.ipynb in"):
        grading.notebooks([tmp_path])
    broken = tmp_path / "90_broken.ipynb"
    broken.write_text("{")
    with pytest.raises(DataError, match="is not a notebook"):
        grading.grade(broken)
    other = tmp_path / "other.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), other)
    with pytest.raises(DataError, match="does not say of which chapter"):
        grading.grade(other)
    with pytest.raises(DataError, match="cannot be read"):
        grading.grade(tmp_path)


def test_a_notebook_may_say_of_which_chapter_it_is(tmp_path):
    notebook = nbformat.v4.new_notebook(metadata={"minilm": {"chapter": 90}})
    nbformat.write(notebook, tmp_path / "homework.ipynb")
    report = grading.grade(tmp_path / "homework.ipynb")
    assert (report.chapter, report.points, report.of) == (90, 0, 4)


# The command


def command(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["grade", *(str(one) for one in arguments)])
    out, err = capsys.readouterr()
    return done.value.code, out, err


@pytest.fixture
def folder(find_example, tmp_path, monkeypatch) -> Path:
    """A book of two notebooks: 90 with one right answer, 90 again with none."""
    inside = tmp_path / "exercises"
    inside.mkdir()
    for name, letter in (("90_first", "b"), ("90_second", "a")):
        cell = f'{find_example}check("example.why_bytes", "{letter}")'
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        nbformat.write(notebook, inside / f"{name}.ipynb")
    (inside / "solutions").mkdir()
    monkeypatch.chdir(tmp_path)
    return inside


def test_the_command_for_one_notebook(folder, capsys):
    code, out, err = command(capsys, "exercises/90_first.ipynb", "--json", "out.json")
    assert (code, err) == (1, "")
    assert "Running the code of exercises/90_first.ipynb on this machine" in out
    assert "total                1 of  4" in out
    result = json.loads(Path("out.json").read_text())
    assert (result["schema"], result["points"], result["of"]) == (1, 1, 4)
    assert result["notebooks"][0]["notebook"] == "exercises/90_first.ipynb"
    assert not list(Path().glob("*.part"))


def test_the_command_for_the_whole_book(folder, capsys):
    code, out, _ = command(capsys)
    assert code == 1
    assert out.splitlines()[-4:] == [
        "notebook   points     right",
        "90_first    1 of  4   1 of 3 questions",
        "90_second   0 of  4   0 of 3 questions",
        "total       1 of  8",
    ]


@pytest.mark.parametrize(
    "arguments", [["nothing.ipynb"], ["exercises/90_first.ipynb", "--timeout", "0"]]
)
def test_the_command_says_what_is_wrong_in_a_sentence(folder, capsys, arguments):
    code, _, err = command(capsys, *arguments)
    assert code == 2
    assert err.startswith("minilm: ") and "Traceback" not in err and err.count("\n") == 1
