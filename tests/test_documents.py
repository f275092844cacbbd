"""Documents: what is read, cleaned, dropped, and that duplicates are found as theory says."""

import gzip
import hashlib
import re
from collections import Counter
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_dirty_corpus import BANDS, ROWS, expected_share, planted

from minilm import documents as module
from minilm.cli import main
from minilm.corpus import load_shakespeare
from minilm.data import TokenStore
from minilm.documents import (
    QUALITY_RULES,
    Deduplicator,
    Document,
    LSHIndex,
    Report,
    clean,
    contamination,
    expected_recall,
    installed_documents,
    jaccard,
    license_allows,
    prepare,
    read_documents,
    shingles,
    signature,
)
from minilm.errors import ConfigError, DataError
from minilm.results import load_result


@pytest.fixture(scope="module")
def plays() -> list[str]:
    return [play.text for play in load_shakespeare("train")]


# Cleaning and filters

strange = st.text(
    st.sampled_from(
        " \t\n\r\x00\x0b\x0c\x1b\x85\u2028\u200b\ufeff\xad\u0301\u0308\ud800\u1e9b\u0323eaö́中"
    )
)


@settings(max_examples=300, deadline=None)
@given(strange | st.text())
def test_clean_is_stable_and_touches_no_letter(text):
    done = clean(text)
    assert clean(done) == done
    done.encode()
    assert not re.search(r"\n{3}|[ \t]\n|\r|\x00|\ufeff", done)
    if text.isascii():
        assert re.sub(r"\s", "", done) == re.sub(r"[\s\x00-\x1f\x7f]", "", text)


def test_clean():
    assert clean("\n\nA\x1b[0m  b\r\nc\t\x00\r\r\r\rd\x0c") == "A[0m  b\nc\n\nd"
    assert clean("e\u0301\u00ad\ufeff") == "é"
    assert clean(" " * 10**6 + "x" + " " * 10**6) == " " * 10**6 + "x"  # in linear time
    assert clean("To be, or NOT to be: that's\n  the question.") == (
        "To be, or NOT to be: that's\n  the question."
    )
    assert clean(" \u3000\x00\n ") == ""


def test_the_plays_pass_every_rule(plays):
    for text in plays:
        assert clean(text) == text.strip("\n")
        assert not [name for name, rule in QUALITY_RULES.items() if rule(text)]


SENTENCE = "The duke and the players have come to the town with all that they own."
BAD = {
    "broken encoding": f"{SENTENCE} " * 10 + "caf\ufffd.",
    "too short": f"{SENTENCE} {SENTENCE}",
    "odd words": f"{SENTENCE} " + "a b c d " * 100 + "e.",
    "few letters": f"{SENTENCE} " * 3 + "1234 5678 90 = 17. " * 6 + "18.",
    "few stop words": "He goes away again. She never comes back here. " * 12 + "Exit.",
    "repeated lines": f"{SENTENCE}\n" * 10,
    "unfinished lines": "".join(f"{SENTENCE} {letter} or\n" for letter in "abcdefghij"),
}


@pytest.mark.parametrize("name", QUALITY_RULES)
def test_each_rule_alone_catches_its_fault(name):
    assert [other for other, rule in QUALITY_RULES.items() if rule(BAD[name])] == [name]


def test_text_without_stop_words_and_punctuation_is_what_filters_throw_away(plays):
    words = re.findall(r"[\w']+|\n", plays[0])
    stripped = " ".join(word for word in words if word.lower() not in module.STOP_WORDS)
    caught = [name for name, rule in QUALITY_RULES.items() if rule(clean(stripped))]
    assert caught == ["few stop words", "unfinished lines"]


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("MIT AND BSD-3-Clause OR GPL-2.0-only", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("(MIT OR GPL-2.0-only) AND ISC", False),  # on the safe side
        ("(MIT OR ISC) AND 0BSD", True),
        ("MIT License", False),
        ("", False),
        (" OR ", False),
    ],
)
def test_licences(expression, allowed):
    assert license_allows(expression) is allowed
    assert license_allows(expression, ()) is False


