"""Keep the definitions that chapters show identical to the package.

    python tools/sync_code.py [--write] [NOTEBOOK ...]     (default: all chapters)

A code cell with the tag `minilm:ngram.KneserNey` holds exactly the source of that definition in
`minilm/ngram.py`; several tags, several definitions, one below the other. A method is shown as its
`def`, without the class around it. The tag `minilm-nodoc:` leaves docstrings out. Text is compared,
never meaning. Without `--write` a difference is printed and the exit code is 1.
"""

import ast
import builtins
import difflib
import re
import symtable
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

from common import ROOT, chapters, chosen, read, shown, write

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Statement = Definition | ast.Assign | ast.AnnAssign


def _named(body: list[ast.stmt], name: str) -> Statement | None:
    """The statement of a body that defines `name`."""
    for node in body:
        if isinstance(node, Definition) and node.name == name:
            return node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(
            isinstance(target, ast.Name) and target.id == name for target in targets
        ):
            return node
    return None


def find(dotted: str, package: Path = ROOT / "minilm") -> tuple[list[str], Statement]:
    """Look a definition up in the files, without importing anything.

    Returns:
        The lines of its module, and its syntax node.

    Raises:
        LookupError: If there is no such module or no such definition.
    """
    parts = dotted.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        base = package.joinpath(*parts[:depth])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8")
            body, node = ast.parse(text).body, None
            for name in parts[depth:]:
                node = _named(body, name)
                if node is None:
                    raise LookupError(f"{dotted}: {path.name} defines no {name!r}")
                body = getattr(node, "body", [])
            if node is not None:
                return text.splitlines(), node
    raise LookupError(f"{dotted}: no module of minilm has that name")


def _docstring_lines(lines: list[str], node: ast.AST) -> set[int]:
    """The lines of all docstrings in a definition, with the empty line below each."""
    drop: set[int] = set()
    for inner in ast.walk(node):
        if not isinstance(inner, Definition) or ast.get_docstring(inner) is None:
            continue
        first = inner.body[0]
        if len(inner.body) == 1:  # a body of nothing but a docstring keeps it
            continue
        last = first.end_lineno or first.lineno
        while last < len(lines) and not lines[last].strip():
            last += 1
        drop |= set(range(first.lineno, last + 1))
    return drop


def source(dotted: str, docstring: bool = True) -> str:
    """The text of a definition, dedented, decorators included."""
    lines, node = find(dotted)
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    drop = set() if docstring else _docstring_lines(lines, node)
    kept = [lines[k - 1] for k in range(first, (node.end_lineno or first) + 1) if k not in drop]
    return textwrap.dedent("\n".join(kept))


def joined(definitions: list[str]) -> str:
    """Definitions one below the other: two empty lines between them, none between constants."""
    text = definitions[0]
    for above, below in pairwise(definitions):
        text += ("\n\n\n" if "\n" in above + below else "\n") + below
    return text


def _needs(code: str) -> set[str]:
    """The names that a piece of code takes from its notebook."""
    top = symtable.symtable(code, "cell", "exec")
    needed: set[str] = set()

    def walk(table: symtable.SymbolTable) -> None:
        for symbol in table.get_symbols():
            at_top = table.get_type() == "module"
            if symbol.is_global() or (at_top and symbol.is_referenced()):
                needed.add(symbol.get_name())
        for child in table.get_children():
            walk(child)

    walk(top)
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()}
    return needed - own - set(dir(builtins)) - {"__class__"}  # what super() reads


def _defines(code: str) -> set[str]:
    """The names that a cell leaves in the notebook."""
    plain = re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.MULTILINE)
    names: set[str] = set()
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, Definition):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def check(path: Path, fix: bool) -> list[str]:
    """Compare the tagged cells of a notebook with the package; the complaints, one a string."""
    notebook, complaints, known, changed = read(path), [], set(), False
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        where = f"{path.name} cell {index}"
        if names := shown(cell):
            try:
                want = joined([source(name, doc) for name, doc in names])
            except LookupError as error:
                complaints.append(f"{where}: {error}")
                continue
            if missing := _needs(want) - known:
                complaints.append(f"{where}: not defined before it is shown: {sorted(missing)}")
            if shadowed := {name.split(".")[-1] for name, _ in names} & set(dir(builtins)):
                complaints.append(f"{where}: shadows the builtin {sorted(shadowed)}")
            if cell.source != want:
                labels = (where, names[0][0])
                old, new = cell.source.splitlines(), want.splitlines()
                diff = "\n".join(difflib.unified_diff(old, new, *labels, lineterm="", n=1))
                if fix:
                    cell.source, changed = want, True
                else:
                    complaints.append(f"{where}: differs from the package\n{diff}")
        known |= _defines(cell.source)
    if changed:
        write(notebook, path)
    return complaints


def main(arguments: list[str]) -> int:
    """Check or write every notebook; 1 if a complaint is left."""
    paths = chosen(arguments, chapters())
    complaints = [line for path in paths for line in check(path, fix="--write" in arguments)]
    print("\n".join(complaints) or "shown code = package code")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
