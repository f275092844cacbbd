"""From dirty text to documents that a model may learn from (chapter 08).

Documents stream through this module: they are read, cleaned, filtered, and dropped if they repeat
another one or hold text that a model will be tested on. No corpus is ever in memory, only what the
deduplicator remembers of each document that it let through, a few kilobytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt64

from minilm.errors import ConfigError, DataError

__all__ = [
    "PERMISSIVE",
    "QUALITY_RULES",
    "Deduplicator",
    "Document",
    "LSHIndex",
    "Report",
    "clean",
    "contamination",
    "expected_recall",
    "installed_documents",
    "jaccard",
    "license_allows",
    "mix",
    "prepare",
    "read_documents",
    "shingles",
    "signature",
]

READABLE = {".txt", ".md", ".jsonl"}  # what is taken from a folder
LEGAL = re.compile(r"(?i)/licenses/|(^|/)(licen[cs]e|copying|notice)[^/]*$")
LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff\ud800-\udfff]")
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
PUNCTUATION = tuple(".!?;:,\"'”’)—。！？")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
PERMISSIVE = (
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC-BY-4.0", "CC0-1.0"),
    *("ISC", "MIT", "PSF-2.0", "Unlicense", "Zlib"),
)


@dataclass(frozen=True)
class Document:
    """What a pipeline moves: a text, where it came from, and what its licence says.

    Attributes:
        text: The text.
        source: A name under which a reader can find it: a path, an address, a line of a file.
        license: An SPDX expression such as "MIT OR Apache-2.0"; "" if nobody said.
    """

    text: str
    source: str
    license: str = ""


def read_documents(urls: Iterable[str]) -> Iterator[Document]:
    """Read texts from files, folders, patterns and any address that fsspec knows, such as s3://.

    A `.jsonl` file has a JSON object with "text" and perhaps "license" in each line. From folders,
    `.txt`, `.md` and `.jsonl` are taken. Any other file is one document. A name that ends in
    `.gz`, `.bz2`, `.xz` or `.zst` is decompressed. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        DataError: If something cannot be read, or nothing is there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("Speak, I charge you.")
        ...     [document.text for document in read_documents([f"{folder}/*.txt"])]
        ['Speak, I charge you.']
    """
    for url in urls:
        with clear_errors(url):
            filesystem, paths = find_files(url)
        for path, name in paths:
            with clear_errors(name), filesystem.open(path, "rb", compression="infer") as file:
                if ".jsonl" not in Path(name).suffixes:
                    yield Document(file.read().decode("utf-8", errors="replace"), name)
                    continue
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield document_of(line, f"{name}:{number}")


def document_of(line: bytes, source: str) -> Document:
    """One line of a `.jsonl` file.

    Raises:
        DataError: If it is no JSON object with a "text".
    """
    try:
        record = json.loads(line)
        text, license = record["text"], record.get("license") or ""
        if not isinstance(text, str) or not isinstance(license, str):
            raise TypeError('"text" and "license" are strings')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{source} is no JSON object with a "text" ({type(error).__name__}: {error}); '
            "mend or delete the line"
        ) from error
    return Document(text, source, license)


def find_files(url: str) -> tuple[Any, list[tuple[str, str]]]:
    """The file system behind an address, and the files there: path and name in sorted order.

    Raises:
        DataError: If a folder or a pattern holds nothing to read.
    """
    import fsspec

    filesystem, path = fsspec.url_to_fs(url)
    if "*" in path:
        found = [each for each in filesystem.glob(path) if not filesystem.isdir(each)]
        base = url[: url.index("*")].rpartition("/")[0]
    elif (Path(path).is_dir() or not Path(path).suffix) and filesystem.isdir(path):
        found = [each for each in filesystem.find(path) if set(Path(each).suffixes) & READABLE]
        base = url.rstrip("/")
    else:
        return filesystem, [(path, url)]
    if not found:
        raise DataError(f"{url} holds nothing to read; wanted files, or a folder of .txt and .md")
    start, prefix = f"{base}/" if base else "", filesystem._strip_protocol(base or ".") + "/"
    return filesystem, sorted((each, start + each.removeprefix(prefix)) for each in found)


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Say in one sentence what a file system could not do: each of them has errors of its own."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name} is not there; check the address") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(f"{name} cannot be read: {reason}") from error


def installed_documents(folders: Sequence[str] = ("numpy", "torch/nn")) -> Iterator[Document]:
    """Real dirty text that is on this machine already: what comes with installed packages.

    For each folder of a package: the licences and other text files of the whole package, and the
    docstrings of the folder's code. The licence is what the package's metadata says, if it says it
    in SPDX. The order is the same on every machine; the texts change with the packages' versions.

    Raises:
        DataError: If a package is not installed.
    """
    seen: set[str] = set()
    for folder in folders:
        package = folder.partition("/")[0]
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError as error:
            raise DataError(f"{package} is not installed; install it, or leave it out") from error
        license = distribution.metadata["License-Expression"] or ""
        for file in sorted(map(str, distribution.files or [])):
            path = Path(str(distribution.locate_file(file)))
            if file in seen or not path.is_file():
                continue
            if LEGAL.search(file) or path.suffix in (".md", ".rst"):
                seen.add(file)
                text = path.read_text(encoding="utf-8", errors="replace")
                yield Document(text, file, license)
            elif path.suffix == ".py" and file.startswith(f"{folder}/") and "/test" not in file:
                seen.add(file)
                for name, text in docstrings(path.read_text(encoding="utf-8", errors="replace")):
                    yield Document(text, f"{file}: {name}", license)


def docstrings(code: str) -> Iterator[tuple[str, str]]:
    """The name and the docstring of each class and function in some Python code that has one."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.name, text


