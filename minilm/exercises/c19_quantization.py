"""Questions of chapter 19: a speed limit, a zero point, packed codes, a step of GPTQ, groups."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from minilm.exercises.engine import Array, Choose, Debug, Implement, Measure, Mistake, Predict

__all__ = ["QUESTIONS"]


# predict: tokens a second


def token_limit_with(
    scale_bytes: int = 2,
    least_bytes: int = 2,
    bits_in_a_byte: int = 8,
    cache_times: int = 1,
    scales: str = "groups",
) -> Callable[..., float]:
    """The limit of decoding, in which one part may be another."""

    def token_limit(
        n_weights: float,
        bits: int,
        group: int,
        affine: bool,
        cache_bytes: float,
        bytes_per_second: float,
    ) -> float:
        extra = scale_bytes + least_bytes * affine
        n_scales = {"groups": n_weights / group, "none": 0.0, "each": n_weights}[scales]
        size = n_weights * bits / bits_in_a_byte + n_scales * extra
        return bytes_per_second / (size + cache_times * cache_bytes)

    return token_limit


def read_only_codes(
    n_weights: float, bits: int, group: int, affine: bool, cache_bytes: float, speed: float
) -> float:
    return speed / (n_weights * bits / 8)


def machines(rng: np.random.Generator) -> Iterator[tuple[float, int, int, bool, float, float]]:
    yield 7e9, 4, 32, True, 5e8, 6e10
    yield 7e9, 4, 16, False, 5e8, 6e10
    for affine in (True, False):
        n = float(rng.integers(1, 80)) * 1e9
        bits, group = int(rng.integers(3, 9)), 16 * int(rng.integers(1, 3))
        yield (
            n,
            bits,
            group,
            affine,
            n * float(rng.uniform(0.1, 0.3)),
            float(rng.integers(2, 9)) * 1e11,
        )


# implement: a zero point


def zero_point_with(
    reaches_zero: bool = True,
    whole: bool = True,
    clips: bool = True,
    sign: float = 1.0,
    levels: Callable[[int], int] = lambda bits: 2**bits - 1,
    one_for_all: bool = False,
    columns: bool = False,
    rounds: Callable[[Array], Array] = np.round,
    guard: bool = True,
) -> Callable[[Array, int], tuple[Array, Array, Array]]:
    """Codes, steps and zero points, in which one part may be another."""

    def zero_point(weight: Array, bits: int) -> tuple[Array, Array, Array]:
        axis = 0 if columns else 1
        least, most = weight.min(axis=axis, keepdims=True), weight.max(axis=axis, keepdims=True)
        if one_for_all:
            least, most = np.full_like(least, least.min()), np.full_like(most, most.max())
        if reaches_zero:
            least, most = np.minimum(least, 0.0), np.maximum(most, 0.0)
        top = levels(bits)
        step = (most - least) / top
        if guard:
            step = np.where(step > 0, step, 1.0)
        zero = -sign * least / step
        zero = np.round(zero) if whole else zero
        codes = rounds(weight / step) + zero
        codes = np.clip(codes, 0, 2**bits - 1) if clips else codes
        return codes, step, zero

    return zero_point


def offset_by_least(weight: Array, bits: int) -> tuple[Array, Array, Array]:
    """The chapter's affine grid: a float offset, not a whole code."""
    least, most = weight.min(axis=1, keepdims=True), weight.max(axis=1, keepdims=True)
    step = (most - least) / (2**bits - 1)
    step = np.where(step > 0, step, 1.0)
    return np.round((weight - least) / step), step, least


def lopsided(rng: np.random.Generator) -> Iterator[tuple[Array, int]]:
    yield np.array([[-0.3, 0.0, 0.7, 1.2], [-2.0, -0.5, 0.25, 0.5]]), 4
    for rows, width, bits in ((3, 8, 4), (2, 5, 3), (4, 16, 8)):
        yield rng.standard_normal((rows, width)) + rng.uniform(-0.5, 0.5, (rows, 1)), bits
    yield rng.uniform(0.5, 1.0, (2, 6)), 4  # all above zero
    yield np.zeros((2, 3)), 4
    yield np.array([[-1.5, 0.2, 1.5], [-0.2, 0.1, 0.4]]), 2  # two roundings go up: code 4 of 0 to 3


