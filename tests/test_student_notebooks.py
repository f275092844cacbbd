"""The learners' notebooks are what the masters give, and give nothing away."""

import ast
import re

import common
import nbformat
import pytest
import student

STUDENTS = sorted((common.ROOT / "exercises").glob("*.ipynb"))

MASTER = [
    ("markdown", "title", "# Exercises: Language as probability\n\nWarm up.", []),
    ("code", "setup", 'import sys\nif "google.colab" in sys.modules:\n    pass', []),
    ("code", "imports", "import numpy as np\n\nfrom minilm.exercises import check", []),
    ("markdown", "task-1", "## 1. Add k (implement, 2 points)", []),
    (
        "code",
        "answer-1",
        "def helper(x):\n    return x\n\n\ndef add_k(counts, k):\n    # smooth\n"
        "    ### BEGIN SOLUTION\n    total = counts.sum()\n    return (counts + k) / total\n"
        "    ### END SOLUTION\n",
        [],
    ),
    ("code", "check-1", 'check("ngram.add_k", add_k)', ["keep"]),
    ("markdown", "hint-1", "What is $k$ for?", ["hint"]),
    ("markdown", "hint-2", "Look at zeros.", ["second-hint"]),
    ("markdown", "words-1", "Every byte gets `k`.", ["solution"]),
    ("markdown", "task-2", "## 2. Repair (debug, 1 point)", []),
    (
        "code",
        "answer-2",
        "def step(p, g):\n    ### BEGIN SOLUTION\n    return p - g\n    ### GIVEN\n"
        "    # if True:\n    #     return p + g\n    ### END SOLUTION\n\n\ncheck('t.step', step)",
        [],
    ),
    ("markdown", "task-3", "## 3. Choose", []),
    (
        "code",
        "answer-3",
        '### BEGIN SOLUTION\nanswer = "b"\n### END SOLUTION\ncheck("t.w", answer)',
        [],
    ),
]


def master(cells=MASTER) -> nbformat.NotebookNode:
    made = []
    for kind, cell_id, source, tags in cells:
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        made.append(new(source, id=cell_id, metadata={"tags": tags} if tags else {}))
        if kind == "code":
            made[-1].execution_count = 7
            made[-1].outputs = [nbformat.v4.new_output("stream", text="2 of 2 points")]
    return nbformat.v4.new_notebook(cells=made)


def converted(cells=MASTER) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in student.student(master(cells), "01_name").cells}


def test_the_learners_notebooks_are_up_to_date():
    assert student.stale() == []


@pytest.mark.parametrize("path", STUDENTS, ids=lambda path: path.stem)
def test_a_learners_notebook_gives_nothing_away_but_under_a_dropdown(path):
    notebook = common.read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert "### " not in cell.source
    solutions = [cell for cell in notebook.cells if "<summary>Solution</summary>" in cell.source]
    hints = [cell for cell in notebook.cells if "<summary>Hint</summary>" in cell.source]
    checks = [cell for cell in code if re.search(r"^check\(", cell.source, re.M)]
    assert len(checks) >= 4
    assert len(solutions) >= len(checks) and len(hints) == len(checks)
    assert "Solutions are public" in notebook.cells[1].source


def test_the_order_and_the_ids_of_the_cells():
    wanted = (
        "title how-it-works colab-setup imports task-1 answer-1 check-1 hint-1 hint-2 answer-1-s"
    )
    wanted += " task-2 answer-2 answer-2-s task-3 answer-3 answer-3-s"
    assert list(converted()) == wanted.split()
    assert converted() == converted()


def test_a_solution_becomes_a_placeholder():
    cells = converted()
    assert cells["answer-1"].source.endswith(
        "    # smooth\n    raise NotImplementedError  # your code here\n"
    )
    assert cells["answer-2"].source == (
        "def step(p, g):\n    if True:\n        return p + g\n\n\ncheck('t.step', step)"
    )
    assert cells["answer-3"].source == 'answer = None  # your answer\ncheck("t.w", answer)'
    for cell in cells.values():
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            if cell.id != "colab-setup":
                ast.parse(cell.source)


def test_hints_and_solutions_are_dropdowns():
    cells = converted()
    assert cells["hint-1"].source == (
        "<details>\n<summary>Hint</summary>\n\nWhat is $k$ for?\n\n</details>"
    )
    assert "<summary>Second hint</summary>" in cells["hint-2"].source
    assert cells["answer-1-s"].source == (
        "<details>\n<summary>Solution</summary>\n\nEvery byte gets `k`.\n\n```python\n"
        "def add_k(counts, k):\n    # smooth\n    total = counts.sum()\n"
        "    return (counts + k) / total\n```\n\n</details>"
    )
    assert "```python\ndef step(p, g):\n    return p - g\n```" in cells["answer-2-s"].source
    assert '```python\nanswer = "b"\n```' in cells["answer-3-s"].source


def test_the_header_says_how_it_works():
    text = converted()["how-it-works"].source
    assert "[chapter 01, Language as probability](../chapters/01_name.ipynb)" in text
    assert "minilm grade exercises/01_name.ipynb" in text and "Solutions are public" in text
    assert converted()["colab-setup"].metadata.tags == ["hide-input"]
    assert common.repository() in converted()["colab-setup"].source
    assert student.student(master(), "01_name").metadata.minilm == {"chapter": 1}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f():\n    ### BEGIN SOLUTION\n    return 1\n", "do not match"),
        ("def f():\n    return 1\n    ### END SOLUTION\n", "do not match"),
        ("### BEGIN SOLUTION\nprint(1)\n### END SOLUTION\n", "at the left margin"),
        ("### BEGIN SOLUTION\nx = 1\n### GIVEN\nx = 2\n### END SOLUTION\n", "comments are wanted"),
        ("### BEGIN SOLUTION\nx = = 1\n### GIVEN\n# x = 2\n### END SOLUTION\n", "does not parse"),
    ],
)
def test_a_master_with_a_mistake_is_told(source, complaint):
    with pytest.raises(SystemExit, match=complaint):
        converted([MASTER[0], ("code", "a", source, [])])


def test_a_hint_without_a_question_and_a_missing_title_are_told():
    with pytest.raises(SystemExit, match="must follow the code"):
        converted([MASTER[0], ("markdown", "h", "Hm.", ["hint"])])
    with pytest.raises(SystemExit, match="must be Markdown"):
        converted(MASTER[1:])


def test_one_changed_character_a_missing_and_an_orphaned_notebook_are_found(tmp_path):
    folder = tmp_path / "exercises/solutions"
    folder.mkdir(parents=True)
    for name in ("01_name", "02_name"):
        nbformat.write(master(), folder / f"{name}.ipynb")
    for path, text in student.wanted(tmp_path).items():
        path.write_text(text, encoding="utf-8")
    assert student.stale(tmp_path) == []
    first, second = sorted((tmp_path / "exercises").glob("*.ipynb"))
    first.write_text(first.read_text().replace("smooth", "smoooth"))
    second.rename(second.with_name("03_name.ipynb"))
    assert student.stale(tmp_path) == [
        "exercises/01_name.ipynb is not what its master gives",
        "exercises/02_name.ipynb is missing",
        "exercises/03_name.ipynb has no master in exercises/solutions",
    ]
