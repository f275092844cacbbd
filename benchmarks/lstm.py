"""The LSTM of chapter 04, trained to its end: its losses, its score, and what it writes.

    python benchmarks/lstm.py
    python benchmarks/lstm.py --quick    # a few steps of everything; saves nothing

Writes minilm/assets/results/lstm.json. Takes a minute of one core, half of it training; the score
on the test plays takes most of the rest. The chapter trains the first fifth again, with the same
settings, and compares the losses. The weights are not kept, only their SHA-256: on one machine and
one thread the run ends with the same bits.
"""

import argparse
import hashlib
import math
import time
from typing import Any

import numpy as np
import torch

from minilm.corpus import load_shakespeare
from minilm.measure import score
from minilm.recurrent import LSTMLanguageModel, train_language_model
from minilm.results import save_result

SIZE = {"d_embed": 64, "d_hidden": 192}
SETTINGS: dict[str, Any] = {"steps": 1450, "batch_size": 16, "seq_len": 32, "learning_rate": 0.015}
EXCERPT_BYTES, WINDOW = 8192, 512
TEMPERATURES = (0.0, 0.5, 0.8, 1.2)
PROMPT = "KING HENRY:\n"


def two_readings(model: LSTMLanguageModel, text: bytes) -> dict[str, float]:
    """Bits per byte of the same bytes, the state carried all the way and in windows."""
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    half = WINDOW // 2
    carried = model.log_probs(ids[None])[0, half:]
    starts = range(0, len(ids) - half, half)
    windows = model.log_probs(np.stack([ids[start : start + WINDOW] for start in starts]))
    both = {"carried": carried, "windows": windows[:, half:]}
    return {name: -float(one.mean()) / math.log(2) for name, one in both.items()}


def written(model: LSTMLanguageModel) -> dict[str, Any]:
    """A sample at each temperature, one long one, and how fast they come."""
    samples = {str(t): model.sample(PROMPT, 160, temperature=t, seed=1) for t in TEMPERATURES}
    begun = time.perf_counter()
    long = model.sample(PROMPT, 1500, temperature=0.8, seed=2)
    rate = 1500 / (time.perf_counter() - begun)
    return {"prompt": PROMPT, "samples": samples, "long": long, "tokens_per_second": rate}


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps; save nothing")
    quick: bool = parser.parse_args().quick
    torch.set_num_threads(1)
    train, test = load_shakespeare("train"), load_shakespeare("test")
    torch.manual_seed(0)
    model = LSTMLanguageModel(**SIZE)
    begun = time.perf_counter()
    texts = [play.data for play in train]
    stop_after = 20 if quick else None
    losses = train_language_model(model, texts, **SETTINGS, stop_after=stop_after)
    seconds = time.perf_counter() - begun
    print(f"{len(losses)} steps in {seconds:.0f} s, loss {np.mean(losses[-25:]):.3f}", flush=True)
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    excerpt = load_shakespeare("validation")[0].data[: 2048 if quick else EXCERPT_BYTES]
    result: dict[str, Any] = {
        "size": SIZE,
        "settings": SETTINGS,
        "seconds": seconds,
        "losses": [round(loss, 4) for loss in losses],
        "sha256": hashlib.sha256(weights).hexdigest(),
        "excerpt_bytes": len(excerpt),
        "excerpt": two_readings(model, excerpt),
        **written(model),
    }
    print("excerpt", result["excerpt"], flush=True)
    if quick:
        return
    on_test = score(model, test)
    low, high = on_test.interval()
    result |= {"bits_per_byte": on_test.bits_per_byte, "low": low, "high": high}
    print(f"test plays: {on_test.bits_per_byte:.4f} ({low:.4f} to {high:.4f})")
    print("wrote", save_result("lstm", result, "python benchmarks/lstm.py").name)


if __name__ == "__main__":
    main()
