"""The command line: quick to answer, and clear when something cannot be done."""

import os
import subprocess
import sys

import pytest

from minilm.cli import COMMANDS, main

HEAVY = (
    "IPython",
    "jupyter_client",
    "matplotlib",
    "minilm.corpus",
    "minilm.exercises",
    "nbclient",
    "nbformat",
    "numpy",
    "torch",
    "zmq",
)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    out, err = capsys.readouterr()
    return done.value.code, out, err


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    """What makes `--help` quick, counted in modules: a wall clock would depend on the machine."""
    code = (
        "import sys\nfrom minilm.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as done:\n    assert done.code == 0\n"
        f"print([m for m in {HEAVY} if m in sys.modules], len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, count = done.stderr.rsplit("]", 1)
    assert heavy == "["
    assert int(count) < 600


def test_help_lists_the_commands(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(name in out for name in ("grade", "ledger", "sample", "score"))


def test_python_m_minilm():
    done = subprocess.run(
        [sys.executable, "-m", "minilm", "ledger"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("| model | chapter | bits per byte |")


def test_ledger(capsys):
    from minilm import ledger

    code, out, _ = run(capsys, "ledger")
    assert code == 0
    assert out == ledger.table(ledger.rows()) + "\n"


def test_sample_continues_the_prompt_and_repeats_itself(capsys):
    command = ["sample", "--order", "3", "--bytes", "40", "--prompt", "To be", "--seed", "1"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert out.startswith("To be") and len(out.encode()) == len("To be") + 40 + 1
    assert run(capsys, *command)[1] == out
    assert run(capsys, *command[:-1], "2")[1] != out


def test_score_is_the_measure_of_the_book(capsys, tmp_path):
    import gzip
    import lzma

    from minilm.corpus import load_shakespeare
    from minilm.measure import bits_per_byte
    from minilm.ngram import count_ngrams, kneser_ney

    play = load_shakespeare("validation")[0]
    path = tmp_path / "play.txt"
    path.write_bytes(play.data)
    code, out, _ = run(capsys, "score", str(path), "--order", "3")
    assert code == 0
    model = kneser_ney(count_ngrams([one.data for one in load_shakespeare("train")], 3))
    wanted = [
        8 * len(gzip.compress(play.data, 9)) / len(play.data),
        8 * len(lzma.compress(play.data, preset=9)) / len(play.data),
        bits_per_byte(model, [play]),
    ]
    assert out.splitlines()[1].split()[:3] == [f"{each:.3f}" for each in wanted]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--order", "9"], "order=9; use 1 to 8"),
        (["sample", "--order", "2", "--temperature", "-1"], "neither may be below 0"),
        (["score"], "no file"),
        (["score", "nothing.txt"], "nothing.txt cannot be read: No such file"),
        (["score", os.devnull], "is empty"),
        (["grade", "nothing.ipynb"], "there is no nothing.ipynb"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_2(capsys, arguments, said):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("minilm: ") and said in err
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["nothing"], ["sample", "--order", "six"], []])
def test_a_command_that_does_not_exist(capsys, arguments):
    assert run(capsys, *arguments)[0] == 2


@pytest.mark.skipif(os.name != "posix", reason="pipes close differently elsewhere")
def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m minilm sample --order 2 --bytes 1000 | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
