"""Byte-pair encoding beside its peers: training and encoding, in one run.

    python benchmarks/tokenizer.py --json     writes minilm/assets/results/tokenizer.json
    python benchmarks/tokenizer.py --quick    five plays, one round; saves nothing

All 38 plays, 4,096 tokens. Peers: the trainer and the encoder of Hugging Face's `tokenizers`, in
Rust, called as its documentation does, free to use both cores; and tiktoken, with our merges, which
is `BPETokenizer.fast`. The sides take turns; a ratio is taken within a round, and the median over
the rounds stands, with the range beside it. Before anything is timed, merges and ids are compared:
equal, or the benchmark ends. About 2 minutes of two cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from minilm.corpus import load_shakespeare
from minilm.results import save_result
from minilm.tokenizer import BPETokenizer, to_visible, train_bpe

VOCAB_SIZE = 4096


def train_peer(texts: Sequence[str]) -> list[list[str]]:
    """Hugging Face's trainer with our settings; its merges, in the order they were learned."""
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    peer.train_from_iterator(texts, trainer)
    merges: list[list[str]] = json.loads(peer.to_str())["model"]["merges"]
    return merges


def open_in_peer(tokenizer: BPETokenizer) -> tokenizers.Tokenizer:
    """Our tokenizer as Hugging Face's library reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.export_hf(path)
        return tokenizers.Tokenizer.from_file(str(path))


def check(tokenizer: BPETokenizer, peer: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    """Equal merges in equal order, equal ids on all three roads."""
    ours = [[to_visible(tokenizer.vocab[i]) for i in pair] for pair in tokenizer.merges]
    assert ours == train_peer(texts), "the merges differ"
    ids = tokenizer.fast().encode_ordinary_batch(list(texts))
    assert ids == [one.ids for one in peer.encode_batch_fast(list(texts))], "the ids differ"
    assert ids[0] == tokenizer.encode(texts[0]), "the ids in pure Python differ"


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(ours: Sequence[float], peers: Sequence[float]) -> dict[str, Any]:
    """The peer's seconds over ours, round by round: above 1 we are faster."""
    each = [theirs / mine for mine, theirs in zip(ours, peers, strict=True)]
    return {"median": statistics.median(each), "range": [min(each), max(each)]}


def measure(texts: Sequence[str], rounds: int) -> dict[str, Any]:
    """All sides in turn, `rounds` times."""
    tokenizer = train_bpe(texts, VOCAB_SIZE, special_tokens=())
    peer, texts = open_in_peer(tokenizer), list(texts)
    check(tokenizer, peer, texts)
    size = sum(len(text.encode()) for text in texts)
    fast = tokenizer.fast()
    few, few_size = texts[:4], sum(len(text.encode()) for text in texts[:4])

    def pure_python() -> None:
        fresh = BPETokenizer(tokenizer.vocab, tokenizer.merges)  # nothing remembered yet
        for text in few:
            fresh.encode(text)

    sides: dict[str, Callable[[], object]] = {
        "train ours": lambda: train_bpe(texts, VOCAB_SIZE, special_tokens=()),
        "train peer": lambda: train_peer(texts),
        "encode fast": lambda: fast.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1),
        "encode peer": lambda: peer.encode_batch_fast(texts),
        "encode python": pure_python,
    }
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            took[name].append(seconds(side))
    rates = {name: (few_size if "python" in name else size) / 1e6 for name in sides}
    return {
        "bytes": size,
        "vocab_size": VOCAB_SIZE,
        "merges_equal": len(tokenizer.merges),
        "rounds": rounds,
        "versions": {name: version(name) for name in ("tokenizers", "tiktoken")},
        "seconds": {name: statistics.median(took[name]) for name in sides if "train" in name},
        "mb_per_second": {
            name: rates[name] / statistics.median(took[name]) for name in sides if "encode" in name
        },
        "training_time_over_peer": ratio(took["train peer"], took["train ours"]),
        "encoding_speed_over_peer": ratio(took["encode fast"], took["encode peer"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="save the result")
    parser.add_argument("--quick", action="store_true", help="five plays, one round")
    arguments = parser.parse_args()
    texts = [play.text for play in load_shakespeare()]
    result = measure(texts[:5] if arguments.quick else texts, 1 if arguments.quick else 7)
    print(json.dumps(result, indent=1))
    if arguments.json and not arguments.quick:
        print(save_result("tokenizer", result, "python benchmarks/tokenizer.py --json"))


if __name__ == "__main__":
    main()
