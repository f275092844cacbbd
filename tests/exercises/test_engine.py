"""The checking engine: right answers pass, every wrong one is refused with a sentence that fits."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import measure
from minilm.errors import ConfigError
from minilm.exercises import check, engine
from minilm.exercises.comparing import difference, plain
from minilm.exercises.engine import Choose, Debug, Implement, Measure, Mistake, Predict, judge
from minilm.exercises.refusing import CallsPackageError, refusing

SEEDS = (None, 0, 1, 2, 3)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_cases(rng):
    yield (rng.normal(size=(3, 4)),)
    yield (rng.normal(size=(1, 5)) + 1000,)


SOFTMAX = Implement(
    "test.softmax",
    points=3,
    reference=softmax,
    forbid=(),
    cases=softmax_cases,
    mistakes=(
        Mistake("wrong axis", lambda x: softmax(x.T).T, "You sum over the batch."),
        Mistake("overflow", lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True), "Overflows."),
    ),
)


def diagnosis(question, answer, seed=None):
    result = judge(question, answer, seed)
    assert (result.points == 0) == bool(result.diagnosis)
    assert result.points in (0, question.points)
    return result.diagnosis


# The worked example


@pytest.mark.parametrize("seed", SEEDS)
def test_the_worked_example_accepts_what_is_right(example, seed):
    add_k, table_size, why_bytes = example.QUESTIONS
    assert diagnosis(add_k, example.add_k, seed) == ""
    assert diagnosis(table_size, lambda n, vocab_size: float(vocab_size) ** n, seed) == ""
    assert diagnosis(why_bytes, "b", seed) == ""


@pytest.mark.parametrize("seed", SEEDS)
def test_the_worked_example_names_each_mistake(example, seed):
    for question in example.QUESTIONS[:2]:
        for mistake in question.mistakes:
            assert diagnosis(question, mistake.wrong, seed) == mistake.says


# What the engine says by itself


@pytest.mark.parametrize("answer", [None, ...])
def test_an_untouched_answer(answer):
    assert diagnosis(SOFTMAX, answer) == "Not answered yet."


def test_an_untouched_function():
    def answer(x):
        raise NotImplementedError  # your code here

    assert diagnosis(SOFTMAX, answer) == "Not answered yet."


def test_no_function():
    assert diagnosis(SOFTMAX, 3.5) == "Give a function of (x), not 3.5."
    assert diagnosis(SOFTMAX, softmax(np.ones(3))) == "Give a function of (x), not an array."


def test_the_wrong_number_of_arguments():
    said = diagnosis(SOFTMAX, lambda: 1)
    assert said.endswith("takes 0 positional arguments but 1 was given; it is called with (x).")


def broken(x):
    total = x.sum() + missing  # noqa: F821  that is the error
    return x / total


def calls_itself(x):
    return calls_itself(x)


def leaves(x):
    raise SystemExit(0)


class Hostile(BaseException):
    def __str__(self):
        raise ValueError("no text")


def raises_nonsense(x):
    raise Hostile


def test_an_exception_is_told_with_the_learners_own_line():
    said = diagnosis(SOFTMAX, broken)
    assert said.startswith("Your code raised NameError: name 'missing' is not defined (line ")
    assert "`total = x.sum() + missing" in said
    assert "RecursionError" in diagnosis(SOFTMAX, calls_itself)
    assert "SystemExit: 0" in diagnosis(SOFTMAX, leaves)
    assert "Hostile (line" in diagnosis(SOFTMAX, raises_nonsense)


def test_an_exception_inside_a_library_is_told_with_the_learners_line():
    said = diagnosis(SOFTMAX, lambda x: np.linalg.inv(x))
    assert (
        "LinAlgError" in said and "`said = diagnosis(SOFTMAX, lambda x: np.linalg.inv(x))`" in said
    )


def test_only_the_readers_own_interrupt_comes_through():
    def answer(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(SOFTMAX, answer)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: None, "Your function returns None: is there a `return`?"),
        (lambda x: "abc", "is a str; wanted numbers of shape (3, 4)."),
        (lambda x: softmax(x)[None], "has shape (1, 3, 4); wanted (3, 4)."),
        (lambda x: softmax(x).T, "has shape (4, 3); wanted (3, 4). It is the transpose of what"),
        (lambda x: softmax(x) + np.nan, "is NaN at index (0, 0); wanted 0."),
        (lambda x: -softmax(x), "Every value is -1 times the right one (the sign is flipped)."),
        (lambda x: softmax(x) * 3, "Every value is 3 times the right one."),
        (lambda x: softmax(x) * math.log(2), "nats where bits are wanted: divide by ln 2"),
        (lambda x: softmax(x) + 1e-4 * (np.arange(x.shape[1]) == 2), " at index (0, 2); wanted 0."),
        (lambda x: (v for v in x), "is a generator; wanted numbers"),
        (lambda x: [[1], [1, 2]], "is a list; wanted numbers"),
        (object, "Your code raised TypeError: "),
    ],
)
def test_a_wrong_result_is_described(answer, said):
    assert said in diagnosis(SOFTMAX, answer)


def test_the_case_is_named():
    question = Implement(
        "test.scale",
        points=1,
        reference=lambda x, k: x * k,
        forbid=(),
        cases=lambda rng: [(np.array([1.0, 2.0]), 0.5)],
    )
    said = diagnosis(question, lambda x, k: x + k)
    assert said == "Your answer for x=[1.0, 2.0], k=0.5 is 1.5 at index 0; wanted 0.5."


def test_booleans_must_be_booleans_and_integers_exact():
    mask = Implement(
        "test.mask",
        points=1,
        reference=lambda n: np.tril(np.ones((n, n), bool)),
        forbid=(),
        cases=lambda rng: [(3,)],
    )
    assert "dtype float64; wanted booleans" in diagnosis(mask, lambda n: np.tril(np.ones((n, n))))
    count = Implement(
        "test.count",
        points=1,
        reference=lambda n: 10**n,
        forbid=(),
        cases=lambda rng: [(9,)],
    )
    assert diagnosis(count, lambda n: 10.0**n) == ""
    assert "is 1000000001; wanted 1000000000" in diagnosis(count, lambda n: 10**n + 1)


# Arguments


def sort_reference(values):
    return sorted(values)


@pytest.mark.parametrize(
    ("make", "spoil"),
    [
        (lambda: np.array([3.0, 1.0, 2.0]), lambda v: v.sort()),
        (lambda: [3, 1, 2], lambda v: v.sort()),
        (lambda: {"b": 1, "a": 2}, lambda v: v.pop("b")),
        (lambda: [[3], [1]], lambda v: v[0].append(4)),
    ],
)
def test_an_answer_that_changes_its_argument_is_refused(make, spoil):
    def answer(values):
        right = sorted(values)
        spoil(values)
        return right

    question = Implement(
        "test.sort",
        points=1,
        reference=sort_reference,
        forbid=(),
        cases=lambda rng: [(make(),)],
    )
    assert diagnosis(question, sort_reference) == ""
    assert diagnosis(question, answer) == (
        "Your function changes its argument values: work on a copy."
    )


def test_a_mistake_may_be_a_change_of_the_argument():
    def in_place(values):
        values.sort()
        return values

    question = Implement(
        "test.sort",
        points=1,
        reference=sort_reference,
        forbid=(),
        cases=lambda rng: [([3, 1, 2],)],
        mistakes=(Mistake("in place", in_place, "You sort the list of your caller."),),
    )
    assert diagnosis(question, in_place) == "You sort the list of your caller."


def test_changing_the_argument_does_not_change_what_is_wanted():
    def answer(x):
        x[:] = 0
        return np.full(x.shape, 1 / x.shape[-1])  # right for zeros

    assert diagnosis(SOFTMAX, answer) == "Your function changes its argument x: work on a copy."


def test_a_result_that_is_overwritten_later_is_judged_as_it_was():
    buffer = np.zeros((3, 4))

    def answer(x):
        if x.shape != buffer.shape:
            return softmax(x)
        buffer[:] = softmax(x)
        return buffer

    two = Implement(
        "test.two",
        points=1,
        reference=softmax,
        forbid=(),
        cases=lambda rng: [(rng.normal(size=(3, 4)),), (rng.normal(size=(3, 4)),)],
    )
    assert diagnosis(two, answer) == ""


def test_a_generator_may_be_used_up():
    question = Implement(
        "test.draw",
        points=1,
        reference=lambda rng: rng.integers(100, size=5),
        forbid=(),
        cases=lambda rng: [(np.random.default_rng(7),)],
    )
    assert diagnosis(question, lambda rng: rng.integers(100, size=5)) == ""
    assert diagnosis(question, lambda rng: rng.integers(99, size=5))


def test_run_turns_a_class_or_an_in_place_answer_into_a_result():
    class Counter:
        def __init__(self):
            self.n = 0

        def add(self, k):
            self.n += k

    class Forgets(Counter):
        def add(self, k):
            self.n = k

    def run(cls, ks):
        counter = cls()
        for k in ks:
            counter.add(k)
        return counter.n

    question = Implement(
        "test.counter",
        points=1,
        reference=Counter,
        forbid=(),
        cases=lambda rng: [([1, 2, 3],)],
        run=run,
        mistakes=(Mistake("forgets", Forgets, "You write `=` where `+=` is meant."),),
    )
    assert diagnosis(question, Counter) == ""
    assert diagnosis(question, Forgets) == "You write `=` where `+=` is meant."
    assert diagnosis(question, Counter()) == "Give a class, not a Counter."

    class Off(Counter):
        def add(self, k):
            self.n += k + 1

    assert diagnosis(question, Off) == "Your answer for ks=[1, 2, 3] is 9; wanted 6."


# Mistakes and probes


def test_a_mistake_that_raises_is_recognised_and_told_with_the_line():
    question = Debug(
        "test.mean",
        points=1,
        reference=lambda xs: sum(xs) / max(len(xs), 1),
        forbid=(),
        cases=lambda rng: [([1.0, 3.0],), ([],)],
        mistakes=(Mistake("empty", lambda xs: sum(xs) / len(xs), "You forgot the empty list."),),
    )

    def answer(xs):
        total = 0
        for x in xs:
            total += x
        return total / len(xs)

    said = diagnosis(question, answer)
    assert said.startswith("You forgot the empty list. Your code raised ZeroDivisionError: ")
    assert "`return total / len(xs)`" in said


def test_a_wrong_answer_that_no_mistake_explains_is_refused():
    assert "wanted" in diagnosis(SOFTMAX, lambda x: softmax(2 * x))


def test_mistakes_do_not_warn(recwarn):
    diagnosis(SOFTMAX, lambda x: softmax(2 * x))
    assert not recwarn.list


def test_a_probe_refuses_what_values_do_not_show():
    calls = []

    def counted(answer, rng):
        calls.clear()
        answer(rng.normal(size=(2, 2)))
        return "You call it twice." if len(calls) > 1 else None

    def noisy(x):
        calls.append(1)
        calls.append(1)
        return softmax(x)

    question = Implement(
        "test.probe",
        points=1,
        reference=softmax,
        forbid=(),
        cases=softmax_cases,
        probes=(counted,),
    )
    assert diagnosis(question, softmax) == ""
    assert diagnosis(question, noisy) == "You call it twice."

    def fails_on_small(x):
        if x.shape == (2, 2):
            raise ValueError("too small")
        return softmax(x)

    assert "ValueError: too small (line" in diagnosis(question, fails_on_small)


# The package's own


def encode_question(forbid, reference=lambda text: measure.ByteTokenizer().encode(text)):
    return Implement(
        "test.encode",
        points=1,
        reference=reference,
        forbid=forbid,
        cases=lambda rng: [("né",), ("",)],
    )


def own_encode(text):
    return list(text.encode("utf-8"))


class Inherits(measure.ByteTokenizer):
    def encode(self, text):
        return super().encode(text)


@pytest.mark.parametrize(
    "forbid", [("measure.ByteTokenizer.encode",), ("measure.ByteTokenizer",), ("measure",)]
)
@pytest.mark.parametrize(
    "answer",
    [
        lambda text: measure.ByteTokenizer().encode(text),
        measure.ByteTokenizer().encode,  # bound before the check
        lambda text: Inherits().encode(text),
    ],
)
def test_an_answer_that_calls_the_package_is_refused(forbid, answer):
    said = diagnosis(encode_question(forbid), answer)
    assert said.startswith("Your code calls minilm's own measure.ByteTokenizer")
    assert said.endswith(": write it yourself.")
    assert diagnosis(encode_question(forbid), own_encode) == ""
    assert measure.ByteTokenizer().encode("né") == [110, 195, 169]  # and it is back


ALIAS = measure.bits_per_byte


class Uniform:
    tokenizer = measure.ByteTokenizer()
    max_seq_len = None

    def log_probs(self, ids):
        return np.full(ids.shape, -math.log(256))


MODEL = Uniform()


def test_every_alias_is_met_and_everything_is_put_back():
    before = ALIAS.__code__
    with (
        pytest.raises(CallsPackageError, match=r"measure\.bits_per_byte"),
        refusing(["measure.bits_per_byte"]),
    ):
        ALIAS(MODEL, [])
    assert ALIAS.__code__ is before
    with pytest.raises(ConfigError, match="no plays"):
        ALIAS(MODEL, [])


def test_properties_are_met():
    score = measure.Score(("a",), (np.ones(1),), (np.ones(1),))
    with refusing(["measure.Score.bits_per_byte"]), pytest.raises(CallsPackageError):
        _ = score.bits_per_byte
    assert score.bits_per_byte == 1.0


def test_functions_with_closures_and_caches_are_met(monkeypatch):
    import functools

    factor = 3

    @functools.lru_cache
    def cached(x):
        return factor * x

    cached.__wrapped__.__module__ = "minilm.measure"
    assert cached(2) == 6
    monkeypatch.setattr(measure, "cached", cached, raising=False)
    with refusing(["measure.cached"]), pytest.raises(CallsPackageError):
        cached(2)
    assert cached(2) == 6 and cached(3) == 9


def test_a_class_without_init_is_met_and_opened_again():
    with refusing(["measure.ByteTokenizer"]), pytest.raises(CallsPackageError):
        measure.ByteTokenizer()
    assert "__init__" not in vars(measure.ByteTokenizer)
    assert Inherits().encode("a") == [97]


def test_what_minilm_only_borrows_stays_as_it_is():
    from typing import Protocol

    class Other(Protocol):
        def method(self): ...

    shared = vars(Other)["__init__"]  # one function of `typing` serves all protocols
    assert shared is vars(measure.Tokenizer)["__init__"]
    before = shared.__code__
    with refusing(["measure"]):
        assert shared.__code__ is before


@pytest.mark.parametrize("name", ["measure.nothing", "nowhere", "measure.ByteTokenizer.nothing"])
def test_forbidding_what_is_not_there_is_an_error(name):
    with pytest.raises(ConfigError, match="minilm has no"):
        judge(encode_question((name,)), own_encode)


def test_the_first_is_put_back_when_the_second_is_not_there():
    before = ALIAS.__code__
    with pytest.raises(ConfigError), refusing(["measure.bits_per_byte", "measure.nothing"]):
        pass
    assert ALIAS.__code__ is before


# The other kinds


PARAMETERS = Predict(
    "test.parameters",
    points=1,
    reference=lambda d, v: d * v,
    cases=lambda rng: [(int(rng.integers(1, 50)), 256) for _ in range(4)],
    factor=1.5,
    mistakes=(Mistake("sum", lambda d, v: d + v, "You add where each pair needs a weight."),),
)


@pytest.mark.parametrize(("ratio", "right"), [(1.0, 1), (1.45, 1), (0.7, 1), (1.55, 0), (0.6, 0)])
def test_a_prediction_is_right_within_its_factor(ratio, right):
    assert judge(PARAMETERS, lambda d, v: d * v * ratio).points == right


def test_a_prediction_is_refused_by_size():
    said = diagnosis(PARAMETERS, lambda d, v: d * v * 100)
    assert "too large by a factor of 100" in said
    assert "too small by a factor of 4" in diagnosis(PARAMETERS, lambda d, v: d * v / 4)
    assert "no multiple" in diagnosis(PARAMETERS, lambda d, v: -d * v)
    assert "no multiple" in diagnosis(PARAMETERS, lambda d, v: 0)
    assert "NaN" in diagnosis(PARAMETERS, lambda d, v: math.nan)
    assert "too large" in diagnosis(PARAMETERS, lambda d, v: math.inf)
    assert diagnosis(PARAMETERS, 12) == "Give a function of (d, v), not 12."
    assert diagnosis(PARAMETERS, lambda d, v: d + v) == "You add where each pair needs a weight."


def test_a_prediction_of_one_number():
    question = Predict("test.contexts", points=1, reference=256**9, factor=2.0)
    assert diagnosis(question, 256**9) == diagnosis(question, 4.7e21) == ""
    assert "too small by a factor of 256" in diagnosis(question, 256**8)
    with pytest.raises(ConfigError, match="factor"):
        Predict("test.bad", points=1, reference=1, factor=1.0)


def test_a_measured_number():
    question = Measure(
        "test.measured",
        points=1,
        reference=lambda: 2.0,
        mistakes=(Mistake("bytes", lambda: 0.25, "You report bytes."), Mistake("n", 7.0, "Seven.")),
    )
    assert diagnosis(question, 2.01) == diagnosis(question, lambda: 1.99) == ""
    assert diagnosis(question, 2.1) == "Your answer is 2.1; wanted 2."
    assert diagnosis(question, 0.25) == "You report bytes."
    assert diagnosis(question, 7) == "Seven."
    assert diagnosis(question, "2") == "Your answer is a str; wanted a number."
    assert diagnosis(question, math.nan) == "Your answer is NaN; wanted 2."


CHOICE = Choose(
    "test.choice", points=1, right="b", wrong={"a": "No: a.", "c": "No: c."}, because="B."
)


@pytest.mark.parametrize("answer", ["b", "B", "(b)", " b. "])
def test_the_right_letter(answer):
    assert str(judge(CHOICE, answer)) == "test.choice: 1 of 1 point. B."


@pytest.mark.parametrize(("answer", "said"), [("a", "No: a."), ("C", "No: c.")])
def test_a_wrong_letter_says_why(answer, said):
    assert diagnosis(CHOICE, answer) == said


@pytest.mark.parametrize("answer", ["d", "", 2, ["b"], lambda: "b"])
def test_no_letter(answer):
    assert diagnosis(CHOICE, answer).startswith("Give one letter of a, b, c in quotes; got ")


# check


def test_check_prints_one_line_and_shows_nothing_more(example, capsys):
    result = check("example.why_bytes", "a")
    assert capsys.readouterr().out == (
        "example.why_bytes: 0 of 1 point. A model's speed has no part in the measure.\n"
    )
    assert (
        repr(result) + "\n"
        == "example.why_bytes: 0 of 1 point. A model's speed has no part in the measure.\n"
    )
    assert result._ipython_display_() is None


def test_an_unknown_question_names_the_nearest(example):
    with pytest.raises(
        ConfigError, match=r"no question 'example\.addk'; did you mean 'example\.add_k'"
    ):
        check("example.addk", None)
    with pytest.raises(ConfigError, match="did you mean"):
        check("", None)
    with pytest.raises(ConfigError, match=r"chapter 77 has no exercises; chapters that have: .*90"):
        engine.questions(77)


def test_check_reports_to_the_run_that_grades(example, tmp_path, monkeypatch):
    monkeypatch.setenv(engine.REPORT_FILE, str(tmp_path / "lines"))
    monkeypatch.setenv(engine.REPORT_NONCE, "n")
    check("example.why_bytes", "c")
    check("example.why_bytes", "b")
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [(one["nonce"], one["question"], one["points"]) for one in lines] == [
        ("n", "example.why_bytes", 0),
        ("n", "example.why_bytes", 1),
    ]


def test_importing_check_imports_nothing_else():
    code = (
        "import sys; from minilm.exercises import check\n"
        "print([m for m in ('numpy', 'torch', 'minilm.exercises.engine') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Comparing

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-(2**40), 2**40)
leaves_ = numbers | st.text(max_size=5) | st.booleans() | st.none()
values = st.recursive(
    leaves_,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_a_value_is_equal_to_itself(value):
    assert difference(plain(value), plain(value), 1e-6, 1e-9) is None


@given(values, values)
def test_what_compares_equal_is_equal(one, other):
    """No false acceptance: Python's own comparison agrees, up to the tolerance of floats."""
    if difference(plain(one), plain(other), 0.0, 0.0) is None:
        assert normal(one) == normal(other)


def normal(value):
    """The same for Python: lists and dicts all the way down."""
    if isinstance(value, list):
        return [normal(each) for each in value]
    if isinstance(value, dict):
        return {key: normal(each) for key, each in value.items()}
    return value


@given(st.lists(numbers, min_size=1, max_size=6), st.data())
def test_one_changed_number_is_found(numbers, data):
    place = data.draw(st.integers(0, len(numbers) - 1))
    changed = list(numbers)
    changed[place] = changed[place] * 1.001 + 0.001
    assert difference(plain(changed), plain(numbers), 1e-6, 1e-9) or math.isclose(
        changed[place], numbers[place], rel_tol=2e-6, abs_tol=2e-9
    )


def test_torch_tensors_are_read_without_importing_torch():
    torch = pytest.importorskip("torch")
    x = torch.tensor([1.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert difference(plain(x), plain(np.array([1.5, 2.0])), 0.0, 0.0) is None
    assert difference(plain([x.detach().float(), 1]), [plain(np.array([1.5, 2.1])), 1], 0.0, 0.0)
