"""What the chapters stand on: bundled files, committed results, the ledger, figures."""

import json
from dataclasses import asdict

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from minilm import assets, ledger, plotting, results
from minilm.device import default_device
from minilm.errors import ConfigError, DataError, MinilmError

mpl.use("Agg")


@pytest.fixture
def shown(monkeypatch) -> list[tuple[dict, dict]]:
    """What the code displays in a notebook: (data, metadata)."""
    seen: list[tuple[dict, dict]] = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, metadata, raw: seen.append((data, metadata))
    )
    return seen


def test_errors_on_purpose_are_value_errors_of_one_family():
    for kind in (ConfigError, DataError):
        assert issubclass(kind, MinilmError) and issubclass(kind, ValueError)


# Bundled files


def test_a_bundled_file_is_read_and_an_unknown_one_refused():
    assert assets.read_asset("shakespeare.json.xz")[:6] == b"\xfd7zXZ\x00"
    with pytest.raises(DataError, match=r"no bundled file 'nothing'; there are: book.*shakespeare"):
        assets.read_asset("nothing")


def test_a_changed_or_missing_file_is_found(monkeypatch):
    monkeypatch.setitem(assets.SHA256, "shakespeare.json.xz", "0" * 64)
    with pytest.raises(DataError, match=r"wanted 000000000000\.\.\.; the file is damaged"):
        assets.read_asset("shakespeare.json.xz")
    monkeypatch.setitem(assets.SHA256, "gone.bin", "0" * 64)
    with pytest.raises(DataError, match=r"the bundled file gone\.bin is missing"):
        assets.read_asset("gone.bin")


# Committed results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "files", lambda package: tmp_path)
    return tmp_path / "results"


def test_a_result_comes_back_with_how_it_was_made(folder):
    path = results.save_result("trial", {"bits": [1.5, 2.0]}, "python benchmarks/trial.py")
    assert path == folder / "trial.json"
    loaded = results.load_result("trial")
    assert loaded["result"] == {"bits": [1.5, 2.0]}
    assert loaded["made"]["command"] == "python benchmarks/trial.py"
    assert set(loaded["made"]) == {"command", "commit", "date", "machine", "versions"}
    assert loaded["made"]["machine"] == results.machine()
    assert "numpy" in loaded["made"]["versions"]


def test_a_result_that_json_cannot_hold_leaves_the_old_one(folder):
    results.save_result("trial", {"a": 1}, "first")
    with pytest.raises(TypeError):
        results.save_result("trial", {"a": np.zeros(2)}, "second")
    assert results.load_result("trial")["made"]["command"] == "first"
    assert [path.name for path in folder.iterdir()] == ["trial.json"]


def test_a_result_that_is_not_there_is_named(folder):
    with pytest.raises(DataError, match="no committed result 'trial'; there are: none yet"):
        results.load_result("trial")
    results.save_result("other", {}, "x")
    with pytest.raises(DataError, match="there are: other"):
        results.load_result("trial")


@pytest.mark.parametrize("name", ["../up", "Big", "a.b", ""])
def test_a_result_name_stays_in_its_folder(name):
    with pytest.raises(DataError, match="use lower-case letters, digits and _"):
        results.load_result(name)


# The ledger

ROW = ledger.Row(
    "a model", 1, 2.25, 2.1, 2.4, parameters=1234567, bytes_on_disk=5000, train_seconds=9.0
)


def test_a_row_is_shown_and_travels_whole(shown):
    ledger.record(ROW)
    ((data, metadata),) = shown
    assert data["text/plain"] == (
        "a model: 2.250 bits per byte [2.100, 2.400]; 1,234,567 parameters; 5 kB on disk"
    )
    assert ledger.from_dict(json.loads(json.dumps(metadata[ledger.METADATA_KEY]))) == ROW


def test_what_is_shown_of_a_row_has_no_time_in_it():
    slower = ledger.from_dict({**asdict(ROW), "train_seconds": 10.0, "tokens_per_second": 7.0})
    assert str(slower) == str(ROW)


def test_energy_is_seconds_times_watts():
    assert ROW.energy_wh == pytest.approx(9 * 20 / 3600)
    assert ledger.Row("m", 1, 2.0).energy_wh is None


def test_the_table_puts_the_best_last():
    table = ledger.table([ROW, ledger.Row("guess", 1, 8.0)]).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["guess", "a model"]
    assert "| 2.250 | 2.100 to 2.400 | 1.23 M | 5 kB | - | 9 s | 0.05 Wh | - |" in table[3]
    assert len({line.count("|") for line in table}) == 1


def test_the_figure_draws_every_row():
    fig = ledger.figure([ROW, ledger.Row("guess", 2, 8.0)])
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a model", "guess"]
    assert "a model" in ax.get_title(loc="left") + ax.get_title()
    plt.close(fig)
    with pytest.raises(ConfigError, match="no rows to draw"):
        ledger.figure([])


def test_a_model_that_has_read_the_test_stands_apart():
    read = ledger.Row("read", 2, 1.0, saw_test=True)
    fig = ledger.figure([ROW, read])
    plt.close(fig)
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == ["read*", ROW.model]
    assert ROW.model in fig.axes[0].get_title(loc="left") + fig.axes[0].get_title()
    assert "read*" in ledger.table([read])
    assert "may have read the test plays" in str(read) and "read" not in str(ROW)


def test_the_committed_ledger_opens():
    assert all(isinstance(row, ledger.Row) for row in ledger.rows())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bits_per_byte": 0.0}, "more than 0 bits"),
        ({"bits_per_byte": 9.0}, "a uniform guess costs 8"),
        ({"bits_per_byte": float("nan")}, "more than 0 bits"),
        ({"low": None}, "both ends of the interval"),
        ({"low": 2.3}, "lies outside its interval"),
        ({"watts": 0.0}, "watts=0.0"),
        ({"flops": 1}, "no field flops"),
    ],
)
def test_a_wrong_row_is_refused(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ledger.from_dict({**asdict(ROW), **changes})


# Figures


def test_a_figure_is_shown_with_its_alternative_text_and_closed(shown):
    plotting.use_style()
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    plotting.show(fig, alt="A line that   rises\nfrom one to two.")
    ((data, metadata),) = shown
    assert metadata["image/png"]["alt"] == "A line that rises from one to two."
    assert data["text/plain"] == "Figure: A line that rises from one to two."
    assert data["image/png"].startswith("iVBOR")  # a PNG in base64
    assert not plt.get_fignums()


def test_a_figure_without_words_is_refused():
    with pytest.raises(ConfigError, match="too short"):
        plotting.show(plt.figure(), alt="a plot")
    plt.close("all")


def test_ink_and_colours_are_readable_on_both_pages():
    """WCAG asks for a contrast of 3 for graphics; the ink of axes and words has it on both."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for page in ("#ffffff", "#14181e"):
        bright, dark = sorted([luminance(page), luminance(plotting.INK)], reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3
    assert len(set(plotting.COLORS)) == len(plotting.COLORS) >= 6


def test_the_device_is_one_that_is_there():
    assert default_device().type in ("cpu", "cuda")