# debug: packed codes


def decoder_with(
    sign: str = "two's complement",
    groups: str = "neighbours",
    low_first: bool = True,
    last_negative: int = 8,
) -> Callable[[Array, Array], Array]:
    """Decode packed codes, in which one part may be another."""

    def decode(packed: Array, scale: Array) -> Array:
        low, high = packed & 15, packed >> 4
        halves = [low, high] if low_first else [high, low]
        codes = np.stack(halves, axis=2).reshape(len(packed), -1)
        if sign == "none":
            numbers = codes.astype(np.float64)
        elif sign == "shifted":
            numbers = codes.astype(np.float64) - 8
        elif sign == "wraps":
            numbers = np.where(codes >= 8, codes - np.uint8(16), codes).astype(np.float64)
        else:
            whole = codes.astype(np.int64)
            numbers = np.where(whole >= last_negative, whole - 16, whole).astype(np.float64)
        n_groups = scale.shape[1]
        if groups == "in turn":
            return (numbers.reshape(len(packed), -1, n_groups) * scale[:, None, :]).reshape(
                codes.shape
            )
        if groups == "first":
            return numbers * scale[:, :1]
        return (numbers.reshape(len(packed), n_groups, -1) * scale[:, :, None]).reshape(codes.shape)

    return decode


