"""The page "How fast is it": tables drawn at build time from the committed benchmarks."""

from __future__ import annotations

import json
from typing import Any

from bookpages import ROOT, Computed, row, table
from sphinx.application import Sphinx


class Benchmark(Computed):
    """A table of one committed result, and a line that says how it was made."""

    benchmark: str

    def rows(self, result: dict[str, Any]) -> list[str]:
        raise NotImplementedError

    def markdown(self) -> str:
        path = ROOT / "minilm" / "assets" / "results" / f"{self.benchmark}.json"
        self.env.note_dependency(str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        return "\n".join([*self.rows(content["result"]), "", made(content)])


def made(content: dict[str, Any]) -> str:
    """How a committed result came to be, in one paragraph."""
    how, versions = content["made"], {}
    for source in (how["versions"], content["result"].get("versions", {})):
        versions.update(source)
    machine = how["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Made by `{how['command']}` at commit `{how['commit']}` on {how['date']}: "
        f"{machine['processor']}, {machine['cores']} cores; {peers}."
    )


def times(ratio: dict[str, Any]) -> str:
    """A ratio with its range over the rounds."""
    low, high = ratio["range"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


class SpeedTraining(Benchmark):
    """The speedrun of chapter 10: seconds to the reference's final loss."""

    benchmark = "speedrun"

    def rows(self, result: dict[str, Any]) -> list[str]:
        reference, ours = result["reference"], result["ours"]
        lines = table(
            "Seed", "Reference: loss", "Reference: seconds", "minilm: seconds to it", "Sooner"
        )
        for theirs, mine in zip(reference["runs"], ours["runs"], strict=True):
            sooner = theirs["seconds"] / mine["to_target"]
            cells = f"{theirs['loss']:.3f}", f"{theirs['seconds']:.0f}", f"{mine['to_target']:.1f}"
            lines.append(row(str(theirs["seed"]), *cells, f"{sooner:.1f} times"))
        return lines


class SpeedTokenizer(Benchmark):
    """Training and encoding of byte-pair encodings beside Hugging Face's."""

    benchmark = "tokenizer"

    def rows(self, result: dict[str, Any]) -> list[str]:
        took, rate = result["seconds"], result["mb_per_second"]
        train, encode = result["training_time_over_peer"], result["encoding_speed_over_peer"]
        n, size = result["vocab_size"], result["bytes"] / 1e6
        return [
            *table("What", "minilm", "Hugging Face tokenizers", "Ratio, median (range)"),
            row(
                f"Learning {n:,} tokens from {size:.1f} MB",
                f"{took['train ours']:.2f} s",
                f"{took['train peer']:.2f} s",
                f"{times(train)} times its seconds",
            ),
            row(
                "Encoding, `BPETokenizer.fast()` (tiktoken)",
                f"{rate['encode fast']:.1f} MB/s",
                f"{rate['encode peer']:.1f} MB/s",
                f"{times(encode)} times its rate",
            ),
            row("Encoding, pure Python", f"{rate['encode python']:.2f} MB/s", "", ""),
        ]


class SpeedDecoding(Benchmark):
    """SmolLM2-135M writing: tokens per second beside the peers and the bandwidth's limit."""

    benchmark = "decode"

    def rows(self, result: dict[str, Any]) -> list[str]:
        head = "Side", "Weights", "Batch", "Prefill, tokens/s", "Decoding, tokens/s", "Of the limit"
        lines = table(*head)
        for one in result["rows"]:
            decode = one["decode_tokens_per_s"]
            limit = (
                f"{decode / one['limit_tokens_per_s']:.0%}" if one.get("limit_tokens_per_s") else ""
            )
            prefill = one.get("prefill_tokens_per_s")
            rates = f"{prefill:,.0f}" if prefill else "", f"{decode:,.1f}"
            lines.append(row(one["side"], one["weights"], str(one["batch"]), *rates, limit))
        ratios = table("minilm", "Peer", "Batch", "Decoding rate over the peer's, median (range)")
        for one in result["ratios"]:
            ratios.append(row(one["ours"], one["peer"], str(one["batch"]), times(one)))
        return [*lines, "", *ratios]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("speed-training", SpeedTraining)
    app.add_directive("speed-tokenizer", SpeedTokenizer)
    app.add_directive("speed-decoding", SpeedDecoding)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
