"""Make the learners' notebooks from the masters that hold the solutions.

    python tools/student.py [--check]   say which learners' notebooks are not what the masters give
    python tools/student.py --write     write them: exercises/solutions/NN_*.ipynb -> exercises/

How to write a master
=====================
The first cell is Markdown and begins `# Exercises: <title of the chapter>`. What follows it in the
learner's copy, how it is graded and the Colab set-up cell, is put in by this tool. Then, for each
question: Markdown with the task (its kind, its points), a code cell with the answer and the call of
`check`, and the hints. In a code cell, an answer stands between two comments:

    def add_k(counts, k):
        ### BEGIN SOLUTION
        return (counts + k) / (counts.sum() + k * len(counts))
        ### END SOLUTION

    check("ngram.add_k", add_k)

The learner gets `raise NotImplementedError  # your code here` at that indentation. A region at the
left margin that ends in an assignment (`answer = "b"`) becomes `answer = None  # your answer`.
Anything else, such as the code with a bug of a *debug* question, is given as comments:

    def step(p, g, lr):
        ### BEGIN SOLUTION
        return p - lr * g
        ### GIVEN
        # return p + lr * g
        ### END SOLUTION

Markdown cells that directly follow the code cell (or the cell with its `check`) become dropdowns by
their tag: `hint`, `second-hint`, and `solution` for words that explain the solution (optional). The
dropdown *Solution* ends with the code of the regions, with the definitions around them, so that it
cannot drift. A hint is Markdown without a heading.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

import nbformat
from common import ROOT, read, repository, tags

from minilm.errors import ConfigError
from minilm.exercises import engine

BEGIN, GIVEN, END = "### BEGIN SOLUTION", "### GIVEN", "### END SOLUTION"
REGION = re.compile(
    rf"^(?P<indent>[ \t]*){BEGIN}\n(?P<body>.*?)(?:^[ \t]*{GIVEN}\n(?P<given>.*?))?^[ \t]*{END}$",
    re.S | re.M,
)
DROPDOWNS = {"hint": "Hint", "second-hint": "Second hint", "solution": "Solution"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
HEADER = """\
Exercises for [chapter {number}, {title}](../chapters/{name}.ipynb){points}.

1. Put your answer in place of `raise NotImplementedError` or `None`, or repair the code, and run
   the cell. `check` prints your points, or a sentence that names the likely mistake.
2. `minilm grade exercises/{name}.ipynb` runs the whole notebook in a fresh kernel and adds up the
   points. If a question is checked more than once, the last check counts.
3. Stuck? Unfold the hints below each question. Solutions are public: they stand under the hints.

[Open this notebook in Colab]({colab})
"""
SETUP = """\
import sys

if "google.colab" in sys.modules:  # on Colab, install the package; elsewhere nothing happens
    %pip install -q git+{repository}"""


def placeholder(region: re.Match[str], where: str) -> str:
    """What a learner sees in place of one solution."""
    indent, body, given = region["indent"], region["body"], region["given"]
    if given is not None:
        lines = given.rstrip("\n").split("\n")
        if wrong := [line for line in lines if line.strip() and not line.lstrip().startswith("#")]:
            raise SystemExit(
                f"{where}: after {GIVEN} comments are wanted, got {wrong[0].strip()!r}"
            )
        return "\n".join(re.sub(r"^([ \t]*)# ?", r"\1", line).rstrip() for line in lines)
    if not indent:
        last = ast.parse(body).body[-1]
        if isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name):
            return f"{last.targets[0].id} = None  # your answer"
        raise SystemExit(
            f"{where}: a solution at the left margin that does not end in `name = ...`; "
            f"put it inside the function, or say after {GIVEN} what the learner sees"
        )
    return f"{indent}raise NotImplementedError  # your code here"


def solution_code(source: str, where: str) -> str:
    """The regions' code, each with the definition around it, without markers."""
    kept: list[str] = []
    inside: set[int] = set()  # line numbers, from 1, in the text that is kept
    within = skipping = False
    for line in source.split("\n"):
        mark = line.strip()
        if mark == BEGIN:
            within = True
        elif mark == GIVEN:
            skipping = True
        elif mark == END:
            within = skipping = False
        elif not skipping:
            kept.append(line)
            if within:
                inside.add(len(kept))
    try:
        statements = ast.parse("\n".join(kept)).body
    except SyntaxError as error:
        raise SystemExit(f"{where}: the solution does not parse: {error}") from error
    parts = []
    for one in statements:
        decorators = getattr(one, "decorator_list", [])
        first = min([one.lineno, *(each.lineno for each in decorators)])
        last = one.end_lineno or one.lineno
        if inside & set(range(first, last + 1)):
            parts.append(((first, last), isinstance(one, ast.FunctionDef | ast.ClassDef)))
    text = ""
    for place, ((first, last), is_definition) in enumerate(parts):
        if place:
            text += "\n\n\n" if is_definition or parts[place - 1][1] else "\n"
        text += "\n".join(kept[first - 1 : last])
    return text


