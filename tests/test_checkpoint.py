"""Models and runs on disk: what was saved comes back, and nothing that was finished is lost."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import minilm
from minilm import checkpoint, files
from minilm.checkpoint import (
    checkpoint_damage,
    join_state,
    latest_checkpoint,
    load,
    load_checkpoint,
    load_model,
    load_weights,
    random_state,
    restore_random_state,
    save_checkpoint,
    save_model,
    split_state,
    step_folder,
)
from minilm.errors import ConfigError, DataError
from minilm.files import whole_folder
from minilm.measure import ByteTokenizer
from minilm.model import Transformer, gpt2_config, llama_config, next_token_loss
from minilm.optim import OptimizerConfig, build_optimizer
from minilm.pretrained import export_hf
from minilm.tokenizer import train_bpe

CONFIG = llama_config(257, 16, d_model=8, n_layers=2, n_heads=2)
IDS = torch.arange(24).reshape(2, 12)


def tiny(seed: int = 0, config=CONFIG) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config, ByteTokenizer())


def a_run(name: str = "adamw", seed: int = 0):
    model = tiny(seed)
    return model, build_optimizer(model, OptimizerConfig(name, lr=0.01))


def some_steps(model, optimizer, n: int = 3) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        noise = 0.01 * torch.randn(2, 12, 257) + np.random.rand()
        next_token_loss(model(IDS) * noise, IDS).backward()
        optimizer.step()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# A model


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", None])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_comes_back(tmp_path, tokenizer, tied, dtype):
    made = {
        "bytes": ByteTokenizer(),
        "bpe": train_bpe(["to be or not to be"], 262),
        None: None,
    }[tokenizer]
    config = gpt2_config(300, 16, d_model=8, n_layers=2, n_heads=2, tie_embeddings=tied)
    model = Transformer(config, made).to(dtype)
    save_model(tmp_path / "model", model)
    assert set(names(tmp_path / "model")) <= {"config.json", "model.safetensors", "tokenizer.json"}
    again = load_model(tmp_path / "model")
    assert again.config == config and not again.training
    assert again.embed_tokens.weight.dtype == dtype
    assert equal(again.state_dict(), model.state_dict())
    assert torch.equal(again(IDS), model.eval()(IDS))
    if tokenizer is None:
        assert not hasattr(again, "tokenizer")
    else:
        assert again.tokenizer.encode("to be ö") == made.encode("to be ö")
        assert again.begin_id == model.begin_id


def test_load_by_name(tmp_path):
    model, optimizer = a_run()
    path = save_checkpoint(tmp_path, 7, model, optimizer, {})
    save_model(tmp_path / "run" / "model", model)
    for source in (path, tmp_path / "run", tmp_path / "run" / "model", str(path)):
        assert equal(load(source).state_dict(), model.state_dict())
        assert equal(minilm.load(source).state_dict(), model.state_dict())
    hugging_face = Transformer(CONFIG)
    export_hf(hugging_face, tmp_path / "hf")
    assert torch.allclose(load(tmp_path / "hf")(IDS), hugging_face(IDS), atol=1e-6)


def test_load_says_what_there_is(tmp_path):
    with pytest.raises(DataError, match=r"no model 'boook'; wanted book, smollm2-135m, a \.gguf"):
        load("boook")
    with pytest.raises(DataError, match=r"has no model\.safetensors|cannot be read"):
        load(tmp_path)


def test_nothing_is_imported_by_the_package_itself():
    code = "import sys, minilm; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_a_model_is_replaced_whole(tmp_path):
    save_model(tmp_path / "model", tiny(0))
    save_model(tmp_path / "model", tiny(1, gpt2_config(257, 8, d_model=4, n_layers=1, n_heads=1)))
    assert load_model(tmp_path / "model").config.d_model == 4
    assert names(tmp_path) == ["model"]
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds notes\.txt, which is no model's"):
        save_model(tmp_path / "model", tiny())
    assert (tmp_path / "model" / "notes.txt").exists()


def test_a_model_of_another_shape_is_refused(tmp_path):
    save_model(tmp_path / "model", tiny())
    other = tiny(config=llama_config(257, 16, d_model=16, n_layers=2, n_heads=2))
    with pytest.raises(ConfigError, match="holds another model: size mismatch for embed_tokens"):
        load_weights(tmp_path / "model", other)


def test_damaged_models(tmp_path):
    save_model(tmp_path / "model", tiny())
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
        load_model(tmp_path / "model")
    weights.write_bytes(whole)
    config.write_text(json.dumps({"d_mdel": 8}))
    with pytest.raises(DataError, match=r"config\.json is no model's config: "):
        load_model(tmp_path / "model")
    config.write_text("{")
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        load_model(tmp_path / "model")


# A run


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_a_run_goes_on_where_it_was(tmp_path, name):
    """Weights, optimizer and sources of chance: three more steps give the same bits.

    (Python's own generator is not used here: beartype draws from it in tests.)
    """
    torch.manual_seed(3), np.random.seed(4)
    model, optimizer = a_run(name)
    optimizer.param_groups[0]["initial_lr"] = 0.01  # as set_learning_rate leaves it
    some_steps(model, optimizer)
    path = save_checkpoint(tmp_path, 3, model, optimizer, {"position": [1, 2.5, None, "x"]})
    assert path == tmp_path / "step-00000003" == step_folder(tmp_path, 3)
    some_steps(model, optimizer)

    again, another = a_run(name, seed=9)
    torch.manual_seed(0), np.random.seed(0)
    assert load_checkpoint(path, again, another) == {"position": [1, 2.5, None, "x"]}
    some_steps(again, another)
    assert equal(again.state_dict(), model.state_dict())
    ours, theirs = split_state(optimizer.state_dict()), split_state(another.state_dict())
    assert equal(ours[0], theirs[0]) and len(ours[0]) > 0
    assert json.dumps(ours[1]) == json.dumps(theirs[1])


def test_split_and_join_are_inverse():
    model, optimizer = a_run()
    some_steps(model, optimizer, 1)
    state = optimizer.state_dict()
    again = join_state(*split_state(state))
    assert again["param_groups"] == state["param_groups"]
    assert again["state"].keys() == state["state"].keys()
    assert all(equal(again["state"][n], state["state"][n]) for n in state["state"])


def test_random_state_survives_json():
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    np.random.randn(), random.gauss(0, 1)  # each leaves a second number in store
    state = json.loads(json.dumps(random_state()))

    def draw():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)

    first = draw()
    restore_random_state(state)
    assert draw() == first


def test_only_safetensors_and_json(tmp_path):
    path = save_checkpoint(tmp_path, 1, *a_run(), {})
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert len(modes) == 1  # readable by whom the rest is


def test_the_newest_and_the_best_stay(tmp_path):
    model, optimizer = a_run()
    for step, best in ((10, 10), (20, 20), (30, 20), (40, 20), (50, 20)):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2, best=best)
    assert names(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000050"
    save_checkpoint(tmp_path, 60, model, optimizer, {}, keep=1, best=60)
    assert names(tmp_path) == ["step-00000060"]


def test_order_is_by_number(tmp_path):
    model, optimizer = a_run()
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, {})
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "step-by-step").mkdir()
    assert latest_checkpoint(tmp_path) is None


# Damage


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "weights cut": (lambda p: cut(p / "model.safetensors"), "model.safetensors is damaged"),
    "one bit": (lambda p: flip(p / "optimizer.safetensors"), "optimizer.safetensors is damaged"),
    "state": (lambda p: (p / "state.json").write_text("{}"), "state.json is damaged"),
    "config": (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "manifest": (lambda p: cut(p / "manifest.json"), "manifest.json is damaged"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty": (lambda p: [file.unlink() for file in p.iterdir()], "manifest.json is missing"),
    "list": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "other": (
        lambda p: (p / "manifest.json").write_text('{"format": "theirs", "sha256": {}}'),
        "its format is 'theirs', wanted 'minilm checkpoint 1'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage):
    model, optimizer = a_run()
    for step in (10, 20):
        save_checkpoint(tmp_path, step, model, optimizer, {"step": step})
    path = tmp_path / "step-00000020"
    assert checkpoint_damage(path) is None
    harm, words = DAMAGES[damage]
    harm(path)
    assert checkpoint_damage(path) == words
    with pytest.warns(UserWarning, match=f"step-00000020 is skipped: {words}"):
        found = latest_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000010"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match=f"step-00000020 cannot be used: {words}"):
        load_checkpoint(path, model, optimizer)
    assert equal(model.state_dict(), before)
    assert load_checkpoint(found, model, optimizer) == {"step": 10}

    save_checkpoint(tmp_path, 20, model, optimizer, {})  # the run comes by again
    assert latest_checkpoint(tmp_path) == path
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


def test_another_optimizer_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, *a_run("adamw"), {})
    model = tiny()
    with pytest.raises(ConfigError, match="holds another optimizer's state"):
        load_checkpoint(path, model, torch.optim.SGD(model.parameters(), lr=0.1))


# A disk that fails


class Disk:
    """Counts what is asked of the disk while a checkpoint is written; fails at the n-th time."""

    def __init__(self, monkeypatch, fail_at: int, how=None):
        self.asked, self.fail_at, self.how = 0, fail_at, how or self.full
        for module, name in (
            (checkpoint, "save_file"),
            (checkpoint, "file_sha256"),
            (checkpoint.Path, "write_text"),
            (checkpoint.Path, "mkdir"),
            (checkpoint.Path, "rename"),
            (os, "fsync"),
        ):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, real):
        def call(*args, **kwargs):
            self.asked += 1
            if self.asked == self.fail_at:
                self.how()
            return real(*args, **kwargs)

        return call

    @staticmethod
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    model, optimizer = a_run()
    for step in (10, 20):
        save_checkpoint(tmp_path, step, model, optimizer, {"step": step})
    failures, fail_at = 0, 1
    while True:
        with monkeypatch.context() as patch:
            disk = Disk(patch, fail_at)
            try:
                save_checkpoint(tmp_path, 30, model, optimizer, {})
            except DataError as error:
                assert str(error).endswith("cannot be written: No space left on device")
                assert "step-00000030" in str(error)
                failures += 1
        if disk.asked < fail_at:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = latest_checkpoint(tmp_path)
        if found == step_folder(tmp_path, 30):  # failed after the rename: all was on the disk
            shutil.rmtree(found)
            for step in (10, 20):
                save_checkpoint(tmp_path, step, model, optimizer, {})
        assert names(tmp_path) == ["step-00000010", "step-00000020"]
        fail_at += 1
    assert failures >= 15  # files written, hashed, synced; folders made, renamed, synced


def test_a_really_full_disk(tmp_path):
    """No file may grow beyond 20 kB: the write fails half way, as on a full disk."""
    save_checkpoint(tmp_path, 10, *a_run(), {})
    code = """
        import resource, signal, sys
        from minilm.checkpoint import save_checkpoint
        from minilm.errors import DataError
        from minilm.measure import ByteTokenizer
        from minilm.model import Transformer, llama_config
        from minilm.optim import OptimizerConfig, build_optimizer
        model = Transformer(llama_config(257, 16, d_model=32, n_layers=2, n_heads=2))
        optimizer = build_optimizer(model, OptimizerConfig())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(sys.argv[1], 20, model, optimizer, {})
        except DataError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "step-00000020 cannot be written: " in done.stdout and "File too large" in done.stdout
    assert names(tmp_path) == ["step-00000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000010"


def test_a_folder_that_was_to_be_replaced_comes_back(tmp_path):
    """Killed between the two renames of a replacement: the next visitor puts the old one back."""
    save_model(tmp_path / "model", tiny(0))
    (tmp_path / "model").rename(tmp_path / ".model.old")
    with (
        pytest.raises(DataError, match="model cannot be written"),
        whole_folder(tmp_path / "model"),
    ):
        raise OSError("the second attempt fails, too")
    assert equal(load_model(tmp_path / "model").state_dict(), tiny(0).state_dict())
    assert names(tmp_path) == ["model"]


def test_leftovers_are_cleared_away(tmp_path):
    (tmp_path / ".step-00000005.part").mkdir(parents=True)
    (tmp_path / ".step-00000005.part" / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 10, *a_run(), {})
    assert names(tmp_path) == ["step-00000010"]


def test_errors_of_others_pass_through(tmp_path):
    with pytest.raises(ConfigError, match="mine"), whole_folder(tmp_path / "x"):
        raise ConfigError("mine")
    assert names(tmp_path) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        save_checkpoint(tmp_path / "run", 1, *a_run(), {})


def test_weights_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Every file is synced before the folder is renamed, and the parent after it."""
    order = []
    real = files._to_disk
    monkeypatch.setattr(files, "_to_disk", lambda path: (order.append(path.name), real(path)))
    rename = checkpoint.Path.rename
    monkeypatch.setattr(
        checkpoint.Path, "rename", lambda p, q: (order.append("rename"), rename(p, q))[1]
    )
    path = save_checkpoint(tmp_path, 1, *a_run(), {})
    at = order.index("rename")
    written = {name for name in order[: at - 1] if not name.endswith(".part")}
    assert written == set(names(path))
    assert order[at - 1 :] == [".step-00000001.part", "rename", tmp_path.name]


def test_logits_survive_a_round_trip_at_batch_3(tmp_path):
    model = tiny()
    save_model(tmp_path / "m", model)
    ids = torch.randint(0, 257, (3, 16))
    again = load_model(tmp_path / "m")
    assert F.mse_loss(again(ids), model.eval()(ids)) == 0
