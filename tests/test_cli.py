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
    assert all(name in out for name in COMMANDS)


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


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A folder with a model that knows nothing, but has all that `generate` and `chat` need."""
    import torch

    from minilm.model import Transformer, llama_config
    from minilm.pretrained import export_hf
    from minilm.tokenizer import train_bpe

    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = train_bpe(["to be or not to be"], 270, special_tokens=names)
    torch.manual_seed(0)
    config = llama_config(tokenizer.vocab_size, 512, d_model=16, n_layers=1, n_heads=2)
    folder = tmp_path_factory.mktemp("models") / "small"
    export_hf(Transformer(config, tokenizer), folder)
    return str(folder)


def test_generate_continues_the_prompt_and_repeats_itself(capsys, small):
    options = ["--model", small, "--max-new-tokens", "12", "--device", "cpu"]
    code, out, err = run(capsys, "generate", "To be <|im_end|>", *options)
    assert (code, err) == (0, "")
    assert out.startswith("To be <|im_end|>") and out.endswith("\n")
    assert run(capsys, "generate", "To be <|im_end|>", *options)[1] == out
    warm = ["generate", "", *options, "--temperature", "1", "--top-k", "50", "--seed"]
    first, again, other = (run(capsys, *warm, seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_prints_each_piece_when_it_comes(monkeypatch, small):
    """What is flushed, one write a piece: the prompt, then characters, never half of one."""
    from minilm import generation

    written = []
    monkeypatch.setattr(generation, "stream", lambda *_: iter(["", "é", " 🙂"]))
    monkeypatch.setattr(
        "builtins.print", lambda *a, end="\n", flush=False: written.append(("".join(a), end, flush))
    )
    with pytest.raises(SystemExit) as done:
        main(["generate", "Hi", "--model", small])
    assert done.value.code == 0
    pieces = [("Hi", "", True), ("", "", True), ("é", "", True), (" 🙂", "", True)]
    assert written == [*pieces, ("", "\n", False)]


def test_chat_answers_each_line_of_a_pipe(capsys, monkeypatch, small):
    import io

    from minilm import generation

    asked = []

    def echo(model, ids, max_new_tokens, sampling, stop):
        asked.append((model.tokenizer.decode(ids), sampling.seed))
        return iter(["so ", "said"])

    monkeypatch.setattr(generation, "stream", echo)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who is there?\n\n  Nay, answer me\n"))
    code, out, err = run(capsys, "chat", "--model", small, "--system", "Be brief.", "--seed", "3")
    assert (code, out, err) == (0, "so said\nso said\n", "")
    assert [seed for _, seed in asked] == [3, 3]
    assert asked[1][0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho is there?<|im_end|>\n"
        "<|im_start|>assistant\nso said<|im_end|>\n<|im_start|>user\nNay, answer me<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_in_a_real_pipe(small):
    command = [sys.executable, "-m", "minilm", "chat", "--model", small, "--max-new-tokens", "5"]
    done = subprocess.run(command, input="To be?\n", capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n") and done.stderr == ""


def test_all_samplers_and_stop_texts(capsys, small):
    """The same text as `minilm.generation.stream` writes, and an end before a stop text."""
    from minilm.decoder import Decoder
    from minilm.generation import Sampling, stream
    from minilm.pretrained import load_hf

    model = load_hf(small)
    sampling = Sampling(1.5, 40, 0.95, 0.001, 1.1, 3)
    wanted = "".join(stream(Decoder(model), model.tokenizer.encode("to be"), 30, sampling))
    words = ["generate", "to be", "--model", small, "--max-new-tokens", "30", "--seed", "3"]
    words += ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.001"]
    words += ["--repetition-penalty", "1.1"]
    assert run(capsys, *words)[1] == f"to be{wanted}\n"
    stop = next(wanted[i : i + 2] for i in range(5, 60) if wanted[i : i + 2].isascii())
    got = run(capsys, *words, "--stop", stop, "never")[1]
    assert got == f"to be{wanted[: wanted.index(stop)]}\n"
    half = run(capsys, "generate", "to be", "--model", small, "--dtype", "bfloat16")
    assert half[0] == 0 and half[1].startswith("to be")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "temperature=-1"),
        (["--top-p", "2"], "top_p=2.0; wanted above 0"),
        (["--max-new-tokens", "600"], "there is room for 512"),
        (["--stop", ""], "a stop text is empty"),
    ],
)
def test_bad_settings_of_generate_print_nothing_else(capsys, small, arguments, said):
    code, out, err = run(capsys, "generate", "to be", "--model", small, *arguments)
    assert (code, out) == (2, "") and said in err


def test_a_conversation_that_is_too_long(capsys, monkeypatch, small):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("to be " * 300 + "\n"))
    code, _, err = run(capsys, "chat", "--model", small)
    assert code == 2 and "tokens, the model reads 512; begin a new one" in err


def test_export_writes_the_same_model(capsys, small, tmp_path):
    from pathlib import Path

    code, out, _ = run(capsys, "export", "--to", "hf", str(tmp_path / "copy"), "--model", small)
    assert (code, out) == (0, f"{tmp_path / 'copy'}\n")
    for file in Path(small).iterdir():
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()
    code, _, err = run(capsys, "export", "--to", "hf", str(tmp_path / "copy"), "--model", small)
    assert code == 2 and "there already and not empty" in err


def test_a_model_without_tokenizer_cannot_write(capsys, small, tmp_path):
    import shutil

    shutil.copytree(small, tmp_path / "ids only")
    (tmp_path / "ids only" / "tokenizer.json").unlink()
    for command in (["generate", "Hi"], ["chat"]):
        code, _, err = run(capsys, *command, "--model", str(tmp_path / "ids only"))
        assert code == 2 and "has no tokenizer.json" in err


def test_a_model_that_cannot_chat(capsys, monkeypatch, tmp_path):
    import io

    from minilm.model import Transformer, llama_config
    from minilm.pretrained import export_hf
    from minilm.tokenizer import train_bpe

    tokenizer = train_bpe(["to be or not to be"], 260)
    config = llama_config(tokenizer.vocab_size, 64, d_model=16, n_layers=1, n_heads=2)
    export_hf(Transformer(config, tokenizer), tmp_path / "plain")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    code, _, err = run(capsys, "chat", "--model", str(tmp_path / "plain"))
    assert code == 2 and err == (
        "minilm: the tokenizer has no <|im_start|>; use a chat model, as smollm2-135m\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "Hi", "--model", "gpt5"], "no model 'gpt5'; wanted book, smollm2-135m"),
        (["generate", "Hi", "--model", "x.bin"], "x.bin is a pickle: opening one runs"),
        (["chat", "--model", "x.gguf"], "x.gguf is no whole GGUF file"),
        (["export", "--to", "hf", "copy", "--model", "gpt5"], "no model 'gpt5'"),
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


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["sample", "--order", "six"], ["generate"], ["export", "--to", "gguf", "x"], []],
)
def test_a_command_that_does_not_exist(capsys, arguments):
    assert run(capsys, *arguments)[0] == 2


@pytest.mark.skipif(os.name != "posix", reason="pipes close differently elsewhere")
def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m minilm sample --order 2 --bytes 1000 | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
