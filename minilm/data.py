"""From documents to batches: tokenize, store, pack, sample (chapter 08).

Tokens are kept in files that are mapped into memory. From them the same batches are drawn in the
same order on any number of processes, from any point at which a run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt64

from minilm.assets import file_sha256
from minilm.corpus import load_shakespeare
from minilm.documents import Document, Report, mix
from minilm.errors import ConfigError, DataError
from minilm.files import whole_folder, write_atomically
from minilm.measure import ByteTokenizer, Tokenizer
from minilm.tokenizer import BPETokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BatchSampler",
    "MemoryTokens",
    "TokenStore",
    "Tokens",
    "begin_id",
    "build_store",
    "load_tokenizer",
    "load_tokens",
    "pack",
    "permuted",
    "save_tokenizer",
    "token_dtype",
    "tokenize",
    "write_shards",
]

TEXTS_AT_ONCE = 2**20  # characters in a process's portion
INDEX = "index.json"
FORMAT = "minilm tokens 1"
DTYPES = ("uint16", "uint32")  # what a shard may hold, little-endian
ROUNDS = 6  # of the permutation; 4 are not quite even below 20 windows


# Tokens in memory and on disk


@runtime_checkable
class Tokens(Protocol):
    """A long row of token ids, wherever it is kept."""

    vocab_size: int
    checksum: int  # another content has another one

    def __len__(self) -> int:
        """The number of tokens."""

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """The tokens from `start` up to `stop`, as a new array."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of the two stored dtypes that has room for the ids, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_ids(ids: np.ndarray, vocab_size: int, what: str) -> None:
    """Refuse what cannot be token ids.

    Raises:
        DataError: If the array is empty, not flat, not of integers, or has an id outside the
            vocabulary.
    """
    if not ids.size:
        raise DataError(f"{what} is empty; drop empty documents before they are stored")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"{what} has dtype {ids.dtype} and shape {ids.shape}; wanted a row of ints")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise DataError(f"{what} has the id {wrong}, but vocab_size={vocab_size}; check both")


def check_range(start: int, stop: int, length: int) -> None:
    """Refuse to read what is not there.

    Raises:
        DataError: If the range does not lie within the tokens.
    """
    if not 0 <= start <= stop <= length:
        raise DataError(f"tokens {start} to {stop} of {length}; use 0 <= start <= stop <= {length}")


class MemoryTokens:
    """Token ids in an array, read like those of a `TokenStore`.

    Args:
        ids: A row of ids.
        vocab_size: Ids run from 0 to `vocab_size - 1`.

    Raises:
        DataError: If the ids are none, not integers, or outside the vocabulary.

    Example:
        >>> tokens = MemoryTokens(np.array([3, 1, 4, 1, 5]), vocab_size=6)
        >>> len(tokens), tokens.read(1, 4)
        (5, array([1, 4, 1], dtype=uint16))
    """

    def __init__(self, ids: np.ndarray, vocab_size: int) -> None:
        check_ids(ids, vocab_size, "the array of tokens")
        self.ids = ids.astype(token_dtype(vocab_size))
        self.vocab_size = vocab_size
        self.checksum = zlib.crc32(self.ids.data)

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """The tokens from `start` up to `stop`, as a new array."""
        check_range(start, stop, len(self))
        return self.ids[start:stop].copy()


def begin_id(tokenizer: Tokenizer) -> int:
    """The id that stands before a text: the tokenizer's own, or one after its last.

    It is the id that `Transformer` puts before a text when the text is scored.
    """
    return int(getattr(tokenizer, "begin_id", tokenizer.vocab_size))