# Reading


def test_read_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "v1.2").mkdir(parents=True)
    (tmp_path / "docs" / "b.txt").write_text("bé")
    (tmp_path / "docs" / "a.md").write_bytes(b"caf\xe9")
    (tmp_path / "docs" / "c.py").write_text("pass")
    with gzip.open(tmp_path / "docs" / "v1.2" / "z.jsonl.gz", "wt") as file:
        file.write('{"text": "one", "license": "MIT"}\n\n{"text": "two", "license": null}\n')
    inside = [
        Document("caf\ufffd", "docs/a.md"),
        Document("bé", "docs/b.txt"),
        Document("one", "docs/v1.2/z.jsonl.gz:1", "MIT"),
        Document("two", "docs/v1.2/z.jsonl.gz:3"),
    ]
    assert list(read_documents(["docs"])) == list(read_documents(["docs/"])) == inside
    assert list(read_documents(["docs/v1.2"])) == inside[2:]
    assert list(read_documents(["docs/c.py"])) == [Document("pass", "docs/c.py")]
    assert [each.source for each in read_documents(["docs/*"])] == [
        "docs/a.md", "docs/b.txt", "docs/c.py"
    ]  # fmt: skip
    assert list(read_documents([f"{tmp_path}/docs/*.txt"])) == [
        Document("bé", f"{tmp_path}/docs/b.txt")
    ]
    monkeypatch.chdir(tmp_path / "docs")
    assert [each.source for each in read_documents(["*.txt", "a.md"])] == ["b.txt", "a.md"]


def test_read_documents_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    for line in ("{", "[1]", '{"txt": "a"}', '{"text": 3}', '{"text": "a", "license": 3}', '"a"'):
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' + line)
        with pytest.raises(DataError, match=r'bad\.jsonl:2 is no JSON object with a "text"'):
            list(read_documents([f"{tmp_path}/bad.jsonl"]))
    (tmp_path / "bad.gz").write_text("not compressed")
    for url, message in (
        ("nothing.txt", "nothing.txt is not there"),
        (f"{tmp_path}/empty", "empty holds nothing to read"),
        (f"{tmp_path}/*.txt", r"\*.txt holds nothing to read"),
        (f"{tmp_path}/bad.gz", "bad.gz cannot be read: BadGzipFile"),
        ("nowhere://a/b.txt", "b.txt cannot be read: ValueError: Protocol not known: nowhere"),
    ):
        with pytest.raises(DataError, match=message) as error:
            list(read_documents([url]))
        assert "\n" not in str(error.value)


def test_read_documents_from_any_file_system():
    import fsspec

    with fsspec.open("memory://shelf/play.txt", "w") as file:
        file.write("Enter a messenger.")
    expected = [Document("Enter a messenger.", "memory://shelf/play.txt")]
    for url in ("memory://shelf/play.txt", "memory://shelf", "memory://shelf/*.txt"):
        assert list(read_documents([url])) == expected


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on loopback, with a bucket called shelf."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("NO_PROXY", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="shelf")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_read_documents_over_the_s3_protocol(s3, tmp_path, capsys):
    texts = {f"plays/{play.slug}.txt": play.text for play in load_shakespeare("test")}
    for key, text in texts.items():
        s3.put_object(Bucket="shelf", Key=key, Body=text.encode())
    s3.put_object(Bucket="shelf", Key="more/lines.jsonl", Body=b'{"text": "one"}\n{"text": "two"}')
    expected = [Document(text, f"s3://shelf/{key}") for key, text in sorted(texts.items())]
    for url in ("s3://shelf/plays", "s3://shelf/plays/*.txt"):
        assert list(read_documents([url])) == expected
    assert list(read_documents([expected[0].source])) == expected[:1]
    lines = list(read_documents(["s3://shelf/more/lines.jsonl"]))
    assert lines == [
        Document(t, f"s3://shelf/more/lines.jsonl:{n}") for n, t in ((1, "one"), (2, "two"))
    ]
    for url in ("s3://shelf/none.txt", "s3://nobody/a.txt"):
        with pytest.raises(DataError, match=f"{url} is not there"):
            list(read_documents([url]))
    out = tmp_path / "tokens"
    with pytest.raises(SystemExit) as done:
        main(["data", "build", "s3://shelf/plays", "--out", str(out), "--processes", "1"])
    assert done.value.code == 0
    assert len(TokenStore(out, verify=True)) == sum(
        len(clean(text).encode()) + 1 for text in texts.values()
    )


