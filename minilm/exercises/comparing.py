"""Compare a learner's result with the right one, and say in a few words how it differs."""

import contextlib
import dataclasses
import inspect
import math
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "brief",
    "case_text",
    "difference",
    "form_difference",
    "kind",
    "learners_line",
    "misshapen",
    "parameter_names",
    "pattern",
    "plain",
]

EXACT = 1e-6  # with this relative tolerance or a tighter one, integers must be equal


def plain(value: Any) -> Any:
    """A copy made of numbers, arrays, text, lists and dicts, as far as possible."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor; torch stays out
        value = value.detach().cpu()
        return np.array(value.tolist() if "bfloat16" in str(value.dtype) else value.numpy())
    if isinstance(value, int) and abs(value) >= 2**63:
        return float(value) if abs(value) < 2**1023 else math.copysign(math.inf, value)
    if isinstance(value, np.ndarray):
        return value.copy()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return frozenset(value)
    if isinstance(value, list | tuple | range):
        parts = [plain(each) for each in value]
        alike = len({np.shape(each) for each in parts if _numeric(each)}) == 1
        return np.array(parts) if alike and all(_numeric(each) for each in parts) else parts
    return value


def _numeric(value: Any) -> bool:
    if isinstance(value, int | float | complex | np.number | np.bool_):
        return True
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def difference(got: Any, want: Any, rtol: float, atol: float) -> str | None:
    """None when two plain values are equal, else a phrase to follow "your answer"."""
    if _numeric(want):
        return form_difference(got, want) or _number_difference(got, want, rtol, atol)
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return f"is {kind(got)}; wanted a dict"
        if missing := [key for key in want if key not in got]:
            return f"has no key {brief(missing[0])}"
        if extra := [key for key in got if key not in want]:
            return f"has a key too many, {brief(extra[0])}"
        for key, right in want.items():
            if said := difference(got[key], right, rtol, atol):
                return f"at key {brief(key)} {said}"
        return None
    if isinstance(want, list):
        if not isinstance(got, list) and np.ndim(got) == 0:
            return f"is {kind(got)}; wanted a list of {len(want)}"
        if len(got) != len(want):
            return f"has length {len(got)}; wanted {len(want)}"
        for place, (one, right) in enumerate(zip(got, want, strict=True)):
            if said := difference(one, right, rtol, atol):
                return f"in part {place} {said}"
        return None
    if not isinstance(got, type(want)):
        return f"is {kind(got)}; wanted {kind(want)}"
    return None if want is got or want == got else f"is {brief(got)}; wanted {brief(want)}"


def form_difference(got: Any, want: Any) -> str | None:
    """How `got` differs from the numbers `want` in type or shape, or by a NaN; else None."""
    if not _numeric(got):
        wanted = "a number" if np.ndim(want) == 0 else f"numbers of shape {np.shape(want)}"
        return f"is {kind(got)}; wanted {wanted}"
    yours, right = np.asarray(got), np.asarray(want)
    if yours.shape != right.shape:
        return f"has shape {yours.shape}; wanted {right.shape}"
    if right.dtype.kind == "b" and yours.dtype.kind != "b":
        return f"has dtype {yours.dtype}; wanted booleans"
    with np.errstate(all="ignore"):
        bad = np.argwhere(np.isnan(yours) & ~np.isnan(right))
    return f"is NaN{_where(bad[0])}; wanted {_number(right[tuple(bad[0])])}" if len(bad) else None


def misshapen(got: Any, want: Any) -> bool:
    """Whether `got` differs from `want` before any value is looked at."""
    if _numeric(want):
        return form_difference(got, want) is not None
    return not isinstance(got, type(want))


def _number_difference(got: Any, want: Any, rtol: float, atol: float) -> str | None:
    yours, right = np.asarray(got), np.asarray(want)
    if rtol <= EXACT and yours.dtype.kind in "biu" and right.dtype.kind in "biu":
        close = yours == right
    else:
        with np.errstate(all="ignore"):
            close = np.isclose(yours, right, rtol=rtol, atol=atol, equal_nan=True)
    bad = np.argwhere(~close)
    if not len(bad):
        return None
    place = tuple(bad[0])
    return f"is {_number(yours[place])}{_where(bad[0])}; wanted {_number(right[place])}"


FACTORS = {
    math.log(2): "nats where bits are wanted: divide by ln 2",
    1 / math.log(2): "bits where nats are wanted: multiply by ln 2",
    -1.0: "the sign is flipped",
    8.0: "bits and bytes: 8 to one",
    1 / 8: "bits and bytes: 8 to one",
}


def pattern(got: Sequence[Any], want: Sequence[Any]) -> str | None:
    """A mistake that shows in all results together: a transpose, or one constant factor."""
    if not all(_numeric(value) for value in [*got, *want]):
        return None
    pairs = list(zip(got, want, strict=True))
    if any(np.ndim(right) == 2 for right in want) and all(
        np.shape(np.transpose(one)) == np.shape(right) and np.allclose(np.transpose(one), right)
        for one, right in pairs
    ):
        return "It is the transpose of what is wanted."
    if any(np.shape(one) != np.shape(right) for one, right in pairs):
        return None
    yours = np.concatenate([np.ravel(one) for one in got]).astype(complex)
    right = np.concatenate([np.ravel(one) for one in want]).astype(complex)
    if not (np.isfinite(yours).all() and np.isfinite(right).all()):
        return None
    if ((yours == 0) != (right == 0)).any() or np.count_nonzero(right) < 2:
        return None
    ratios = yours[right != 0] / right[right != 0]
    ratio = float(ratios[0].real)
    if not np.allclose(ratios, ratio, rtol=1e-6, atol=0):
        return None
    meanings = [
        text for factor, text in FACTORS.items() if math.isclose(ratio, factor, rel_tol=1e-6)
    ]
    return (
        f"Every value is {ratio:.4g} times the right one"
        + "".join(f" ({text})" for text in meanings)
        + "."
    )


def brief(value: Any, limit: int = 60) -> str:
    """A value in a few characters."""
    if isinstance(value, np.ndarray | np.generic):
        if value.size > 8:
            return f"an array of shape {value.shape}"
        value = np.round(value, 6).tolist() if value.dtype.kind in "fc" else value.tolist()
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001  a learner's __repr__
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def kind(value: Any) -> str:
    """A value's type with its article, or the value itself when that says more."""
    if value is None or isinstance(value, int | float | np.number):
        return brief(value)
    name = "array" if isinstance(value, np.ndarray) else type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _number(value: Any) -> str:
    if np.asarray(value).dtype.kind in "biu":
        return str(value)
    return f"{float(value):.6g}" if np.isrealobj(value) else str(value)