def load_tokens(name: str, split: str, tokenizer: Tokenizer) -> MemoryTokens:
    """The plays of a split as one row of ids, the begin id before each play.

    Args:
        name: "shakespeare", the one text that comes with the package.
        split: "train", "validation" or "test".
        tokenizer: What turns a play into ids.

    Raises:
        ConfigError: If there is no such text or split.

    Example:
        >>> from minilm.measure import ByteTokenizer
        >>> tokens = load_tokens("shakespeare", "validation", ByteTokenizer())
        >>> tokens.vocab_size, tokens.read(0, 5)
        (257, array([256,  67, 104, 111, 114], dtype=uint16))
    """
    if name != "shakespeare":
        raise ConfigError(f"no text {name!r}; use 'shakespeare', or TokenStore for your own")
    begin = begin_id(tokenizer)
    texts = [play.text for play in load_shakespeare(split)]
    parts = [part for ids in tokenize(texts, tokenizer) for part in (np.array([begin]), ids)]
    return MemoryTokens(np.concatenate(parts), max(tokenizer.vocab_size, begin + 1))


def separated(
    documents: Iterable[np.ndarray], vocab_size: int, separator_id: int
) -> Iterator[Integer[np.ndarray, " _"]]:
    """Each document with the separator before it, in the stored dtype.

    Raises:
        DataError: If a document is empty, has a wrong id, or contains the separator.
    """
    for number, ids in enumerate(documents):
        check_ids(ids, vocab_size, f"document {number}")
        if (ids == separator_id).any():
            raise DataError(
                f"document {number} contains the separator, id {separator_id}, which would cut "
                "it in two; encode text so that it never becomes a special token"
            )
        yield np.append(separator_id, ids).astype(token_dtype(vocab_size))


def cut(
    arrays: Iterable[Integer[np.ndarray, " _"]], size: int
) -> Iterator[Integer[np.ndarray, " _"]]:
    """The same numbers in arrays of `size`; the last one may have fewer."""
    waiting: list[Integer[np.ndarray, " _"]] = []  # at most one piece, and the array that fills it
    n_waiting = 0
    for array in arrays:
        waiting.append(array)
        n_waiting += len(array)
        if n_waiting >= size:
            joined, n_waiting = np.concatenate(waiting), n_waiting % size
            rest = len(joined) - n_waiting
            yield from (joined[start : start + size] for start in range(0, rest, size))
            waiting = [joined[rest:].copy()]
    if n_waiting:
        yield np.concatenate(waiting)


