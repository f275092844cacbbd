"""The exercises: `check` tells a learner at once whether an answer is right, and if not, why."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minilm.exercises.engine import Result

__all__ = ["check"]


def check(name: str, answer: object) -> "Result":
    """Grade one answer: print its points or one sentence that names the likely mistake.

    Args:
        name: The question, such as "ngram.add_k".
        answer: What the question asks for: a function, a class, a number, or an option's letter.

    Raises:
        ConfigError: If there is no such question. Whatever the answer does, it raises nothing.
    """
    from minilm.exercises import engine

    return engine.check(name, answer)
