"""In-context learning, accuracy against 0 to 8 shots, and the tasks made from the plays.

    python benchmarks/in_context.py
    python benchmarks/in_context.py --quick         # a few items of each; saves nothing
    python benchmarks/in_context.py --fresh book    # ask a model again that has been asked

Writes minilm/assets/results/in_context.json. Takes about 10 minutes of one core and 1.5 GB. Each
part is saved when it is done, and what is there is not asked again.

Three tasks of one line an item, each asked after 0, 1, 2, 4 and 8 solved items. *Copy*: a word, and
the same word. *Name or word*: a speaker of the plays, or a word of them. *Opposite*: a word, and
its opposite. "Name or word" is asked a second time with the answers of the shots drawn at random.
SmolLM2-135M and the book model answer the same items. Then both answer the tasks of
`minilm.evaluation.TASKS` on the validation plays.
"""

import argparse
import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import minilm
from minilm.corpus import load_shakespeare
from minilm.errors import DataError
from minilm.evaluation import TASKS, Answers, Item, answer, few_shot, shuffled
from minilm.model import Transformer
from minilm.results import load_result, save_result

MODELS = ("book", "smollm2-135m")
SHOTS = (0, 1, 2, 4, 8)
N_ITEMS, N_OF_PLAYS, N_KEPT = 60, 45, 4
COMMON = 8  # tokens with which the options of an item may begin alike
OPPOSITES = """\
day night, love hate, life death, true false, young old, rich poor, hot cold, good evil, strong
weak, black white, high low, friend enemy, early late, heaven hell, war peace, sweet bitter, joy
sorrow, wise foolish, begin end, first last, open shut, come go, give take, near far, light dark,
east west, north south, brother sister, father mother, son daughter, man woman, rise fall, laugh
weep, hard soft, thick thin, long short, big small, wet dry, full empty, sick healthy, quick slow,
truth lie, honour shame, victory defeat, master servant, hope despair, summer winter, before
after, up down, win lose, buy sell, ask answer, remember forget, sleep wake, clean dirty, king
queen, boy girl, husband wife, inside outside, above below"""


def words_of_the_plays() -> tuple[list[str], list[str]]:
    """The most frequent speakers' names of one word, and words of the text that are frequent."""
    names: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for play in load_shakespeare("train"):
        names.update(re.findall(r"^([A-Z]{4,10}):$", play.text, re.M))
        words.update(re.findall(r"(?<=[a-z] )[a-z]{4,9}(?=[ ,;.])", play.text))
    return [name.capitalize() for name, _ in names.most_common(100)], [
        word for word, _ in words.most_common(900)[300:]
    ]


def with_options(
    asked: str, right: str, others: Sequence[str], number: int, rng: np.random.Generator
) -> Item:
    """`asked: right`, and three other answers of the same task."""
    wrong: list[str] = []
    while len(wrong) < 3:
        other = others[rng.integers(len(others))]
        wrong += [other] * (other not in (asked, right, *wrong))
    return shuffled(f"{asked}:", f" {right}", [f" {each}" for each in wrong], str(number), rng)


def build_tasks(n_items: int) -> dict[str, tuple[Item, ...]]:
    """The items of each task, equal in every run."""
    rng = np.random.default_rng(0)
    names, words = words_of_the_plays()
    chosen = rng.permutation(words)[:n_items].tolist()
    copied = [with_options(word, word, words, i, rng) for i, word in enumerate(chosen)]
    half = n_items // 2
    both = [(name, 0) for name in rng.permutation(names)[:half].tolist()]
    both += [(word.capitalize(), 1) for word in rng.permutation(words)[: n_items - half].tolist()]
    both = [both[i] for i in rng.permutation(n_items)]
    kinds = [Item(f"{word}:", (" name", " word"), kind, str(i))
             for i, (word, kind) in enumerate(both)]  # fmt: skip
    pairs = [pair.split() for pair in re.split(r",\s+", OPPOSITES)]
    others = [b for _, b in pairs]
    opposites = [with_options(a, b, others, i, rng) for i, (a, b) in enumerate(pairs[:n_items])]
    return {"copy": tuple(copied), "name or word": tuple(kinds), "opposite": tuple(opposites)}


def as_json(answers: Answers, kept: int = 0) -> dict[str, Any]:
    """Accuracy with interval, each choice, and all that it takes to redo the first items."""
    result = answers.score()
    low, high = result.interval()
    whole = {
        "accuracy": result.bits_per_byte, "low": low, "high": high,
        "per character": answers.score("characters").bits_per_byte,
        "targets": answers.targets().tolist(), "chosen": answers.chosen().tolist(),
        "clusters": [item.cluster for item in answers.items],
        "confidence": answers.confidence().round(4).tolist(),
    }  # fmt: skip
    firsts = zip(answers.items[:kept], answers.log_probs, strict=False)
    whole["first"] = [
        {"context": item.context, "options": item.options, "answer": item.answer,
         "log_probs": log_probs.round(4).tolist()}
        for item, log_probs in firsts
    ]  # fmt: skip
    return whole