def write_shards(
    folder: str | os.PathLike[str],
    documents: Iterable[np.ndarray],
    vocab_size: int,
    separator_id: int,
    shard_tokens: int = 2**24,
    about: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Write documents as files of equal length, the separator before each document.

    A document may begin in one shard and end in the next. The index is written last: a folder
    without one holds no store, so a run that is killed leaves nothing that looks whole. After an
    error the shards are removed.

    Args:
        folder: A folder without a store in it; made if it is not there.
        documents: The ids of one document at a time.
        vocab_size: Ids run from 0 to `vocab_size - 1`, the separator included.
        separator_id: An id that no document contains.
        shard_tokens: Tokens in a shard; the last one may have fewer.
        about: What else the index shall say.

    Raises:
        ConfigError: If a number makes no sense, or the folder holds a store.
        DataError: If a document is empty or has a wrong id, if there is no document, or if a file
            cannot be written.
    """
    path, shards = Path(folder), list[dict[str, Any]]()
    if not 0 <= separator_id < vocab_size or shard_tokens < 1:
        raise ConfigError(
            f"separator_id={separator_id}, vocab_size={vocab_size}, shard_tokens={shard_tokens}; "
            "wanted 0 <= separator_id < vocab_size and at least 1 token a shard"
        )
    if (path / INDEX).exists():
        raise ConfigError(f"{path} holds a token store; name another folder, or delete this one")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be made: {error.strerror or error}") from error
    try:
        for ids in cut(separated(documents, vocab_size, separator_id), shard_tokens):
            file, starts = f"shard-{len(shards):05d}.bin", int((ids == separator_id).sum())
            with write_atomically(path / file) as temporary:
                temporary.write_bytes(ids.data)
            digest = hashlib.sha256(ids.data).hexdigest()
            about_it = {"tokens": len(ids), "sha256": digest, "documents": starts}
            shards.append({"file": file, **about_it})
        if not shards:
            raise DataError("no document is left to write; a store needs at least one")
        sizes = {"vocab_size": vocab_size, "separator_id": separator_id}
        dtype = token_dtype(vocab_size).name
        index = {"format": FORMAT, "dtype": dtype, **sizes, **(about or {}), "shards": shards}
        with write_atomically(path / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except BaseException:  # Ctrl-C too
        for shard in shards:
            (path / shard["file"]).unlink(missing_ok=True)
        raise
    return TokenStore(path)


class TokenStore:
    """Token ids in files that are mapped into memory: read in place, never loaded.

    Args:
        folder: What `write_shards` wrote.
        verify: Read every byte once and compare it with the SHA-256 in the index.

    Attributes:
        vocab_size: Ids run from 0 to `vocab_size - 1`.
        separator_id: The id before each document.
        documents: How many documents there are.
        index: All that the index says.

    Raises:
        DataError: If there is no index, if it is damaged, or if a shard is missing, too short, too
            long or, with `verify`, not what was written.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = False) -> None:
        self.folder = Path(folder)
        self.index = self._read_index()
        self.vocab_size: int = self.index["vocab_size"]
        self.separator_id: int = self.index["separator_id"]
        shards = self.index["shards"]
        self.documents = sum(shard["documents"] for shard in shards)
        self.checksum = zlib.crc32("".join(shard["sha256"] for shard in shards).encode())
        self._starts: list[int] = list(accumulate((shard["tokens"] for shard in shards), initial=0))
        self._shards = [self._map(shard) for shard in shards]
        if verify:
            self.verify()

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            form, dtype, vocab_size = index["format"], index["dtype"], index["vocab_size"]
            numbers = [vocab_size, index["separator_id"]]
            for shard in index["shards"]:
                numbers += [shard["tokens"], shard["documents"]]
                shard["file"], shard["sha256"]
            if not all(isinstance(number, int) for number in numbers):
                raise TypeError("a count is not an integer")
        except FileNotFoundError as error:
            raise DataError(
                f"{self.folder} holds no token store: there is no {INDEX}, which is written last; "
                "make the store again with minilm data build or write_shards"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({type(error).__name__}: {error}); make the store again"
            ) from error
        if form != FORMAT or dtype not in DTYPES or np.dtype(dtype) != token_dtype(vocab_size):
            raise DataError(
                f"{path} says format {form!r} and dtype {dtype!r} for vocab_size={vocab_size}; "
                f"wanted {FORMAT!r} and {token_dtype(vocab_size).name!r}; make the store again"
            )
        return index

    def _map(self, shard: Mapping[str, Any]) -> Integer[np.ndarray, " n"]:
        path, dtype = self.folder / shard["file"], token_dtype(self.vocab_size)
        wanted = shard["tokens"] * dtype.itemsize
        try:
            size = path.stat().st_size
            if size != wanted:
                raise DataError(
                    f"{path} has {size} bytes, wanted {wanted} ({shard['tokens']} tokens of "
                    f"{dtype.name}); the shard is cut off or not of this store: copy it again"
                )
            return np.memmap(path, dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}), but {INDEX} names it; copy it again"
            ) from error

    def __len__(self) -> int:
        """The number of tokens."""
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """The tokens from `start` up to `stop`, as a new array, across the borders of shards."""
        check_range(start, stop, len(self))
        parts = []
        shard = bisect_right(self._starts, start, hi=len(self._shards)) - 1
        while start < stop:
            first = self._starts[shard]
            part = self._shards[shard][start - first : stop - first]
            parts.append(part)
            start, shard = start + len(part), shard + 1
        return np.concatenate(parts) if parts else np.empty(0, token_dtype(self.vocab_size))

    def verify(self) -> None:
        """Compare every shard with its SHA-256 in the index.

        Raises:
            DataError: If one is not what was written; the text names it.
        """
        for shard in self.index["shards"]:
            digest = file_sha256(self.folder / shard["file"])
            if digest != shard["sha256"]:
                raise DataError(
                    f"{self.folder / shard['file']} has SHA-256 {digest[:12]}..., wanted "
                    f"{shard['sha256'][:12]}...; the shard is damaged: copy it again"
                )


# From text to ids