# Cleaning


def clean(text: str) -> str:
    """Bring a text into one form without changing what it says.

    Line ends become `\\n`, characters that control a terminal or show nothing are removed, letters
    and their accents are joined (Unicode's NFC), white space at line ends goes, and of many empty
    lines one stays. Case, punctuation and words stay: a model that writes needs them.

    Example:
        >>> clean("cafe\\u0301 \\r\\n\\r\\n\\r\\n\\r\\nbar\\x00\\ufeff")
        'café\\n\\nbar'
    """
    text = INVISIBLE.sub("", LINE_END.sub("\n", text))
    lines = (line.rstrip() for line in unicodedata.normalize("NFC", text).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


# Filters. Each of the first is a named function that says whether a text is to be dropped.


def broken_encoding(text: str) -> bool:
    """Bytes that were not UTF-8, now U+FFFD."""
    return "\ufffd" in text


def too_short(text: str) -> bool:
    """Fewer than 50 words (Gopher)."""
    return len(text.split()) < 50


def odd_words(text: str) -> bool:
    """A mean length of words outside 3 to 10 characters (Gopher): tables, base64, keyboards."""
    words = text.split()
    return not 3 * len(words) <= sum(map(len, words)) <= 10 * len(words)


def few_letters(text: str) -> bool:
    """A letter in fewer than 80% of the words (Gopher)."""
    words = text.split()
    return sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words)


def few_stop_words(text: str) -> bool:
    """Fewer than two of eight words that no English text does without (Gopher)."""
    return len(STOP_WORDS.intersection(text.lower().split())) < 2


def repeated_lines(text: str) -> bool:
    """More than 30% of the lines were there before (Gopher)."""
    lines = [line for line in text.split("\n") if line]
    return len(lines) - len(set(lines)) > 0.3 * len(lines)


def unfinished_lines(text: str) -> bool:
    """At most 12% of the lines end as a sentence or a verse does (C4's idea, FineWeb's number)."""
    lines = [line for line in text.split("\n") if line]
    return sum(line.endswith(PUNCTUATION) for line in lines) <= 0.12 * len(lines)


