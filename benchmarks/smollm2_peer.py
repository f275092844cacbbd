"""What `transformers` makes of SmolLM2's GGUF file: logits after the fox, and 16 greedy tokens.

    python benchmarks/smollm2_peer.py

Writes minilm/assets/results/smollm2_peer.json. Takes half a minute of one core and 2 GB; the
decoding of the file takes most of it, which is why chapter 07 does not wait for it. The result
holds the five largest logits and every 64th one; the package's tests compare all of them.
"""

from importlib.metadata import version

import torch
import transformers

from minilm import assets
from minilm.pretrained import load_gguf
from minilm.results import save_result

PROMPT = "The quick brown fox jumps over the lazy"
EVERY = 64
N_TOKENS = 16


def main() -> None:
    """Ask and save."""
    transformers.utils.logging.set_verbosity_error()
    path = assets.fetch("smollm2-135m")
    ids = load_gguf(path).tokenizer.encode(PROMPT)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(row).logits[0, -1]
        new = model.generate(
            row, min_new_tokens=N_TOKENS, max_new_tokens=N_TOKENS, do_sample=False
        )[0, len(ids) :]
    best = logits.topk(5)
    payload = {
        "transformers": version("transformers"),
        "prompt": PROMPT,
        "ids": ids,
        "best": {
            "ids": best.indices.tolist(),
            "logits": [round(v, 4) for v in best.values.tolist()],
        },
        "every": EVERY,
        "logits": [round(v, 4) for v in logits[::EVERY].tolist()],
        "greedy": new.tolist(),
    }
    print("wrote", save_result("smollm2_peer", payload, "python benchmarks/smollm2_peer.py").name)


if __name__ == "__main__":
    main()