@pytest.fixture(scope="module")
def dirty() -> list[Document]:
    return list(installed_documents(("torch/nn",)))


def test_installed_documents_are_real_and_dirty(dirty):
    """Facts that hold for any versions of the packages, not the numbers of one."""
    documents = dirty
    assert len({document.source for document in documents}) > 300
    assert any("LICENSE" in document.source for document in documents)
    report = Report()
    kept = list(prepare(documents, report))
    assert 100 < len(kept) < 0.9 * len(documents)
    assert report.dropped["near-duplicate"] > 20
    with pytest.raises(DataError, match="no_such_package is not installed"):
        list(installed_documents(("no_such_package",)))


def test_the_committed_result_is_what_this_corpus_gives():
    """With the pinned versions to the letter; with others there is nothing to compare."""
    made = load_result("dirty_corpus")["result"]
    assert made["kept"] + sum(made["dropped"].values()) == made["documents"]
    for row in made["planted"]:
        expected = row["expected"]
        error = np.sqrt(expected * (1 - expected) / row["pairs"])
        assert abs(row["dropped"] - expected) < 4 * error + 0.02
    if made["versions"] != {name: version(name) for name in made["versions"]}:
        pytest.skip("other versions of the packages are installed than the result was made with")
    texts = [document.text for document in installed_documents(made["folders"])]
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()
    assert (len(texts), digest) == (made["documents"], made["sha256"])


# Duplicates


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def runs_of(text: str, width: int) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1))}


@settings(max_examples=100, deadline=None)
@given(st.text("ab .,\n", max_size=60), st.text("aB ", max_size=60), st.integers(1, 6))
def test_shingles_and_jaccard_are_those_of_sets(one, other, width):
    sets = [runs_of(text, width) if words_of(text) else set() for text in (one, other)]
    arrays = [shingles(text, width) for text in (one, other)]
    assert [len(array) for array in arrays] == [len(s) for s in sets]
    assert all((np.diff(array.astype(object)) > 0).all() for array in arrays)
    wanted = len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))
    assert jaccard(*arrays) == pytest.approx(wanted, abs=1e-12)


def test_shingles_see_order_case_and_chinese():
    assert not np.intersect1d(shingles("a b c d e"), shingles("b a c d e")).size
    assert np.array_equal(shingles("To BE, or not to be"), shingles("to be; or not...to be!"))
    assert len(shingles("天地玄黃宇宙洪荒", 5)) == 4
    assert len(shingles("... !!")) == 0


EDITS = (2, 4, 7, 10, 13)
PAIRS = 150


@pytest.fixture(scope="module")
def levels(plays):
    """Pairs of five similarities with their signatures."""
    found = []
    for level, n_edits in enumerate(EDITS):
        pairs = planted(plays[:10], n_edits, PAIRS, level * PAIRS)
        similarity = (200 - 5 * n_edits) / (200 + 5 * n_edits)
        runs = [[shingles(text) for text in pair] for pair in pairs]
        exact = np.mean([jaccard(*pair) for pair in runs])
        assert exact == pytest.approx(similarity, abs=0.005)  # a passage may repeat five words
        signatures = [[signature(each) for each in pair] for pair in runs]
        found.append((similarity, pairs, signatures))
    return found


def test_signatures_estimate_similarity(levels):
    """The mean over 150 pairs of 112 places: within 4 standard errors (6 in 10^5)."""
    for similarity, _, signatures in levels:
        estimate = np.mean([np.mean(a == b) for a, b in signatures])
        error = np.sqrt(similarity * (1 - similarity) / (PAIRS * BANDS * ROWS))
        assert abs(estimate - similarity) < 4 * error + 0.002
    one = signature(shingles("a b c d e f g"), seed=1)
    assert not np.array_equal(one, signature(shingles("a b c d e f g"), seed=2))