def _where(place: Any) -> str:
    index = tuple(int(one) for one in place)
    return f" at index {index if len(index) > 1 else index[0]}" if index else ""


def parameter_names(function: Any, case: Sequence[Any]) -> list[str]:
    """The names of a function's parameters, or their places when the names cannot be told."""
    with contextlib.suppress(TypeError, ValueError):
        names = list(inspect.signature(function).parameters)
        if len(names) >= len(case):
            return names[: len(case)]
    return [f"number {place + 1}" for place in range(len(case))]


def case_text(names: Sequence[str], case: Sequence[Any]) -> str:
    """`k=0.5, counts=[1, 2]`."""
    parts = [
        f"{name}={brief(value, 40)}" if name.isidentifier() else brief(value, 40)
        for name, value in zip(names, case, strict=True)
    ]
    return ", ".join(parts)


LIBRARY = tuple(
    str(Path(path).resolve())
    for path in {
        str(Path(__file__).parents[1]),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    }
)


def learners_line(error: BaseException) -> str:
    """The last line of the learner's own that an exception went through: ` (line 3: ...)`."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if frame.filename.startswith(("<frozen", "<minilm")):
            continue
        if not str(Path(frame.filename).resolve()).startswith(LIBRARY):
            return f" (line {frame.lineno}" + (f": `{frame.line}`" if frame.line else "") + ")"
    return ""
