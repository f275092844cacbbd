"""SmolLM2 on the test plays: bits per byte, an excerpt, what it knows by heart, what it costs.

    python benchmarks/smollm2.py
    python benchmarks/smollm2.py --quick    # a few windows of each part; saves nothing

Writes minilm/assets/results/smollm2.json. Takes about 40 minutes of one core and 2 GB.

The model sees at most 2,048 tokens at once and reads every play through windows that overlap by
half. The excerpt is the first 8,000 bytes of the first test play, by the same windows. Chapter 07
scores the first scene of Macbeth again, and compares it with that scene's bits. "By heart": the
model gets one line of a play, with its end, after the begin token; a hit is a token of the text
that follows which is also the model's most probable one, given all true tokens before it. As many
tokens as are hit before the first miss it would have written itself by greedy choice. "Last word":
whether the first token of the line's own last word is a hit.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm import assets
from minilm.corpus import Play, load_shakespeare
from minilm.measure import Score, score
from minilm.model import Transformer, generate
from minilm.pretrained import load_pretrained
from minilm.results import save_result

WINDOW = 2048
EXCERPT_BYTES = 8000
CONTINUATION = 32  # tokens
N_LINES = 200  # drawn at random, beside the famous ones
FAMOUS = {
    "a-midsummer-night-s-dream": (
        "The course of true love never did run smooth;",
        "Love looks not with the eyes, but with the mind;",
        "Over hill, over dale,",
        "I know a bank where the wild thyme blows,",
        "The lunatic, the lover and the poet",
        "If we shadows have offended,",
        "Lord, what fools these mortals be!",
    ),
    "macbeth": (
        "When shall we three meet again",
        "If it were done when 'tis done, then 'twere well",
        "Is this a dagger which I see before me,",
        "Double, double toil and trouble;",
        "By the pricking of my thumbs,",
        "To-morrow, and to-morrow, and to-morrow,",
        "It is too full o' the milk of human kindness",
        "Something wicked this way comes.",
        "Told by an idiot, full of sound and fury,",
    ),
    "richard-iii": (
        "Now is the winter of our discontent",
        "I am determined to prove a villain",
        "A horse! a horse! my kingdom for a horse!",
    ),
}
LOAD = """
import time
start = time.perf_counter()
from minilm.pretrained import load_pretrained
imported = time.perf_counter()
load_pretrained()
done = time.perf_counter()
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(imported - start, done - imported, int(peak) // 1024)
"""


def excerpt(play: Play, n_bytes: int) -> Play:
    """The beginning of a play's first scene."""
    text = play.data[:n_bytes].decode("utf-8", errors="ignore")
    return replace(play, text=text, scenes=(replace(play.scenes[0], end=len(text.encode())),))


def as_json(result: Score) -> dict[str, Any]:
    """Everything in a score, so that the chapter can build it again."""
    plays = {}
    for slug, bits, n_bytes in zip(result.plays, result.bits, result.n_bytes, strict=True):
        plays[slug] = {
            "bits_per_byte": float(bits.sum() / n_bytes.sum()),
            "bits": [round(float(each), 3) for each in bits],
            "n_bytes": [int(each) for each in n_bytes],
        }
    low, high = result.interval()
    return {"bits_per_byte": result.bits_per_byte, "low": low, "high": high, "plays": plays}


@torch.no_grad()
def log_probs(model: Transformer, ids: Sequence[int], begin_id: int) -> tuple[Any, Any]:
    """For each id its log-probability after a begin token, and whether it was the most probable."""
    row = torch.tensor([[begin_id, *ids]])
    states = model.states(row[:, :-1])[0]
    wide = torch.cat([model.logits(part).log_softmax(dim=-1) for part in states.split(256)])
    chosen = wide.gather(1, row[0, 1:, None])[:, 0].double()
    return chosen.numpy(), (wide.argmax(dim=-1) == row[0, 1:]).numpy()


def begin_tokens(model: Transformer, plays: Sequence[Play], n_tokens: int) -> dict[str, float]:
    """Bits per byte of the beginnings of plays, by the token that stands before them."""
    tokenizer: Any = model.tokenizer
    result = {}
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        bits = n_bytes = 0.0
        for play in plays:
            ids = tokenizer.encode(play.text[: 6 * n_tokens])[:n_tokens]
            chosen, _ = log_probs(model, ids, tokenizer.special_tokens[name])
            bits -= float(chosen.sum()) / math.log(2)
            n_bytes += len(tokenizer.decode_bytes(ids))
        result[name] = bits / n_bytes
    return result


def by_heart(model: Transformer, play: Play, start: int) -> dict[str, Any]:
    """What the model knows of the text after the line that starts at a character of a play."""
    tokenizer: Any = model.tokenizer
    prompt = play.text[start : play.text.index("\n", start) + 1]
    line = tokenizer.encode(prompt)
    after = tokenizer.encode(play.text[start + len(prompt) :][: 8 * CONTINUATION])[:CONTINUATION]
    n_before = len(tokenizer.encode(prompt.rstrip().rpartition(" ")[0]))
    chosen, hits = log_probs(model, [*line, *after], model.begin_id)
    last_word = bool(hits[n_before])
    chosen, hits = chosen[len(line) :], hits[len(line) :]
    return {
        "play": play.slug,
        "prompt": prompt.strip(),
        "last_word": last_word,
        "hits": [int(hit) for hit in hits],
        "by_heart": len(hits) if hits.all() else int(hits.argmin()),
        "bits_per_byte": -float(chosen.sum()) / math.log(2) / len(tokenizer.decode_bytes(after)),
    }


def random_lines(plays: Sequence[Play], n_lines: int) -> list[tuple[Play, int]]:
    """Lines of verse or prose that four more lines of the same speech follow, drawn once."""
    found = []
    for play in plays:
        at = 0
        for speech in play.text.split("\n\n"):
            lines = speech.split("\n")
            starts = at + np.cumsum([0, *(len(line) + 1 for line in lines)])
            found += [(play, int(start)) for start in starts[1 : len(lines) - 4]]
            at += len(speech) + 2
    chosen = np.random.default_rng(0).choice(len(found), size=n_lines, replace=False)
    return [found[i] for i in sorted(chosen)]


def recall(model: Transformer, plays: Sequence[Play], n_lines: int, quick: bool) -> dict[str, Any]:
    """What the model knows by heart: famous lines with what it writes, and random lines."""
    tokenizer: Any = model.tokenizer
    famous = []
    for play in plays:
        for line in FAMOUS[play.slug][: 1 if quick else None]:
            famous.append(by_heart(model, play, play.text.index(line + "\n")))
    prompts = [[model.begin_id, *tokenizer.encode(each["prompt"] + "\n")] for each in famous]
    written = generate(model, prompts, 4 if quick else CONTINUATION, temperature=0.0)
    for each, ids in zip(famous, written, strict=True):
        each["written"] = tokenizer.decode(ids)
        print(f"{each['by_heart']:3} by heart, {sum(each['hits'])} hits: {each['prompt']}")
    lines = [by_heart(model, *place) for place in random_lines(plays, n_lines)]
    for name, group in (("famous", famous), ("random", lines)):
        heart, last = (np.mean([each[key] for each in group]) for key in ("by_heart", "last_word"))
        print(f"{name}: {heart:.2f} tokens by heart, last word {last:.2f}", flush=True)
    return {"famous": famous, "random": lines}


def load_cost() -> dict[str, float]:
    """Seconds and peak memory of loading, in a process of its own (Linux)."""
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imports, seconds, megabytes = (float(word) for word in done.stdout.split())
    return {"import_seconds": imports, "load_seconds": seconds, "peak_megabytes": megabytes}


def speed(model: Transformer, n_tokens: int) -> float:
    """Tokens a second of writing after a short prompt; every token reads the whole text again."""
    prompt = [model.begin_id, *model.tokenizer.encode("The quick brown fox")]
    start = time.perf_counter()
    generate(model, [prompt], n_tokens, temperature=0.0)
    return n_tokens / (time.perf_counter() - start)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few windows; save nothing")
    quick: bool = parser.parse_args().quick
    result: dict[str, Any] = {"load": load_cost()}
    print(result["load"], flush=True)
    model, plays = load_pretrained(), load_shakespeare("test")
    model.max_seq_len = WINDOW
    path: Path = assets.fetch("smollm2-135m")
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result["bytes_on_disk"] = path.stat().st_size
    result["threads"] = torch.get_num_threads()
    result["tokens_per_second"] = speed(model, 4 if quick else 32)
    result["window"], result["excerpt_bytes"] = WINDOW, EXCERPT_BYTES
    scored = tuple(excerpt(play, 1000) for play in plays) if quick else plays
    part = excerpt(plays[0], 1000 if quick else EXCERPT_BYTES)
    result["excerpt"] = as_json(score(model, [part], batch_size=1))
    print("excerpt", result["excerpt"]["bits_per_byte"], flush=True)
    validation = load_shakespeare("validation")
    result["begin"] = begin_tokens(model, validation, 200 if quick else WINDOW)
    print("begin", result["begin"], flush=True)
    result["recall"] = recall(model, plays, 4 if quick else N_LINES, quick)
    start = time.perf_counter()
    result["whole"] = as_json(score(model, scored, batch_size=1))
    result["whole"]["seconds"] = time.perf_counter() - start
    whole = result["whole"]
    print(f"whole {whole['bits_per_byte']:.4f} ({whole['low']:.4f} to {whole['high']:.4f})")
    if not quick:
        path = save_result("smollm2", result, "python benchmarks/smollm2.py")
        print("wrote", path.name)


if __name__ == "__main__":
    main()