def test_recall_and_precision_are_those_of_theory_and_of_datasketch(levels):
    from datasketch import MinHash, MinHashLSH

    ours, theirs = LSHIndex(BANDS, ROWS), MinHashLSH(params=(BANDS, ROWS), num_perm=BANDS * ROWS)

    def peer(text):
        made = MinHash(BANDS * ROWS, seed=7)
        made.update_batch([" ".join(run).encode() for run in runs_of(text, 5)])
        return made

    for level, (_, pairs, signatures) in enumerate(levels):
        for number, (text, _) in enumerate(pairs):
            ours.add(level * PAIRS + number, signatures[number][0])
            theirs.insert(level * PAIRS + number, peer(text))
    wrong = 0
    found = {"ours": [], "theirs": [], "expected": []}
    for level, (similarity, pairs, signatures) in enumerate(levels):
        hits = {"ours": 0, "theirs": 0}
        for number, (_, edited) in enumerate(pairs):
            key = level * PAIRS + number
            candidates = ours.candidates(signatures[number][1])
            hits["ours"] += key in candidates
            hits["theirs"] += key in theirs.query(peer(edited))
            wrong += len(candidates - {key})
        expected = expected_recall(similarity, BANDS, ROWS)
        margin = 4 * np.sqrt(expected * (1 - expected) / PAIRS) + 0.01  # 4 errors: 6 in 10^5
        for name, count in hits.items():
            assert abs(count / PAIRS - expected) < margin, (name, similarity)
            found[name].append(count / PAIRS)
        found["expected"].append(expected)
    assert wrong == 0  # unrelated passages share no five words, so theory expects none
    precision = {name: sum(recalls[:2]) / sum(recalls) for name, recalls in found.items()}
    for name in ("ours", "theirs"):  # of the pairs found, how many are at least 0.8 similar
        assert precision[name] == pytest.approx(precision["expected"], abs=0.06)


def test_planted_near_duplicates_in_the_dirty_corpus_are_found_as_theory_says(levels, dirty):
    """The pipeline itself: the planted pairs among thousands of real documents."""
    originals = [
        Document(pair[0], f"original {level} {n}")
        for level, (_, pairs, _) in enumerate(levels)
        for n, pair in enumerate(pairs)
    ]
    copies = [
        Document(pair[1], f"copy {level} {n}")
        for level, (_, pairs, _) in enumerate(levels)
        for n, pair in enumerate(pairs)
    ]
    kept = {
        each.source
        for each in prepare(dirty[::2] + originals + dirty[1::2] + copies, Report(), rules=())
    }
    assert all(document.source in kept for document in originals)
    for level, (similarity, _, _) in enumerate(levels):
        dropped = np.mean([f"copy {level} {n}" not in kept for n in range(PAIRS)])
        expected = expected_share(similarity)
        assert abs(dropped - expected) < 4 * np.sqrt(expected * (1 - expected) / PAIRS) + 0.02


def test_the_deduplicator_names_what_is_repeated(plays):
    seen = Deduplicator()
    text = plays[0][:3000]
    documents = [
        Document(text, "first"),
        Document(text, "copy"),
        Document(text.replace("\n", " ") + " The end.", "near"),
        Document(plays[1][:3000], "other"),
        Document("", "nothing"),
        Document("...", "dots"),
        Document("!!!", "signs"),
        Document("...", "dots again"),
    ]
    assert [seen.repeats(document) for document in documents] == [
        None, ("duplicate", "first"), ("near-duplicate", "first"), None, None, None, None,
        ("duplicate", "dots"),
    ]  # fmt: skip