QUALITY_RULES: dict[str, Callable[[str], bool]] = {
    "broken encoding": broken_encoding,
    "too short": too_short,
    "odd words": odd_words,
    "few letters": few_letters,
    "few stop words": few_stop_words,
    "repeated lines": repeated_lines,
    "unfinished lines": unfinished_lines,
}


def license_allows(expression: str, allowed: Collection[str] = PERMISSIVE) -> bool:
    """Whether an SPDX licence expression leaves a way that uses only allowed licences.

    Exceptions (`WITH`) only add rights. Inside brackets, every licence must be allowed. What is
    not SPDX is not allowed, nor is silence: without a licence, all rights are reserved.

    Example:
        >>> license_allows("GPL-3.0-only OR MIT"), license_allows("GPL-3.0-only AND MIT")
        (True, False)
        >>> license_allows("")
        False
    """
    known = {name.lower() for name in allowed}
    text = re.sub(r"\s+with\s+[\w.+-]+", "", expression.lower())
    options = [re.sub(r"[()]|\bor\b", " and ", text)] if "(" in text else re.split(r"\bor\b", text)
    return any(
        bool(names) and names <= known
        for names in (set(re.split(r"\s+|\band\b", option)) - {""} for option in options)
    )


# Duplicates and contamination


def mix(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Scramble 64-bit numbers, one to one: the finalizer of SplitMix64.

    Source:
        Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[np.ndarray, "*shape"] = x ^ (x >> np.uint64(31))
    return mixed


def shingles(text: str, width: int = 5) -> UInt64[np.ndarray, " n"]:
    """The distinct runs of `width` words of a text, each as a 64-bit hash, in ascending order.

    Words are letters and digits, in any case; of Chinese and Japanese, each sign is a word. A
    shorter text is one run; a text without words has none.

    Example:
        >>> len(shingles("To be, or not to be, that is the question"))
        6
    """
    words = np.array([word_hash(word) for word in WORD.findall(text.casefold())], dtype=np.uint64)
    n_runs = max(len(words) - width + 1, min(len(words), 1))
    runs = np.zeros(n_runs, dtype=np.uint64)
    for offset in range(min(width, len(words))):
        runs = mix(runs + words[offset : offset + n_runs])
    return np.unique(runs)


@lru_cache(maxsize=2**17)
def word_hash(word: str) -> int:
    """64 bits that depend on a word alone, today and tomorrow; `hash` differs from run to run."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def jaccard(a: UInt64[np.ndarray, " n"], b: UInt64[np.ndarray, " m"]) -> float:
    """Shared shingles over all shingles of two texts: 1 for the same, 0 for nothing in common."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1)


def signature(
    runs: UInt64[np.ndarray, " n"], size: int = 112, seed: int = 0
) -> UInt64[np.ndarray, " size"]:
    """MinHash: the smallest value of each of `size` hash functions over a text's shingles.

    Two texts agree in a place with probability equal to their Jaccard similarity: the smallest of
    all shingles together is as likely to be any of them, and it must be a shared one.

    Source:
        Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900
    """
    keys = np.random.SeedSequence(seed).generate_state(size, np.uint64)[:, None]
    smallest = np.full(size, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(runs), 4096):  # bounded memory for books too
        hashed = mix(runs[None, start : start + 4096] ^ keys)
        smallest = np.minimum(smallest, hashed.min(axis=1))
    return smallest


def expected_recall(similarity: float, bands: int, rows: int) -> float:
    """The probability that two texts of some Jaccard similarity agree in at least one whole band.

    Example:
        >>> [round(expected_recall(s, bands=14, rows=8), 3) for s in (0.5, 0.7, 0.8, 0.9)]
        [0.053, 0.565, 0.924, 1.0]
    """
    return float(1 - (1 - similarity**rows) ** bands)


class LSHIndex:
    """Find texts with similar signatures without comparing all pairs.

    A signature is cut into bands. Texts that agree in a whole band fall into one bucket, and only
    texts of one bucket are compared.

    Args:
        bands: More of them find more pairs, of less similarity too.
        rows: Places in a band; more of them find fewer pairs.

    Source:
        Leskovec, Rajaraman & Ullman 2014, chapter 3, http://www.mmds.org
    """

    def __init__(self, bands: int = 14, rows: int = 8) -> None:
        if bands < 1 or rows < 1:
            raise ConfigError(f"bands={bands}, rows={rows}; use at least 1 of each")
        self.bands, self.rows = bands, rows
        self._buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)

    def _keys(self, signature: UInt64[np.ndarray, " size"]) -> list[tuple[int, bytes]]:
        if len(signature) != self.bands * self.rows:
            raise ConfigError(
                f"a signature of {len(signature)} places; wanted {self.bands} bands x "
                f"{self.rows} rows = {self.bands * self.rows}"
            )
        return [(i, band.tobytes()) for i, band in enumerate(signature.reshape(self.bands, -1))]

    def add(self, key: int, signature: UInt64[np.ndarray, " size"]) -> None:
        """Put a text into its buckets."""
        for bucket in self._keys(signature):
            self._buckets[bucket].append(key)

    def candidates(self, signature: UInt64[np.ndarray, " size"]) -> set[int]:
        """The texts that share a bucket with this one."""
        found = (self._buckets.get(bucket, ()) for bucket in self._keys(signature))
        return set(chain.from_iterable(found))