def packed_rows(rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    yield np.array([[0x80, 0xF1, 0x27, 0x9A]], dtype=np.uint8), np.array([[1.0, 10.0]])
    for rows, half, groups in ((2, 6, 3), (3, 16, 4), (1, 8, 2)):
        packed = rng.integers(0, 256, size=(rows, half), dtype=np.uint8)
        packed[0, 0] = 0x88
        yield packed, rng.uniform(0.1, 2.0, (rows, groups))


# implement: a step of GPTQ


def gptq_step_with(
    sign: float = 1.0,
    divides: bool = True,
    by: str = "own",
    pushes: bool = True,
    forgets: str = "update",
    rounds: Callable[[Array], Array] = np.round,
    takes: str = "row",
) -> Callable[[Array, Array, int, Array], tuple[Array, Array]]:
    """One column rounded, in which one part may be another."""

    def gptq_step(weight: Array, inverse: Array, q: int, step: Array) -> tuple[Array, Array]:
        target = rounds(weight[:, q] / step) * step
        error = target - weight[:, q]
        by_what = inverse[q, q] if by == "own" else np.trace(inverse)
        direction = inverse[q] if takes == "row" else np.diag(inverse)
        moved = weight + sign * np.outer(error, direction) / (by_what if divides else 1.0)
        if not pushes:
            moved = weight.copy()
            moved[:, q] = target
        if forgets == "update":
            rest = inverse - np.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        else:
            rest = inverse.copy()
            if forgets == "zero":
                rest[q], rest[:, q] = 0.0, 0.0
        return moved, rest

    return gptq_step


def half_rounded(rng: np.random.Generator) -> Iterator[tuple[Array, Array, int, Array]]:
    for rows, width, q in ((2, 3, 0), (3, 5, 2), (1, 4, 3), (4, 6, 1)):
        inputs = rng.standard_normal((4 * width, width)) @ rng.standard_normal((width, width))
        rest = inputs[:, q:].T @ inputs[:, q:] / len(inputs) + 0.1 * np.eye(width - q)
        inverse = np.zeros((width, width))
        inverse[q:, q:] = np.linalg.inv(rest)
        step = rng.uniform(0.2, 0.5, rows)
        yield rng.standard_normal((rows, width)), inverse, q, step


# measure: what groups buy


@functools.cache
def matrix() -> Any:
    """Of the book model."""
    from minilm import load

    return load("book").state_dict()["layers.1.mlp.down_proj.weight"]


def error_of(group: int | Literal["tensor", "channel"], symmetric: bool = True) -> float:
    """Error of that matrix in 4 bits."""
    from minilm.quantization import Grid, dequantize, quantize

    return float((dequantize(quantize(matrix(), Grid(4, group, symmetric))) - matrix()).norm())


def bits_bought() -> float:
    return math.log2(error_of("channel") / error_of(32))


def in_squares() -> float:
    return 2 * bits_bought()


def in_nats() -> float:
    return math.log(error_of("channel") / error_of(32))


def as_a_ratio() -> float:
    return error_of("channel") / error_of(32)


def of_a_tensor() -> float:
    return math.log2(error_of("tensor") / error_of(32))


def of_affine_grids() -> float:
    return math.log2(error_of("channel", symmetric=False) / error_of(32, symmetric=False))


def absmax_to_affine() -> float:
    return math.log2(error_of("channel") / error_of(32, symmetric=False))


def upside_down() -> float:
    return -bits_bought()


QUESTIONS = (
    Predict(
        "quantization.token_limit",
        points=1,
        reference=token_limit_with(),
        cases=machines,
        factor=1.005,
        mistakes=(
            Mistake(
                "no scales",
                token_limit_with(scales="none"),
                "The scales are read as well: one for each group, and on an affine grid the least "
                "number, too.",
            ),
            Mistake(
                "no least number",
                token_limit_with(least_bytes=0),
                "On an affine grid each group has a least number beside its scale.",
            ),
            Mistake(
                "always a least number",
                lambda n, bits, group, affine, cache, speed: token_limit_with()(
                    n, bits, group, True, cache, speed
                ),
                "On a symmetric grid there is no least number to read.",
            ),
            Mistake(
                "float32 scales",
                token_limit_with(scale_bytes=4, least_bytes=4),
                "The scales are float16: two bytes each.",
            ),
            Mistake(
                "no cache",
                token_limit_with(cache_times=0),
                "The cache is read for each token, too.",
            ),
            Mistake(
                "codes only", read_only_codes, "Beside the codes, scales and the cache are read."
            ),
            Mistake(
                "a byte a bit",
                token_limit_with(bits_in_a_byte=1),
                "A byte has eight bits.",
            ),
        ),
    ),
    Implement(
        "quantization.zero_point",
        points=3,
        reference=zero_point_with(),
        forbid=("quantization.quantize",),
        cases=lopsided,
        atol=1e-8,
        mistakes=(
            Mistake(
                "zero out of reach",
                zero_point_with(reaches_zero=False),
                "In a row without a change of sign zero has no code: let the range reach zero.",
            ),
            Mistake(
                "not whole",
                zero_point_with(whole=False),
                "The zero point is a code, so it must be whole; yours is a fraction.",
            ),
            Mistake(
                "the least number",
                offset_by_least,
                "That is the chapter's affine grid with its least number; here the offset is a "
                "whole code, and zero is exact.",
            ),
            Mistake(
                "no clip",
                zero_point_with(clips=False),
                "Some of your codes lie outside 0 to 2^bits - 1: two roundings can add up.",
            ),
            Mistake(
                "wrong sign",
                zero_point_with(sign=-1.0),
                "The sign of your zero point is wrong: where the range goes below zero, zero lies "
                "above code 0.",
            ),
            Mistake(
                "2^bits steps",
                zero_point_with(levels=lambda bits: 2**bits),
                "Between 2^bits codes there are 2^bits - 1 steps.",
            ),
            Mistake(
                "one for all",
                zero_point_with(one_for_all=True),
                "You use one step for the whole matrix; each row has its own.",
            ),
            Mistake(
                "columns",
                zero_point_with(columns=True),
                "Your steps belong to columns; each row has its own.",
            ),
            Mistake(
                "cut off",
                zero_point_with(rounds=np.trunc),
                "You cut digits off where you should round to the nearest.",
            ),
            Mistake(
                "no guard",
                zero_point_with(guard=False),
                "A row of zeros has the step 0, and you divide by it.",
            ),
        ),
    ),
    Debug(
        "quantization.decode",
        points=3,
        reference=decoder_with(),
        forbid=("quantization.unpack_int4", "quantization.dequantize"),
        cases=packed_rows,
        mistakes=(
            Mistake(
                "both bugs",
                decoder_with(sign="none", groups="in turn"),
                "Codes from 8 to 15 stand for negative numbers, and neighbours share a scale: "
                "yours are all positive, and they take the scales in turn.",
            ),
            Mistake(
                "no sign",
                decoder_with(sign="none"),
                "The scales are right now. A half byte has a sign, too: 15 stands for -1.",
            ),
            Mistake(
                "scales in turn",
                decoder_with(groups="in turn"),
                "The signs are right now. The first group is the first columns of a row, not "
                "every so many columns.",
            ),
            Mistake(
                "shifted",
                decoder_with(sign="shifted"),
                "You subtract 8 from all codes; in two's complement 0 to 7 stay, and 8 to 15 lose "
                "16.",
            ),
            Mistake(
                "unsigned arithmetic",
                decoder_with(sign="wraps"),
                "You subtract within uint8, where 15 - 16 is 255.",
            ),
            Mistake(
                "8 is positive",
                decoder_with(last_negative=9),
                "The code 8 stands for -8, not for 8.",
            ),
            Mistake(
                "halves swapped",
                decoder_with(low_first=False),
                "The low half of a byte is the earlier column.",
            ),
            Mistake(
                "one scale a row",
                decoder_with(groups="first"),
                "All columns take the scale of the first group.",
            ),
        ),
    ),
    Implement(
        "quantization.gptq_step",
        points=3,
        reference=gptq_step_with(),
        forbid=("quantization.gptq",),
        cases=half_rounded,
        atol=1e-8,
        mistakes=(
            Mistake(
                "wrong sign",
                gptq_step_with(sign=-1.0),
                "Column q must end on its grid point; yours moves away from it.",
            ),
            Mistake(
                "not divided",
                gptq_step_with(divides=False),
                "Column q must end on its grid point: divide by the diagonal element of q.",
            ),
            Mistake(
                "divided by the trace",
                gptq_step_with(by="trace"),
                "You divide by the whole diagonal; only the element of q counts.",
            ),
            Mistake(
                "the diagonal",
                gptq_step_with(takes="diagonal"),
                "The other columns move by row q of the inverse, not by its diagonal.",
            ),
            Mistake(
                "nothing pushed",
                gptq_step_with(pushes=False),
                "You round column q, and the columns after it do not make up for the error.",
            ),
            Mistake(
                "same inverse",
                gptq_step_with(forgets="no"),
                "The inverse still has column q in it: take out its part.",
            ),
            Mistake(
                "row and column set to zero",
                gptq_step_with(forgets="zero"),
                "Setting row and column q to zero is not enough: the rest of the inverse changes, "
                "too, when q is gone.",
            ),
            Mistake(
                "cut off",
                gptq_step_with(rounds=np.trunc),
                "Take the nearest multiple of the step; you cut digits off.",
            ),
        ),
    ),
    Measure(
        "quantization.bits_bought",
        points=2,
        reference=bits_bought,
        note="They cost 0.44 bits a weight. Groups pay where single weights stand out, and for "
        "GPTQ; on a well-behaved matrix they barely pay for themselves.",
        mistakes=(
            Mistake("the ratio", as_a_ratio, "That is the ratio of the errors; ask how often 2."),
            Mistake("nats", in_nats, "A bit halves the error: take the logarithm to base 2."),
            Mistake(
                "squares",
                in_squares,
                "You compare squared errors, which a bit divides by four.",
            ),
            Mistake("a tensor", of_a_tensor, "You begin with one scale a tensor; take one a row."),
            Mistake("affine", of_affine_grids, "Both grids are symmetric."),
            Mistake(
                "to affine", absmax_to_affine, "Both grids are symmetric; your groups are affine."
            ),
            Mistake("upside down", upside_down, "Smaller errors are bits gained, not lost."),
        ),
    ),
    Choose(
        "quantization.format",
        points=1,
        right="c",
        because="4.4 GB fit, and 60 / 4.4 is 13 tokens a second at most.",
        wrong={
            "a": "7 billion weights of two bytes are 14 GB: they do not fit.",
            "b": "7 GB fit, barely, but 60 / 7 is less than 9 tokens a second even at the limit.",
            "d": "It is fast enough and it fits, and at two bits the price explodes. There is a "
            "choice that needs no such sacrifice.",
        },
    ),
)