class Kept:
    """The keys and values of a text's beginning, for every row that goes on from it."""

    def __init__(self) -> None:
        self.parts: tuple[Tensor, ...] = ()

    def extend(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the first, put it before all others."""
        if not self.parts:
            self.parts = k, v, positions
            return self.parts
        kept = [part.expand(len(k), *part.shape[1:]) for part in self.parts]
        k, v = torch.cat([kept[0], k], 2), torch.cat([kept[1], v], 2)
        return k, v, torch.cat([kept[2], positions.expand(len(k), -1)], 1)


class SharedBeginning:
    """A model that reads once what all rows of a call begin with: the context of an item."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.tokenizer, self.max_seq_len = model, model.tokenizer, model.max_seq_len

    @torch.no_grad()
    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        """As the model's own."""
        rows = torch.from_numpy(ids)
        n = int((rows == rows[0]).all(dim=0).long().cumprod(0).sum())  # ids that all rows share
        inputs = F.pad(rows, (1, 0), value=self.model.begin_id)[:, :-1]
        places, kv = torch.arange(rows.shape[1])[None], [Kept() for _ in self.model.layers]
        first = self.model.states(inputs[:1, : n + 1], places[:, : n + 1], kv)
        states = first.expand(len(rows), -1, -1)
        if inputs.shape[1] > n + 1:
            rest = self.model.states(inputs[:, n + 1 :], places[:, n + 1 :], kv)
            states = torch.cat([states, rest], 1)
        known = max(0, n - COMMON)  # ids whose log-probability nobody asks for
        wide = self.model.logits(states[:, known:]).log_softmax(dim=-1)
        chosen = wide.gather(-1, rows[:, known:, None])[..., 0]
        return F.pad(chosen, (known, 0), value=torch.nan).double().numpy()


def ask(model: Transformer, items: Sequence[Item]) -> Answers:
    """As `minilm.evaluation.answer`, with each context read once."""
    shared = SharedBeginning(model)
    each = [answer(shared, [item], batch_size=len(item.options)).log_probs[0] for item in items]
    if np.isnan(np.concatenate(each)).any():
        raise RuntimeError(
            "options of an item begin alike in two tokens; answer() reads them whole"
        )
    return Answers(tuple(items), tuple(each))


def ask_all(model: Transformer, n_items: int, n_of_plays: int) -> Iterator[tuple[str, str, Any]]:
    """Each part of the result: its group, its task, and a function that makes it."""
    tasks, plays = build_tasks(N_ITEMS), load_shakespeare("validation")
    rng = np.random.default_rng(1)
    at_random = [replace(item, answer=int(rng.integers(2))) for item in tasks["name or word"]]
    pools = {task: (items, items) for task, items in tasks.items()}
    pools["random answers"] = (tasks["name or word"], at_random)
    for task, (items, pool) in pools.items():
        made = (few_shot(items[:n_items], pool, shots) for shots in SHOTS)
        yield "curves", task, lambda made=made: [
            as_json(ask(model, prompts), N_KEPT if shots == 4 else 0)
            for prompts, shots in zip(made, SHOTS, strict=True)
        ]  # fmt: skip
    for task, make in TASKS.items():
        yield "tasks", task, lambda make=make: as_json(ask(model, make(plays, n_of_plays)))


def main() -> None:
    """Ask and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few items; save nothing")
    parser.add_argument("--fresh", nargs="*", default=[], help="models to ask again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"shots": SHOTS, "models": {}}
    with contextlib.suppress(DataError):  # no result yet
        result = load_result("in_context")["result"]
    for name in MODELS:
        empty: dict[str, Any] = {"curves": {}, "tasks": {}}
        again = arguments.quick or name in arguments.fresh
        parts = empty if again else result["models"].get(name, empty)
        result["models"][name] = parts
        model = minilm.load(name)
        for group, task, make in ask_all(
            model, *((4, 3) if arguments.quick else (N_ITEMS, N_OF_PLAYS))
        ):
            if task in parts[group]:
                continue
            begun = time.perf_counter()
            made = parts[group][task] = make()
            points = made if isinstance(made, list) else [made]
            seconds = time.perf_counter() - begun
            print(f"{name} {task} in {seconds:.0f} s:", [round(p["accuracy"], 3) for p in points])
            if not arguments.quick:
                save_result("in_context", result, "python benchmarks/in_context.py")


if __name__ == "__main__":
    main()