def dropdown(summary: str, text: str) -> str:
    """HTML that Colab, GitHub, Jupyter and Jupyter Book all fold."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>"


def markdown(source: str, cell_id: str) -> nbformat.NotebookNode:
    """A Markdown cell with a fixed id."""
    return nbformat.v4.new_markdown_cell(source, id=cell_id)


def header(name: str, title: str) -> str:
    """What the learner's notebook says of itself."""
    number = int(name[:2])
    try:
        questions = engine.questions(number)
    except ConfigError:
        points = ""
    else:
        points = f": {len(questions)} questions, {sum(one.points for one in questions)} points"
    slug = repository().removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{slug}/blob/main/exercises/{name}.ipynb"
    filled = HEADER.format(
        number=f"{number:02}", title=title, name=name, points=points, colab=colab
    )
    return filled.strip()


def student(master: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The learner's copy of a master; `name` is its file name without `.ipynb`."""
    first = master.cells[0]
    title = re.match(r"# Exercises: (.+)", first.source)
    if first.cell_type != "markdown" or not title:
        raise SystemExit(
            f"{name}: the first cell must be Markdown and begin '# Exercises: <title>'"
        )
    cells = [
        markdown(first.source, first.id),
        markdown(header(name, title[1].strip()), "how-it-works"),
        nbformat.v4.new_code_cell(
            SETUP.format(repository=repository()),
            id="colab-setup",
            metadata={"tags": ["hide-input"]},
        ),
    ]
    code, words, solution_id = "", "", ""  # of the dropdown that is due

    def flush() -> None:
        nonlocal code, words
        if code:
            text = f"{words}\n\n```python\n{code}\n```"
            cells.append(markdown(dropdown(DROPDOWNS["solution"], text), solution_id))
        code = words = ""

    for cell in master.cells[1:]:
        where = f"{name}, cell {cell.id}"
        folded = [tag for tag in tags(cell) if tag in DROPDOWNS]
        if folded and cell.cell_type == "markdown":
            if not code:
                raise SystemExit(f"{where}: a {folded[0]} must follow the code it is for")
            if folded[0] == "solution":
                words = cell.source.strip()
            else:
                cells.append(markdown(dropdown(DROPDOWNS[folded[0]], cell.source), cell.id))
            continue
        if cell.cell_type == "code" and "google.colab" in cell.source:
            continue
        has_solution = BEGIN in cell.source
        if has_solution or cell.cell_type != "code" or "check(" not in cell.source:
            flush()
        if cell.cell_type != "code":
            cells.append(markdown(cell.source, cell.id))
            continue
        source = REGION.sub(lambda region, where=where: placeholder(region, where), cell.source)
        if any(marker in source for marker in (BEGIN, GIVEN, END)):
            raise SystemExit(f"{where}: {BEGIN} and {END} do not match")
        if has_solution:
            code, solution_id = textwrap.dedent(solution_code(cell.source, where)), f"{cell.id}-s"
        metadata = {"tags": tags(cell)} if tags(cell) else {}
        cells.append(nbformat.v4.new_code_cell(source, id=cell.id, metadata=metadata))
    flush()
    metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "minilm": {"chapter": int(name[:2])},
    }
    made = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    made.nbformat_minor = 5
    nbformat.validate(made)
    return made


def wanted(root: Path = ROOT) -> dict[Path, str]:
    """Each learner's notebook, as text, from its master."""
    masters = sorted((root / "exercises/solutions").glob("[0-9][0-9]_*.ipynb"))
    return {
        root / "exercises" / path.name: nbformat.writes(student(read(path), path.stem)) + "\n"
        for path in masters
    }


def stale(root: Path = ROOT) -> list[str]:
    """What is wrong with the learners' notebooks, a line each."""
    texts = wanted(root)
    problems = []
    for path, text in texts.items():
        if not path.exists():
            problems.append(f"{path.relative_to(root)} is missing")
        elif path.read_text(encoding="utf-8") != text:
            problems.append(f"{path.relative_to(root)} is not what its master gives")
    for path in sorted((root / "exercises").glob("*.ipynb")):
        if path not in texts:
            problems.append(f"{path.relative_to(root)} has no master in exercises/solutions")
    return problems


def main(arguments: list[str]) -> int:
    """Check or write; see the module's docstring."""
    if arguments not in ([], ["--check"], ["--write"]):
        raise SystemExit("usage: python tools/student.py [--check | --write]")
    if arguments == ["--write"]:
        for path, text in wanted().items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                temporary = path.with_suffix(".part")
                temporary.write_text(text, encoding="utf-8", newline="\n")
                temporary.replace(path)
                print(f"wrote {path.relative_to(ROOT)}")
    problems = stale()
    for problem in problems:
        print(problem)
    if problems and arguments != ["--write"]:
        print("run: python tools/student.py --write")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
