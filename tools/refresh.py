"""Execute notebooks in place and leave only what is stable in them.

    python tools/refresh.py [NOTEBOOK ...]           (default: every notebook with outputs)
    python tools/refresh.py --clean [NOTEBOOK ...]   do not execute, only clean

Each notebook runs in a fresh kernel, in an empty directory, with the network shut but for loopback.
Afterwards: the time and the peak memory of the run stand in the notebook's metadata and in its
label line ("*Runs in ..."), the alternative text of each figure stands where Jupyter Book reads it,
and everything that changes from machine to machine is gone.
"""

import sys
import tempfile
import time

import nbformat
from common import chosen, notebooks, read, write
from nbclient import NotebookClient

from minilm.assets import REMOTE

KEEP_OF_CELL = ("tags", "mystnb")
LABEL_START = "*Runs in "
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SHUT_THE_NETWORK = """
import socket as _socket
def _loopback_only(self, address, _connect=_socket.socket.connect):
    if self.family != getattr(_socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "::1"):
        raise OSError(f"a notebook runs without the network, and this one asked for {address[0]}")
    return _connect(self, address)
_socket.socket.connect = _loopback_only
"""
PEAK_MEMORY = """
import resource as _resource, sys as _sys
_unit = 1 if _sys.platform == "darwin" else 1024
_who = (_resource.RUSAGE_SELF, _resource.RUSAGE_CHILDREN)
print(max(_resource.getrusage(w).ru_maxrss for w in _who) * _unit)
"""


def label(seconds: float, peak_mb: float, downloads_mb: int = 0) -> str:
    """The line that tells a reader what running the notebook takes."""
    memory = f"{peak_mb / 1000:.1f} GB" if peak_mb >= 100 else "0.1 GB"
    return (
        f"{LABEL_START}{max(1, round(seconds))} s on 2 CPU cores with {memory} of memory; "
        f"downloads {f'{downloads_mb} MB, once' if downloads_mb else 'nothing'}.*"
    )


def fetched_mb(notebook: nbformat.NotebookNode) -> int:
    """What the files take that a notebook fetches, if they are not in the cache yet."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return sum(remote.megabytes for name, remote in REMOTE.items() if f'"{name}"' in code)


def execute(notebook: nbformat.NotebookNode) -> tuple[float, float]:
    """Run all cells in a fresh kernel in an empty directory; seconds, and peak memory in MB.

    Two cells more are run, one that shuts the network and one that reads the peak memory. Both are
    taken out again, and the execution counts are those of the notebook alone.
    """
    before, after = (nbformat.v4.new_code_cell(c) for c in (SHUT_THE_NETWORK, PEAK_MEMORY))
    notebook.cells = [before, *notebook.cells, after]
    with tempfile.TemporaryDirectory() as empty:
        resources = {"metadata": {"path": empty}}
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", record_timing=False, resources=resources
        )
        begun = time.perf_counter()
        try:
            client.execute()
        finally:
            notebook.cells = notebook.cells[1:-1]
    seconds = time.perf_counter() - begun
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip():
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    return seconds, int(after.outputs[0].text) / 1e6


def clean(notebook: nbformat.NotebookNode) -> None:
    """Keep stable metadata only, and put each figure's alternative text where the book reads it."""
    mine = notebook.metadata.get("minilm")
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
        | ({"minilm": mine} if mine else {})
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {key: value for key, value in cell.metadata.items() if key in KEEP_OF_CELL and value}
        )
        if cell.cell_type != "code":
            continue
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            stream = output.output_type == "stream"
            if stream and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        cell.outputs = outputs
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        if pictures:
            about = pictures[0].metadata.get("image/png", {})
            image = {"alt": about.get("alt", ""), "classes": "dark-light"}
            if "width" in about:
                image["width"] = f"{about['width']}px"
            cell.metadata["mystnb"] = {"image": image}


def write_label(notebook: nbformat.NotebookNode) -> None:
    """Put the label line, made from the last execution, into the first cell if it has one."""
    facts = notebook.metadata.get("minilm")
    first = notebook.cells[0]
    if facts and first.cell_type == "markdown":
        first.source = "\n".join(
            label(facts["seconds"], facts["peak_mb"], fetched_mb(notebook))
            if line.startswith(LABEL_START)
            else line
            for line in first.source.split("\n")
        )


def main(arguments: list[str]) -> None:
    """Refresh every chosen notebook."""
    for path in chosen(arguments, notebooks()):
        notebook = read(path)
        if "--clean" not in arguments:
            seconds, peak_mb = execute(notebook)
            notebook.metadata["minilm"] = {"seconds": round(seconds, 1), "peak_mb": round(peak_mb)}
            print(f"{path.name}: {seconds:.1f} s, {peak_mb:.0f} MB")
        clean(notebook)
        write_label(notebook)
        write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