class Deduplicator:
    """Remembers the documents it let through and names the one that a new document repeats.

    A document is compared with those that were kept, never with one that was dropped: a chain of
    small changes does not end in a document that is unlike the first.

    Args:
        similarity: Estimated Jaccard similarity from which on two documents are near-duplicates.
        bands: As in `LSHIndex`; 14 of 8 rows are FineWeb's.
        rows: As in `LSHIndex`.
        seed: Of the signatures.

    Source:
        Penedo et al. 2024, https://arxiv.org/abs/2406.17557
    """

    def __init__(
        self, similarity: float = 0.8, bands: int = 14, rows: int = 8, seed: int = 0
    ) -> None:
        if not 0 < similarity <= 1:
            raise ConfigError(f"similarity={similarity}; use a number above 0, up to 1, such as .8")
        self.similarity, self.size, self.seed = similarity, bands * rows, seed
        self._index = LSHIndex(bands, rows)
        self._exact: dict[bytes, str] = {}
        self._kept: list[tuple[str, UInt64[np.ndarray, " size"]]] = []

    def repeats(self, document: Document) -> tuple[str, str] | None:
        """What the document repeats: "duplicate" or "near-duplicate", and the source of the other.

        A document that repeats nothing is remembered.
        """
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in self._exact:
            return "duplicate", self._exact[digest]
        words = shingles(document.text)
        if len(words):
            new = signature(words, self.size, self.seed)
            for key in sorted(self._index.candidates(new)):
                source, other = self._kept[key]
                if np.mean(new == other) >= self.similarity:
                    return "near-duplicate", source
            self._index.add(len(self._kept), new)
            self._kept.append((document.source, new))
        self._exact[digest] = document.source
        return None


def contamination(
    passages: Sequence[str], texts: Iterable[str], width: int = 13
) -> Float[np.ndarray, " passages"]:
    """The share of each test passage's runs of `width` words that occurs in the training texts.

    Args:
        passages: What the model will be measured on.
        texts: What it is trained on; read once, one at a time.
        width: 13 words are GPT-3's.

    Example:
        >>> texts = ["As he said: to be, or not to be, that is the question."]
        >>> contamination(["To be or not to be?", "Words, words, words."], texts, width=6)
        array([1., 0.])

    Source:
        Brown et al. 2020, appendix C, https://arxiv.org/abs/2005.14165
    """
    wanted = all_shingles(passages, width)
    found = np.zeros(len(wanted), dtype=bool)
    for text in texts:
        runs = shingles(text, width)
        found[np.searchsorted(wanted, runs[are_in(runs, wanted)])] = True
    seen, of_passage = wanted[found], (shingles(passage, width) for passage in passages)
    return np.array([are_in(runs, seen).mean() if len(runs) else 0.0 for runs in of_passage])


