"""What hypothesis draws in more than one test file."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

DTYPES = (np.float32, np.float64)

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)


def shapes(min_dims: int = 0, max_dims: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """Small shapes without empty axes."""
    return hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=1, max_side=4)


def broadcastable(n: int = 2) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    """`n` shapes that broadcast against each other, of up to 4 axes each."""
    drawn = hnp.mutually_broadcastable_shapes(num_shapes=n, max_dims=4, min_side=1, max_side=4)
    return drawn.map(lambda found: found.input_shapes)


@st.composite
def matrix_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of two stacks of matrices that can be multiplied; the stacks broadcast."""
    left, right = draw(broadcastable())
    rows, inner, columns = (draw(st.integers(1, 5)) for _ in range(3))
    return (*left, rows, inner), (*right, inner, columns)


@st.composite
def reductions(draw: st.DrawFn) -> tuple[tuple[int, ...], int | tuple[int, ...] | None, bool]:
    """A shape, some of its axes (counted from either end), and whether they are kept."""
    shape = draw(shapes(min_dims=1))
    axis = draw(
        st.none()
        | st.integers(-len(shape), len(shape) - 1)
        | st.lists(
            st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape), unique=True
        ).map(tuple)
    )
    return shape, axis, draw(st.booleans())


def values(seed: int, shape: tuple[int, ...], dtype: type = np.float64) -> np.ndarray:
    """Numbers of the size that networks hold, reproducible, no two of them equal."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)
