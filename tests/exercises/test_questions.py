"""Every question of the book: its solution passes, nothing else does, each mistake is named."""

import itertools
import re

import common
import numpy as np
import pytest

from minilm.exercises import engine
from minilm.exercises.engine import Choose, Compared, Debug, Implement, Predict, judge
from minilm.exercises.grade import grade
from minilm.exercises.refusing import _members, _resolve

SEEDS = (None, 1, 2)
OWN = "Your code calls minilm's own "
MASTERS = sorted((common.ROOT / "exercises/solutions").glob("[0-9][0-9]_*.ipynb"))
QUESTIONS = [each for chapter in engine.chapters() for each in engine.questions(chapter)]
COMPARED = [each for each in QUESTIONS if isinstance(each, Compared)]
MISTAKES = [(each, mistake) for each in COMPARED for mistake in each.mistakes]


def name(value) -> str:
    return getattr(value, "name", None) or getattr(value, "stem", None) or str(value)


def test_every_chapter_has_its_questions_and_its_master():
    chapters = {path.stem for path in common.chapters()}
    modules = {full.rsplit(".c", 1)[1] for full in engine.chapters().values()}
    assert chapters <= modules
    assert modules == {path.stem for path in MASTERS}


def test_names_are_unique_and_well_formed():
    names = [each.name for each in QUESTIONS]
    assert len(set(names)) == len(names)
    assert [each for each in names if not re.fullmatch(r"[a-z]+\.[a-z][a-z0-9_]*", each)] == []


@pytest.mark.parametrize("chapter", engine.chapters())
def test_a_chapter_asks_four_to_six_questions_of_several_kinds(chapter):
    questions = engine.questions(chapter)
    assert 4 <= len(questions) <= 6
    assert len({each.kind for each in questions}) >= 3
    assert all(1 <= each.points <= 5 for each in questions)


@pytest.mark.parametrize("path", MASTERS, ids=name)
def test_the_solutions_get_full_marks(path):
    report = grade(path)
    assert [(each.question, each.diagnosis) for each in report.questions if each.diagnosis] == []
    assert report.points == report.of > 0


@pytest.mark.parametrize("path", MASTERS, ids=name)
def test_the_untouched_notebook_gets_nothing(path):
    report = grade(path.parents[1] / path.name)
    asked = engine.questions(report.chapter)
    assert report.points == 0 and not report.ended
    for question, graded in zip(asked, report.questions, strict=True):
        if isinstance(question, Debug):  # it hands out the bug
            assert graded.diagnosis.startswith(question.mistakes[0].says)
        else:
            assert graded.diagnosis == engine.NOT_ANSWERED


@pytest.mark.parametrize("question", QUESTIONS, ids=name)
def test_no_answer_earns_nothing(question):
    def todo(*args, **kwargs):
        raise NotImplementedError

    for answer in (None, ..., object(), "", "z"):
        assert judge(question, answer).points == 0
    if not isinstance(question, Choose):
        assert judge(question, todo).diagnosis == engine.NOT_ANSWERED


@pytest.mark.parametrize("question", [q for q in QUESTIONS if isinstance(q, Implement)], ids=name)
def test_there_are_five_mistakes_each_with_its_own_sentence(question):
    assert len(question.mistakes) >= 5
    for part in ("name", "says"):
        assert len({getattr(mistake, part) for mistake in question.mistakes}) >= 5
    assert len({mistake.name for mistake in question.mistakes}) == len(question.mistakes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("question", "mistake"), MISTAKES, ids=name)
def test_each_mistake_is_refused_with_the_sentence_meant_for_it(question, mistake, seed):
    result = judge(question, mistake.wrong, seed)
    assert result.points == 0
    assert result.diagnosis.startswith(mistake.says)
    assert re.fullmatch(r"[^\n]*[.?!]", mistake.says), "a sentence, on one line"


@pytest.mark.parametrize("question", [q for q in COMPARED if q.forbid], ids=name)
def test_an_answer_that_merely_calls_the_package_is_refused(question):
    said = []
    for each in [one for whole in question.forbid for one in _members(whole)]:
        own = _resolve(each)
        own = getattr(own, "__func__", own)
        for answer in (own, lambda *args, own=own, **kwargs: own(*args, **kwargs)):
            result = judge(question, answer)
            assert result.points == 0
            said.append(result.diagnosis)
    assert any(each.startswith(OWN) for each in said), said


def spoiled(value):
    """Results that are nearly right, and wrong."""
    yield None
    if isinstance(value, np.ndarray | float | int | np.number):
        yield np.asarray(value)[None]
        array = np.array(value, dtype=float)
        if array.size:
            array.flat[-1] = array.flat[-1] * 1.2 + 0.1
            yield array if array.ndim else float(array)
            array.flat[-1] = np.nan
            yield array if array.ndim else float(array)
    elif isinstance(value, str | bytes):
        yield value + value[:1] if value else value * 0 + type(value)()
    elif isinstance(value, list) and value:
        yield value[:-1]
    elif isinstance(value, dict) and value:
        yield dict(list(value.items())[:-1])


@pytest.mark.parametrize(
    "question",
    [q for q in COMPARED if q.run is engine.call and not isinstance(q, Predict)],
    ids=name,
)
def test_wrong_answers_that_nobody_foresaw_are_refused(question):
    """One case after the other, its result is replaced by one that is nearly right."""
    seed = 5
    cases = list(question.cases(np.random.default_rng(seed)))
    right = [question.right(case) for case in cases]
    for place in range(min(len(cases), 20)):
        for wrong in spoiled(right[place]):
            results = itertools.chain([*right[:place], wrong, *right[place + 1 :]])
            answer = (lambda *case, results=results: next(results)) if cases != [()] else wrong
            assert judge(question, answer, seed).points == 0, (cases[place], wrong)


@pytest.mark.parametrize("question", [q for q in QUESTIONS if isinstance(q, Choose)], ids=name)
def test_each_wrong_letter_says_why(question):
    assert len(question.wrong) >= 2 and question.right not in question.wrong
    assert len(set(question.wrong.values())) == len(question.wrong)
    assert judge(question, question.right).points == question.points
    for letter, says in question.wrong.items():
        assert judge(question, letter).diagnosis == says


@pytest.mark.parametrize("question", [q for q in COMPARED if isinstance(q, Predict)], ids=name)
def test_a_prediction_beyond_its_factor_is_refused(question):
    seed = 5
    right = [question.right(case) for case in question.cases(np.random.default_rng(seed))]
    for off, accepted in (
        (1.0, True),
        (question.factor * 1.01, False),
        (0.99 / question.factor, False),
    ):
        results = iter([value * off for value in right])
        answer = right[0] * off
        if list(question.cases(np.random.default_rng(seed))) != [()]:
            answer = lambda *case, results=results: next(results)  # noqa: E731
        assert (judge(question, answer, seed).points > 0) == accepted
