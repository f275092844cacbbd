"""Make minilm/assets/results/dirty_corpus.json: what is in a dirty corpus, and what stays of it.

    python tools/make_dirty_corpus.py [--check]

The corpus is text that is installed with the package: docstrings of NumPy and of torch.nn, and all
licences and notes that come with both. The repository holds none of it. What is committed is a
count of what was found and dropped, with the versions of the packages, which constraints.txt pins,
and a SHA-256 of all texts. Near-duplicates of known similarity, made from the plays, are planted in
it, so that what is found can be compared with theory. `--check` makes the result again and
compares; with other versions it says so and compares nothing.
"""

import hashlib
import re
import sys
import time
from importlib.metadata import version

import numpy as np

from minilm.corpus import load_shakespeare
from minilm.documents import Document, Report, installed_documents, prepare
from minilm.results import load_result, save_result

FOLDERS = ("numpy", "torch/nn")
PASSAGE = 204  # words: 200 runs of five
EDITS = (0, 1, 2, 3, 4, 5, 7, 10, 13)  # words replaced in a copy
PAIRS = 150  # of each
BANDS, ROWS, THRESHOLD = 14, 8, 0.8


def planted(texts: list[str], n_edits: int, n_pairs: int, skip: int = 0) -> list[tuple[str, str]]:
    """Passages, and copies of them in which some words are replaced by words never seen before.

    The replaced words stand at least five apart, so each takes five of the 200 runs of five words
    with it, and (200 - 5 n) / (200 + 5 n) of all runs are shared.

    Args:
        texts: Where passages come from.
        n_edits: Words to replace, up to 38.
        n_pairs: How many pairs.
        skip: Passages to leave out at the beginning.
    """
    words = [word for text in texts for word in re.findall(r"\w+", text.casefold())]
    pairs = []
    for number in range(n_pairs):
        start = (skip + number) * PASSAGE
        passage = words[start : start + PASSAGE]
        edited = list(passage)
        for edit in range(n_edits):
            edited[6 + edit * (192 // n_edits)] = f"edit{skip + number}x{edit}"
        pairs.append((" ".join(passage), " ".join(edited)))
    return pairs


def expected_share(similarity: float) -> float:
    """How often a pair shares a band and agrees in enough places: 20,000 pairs drawn."""
    draws = np.random.default_rng(0).random((20_000, BANDS, ROWS)) < similarity
    return float(np.mean(draws.all(2).any(1) & (draws.mean((1, 2)) >= THRESHOLD)))


def planted_shares(dirty: list[Document]) -> list[dict[str, float]]:
    """Plant pairs among the documents; how many copies are dropped, and how many should be."""
    plays = [play.text for play in load_shakespeare("train")]
    pairs = {n: planted(plays, n, PAIRS, i * PAIRS) for i, n in enumerate(EDITS)}
    first, second = (
        [
            Document(pair[side], f"{name} {n} {number}")
            for n in EDITS
            for number, pair in enumerate(pairs[n])
        ]
        for side, name in enumerate(("original", "copy"))
    )
    kept = {each.source for each in prepare([*dirty, *first, *second], Report(), rules=())}
    rows = []
    for n in EDITS:
        similarity = (200 - 5 * n) / (200 + 5 * n)
        dropped = np.mean([f"copy {n} {number}" not in kept for number in range(PAIRS)])
        lost = np.mean([f"original {n} {number}" not in kept for number in range(PAIRS)])
        rows.append(
            {
                "similarity": similarity,
                "pairs": PAIRS,
                "dropped": float(dropped),
                "expected": 1.0 if n == 0 else expected_share(similarity),
                "originals_dropped": float(lost),
            }
        )
    return rows


def main() -> None:
    begin = time.perf_counter()
    documents = list(installed_documents(FOLDERS))
    read = time.perf_counter()
    report = Report()
    texts = [document.text for document in documents]
    list(prepare(documents, report))
    done = time.perf_counter()
    unfiltered = Report()
    list(prepare(documents, unfiltered, rules=()))
    result = {
        "versions": {name: version(name) for name in ("numpy", "torch")},
        "folders": FOLDERS,
        "documents": len(documents),
        "characters": sum(map(len, texts)),
        "sha256": hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest(),
        "kept": report.kept,
        "kept_characters": report.kept_characters,
        "dropped": dict(report.dropped.most_common()),
        "dropped_characters": dict(report.dropped_characters),
        "examples": report.examples,
        "dropped_without_rules": dict(unfiltered.dropped.most_common()),
        "planted": planted_shares(documents),
    }
    seconds = {"read": round(read - begin, 1), "prepare": round(done - read, 1)}
    print(report)
    for row in result["planted"]:
        print(", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    if "--check" in sys.argv[1:]:
        committed = load_result("dirty_corpus")["result"]
        del committed["seconds"]
        if committed["versions"] != result["versions"]:
            print(f"made with {committed['versions']}, here is {result['versions']}: not compared")
        elif {**result, "folders": list(FOLDERS)} != committed:
            sys.exit("the committed result is another one; run tools/make_dirty_corpus.py")
    else:
        command = "python tools/make_dirty_corpus.py"
        print(save_result("dirty_corpus", {**result, "seconds": seconds}, command))


if __name__ == "__main__":
    main()
