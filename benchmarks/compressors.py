"""What gzip, bz2 and xz pay for each scene of the test plays, alone and after the training plays.

    python benchmarks/compressors.py

Writes minilm/assets/results/compressors.json: for each compressor and play the size in bytes of
what is compressed up to the end of each scene. The price of a scene is the difference of two such
sizes. Alone, the first size is 0, so that the first scene pays for the file's header. After the
training plays, it is the size of the compressed training plays. Takes about 4 minutes of one core.
"""

import bz2
import gzip
import lzma
from collections.abc import Callable

from minilm.corpus import Play, load_shakespeare
from minilm.results import save_result

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, compresslevel=9, mtime=0),
    "bz2": lambda data: bz2.compress(data, compresslevel=9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def prefix_sizes(compress: Callable[[bytes], bytes], before: bytes, play: Play) -> list[int]:
    """Compressed size of `before` alone, then of `before` and the play up to each scene's end."""
    first = len(compress(before)) if before else 0
    return [first, *(len(compress(before + play.data[: s.end])) for s in play.scenes)]


def main() -> None:
    """Compress every prefix and save the sizes."""
    train = b"".join(play.data for play in load_shakespeare("train"))
    result = {}
    for name, compress in COMPRESSORS.items():
        for label, before in ((f"{name} alone", b""), (f"{name} primed", train)):
            plays = load_shakespeare("test")
            result[label] = {p.slug: prefix_sizes(compress, before, p) for p in plays}
            spent = sum(sizes[-1] - sizes[0] for sizes in result[label].values())
            print(f"{label}: {8 * spent / sum(len(p.data) for p in plays):.3f} bits per byte")
    print("wrote", save_result("compressors", result, "python benchmarks/compressors.py").name)


if __name__ == "__main__":
    main()
