"""`minilm data build`: from any texts to a folder that training reads."""

import os
import re
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from minilm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minilm.documents import Document
    from minilm.measure import Tokenizer

__all__ = ["data_build"]

TRAINING_CHARACTERS = 10_000_000  # that a tokenizer is trained on


def data_build(
    action: tyro.conf.Positional[Literal["build"]],
    sources: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    tokenizer: str = "bytes",
    skip: tuple[str, ...] = (),
    licenses: tuple[str, ...] = (),
    held_out: tuple[str, ...] = (),
    similarity: float = 0.8,
    shard_tokens: int = 2**24,
    processes: int | None = None,
) -> int:
    """Make training data: clean, filter, deduplicate and tokenize texts into a folder.

    It prints what was dropped and why, and writes the same to report.json in the folder.

    Args:
        action: What to do.
        sources: Files, folders, patterns or addresses that fsspec reads, such as s3://bucket/a.txt;
            .jsonl files have an object with "text" and perhaps "license" in each line.
        out: A new folder.
        tokenizer: bytes; bpe-N, trained on the first 10 MB of the sources to a vocabulary of N; or
            a tokenizer.json that minilm wrote.
        skip: Quality rules to leave out: "broken encoding", "too short", "odd words", "few
            letters", "few stop words" (English), "repeated lines", "unfinished lines".
        licenses: Keep only documents under these SPDX licences.
        held_out: Texts to test on later; documents that share 13 words in a row are dropped.
        similarity: Share of 5-word runs from which on a document is a near-duplicate, up to 1.
        shard_tokens: Tokens in a file.
        processes: Processes that tokenize; without it, one a core.
    """
    from tqdm import tqdm

    from minilm.data import build_store
    from minilm.documents import QUALITY_RULES, Report, prepare, read_documents

    unknown = sorted(set(skip) - set(QUALITY_RULES))
    if unknown:
        raise ConfigError(f"no rule {unknown[0]!r} to skip; there are: {', '.join(QUALITY_RULES)}")
    if not sources:
        raise ConfigError("no source; name files, as in: minilm data build texts/ --out tokens")
    secret = [document.text for document in read_documents(held_out)]

    def documents(report: Report) -> "Iterable[Document]":
        rules = [name for name in QUALITY_RULES if name not in skip]
        found = read_documents(sources)
        return prepare(found, report, rules, licenses or None, secret, similarity)

    workers = (os.cpu_count() or 1) if processes is None else processes
    encoder = choose_tokenizer(tokenizer, documents(Report()))
    report = Report()
    progress = iter(tqdm(documents(report), unit=" documents", disable=None))  # on a terminal only
    try:
        store = build_store(progress, out, encoder, shard_tokens, workers, report)
    except DataError as error:
        if report.kept or not report.dropped:
            raise
        reasons = ", ".join(f"{name} {n}" for name, n in report.dropped.most_common())
        raise DataError(
            f"all {report.dropped.total()} documents were dropped ({reasons}); see --skip and "
            "--similarity in minilm data build --help"
        ) from error
    print(report)
    for reason, sources_dropped in report.examples.items():
        print(f"{reason}: {'; '.join(sources_dropped)}")
    shards = len(store.index["shards"])
    print(f"{out}: {len(store):,} tokens of {store.vocab_size:,} in {shards} file(s)")
    return 0


def choose_tokenizer(name: str, documents: "Iterable[Document]") -> "Tokenizer":
    """A tokenizer by its name on the command line.

    Raises:
        ConfigError: If there is no such tokenizer.
    """
    from minilm.data import load_tokenizer
    from minilm.measure import ByteTokenizer
    from minilm.tokenizer import train_bpe

    if name == "bytes":
        return ByteTokenizer()
    if size := re.fullmatch(r"bpe-(\d+)", name):
        seen = 0

        def begun(document: "Document") -> bool:
            nonlocal seen
            seen += len(document.text)
            return seen - len(document.text) < TRAINING_CHARACTERS

        return train_bpe((each.text for each in takewhile(begun, documents)), int(size[1]))
    if not name.endswith(".json"):
        raise ConfigError(f"tokenizer={name!r}; use bytes, bpe-4096, or the path of a .json file")
    return load_tokenizer(Path(name))