def encoder(tokenizer: Tokenizer) -> Callable[[str], Integer[np.ndarray, " n"]]:
    """The fastest way to a text's ids that gives the same ids as `tokenizer.encode`.

    Text that spells a special token is encoded letter by letter: a corpus is other people's text.
    """
    if type(tokenizer) is ByteTokenizer:  # a subclass may encode in its own way
        return lambda text: np.frombuffer(text.encode(), dtype=np.uint8)
    if isinstance(tokenizer, BPETokenizer):
        try:
            fast = tokenizer.fast()
        except ConfigError:  # tiktoken would give other ids
            return lambda text: np.array(tokenizer.encode(text, allow_special=False), np.int64)
        return lambda text: np.array(fast.encode_ordinary(text), dtype=np.int64)
    return lambda text: np.array(tokenizer.encode(text), dtype=np.int64)


def tokenize(
    texts: Iterable[str], tokenizer: Tokenizer, processes: int = 1
) -> Iterator[Integer[np.ndarray, " _"]]:
    """The ids of each text, in order, made by several processes at once.

    Texts are handed out in groups of about a megabyte, two for each process, so that neither all
    texts nor all ids are ever in memory. A script that asks for more than one process needs
    `if __name__ == "__main__":`, because each process imports it anew.

    Raises:
        ConfigError: If there are fewer than one process.
        DataError: If a process dies.
    """
    if processes < 1:
        raise ConfigError(f"processes={processes}; use at least 1")
    if processes == 1:
        yield from map(encoder(tokenizer), texts)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    with ProcessPoolExecutor(processes, context, start_worker, (tokenizer,)) as pool:
        running: deque[Future[list[Integer[np.ndarray, " _"]]]] = deque()
        try:
            for group in groups(texts, TEXTS_AT_ONCE):
                running.append(pool.submit(encode_group, group))
                if len(running) == 2 * processes:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizing process died: out of memory, or started by a script without "
                'if __name__ == "__main__": ; mend that, or use processes=1'
            ) from error


def groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of texts that hold `size` characters or a little more."""
    group: list[str] = []
    room = size
    for text in texts:
        group.append(text)
        room -= len(text)
        if room <= 0:
            yield group
            group, room = [], size
    if group:
        yield group


worker: dict[str, Callable[[str], Integer[np.ndarray, " n"]]] = {}  # filled in each process


def start_worker(tokenizer: Tokenizer) -> None:
    """Keep the encoder in this process, so that it is made once."""
    worker["encode"] = encoder(tokenizer)


def encode_group(texts: list[str]) -> list[Integer[np.ndarray, " _"]]:
    """What a process does with a group."""
    return list(map(worker["encode"], texts))


def pack(
    documents: Iterable[Integer[np.ndarray, " _"]],
    seq_len: int,
    separator_id: int,
    whole: bool = False,
) -> tuple[Integer[np.ndarray, "rows seq_len"], Integer[np.ndarray, "rows seq_len"]]:
    """Lay documents of any length into rows of one length: inputs and targets.

    The separator stands before each document, and is what comes after its last token.

    Args:
        documents: The ids of each.
        seq_len: The length of a row.
        separator_id: The id between documents.
        whole: Cut no document that fits into a row: the longest comes first, each goes into the
            first row with room. Places that stay empty have the target `IGNORED`. Otherwise
            documents follow each other and are cut where a row ends; only the last row has such
            places. In both cases attention still sees the documents before it in its row.

    Raises:
        ConfigError: If `seq_len` is not positive.
        DataError: If there is no document.

    Example:
        >>> inputs, targets = pack([np.array([1, 2, 3]), np.array([4, 5])], 4, separator_id=0)
        >>> inputs.tolist(), targets.tolist()
        ([[0, 1, 2, 3], [0, 4, 5, 0]], [[1, 2, 3, 0], [4, 5, 0, -100]])
    """
    from minilm.model import IGNORED

    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len}; use at least 1")
    pairs = [np.array([[separator_id, *ids], [*ids, separator_id]]) for ids in documents]
    if not pairs:
        raise DataError("no document to pack; pass at least one")
    if not whole:
        pairs = [np.concatenate(pairs, axis=1)]
    pieces = [
        pair[:, start : start + seq_len]
        for pair in pairs
        for start in range(0, pair.shape[1], seq_len)
    ]
    pieces.sort(key=lambda piece: piece.shape[1], reverse=True)
    inputs = np.full((len(pieces), seq_len), separator_id)
    targets = np.full((len(pieces), seq_len), IGNORED)
    filled = np.zeros(len(pieces), dtype=np.int64)
    for piece in pieces:
        row = int(np.argmax(filled + piece.shape[1] <= seq_len))
        place = slice(filled[row], filled[row] + piece.shape[1])
        inputs[row, place], targets[row, place] = piece
        filled[row] = place.stop
    return inputs[filled > 0], targets[filled > 0]


def save_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer as JSON: ours, or `{"type": "bytes"}`.

    Raises:
        ConfigError: If it is neither a `BPETokenizer` nor the `ByteTokenizer`.
    """
    if isinstance(tokenizer, BPETokenizer):
        tokenizer.save(path)
    elif type(tokenizer) is ByteTokenizer:
        with write_atomically(path) as temporary:
            temporary.write_text('{"type": "bytes"}\n', encoding="utf-8")
    else:
        raise ConfigError(
            f"a {type(tokenizer).__name__} cannot be saved; use BPETokenizer or ByteTokenizer"
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what `save_tokenizer` wrote.

    Raises:
        DataError: If the file is missing, damaged, or holds something else.
    """
    try:
        if json.loads(path.read_text(encoding="utf-8")) == {"type": "bytes"}:
            return ByteTokenizer()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} does not hold a tokenizer ({error}); copy it again") from error
    return BPETokenizer.load(path)


def build_store(
    documents: Iterable[Document],
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer,
    shard_tokens: int = 2**24,
    processes: int = 1,
    report: Report | None = None,
) -> TokenStore:
    """Tokenize documents into a new folder: shards, index.json, tokenizer.json, report.json.

    The folder gets its name when all is written; after an error there is none.

    Raises:
        ConfigError: If there is something at `folder` already.
        DataError: If there is no document, or a file cannot be read or written.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"{path} is there already; name a new folder, or delete it")
    begin = begin_id(tokenizer)
    ids = tokenize((document.text for document in documents), tokenizer, processes)
    with whole_folder(path) as part:
        save_tokenizer(part / "tokenizer.json", tokenizer)
        write_shards(part, ids, max(tokenizer.vocab_size, begin + 1), begin, shard_tokens)
        if report is not None:  # it is complete only now: documents have streamed through
            text = json.dumps(vars(report), indent=1, ensure_ascii=False)
            (part / "report.json").write_text(text + "\n", encoding="utf-8")
    return TokenStore(path)


# Batches


def permuted(
    places: Integer[np.ndarray, " n"], size: int, keys: UInt64[np.ndarray, " rounds"]
) -> Integer[np.ndarray, " n"]:
    """Where a random permutation of `range(size)` puts some places; nothing is stored.

    A place is written as two digits of a base whose square is at least `size`. Each round adds to
    one digit a hash of the other, which can be undone, so two places never meet (a Feistel
    network). A result outside the range goes through again until it is inside.

    Args:
        places: Numbers from 0 to `size - 1`.
        size: How many things are permuted.
        keys: One number for each round; other keys give another permutation.

    Example:
        >>> keys = np.array([3, 1, 4, 1], dtype=np.uint64)
        >>> permuted(np.arange(5), 5, keys).tolist()
        [0, 4, 1, 2, 3]
    """
    base = np.uint64(math.isqrt(size - 1) + 1)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = np.divmod(result[outside], base)
        for key in keys:
            left, right = right, (left + mix(right ^ key) % base) % base
        result[outside] = left * base + right
        outside = result >= size
    return result.astype(np.int64)


