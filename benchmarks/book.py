"""The book model: from the folder of its training run to the package, with its measurements.

    minilm train --preset book --folder RUN      # the training itself, at most half an hour
    python benchmarks/book.py RUN                # about ten minutes of two cores

Copies the model of the run to minilm/assets/book/ and writes minilm/assets/results/book.json: the
config, the log, bits per byte on the test plays, the excerpt that chapter 10 scores again, what a
shorter context costs on the validation plays, and n-grams fitted on as many bytes as the model had
read at each look.
"""

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilm.checkpoint import load_model
from minilm.corpus import Play, load_shakespeare
from minilm.measure import bits_per_byte, compare, score
from minilm.model import Transformer, count_parameters, generate
from minilm.ngram import count_ngrams, kneser_ney
from minilm.results import save_result
from minilm.training import TrainConfig

ASSETS = Path(__file__).resolve().parents[1] / "minilm" / "assets"
EXCERPT_BYTES = 8000
CONTEXTS = (4, 8, 16, 32, 64, 128, 256)
ORDER = 7  # of the best n-gram of chapter 01 on the validation plays


def excerpt(play: Play) -> Play:
    """The beginning of a play's first scene."""
    text = play.data[:EXCERPT_BYTES].decode("utf-8", errors="ignore")
    return replace(play, text=text, scenes=(replace(play.scenes[0], end=len(text.encode())),))


def by_context(model: Transformer, plays: tuple[Play, ...]) -> dict[int, float]:
    """Bits per byte when the model may look back over so many tokens at most."""
    full, result = model.max_seq_len, {}
    for context in CONTEXTS:
        model.max_seq_len = context
        result[context] = bits_per_byte(model, plays)
        print(f"context {context:4}: {result[context]:.4f}", flush=True)
    model.max_seq_len = full
    return result


def counted(log: list[dict[str, Any]], plays: tuple[Play, ...]) -> list[dict[str, float]]:
    """Bits per byte of n-grams fitted on what the model had read at each look, up to all plays."""
    data = [play.data for play in load_shakespeare("train")]
    order = np.random.default_rng(0).permutation(len(data))  # plays in no order of time or kind
    text = [data[i] for i in order]
    total, result = sum(map(len, text)), []
    for look in log:
        left, part = min(look["bytes"], total), []
        for piece in text:
            part.append(piece[:left])
            left -= len(part[-1])
        held_out = bits_per_byte(kneser_ney(count_ngrams([p for p in part if p], ORDER)), plays)
        result.append({"bytes": sum(map(len, part)), "bits_per_byte": held_out})
        if look["bytes"] >= total:
            break
    return result


def speed(model: Transformer) -> float:
    """Tokens a second of writing one text."""
    start = time.perf_counter()
    generate(model, [[model.begin_id]], 200, temperature=0.0)
    return 200 / (time.perf_counter() - start)


def main() -> None:
    """Copy, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of `minilm train --preset book`")
    run: Path = parser.parse_args().run
    model, target = load_model(run / "model"), ASSETS / "book"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run / "model", target)
    config = TrainConfig.from_json((run / "train.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    train, validation, test = (load_shakespeare(s) for s in ("train", "validation", "test"))
    n_bytes = sum(len(play.data) for play in train)
    n_tokens = sum(len(model.tokenizer.encode(play.text)) for play in train)
    steps = [record for record in records if "loss" in record]
    log = []
    for look in (record for record in records if "validation_loss" in record):
        tokens = look["step"] * config.batch_size * config.seq_len
        at = max((one for one in steps if one["step"] <= look["step"]), key=lambda one: one["step"])
        log.append(
            {
                "step": look["step"],
                "seconds": at["seconds"],
                "tokens": tokens,
                "bytes": round(tokens * n_bytes / n_tokens),
                "loss": at["loss"],
                "validation": look["validation_loss"],
                "bits_per_byte": look["bits_per_byte"],
                "sample": look.get("sample", ""),
            }
        )
    best = min(log, key=lambda look: look["validation"])
    parameters = count_parameters(config.model)
    attention = 6 * config.model.n_layers * 2 * config.model.d_model * config.seq_len
    ours, ngram = (
        score(each, test)
        for each in (model, kneser_ney(count_ngrams([p.data for p in train], ORDER)))
    )
    gap, (low, high) = compare(ours, ngram), ours.interval()
    print(f"test {ours.bits_per_byte:.4f}, {ORDER}-gram {ngram.bits_per_byte:.4f}", flush=True)
    part = excerpt(test[0])
    result = {
        "config": asdict(config),
        "parameters": parameters,
        "bytes_on_disk": sum(file.stat().st_size for file in target.iterdir()),
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "epochs": steps[-1]["tokens"] / n_tokens,
        "seconds": steps[-1]["seconds"],
        "train_flops": (6 * parameters + attention) * steps[-1]["tokens"],
        "losses": [{"step": one["step"], "loss": one["loss"]} for one in steps],
        "log": log,
        "best_step": best["step"],
        "validation": bits_per_byte(model, validation),
        "test": {
            "bits_per_byte": ours.bits_per_byte,
            "low": low,
            "high": high,
            "plays": {
                slug: float(bits.sum() / n.sum())
                for slug, bits, n in zip(ours.plays, ours.bits, ours.n_bytes, strict=True)
            },
        },
        "ngram": {
            "order": ORDER,
            "test": ngram.bits_per_byte,
            "ahead": [-gap.high, -gap.mean, -gap.low],  # how many fewer bits per byte we need
        },
        "excerpt": {
            "play": part.slug,
            "start": 0,
            "bytes": len(part.data),
            "bits_per_byte": bits_per_byte(model, [part]),
        },
        "contexts": by_context(model, validation),
        "counted": counted(log, validation),
        "tokens_per_second": speed(model),
        "threads": torch.get_num_threads(),
    }
    if not math.isfinite(result["validation"]):
        raise SystemExit("the model's score is not a number")
    print("wrote", save_result("book", result, "python benchmarks/book.py RUN").name)


if __name__ == "__main__":
    main()