def all_shingles(texts: Sequence[str], width: int) -> UInt64[np.ndarray, " n"]:
    """The distinct shingles of some texts together."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(shingles(t, width) for t in texts)]))


def are_in(
    runs: UInt64[np.ndarray, " n"], ascending: UInt64[np.ndarray, " m"]
) -> Bool[np.ndarray, " n"]:
    """Which runs occur in a sorted array, by bisection: `np.isin` would sort it for each text."""
    places = np.searchsorted(ascending, runs)
    inside = places < len(ascending)
    inside[inside] = ascending[places[inside]] == runs[inside]
    return inside


# The pipeline


@dataclass
class Report:
    """What a pipeline kept and what it dropped, why, and how much text that was.

    Attributes:
        kept: Documents.
        kept_characters: What they hold.
        dropped: Documents, for each reason.
        dropped_characters: What they held.
        examples: A few of the dropped documents' sources, for each reason.
    """

    kept: int = 0
    kept_characters: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_characters: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, document: Document) -> None:
        """Count a document that stays."""
        self.kept += 1
        self.kept_characters += len(document.text)

    def drop(self, document: Document, reason: str, detail: str = "") -> None:
        """Count a document that goes."""
        self.dropped[reason] += 1
        self.dropped_characters[reason] += len(document.text)
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 3:
            examples.append(document.source + detail)

    def __str__(self) -> str:
        """A table."""
        rows = [("kept", self.kept, self.kept_characters)]
        rows += [(name, n, self.dropped_characters[name]) for name, n in self.dropped.most_common()]
        lines = [f"{'':<18} {'documents':>10} {'characters':>12}"]
        return "\n".join(lines + [f"{name:<18} {n:>10,} {size:>12,}" for name, n, size in rows])


def prepare(
    documents: Iterable[Document],
    report: Report,
    rules: Collection[str] = tuple(QUALITY_RULES),
    licenses: Collection[str] | None = None,
    held_out: Sequence[str] = (),
    similarity: float | None = 0.8,
) -> Iterator[Document]:
    """Clean documents and leave out those that a model should not learn from.

    Args:
        documents: One at a time, in any number.
        report: Counts what happens.
        rules: Names out of `QUALITY_RULES`.
        licenses: Licences that a document may have; None asks for none.
        held_out: Test texts. A document that shares 13 words in a row with one is dropped.
        similarity: As in `Deduplicator`; None keeps near-duplicates and duplicates.

    Raises:
        ConfigError: If there is no such rule, or `similarity` is no share.
    """
    unknown = sorted(set(rules) - set(QUALITY_RULES))
    if unknown:
        raise ConfigError(f"no rule {unknown[0]!r}; there are: {', '.join(QUALITY_RULES)}")
    seen = None if similarity is None else Deduplicator(similarity)
    secret = all_shingles(held_out, 13)
    for raw in documents:
        document = replace(raw, text=clean(raw.text))
        if not document.text:
            report.drop(raw, "empty")
        elif licenses is not None and not license_allows(document.license, licenses):
            report.drop(document, "licence", f" ({document.license or 'none given'})")
        elif broken := next((name for name in rules if QUALITY_RULES[name](document.text)), None):
            report.drop(document, broken)
        elif len(secret) and are_in(shingles(document.text, 13), secret).any():
            report.drop(document, "held-out text")
        elif seen is not None and (repeated := seen.repeats(document)):
            report.drop(document, repeated[0], f" (repeats {repeated[1]})")
        else:
            report.keep(document)
            yield document