def test_a_chain_of_small_changes_does_not_swallow_its_end(plays):
    """A is like B and B like C, but C is not like A: C stays, for B was never kept."""
    words = words_of(plays[0])[:400]
    chain = []
    for step in range(0, 200, 20):
        edited = [f"new{i}" if i < step else word for i, word in enumerate(words)]
        chain.append(Document(" ".join(edited), str(step)))
    seen = Deduplicator()
    kept = [document for document in chain if seen.repeats(document) is None]
    assert 1 < len(kept) < len(chain)
    for i, one in enumerate(kept):
        for other in kept[:i]:
            assert jaccard(shingles(one.text), shingles(other.text)) < 0.9


def test_duplicates_refuse_bad_numbers():
    for similarity in (0.0, 1.1):
        with pytest.raises(ConfigError, match=f"similarity={similarity}"):
            Deduplicator(similarity)
    with pytest.raises(ConfigError, match="bands=0"):
        LSHIndex(0, 3)
    with pytest.raises(ConfigError, match="signature of 112 places; wanted 2 bands x 3 rows = 6"):
        LSHIndex(2, 3).add(0, signature(shingles("a b")))


# Contamination


def test_a_contaminated_test_passage_is_caught(plays):
    passages = [
        " ".join(words_of(play.text)[k * 200 : (k + 1) * 200])
        for play in load_shakespeare("test")
        for k in range(20)
    ]
    plays = plays[:8]
    before = contamination(passages, plays)
    assert before.shape == (60,) and before.max() < 0.05  # the plays share no long passage
    leaked = passages[7].upper().replace(" ", ",\n", 40)
    after = contamination(passages, [*plays, f"A review quotes: {leaked}!", "short"])
    assert after[7] == 1.0 and np.array_equal(np.delete(after, 7), np.delete(before, 7))
    half = " ".join(passages[7].split()[:106])
    assert contamination(passages, [half])[7] == pytest.approx(0.5, abs=0.01)
    assert contamination(["to be", "..."], ["he said to be"], 13).tolist() == [0.0, 0.0]
    assert contamination([], plays[:1]).shape == (0,)


def test_training_documents_with_held_out_text_are_dropped(plays):
    held_out = [play.text for play in load_shakespeare("test")]
    leak = Document(plays[0][:2000] + "\n" + held_out[0][5000:5400], "leak")
    report = Report()
    clean_documents = [Document(text[:2000], str(n)) for n, text in enumerate(plays)]
    kept = list(prepare([leak, *clean_documents], report, rules=(), held_out=held_out))
    assert [document.source for document in kept] == [str(n) for n in range(len(plays))]
    assert report.examples == {"held-out text": ["leak"]}


# The pipeline


def test_prepare_reports_everything_it_drops(plays):
    documents = [
        Document(plays[0], "play", "MIT"),
        Document(plays[0] + "\r\n", "again", "MIT"),
        Document(plays[0] + "\nExeunt omnes.", "nearly", "MIT"),
        Document("\x00\n", "nothing", "MIT"),
        Document(BAD["too short"], "short", "MIT"),
        Document(plays[1], "not ours", "GPL-3.0-only"),
        Document(plays[1], "unsaid"),
        Document(plays[1], "ours", "GPL-3.0-only OR MIT"),
    ]
    report = Report()
    kept = list(prepare(iter(documents), report, licenses=module.PERMISSIVE))
    assert [document.source for document in kept] == ["play", "ours"]
    assert report.dropped == Counter(
        {"licence": 2, "duplicate": 1, "near-duplicate": 1, "empty": 1, "too short": 1}
    )
    assert report.kept + report.dropped.total() == len(documents)
    assert report.kept_characters == sum(len(document.text) for document in kept)
    assert report.dropped_characters["too short"] == len(BAD["too short"])
    assert report.examples["near-duplicate"] == ["nearly (repeats play)"]
    assert report.examples["licence"] == ["not ours (GPL-3.0-only)", "unsaid (none given)"]
    assert str(report).splitlines()[1].split()[:2] == ["kept", "2"]
    everything = list(prepare(documents, Report(), rules=(), similarity=None))
    assert len(everything) == len(documents) - 1  # the empty one is never kept
    with pytest.raises(ConfigError, match="no rule 'boring'; there are: broken encoding"):
        list(prepare(documents, Report(), rules=("boring",)))