class BatchSampler:
    """Batches in a random order that depends on the seed alone.

    The tokens are a circle: after the last comes the first, which is the separator of the first
    document. In each epoch the circle is cut at a new place into windows of `seq_len` targets, and
    the windows come in a new random order, each once. All processes count the same sequences; of
    each global batch, process `rank` reads every `world_size`-th row.

    Args:
        tokens: Where to read.
        seq_len: Targets in a row.
        batch_size: Rows in a step, over all processes.
        seed: Equal seeds give equal batches.
        rank: Which process this is, from 0.
        world_size: How many processes there are.

    Raises:
        ConfigError: If a number makes no sense, the tokens do not fill one window, or a process
            would have no row.

    Example:
        >>> tokens = MemoryTokens(np.arange(12), vocab_size=12)
        >>> sampler = BatchSampler(tokens, seq_len=4, batch_size=2)
        >>> inputs, targets = sampler.next_batch()
        >>> inputs.shape, ((targets - inputs) % 12).unique().tolist()
        (torch.Size([2, 4]), [1])
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if seq_len < 1 or len(tokens) <= seq_len:
            raise ConfigError(
                f"seq_len={seq_len}, but there are {len(tokens)} tokens; a window takes "
                "seq_len + 1 of them: use a smaller seq_len, at least 1, or more text"
            )
        if not 0 <= rank < world_size <= batch_size:
            raise ConfigError(
                f"rank={rank}, world_size={world_size}, batch_size={batch_size}; wanted "
                "0 <= rank < world_size <= batch_size, so that every process has a row"
            )
        if seed < 0:
            raise ConfigError(f"seed={seed}; use 0 or more")
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.windows = len(tokens) // seq_len  # in an epoch
        self.position = 0  # sequences that all processes together have drawn

    @property
    def epoch(self) -> int:
        """How many times all windows have been drawn."""
        return self.position // self.windows

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This process's rows of the next global batch.

        Returns:
            Inputs and targets, int64 of shape (rows, seq_len): the targets are the inputs moved
            by one.
        """
        import torch

        last = self.position + self.batch_size
        sequences = np.arange(self.position + self.rank, last, self.world_size)
        starts = self.window_starts(sequences)
        self.position = last
        rows = torch.from_numpy(np.stack([self._window(start) for start in starts]))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def window_starts(self, sequences: Integer[np.ndarray, " n"]) -> list[int]:
        """Where the windows of some sequences begin, counted from the first sequence of the run."""
        epochs, places = np.divmod(sequences, self.windows)
        starts = np.empty_like(sequences)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            entropy = np.random.SeedSequence([self.seed, int(epoch)])
            cut, *keys = entropy.generate_state(1 + ROUNDS, np.uint64)
            windows = permuted(places[here], self.windows, np.array(keys))
            starts[here] = (int(cut) % len(self.tokens) + windows * self.seq_len) % len(self.tokens)
        return [int(start) for start in starts]

    def _window(self, start: int) -> Integer[np.ndarray, " n"]:
        stop, end = start + self.seq_len + 1, len(self.tokens)
        ids = self.tokens.read(start, min(stop, end))
        if stop > end:  # over the end of the circle
            ids = np.concatenate([ids, self.tokens.read(0, stop - end)])
        return ids.astype(np.int64)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps: the same on every process, for any number of processes."""
        return {
            "position": self.position,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "tokens": len(self.tokens),
            "checksum": self.tokens.checksum,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler stopped, whatever its rank and world size were.

        Raises:
            ConfigError: If the other one drew other batches: another seed, text or shape.
            DataError: If the state is not one.
        """
        mine = self.state_dict()
        if set(state) != set(mine) or not all(isinstance(n, int) for n in state.values()):
            raise DataError(f"a sampler's state has the numbers {', '.join(mine)}; got {state}")
        for name, value in mine.items():
            if name != "position" and state[name] != value:
                raise ConfigError(
                    f"the state has {name}={state[name]}, this sampler {name}={value}; "
                    "resume with the settings and the data of the run that was stopped"
                )
        if state["position"] < 0 or state["position"] % self.batch_size:
            raise DataError(
                f"position={state['position']} is between two batches of {self.batch_size}; "
                "wanted a state from state_dict"
            )
        self.position = state["position"]
