"""The plays, their split and their scenes."""

import pytest

from minilm.corpus import Play, load_shakespeare
from minilm.errors import ConfigError

HELD_OUT = {
    "validation": {"twelfth-night": "comedy", "henry-v": "history", "othello": "tragedy"},
    "test": {
        "a-midsummer-night-s-dream": "comedy",
        "richard-iii": "history",
        "macbeth": "tragedy",
    },
}
ALL = load_shakespeare()


def test_the_splits_share_no_play_and_leave_none_out():
    parts = {split: load_shakespeare(split) for split in ("train", "validation", "test")}
    assert {split: len(plays) for split, plays in parts.items()} == {
        "train": 32,
        "validation": 3,
        "test": 3,
    }
    slugs = [play.slug for plays in parts.values() for play in plays]
    assert sorted(slugs) == [play.slug for play in ALL]
    assert len(set(slugs)) == 38


@pytest.mark.parametrize("split", HELD_OUT)
def test_a_held_out_split_has_one_play_of_each_genre(split):
    assert {play.slug: play.genre for play in load_shakespeare(split)} == HELD_OUT[split]


@pytest.mark.parametrize("play", ALL, ids=lambda play: play.slug)
def test_scenes_cover_the_play_exactly(play: Play):
    assert play.scenes[0].start == 0
    assert play.scenes[-1].end == len(play.data)
    for one, following in zip(play.scenes, play.scenes[1:], strict=False):
        assert one.start < one.end == following.start
    for scene in play.scenes:  # cut between speeches, never inside one
        block = play.data[scene.start : scene.end].decode("utf-8")
        assert block.endswith("\n\n") and block.split("\n")[0].endswith(":")


@pytest.mark.parametrize("play", ALL, ids=lambda play: play.slug)
def test_a_play_is_blocks_of_name_and_speech(play: Play):
    assert "\r" not in play.text and "\n\n\n" not in play.text
    blocks = play.text.removesuffix("\n\n").split("\n\n")
    for block in blocks:
        name, *lines = block.split("\n")
        assert name.endswith(":") and lines and all(lines), block[:80]


def test_no_play_is_in_two_splits_under_two_names():
    """Two different plays share at most a few lines: no 200 bytes of a held-out play stand in
    training."""
    train = "".join(play.text for play in load_shakespeare("train"))
    for split in HELD_OUT:
        for play in load_shakespeare(split):
            pieces = [play.text[at : at + 200] for at in range(0, len(play.text), 5000)]
            assert not [piece for piece in pieces if piece in train]


def test_the_size_of_the_corpus():
    assert sum(len(play.data) for play in load_shakespeare("train")) == 4_026_431
    assert sum(len(play.data) for play in load_shakespeare("test")) == 353_576


def test_a_wrong_split_is_refused():
    with pytest.raises(ConfigError, match="split='dev'; use one of train, validation, test"):
        load_shakespeare("dev")
