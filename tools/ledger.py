"""Collect the ledger from the chapters' executed outputs into minilm/assets/ledger.json.

    python tools/ledger.py [--write]

Without `--write`, exit code 1 if the committed ledger is not what the chapters say.
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import ROOT, chapters, read

KEY = "minilm_ledger"  # minilm.ledger.METADATA_KEY
TARGET = ROOT / "minilm" / "assets" / "ledger.json"


def collect(paths: list[Path]) -> list[dict[str, Any]]:
    """Every row that a notebook recorded, in order.

    Raises:
        SystemExit: If two rows have the same name.
    """
    rows = [
        dict(output["metadata"][KEY])
        for path in paths
        for cell in read(path).cells
        for output in cell.get("outputs", [])
        if KEY in output.get("metadata", {})
    ]
    names = [row["model"] for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"recorded more than once: {sorted(twice)}; a model has one row")
    return rows


def main(arguments: list[str]) -> int:
    """Write the ledger, or say whether it is up to date."""
    text = json.dumps(collect(chapters()), indent=1, ensure_ascii=False) + "\n"
    if "--write" in arguments:
        temporary = TARGET.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(TARGET)
    same = TARGET.read_text(encoding="utf-8") == text
    print("ledger = outputs" if same else "the ledger differs: python tools/ledger.py --write")
    return not same


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
