"""What holds for every committed notebook, beyond that it runs.

    python tools/check_notebooks.py [NOTEBOOK ...]

Prints one line for each complaint; exit code 1 if there is one. Whether the outputs are those of a
fresh run is nbval's to say, and whether shown code is the package's is sync_code's.
"""

import re
import sys
from pathlib import Path

import nbformat
from common import chosen, notebooks, read, repository, shown, tags
from refresh import LABEL_START, fetched_mb, label

LONGEST_CELL, LONGEST_SHOWN_CELL = 25, 60  # lines
LARGEST_EXEMPT_SHARE = 1 / 3
LARGEST_SECONDS, LARGEST_MB = 90, 2000
MACHINE_PATH = re.compile(r"(?<![\w/.])/(?:home|root|tmp|work|Users|usr|opt|mnt|srv|var)/[\w./-]+")
LINK = re.compile(r"\]\(((?!https?:|mailto:|#)[^)\s]+)\)")
COLAB = """import sys

if "google.colab" in sys.modules:  # on Colab, install the package; elsewhere nothing happens
    %pip install -q git+{repository}"""


def _texts(output: nbformat.NotebookNode) -> str:
    """All that an output says in words."""
    data = output.get("data", {})
    words = [text for kind, text in data.items() if kind.startswith("text/")]
    return "\n".join([output.get("text", ""), *words])


def _outputs(cell: nbformat.NotebookNode) -> list[str]:
    """Complaints about one executed cell."""
    found = []
    for output in cell.outputs:
        if output.output_type == "error" and "raises-exception" not in tags(cell):
            found.append(f"an output is an error: {output.ename}")
        if output.get("name") == "stderr":
            found.append("an output is on stderr")
        if path := MACHINE_PATH.search(_texts(output)):
            found.append(f"an output names a path of one machine: {path[0]}")
        if "image/png" in output.get("data", {}):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            if not alt:
                found.append("a figure has no alternative text")
            elif alt != output.metadata.get("image/png", {}).get("alt"):
                found.append("a figure's alternative text is not the one its code gives")
        if "image/svg+xml" in output.get("data", {}):
            found.append("a figure is SVG, which differs from run to run; show a PNG")
    return found


def _code(cell: nbformat.NotebookNode) -> list[str]:
    """Complaints about one code cell's source."""
    lines = len(cell.source.splitlines())
    most = LONGEST_SHOWN_CELL if shown(cell) else LONGEST_CELL
    found = [f"{lines} lines in a cell; at most {most}"] if lines > most else []
    if re.search(r"\btqdm\b", cell.source):
        found.append("tqdm prints to stderr; print every N steps")
    return found


def _label(notebook: nbformat.NotebookNode, must_have: bool) -> list[str]:
    """Complaints about the label line, which a chapter must have, and the figures behind it."""
    facts = notebook.metadata.get("minilm")
    if not facts:
        return ["not executed by tools/refresh.py: no time and memory in its metadata"]
    found = []
    if facts["seconds"] > LARGEST_SECONDS:
        found.append(f"takes {facts['seconds']} s; at most {LARGEST_SECONDS}")
    if facts["peak_mb"] > LARGEST_MB:
        found.append(f"takes {facts['peak_mb']} MB; at most {LARGEST_MB}")
    lines = [line for line in notebook.cells[0].source.split("\n") if line.startswith(LABEL_START)]
    want = label(facts["seconds"], facts["peak_mb"], fetched_mb(notebook))
    if (lines or must_have) and lines != [want]:
        found.append(f"its label line is {lines}, not that of its last execution")
    return found


def complaints(path: Path) -> list[str]:
    """Everything that is wrong with a notebook, one sentence each."""
    notebook = read(path)
    code = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    found = _label(notebook, must_have=path.parent.name == "chapters")
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        found.append("not executed once from top to bottom")
    if not code or code[0].source != COLAB.format(repository=repository()):
        found.append("its first code cell is not the one that installs the package on Colab")
    with_output = [c for c in code if c.outputs]
    exempt = [c for c in with_output if "nbval-ignore-output" in tags(c)]
    if len(exempt) > LARGEST_EXEMPT_SHARE * len(with_output):
        found.append(f"{len(exempt)} of {len(with_output)} outputs are exempt from comparison")
    if any("nbval-skip" in tags(c) or "NBVAL_" in c.source for c in code):
        found.append("a cell is skipped by nbval")
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found += [f"cell {index}: {one}" for one in _code(cell) + _outputs(cell)]
            continue
        for link in LINK.findall(cell.source):
            if not (path.parent / link.split("#")[0]).exists():
                found.append(f"cell {index}: a link leads nowhere: {link}")
    return [f"{path.name}: {one}" for one in found]


def main(arguments: list[str]) -> int:
    """Check the chosen notebooks."""
    found = [line for path in chosen(arguments, notebooks()) for line in complaints(path)]
    print("\n".join(found) or "the notebooks hold what the book promises")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
