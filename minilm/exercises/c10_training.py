"""Questions of chapter 10: memory, pieces of a batch, a loss scale, a whole file, a resume."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from minilm.exercises.engine import Choose, Debug, Implement, Mistake, Predict

__all__ = ["QUESTIONS", "Disk", "Trainer"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
IGNORED = -100


# predict: the bytes of weights, gradients and optimizer


def training_bytes(parameters: int, averages: int, short: bool) -> int:
    return parameters * ((2 + 2 + 4 if short else 4 + 4) + 4 * averages)


def runs(rng: np.random.Generator) -> Iterator[tuple[int, int, bool]]:
    yield 7_000_000_000, 2, True
    for averages, short in ((2, False), (1, True), (0, True), (1, False), (0, False)):
        yield int(rng.integers(10**6, 10**9)), averages, short


# implement: a batch in pieces

GradientOfSum: TypeAlias = Callable[[Array, Array], Array]


def accumulate(
    gradient_of_sum: GradientOfSum, inputs: Array, targets: Array, micro_batch: int
) -> Array:
    total: Any = 0.0
    for start in range(0, len(inputs), micro_batch):
        piece = slice(start, start + micro_batch)
        total = total + gradient_of_sum(inputs[piece], targets[piece])
    mean: Array = total / (targets != IGNORED).sum()
    return mean


def pieces_of(inputs: Array, targets: Array, micro_batch: int) -> list[tuple[Array, Array]]:
    starts = range(0, len(inputs), micro_batch)
    return [(inputs[s : s + micro_batch], targets[s : s + micro_batch]) for s in starts]


def run_accumulate(
    answer: Any, weights: Array, inputs: Array, targets: Array, micro_batch: int
) -> Array:
    """Hand out a gradient that notes how many rows it was asked for at once."""
    rows: list[int] = []

    def gradient_of_sum(some: Array, wanted: Array) -> Array:
        rows.append(len(some))
        real = (np.asarray(wanted) != IGNORED).astype(float)
        error = (np.tanh(weights[some]) - wanted) * real
        return np.bincount(some.ravel(), error.ravel(), minlength=len(weights))

    gradient = np.asarray(answer(gradient_of_sum, inputs, targets, micro_batch), dtype=float)
    return np.append(gradient.ravel(), [max(rows, default=0), sum(rows)])


def uneven_batches(rng: np.random.Generator) -> Iterator[tuple[Array, Array, Array, int]]:
    for rows, seq, micro_batch in ((6, 5, 2), (7, 4, 3), (5, 6, 4), (4, 3, 1), (3, 4, 3)):
        inputs = rng.integers(0, 6, size=(rows, seq))
        targets = rng.integers(1, 9, size=(rows, seq))
        lengths = rng.integers(1, seq, size=rows)
        lengths[-1] = 0  # a row in which nothing counts
        targets[np.arange(seq) >= lengths[:, None]] = IGNORED
        yield rng.standard_normal(6), inputs, targets, micro_batch


def weighted(how: Callable[[Array, Array, int], float]) -> Callable[..., Array]:
    """Accumulate; `how` says by what one piece is divided: its targets, all targets, how many."""

    def wrong(
        gradient_of_sum: GradientOfSum, inputs: Array, targets: Array, micro_batch: int
    ) -> Array:
        pieces = pieces_of(inputs, targets, micro_batch)
        total: Any = 0.0
        for some, wanted in pieces:
            total = total + gradient_of_sum(some, wanted) / how(wanted, targets, len(pieces))
        return np.asarray(total)

    return wrong


def count(targets: Array) -> float:
    return float(max((targets != IGNORED).sum(), 1))


def at_once(
    gradient_of_sum: GradientOfSum, inputs: Array, targets: Array, micro_batch: int
) -> Array:
    return gradient_of_sum(inputs, targets) / count(targets)


def last_dropped(
    gradient_of_sum: GradientOfSum, inputs: Array, targets: Array, micro_batch: int
) -> Array:
    total: Any = 0.0
    for start in range(0, len(inputs) - micro_batch + 1, micro_batch):
        piece = slice(start, start + micro_batch)
        total = total + gradient_of_sum(inputs[piece], targets[piece])
    return np.asarray(total / count(targets))


def last_only(
    gradient_of_sum: GradientOfSum, inputs: Array, targets: Array, micro_batch: int
) -> Array:
    gradient: Any = 0.0
    for some, wanted in pieces_of(inputs, targets, micro_batch):
        gradient = gradient_of_sum(some, wanted)
    return np.asarray(gradient / count(targets))


def so_many_pieces(
    gradient_of_sum: GradientOfSum, inputs: Array, targets: Array, micro_batch: int
) -> Array:
    total: Any = 0.0
    for place in np.array_split(np.arange(len(inputs)), micro_batch):
        total = total + gradient_of_sum(inputs[place], targets[place])
    return np.asarray(total / count(targets))


# implement: one step with a scaled loss

Scaled: TypeAlias = tuple[Array, float, int]
PATIENCE = 3


def scaled_step(weights: Array, gradient: Array, scale: float, good: int, lr: float) -> Scaled:
    if not np.isfinite(gradient).all():
        return weights, scale / 2, 0
    weights = weights - lr * gradient.astype(np.float32) / scale
    good += 1
    return (weights, scale * 2, 0) if good == PATIENCE else (weights, scale, good)


def run_scaled(answer: Any, weights: Array, gradient: Array, scale: float, good: int) -> Array:
    new, scale, good = answer(weights, gradient, scale, good, 0.5)
    return np.append(np.asarray(new, dtype=float), [scale, good])


def half_gradients(rng: np.random.Generator) -> Iterator[tuple[Array, Array, float, int]]:
    for scale, good, bad in (
        (65536.0, 0, None),
        (1024.0, 1, np.inf),
        (256.0, PATIENCE - 1, None),
        (4096.0, PATIENCE - 1, np.nan),
        (2048.0, 2, -np.inf),
        (32768.0, 0, None),
    ):
        gradient = rng.uniform(0.5, 2, size=4).astype(np.float16)
        gradient[0] = 0.001  # over a scale this is nothing in float16
        if bad is not None:
            gradient[int(rng.integers(4))] = bad
        yield 1e-3 * rng.standard_normal(4).astype(np.float32), gradient, scale, good


def scaled_with(
    *,
    unscale: bool = True,
    half: bool = False,
    skip: Callable[[Array], bool] = lambda gradient: not np.isfinite(gradient).all(),
    take_bad: bool = False,
    fewer: float = 0.5,
    keep_good: bool = False,
    doubles: bool = True,
    keep_after_doubling: bool = False,
    new_scale: bool = False,
) -> Callable[..., Scaled]:
    """`scaled_step` with one thing done in another way."""

    def wrong(weights: Array, gradient: Array, scale: float, good: int, lr: float) -> Scaled:
        bad = skip(gradient)
        divisor = scale if unscale else 1.0
        divisor = divisor * 2 if new_scale and not bad and good + 1 == PATIENCE else divisor
        if half:
            step = (gradient / np.float16(min(divisor, 65504))).astype(np.float32)
        else:
            step = gradient.astype(np.float32) / divisor
        if not bad or take_bad:
            weights = weights - lr * step
        if bad:
            return weights, scale * fewer, good if keep_good else 0
        good += 1
        if doubles and good == PATIENCE:
            return weights, scale * 2, good if keep_after_doubling else 0
        return weights, scale, good

    return wrong


# implement: a file that is whole or not there


class PowerCutError(Exception):
    """The power is off."""


class Disk:
    """A disk that loses what is not synced when the power goes.

    Args:
        operations: So many succeed; during the next, the power goes.
    """

    def __init__(self, operations: int = 10**9) -> None:
        self.left = operations
        self.files: dict[str, bytes] = {}
        self.safe: dict[str, bool] = {}
        self.said: list[str] = []

    def _spend(self, what: str) -> None:
        self.said.append(what)
        self.left -= 1
        if self.left < 0:
            raise PowerCutError(what)

    def write(self, name: str, data: bytes) -> None:
        """Write a file. It is not yet safe."""
        self.files[name], self.safe[name] = data[: len(data) // 2], False
        self._spend(f"write {name}")
        self.files[name] = data

    def sync(self, name: str) -> None:
        """Wait until a file is safe."""
        if name not in self.files:
            raise FileNotFoundError(name)
        self._spend(f"sync {name}")
        self.safe[name] = True

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, at once. A file of that name is replaced."""
        if old not in self.files:
            raise FileNotFoundError(old)
        self._spend(f"rename {old} {new}")
        self.files[new], self.safe[new] = self.files.pop(old), self.safe.pop(old)

    def remove(self, name: str) -> None:
        """Remove a file."""
        if name not in self.files:
            raise FileNotFoundError(name)
        self._spend(f"remove {name}")
        del self.files[name], self.safe[name]

    def after_power_cut(self) -> dict[str, bytes]:
        """What is found: of a file that was not safe, the first half."""
        return {
            name: data if self.safe[name] else data[: len(data) // 2]
            for name, data in self.files.items()
        }


GOOD = "old or new, at every moment"


def write_whole(disk: Disk, name: str, data: bytes) -> None:
    part = name + ".part"
    disk.write(part, data)
    disk.sync(part)
    disk.rename(part, name)


def run_write(answer: Any, name: str, old: bytes, new: bytes) -> str:
    """Cut the power at every operation, and look at what is left under the name."""
    for operations in range(20):
        disk = Disk(operations)
        disk.files, disk.safe = {name: old}, {name: True}
        try:
            answer(disk, name, new)
        except PowerCutError:
            found = disk.after_power_cut().get(name)
            if found not in (old, new):
                what = "no file" if found is None else "a part"
                return f"{what}, when the power goes during operation {told(disk.said, name)}"
            continue
        found = disk.after_power_cut().get(name)
        if found != new or set(disk.files) != {name}:
            return f"not the new file alone at the end, after {told(disk.said, name)}"
        return GOOD
    return "no end after 20 operations"


def told(said: list[str], name: str) -> str:
    """The operations, whatever the temporary file is called."""
    words = [word if word == name else "TEMPORARY" for line in said for word in line.split()[1:]]
    names = iter(words)
    return ", ".join(
        " ".join([line.split()[0], *(next(names) for _ in line.split()[1:])]) for line in said
    )


def contents(rng: np.random.Generator) -> Iterator[tuple[str, bytes, bytes]]:
    for size in (4, 12):
        old, new = (rng.integers(97, 123, size=size).astype(np.uint8).tobytes() for _ in range(2))
        yield "weights", old, new + b"!!"


def overwrite(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name, data)
    disk.sync(name)


def remove_first(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name + ".part", data)
    disk.sync(name + ".part")
    disk.remove(name)
    disk.rename(name + ".part", name)


def no_sync(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name + ".part", data)
    disk.rename(name + ".part", name)


def late_sync(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name + ".part", data)
    disk.rename(name + ".part", name)
    disk.sync(name)


def copied(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name + ".part", data)
    disk.sync(name + ".part")
    disk.write(name, disk.files[name + ".part"])
    disk.sync(name)
    disk.remove(name + ".part")


def not_renamed(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name + ".part", data)
    disk.sync(name + ".part")


def wrong_sync(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name + ".part", data)
    disk.sync(name)
    disk.rename(name + ".part", name)


def moved_away(disk: Disk, name: str, data: bytes) -> None:
    disk.rename(name, name + ".old")
    disk.write(name + ".part", data)
    disk.sync(name + ".part")
    disk.rename(name + ".part", name)
    disk.remove(name + ".old")


def old_kept(disk: Disk, name: str, data: bytes) -> None:
    disk.write(name + ".old", disk.files[name])
    disk.sync(name + ".old")
    disk.write(name + ".part", data)
    disk.sync(name + ".part")
    disk.rename(name + ".part", name)


# debug: what a checkpoint forgets


class Trainer:
    """A training run that fits on a page: the mean of some numbers, by momentum, with dropout.

    Args:
        data: Rows.
        seed: Of the order and the dropout.
        total: Steps of the whole run.
    """

    def __init__(self, data: Array, seed: int, total: int) -> None:
        self.data, self.total = data, total
        self.rng = np.random.default_rng(seed)
        self.weights = np.zeros(data.shape[1])
        self.velocity = np.zeros(data.shape[1])
        self.order = self.rng.permutation(len(data))
        self.place = 0
        self.step = 0

    def train_step(self) -> None:
        """One row, one step."""
        if self.place == len(self.data):
            self.order, self.place = self.rng.permutation(len(self.data)), 0
        row = self.data[self.order[self.place]]
        kept = self.rng.random(len(row)) > 0.2
        rate = 0.3 * (1 - self.step / self.total)
        self.velocity *= 0.9
        self.velocity += (self.weights - row) * kept
        self.weights -= rate * self.velocity
        self.place += 1
        self.step += 1


NAMES = ("rng", "weights", "velocity", "order", "place", "step")


def saved(trainer: Trainer) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(trainer, name)) for name in NAMES}


def saving(*without: str, aliased: tuple[str, ...] = ()) -> Callable[[Trainer], dict[str, Any]]:
    """`saved`, without some parts, or with some that go on changing."""

    def wrong(trainer: Trainer) -> dict[str, Any]:
        return {
            name: getattr(trainer, name) if name in aliased else copy.deepcopy(vars(trainer)[name])
            for name in NAMES
            if name not in without
        }

    return wrong


def run_resume(answer: Any, data: Array, seed: int, at: int, total: int) -> Array:
    """Save in the middle, go on, then go on again in a new trainer from what was saved."""
    first = Trainer(data, seed, total)
    for _ in range(at):
        first.train_step()
    state = answer(first)
    for _ in range(total - at):
        first.train_step()
    second = Trainer(data, seed + 1000, total)
    for name, value in dict(state).items():
        setattr(second, name, value)
    for _ in range(max(total - at, 0)):
        second.train_step()
    return np.concatenate([second.weights, first.weights])


def histories(rng: np.random.Generator) -> Iterator[tuple[Array, int, int, int]]:
    for rows, at, total in ((5, 7, 16), (6, 3, 20), (4, 9, 14)):
        yield rng.standard_normal((rows, 3)), int(rng.integers(100)), at, total


QUESTIONS = (
    Predict(
        "training.memory",
        points=1,
        reference=training_bytes,
        forbid=(),
        cases=runs,
        factor=1.000001,
        note="16 bytes for each parameter with Adam, in float32 or mixed: a 16-bit copy saves "
        "activations, not these.",
        mistakes=(
            Mistake(
                "no gradients",
                lambda n, averages, short: n * ((2 + 4 if short else 4) + 4 * averages),
                "The gradients are missing.",
            ),
            Mistake(
                "no master weights",
                lambda n, averages, short: n * ((2 + 2 if short else 8) + 4 * averages),
                "The optimizer moves float32 weights, beside the 16-bit ones: they are missing.",
            ),
            Mistake(
                "averages in 16 bits",
                lambda n, averages, short: n * (8 + (2 if short else 4) * averages),
                "The optimizer's averages stay in float32: 4 bytes each.",
            ),
            Mistake(
                "all in 16 bits",
                lambda n, averages, short: n * (2 if short else 4) * (2 + averages),
                "Half the bytes for everything would be training in 16 bits alone: master weights "
                "and averages are float32.",
            ),
            Mistake(
                "gradients in float32",
                lambda n, averages, short: n * ((2 + 4 + 4 if short else 8) + 4 * averages),
                "The gradients have the format of the weights that made them: 2 bytes here.",
            ),
            Mistake(
                "always Adam",
                lambda n, averages, short: n * 16,
                "That is Adam's figure, whatever `averages` is.",
            ),
            Mistake(
                "always float32",
                lambda n, averages, short: n * (12 + 4 * averages),
                "You count float32 weights and gradients, and master weights on top of them.",
            ),
            Mistake(
                "no optimizer",
                lambda n, averages, short: n * 8,
                "The optimizer's averages are missing.",
            ),
        ),
    ),
    Implement(
        "training.accumulate",
        points=3,
        reference=accumulate,
        forbid=("training.accumulate_gradients",),
        cases=uneven_batches,
        run=run_accumulate,
        mistakes=(
            Mistake(
                "mean of means",
                weighted(lambda wanted, targets, pieces: count(wanted) * pieces),
                "You average the means of the pieces, so that a token in a piece with few weighs "
                "more than one in a piece with many.",
            ),
            Mistake(
                "padding counted",
                weighted(lambda wanted, targets, pieces: targets.size),
                "You divide by all positions; those marked -100 do not count.",
            ),
            Mistake(
                "rows counted",
                weighted(lambda wanted, targets, pieces: len(targets)),
                "You divide by the number of rows; wanted the tokens that count.",
            ),
            Mistake(
                "pieces counted",
                weighted(lambda wanted, targets, pieces: pieces),
                "You divide by the number of pieces; the function gives sums, so divide by the "
                "tokens that count.",
            ),
            Mistake(
                "means added",
                weighted(lambda wanted, targets, pieces: count(wanted)),
                "You divide each piece by its own tokens and add: that is as many means as there "
                "are pieces.",
            ),
            Mistake(
                "sum",
                weighted(lambda wanted, targets, pieces: 1.0),
                "That is the gradient of the sum over the batch; wanted that of the mean.",
            ),
            Mistake(
                "at once",
                at_once,
                "You run all rows at once: the batch would not fit into memory.",
            ),
            Mistake(
                "last piece dropped",
                last_dropped,
                "The last rows are lost where the rows are no multiple of `micro_batch`.",
            ),
            Mistake(
                "last piece only",
                last_only,
                "Each piece replaces the gradient of those before; add them.",
            ),
            Mistake(
                "so many pieces",
                so_many_pieces,
                "You cut the batch into `micro_batch` pieces; it is the number of rows in one.",
            ),
        ),
    ),
    Implement(
        "training.loss_scale",
        points=2,
        reference=scaled_step,
        forbid=("training.adjust_loss_scale",),
        cases=half_gradients,
        run=run_scaled,
        mistakes=(
            Mistake(
                "not unscaled",
                scaled_with(unscale=False),
                "Your step is `scale` times too long: the gradient is that of the scaled loss.",
            ),
            Mistake(
                "unscaled in float16",
                scaled_with(half=True),
                "You divide in float16, where the small gradients that the scale has saved become "
                "zero again: convert first.",
            ),
            Mistake(
                "bad step taken",
                scaled_with(take_bad=True),
                "You step with an infinite gradient: after that no weight is a number any more.",
            ),
            Mistake(
                "only NaN",
                scaled_with(skip=lambda gradient: bool(np.isnan(gradient).any())),
                "You look for NaN alone; an overflow is infinite first.",
            ),
            Mistake(
                "only infinity",
                scaled_with(skip=lambda gradient: bool(np.isinf(gradient).any())),
                "You look for infinity alone; an infinity minus an infinity is NaN.",
            ),
            Mistake(
                "scale not halved",
                scaled_with(fewer=1.0),
                "After an overflow the scale must fall, or the next step overflows, too.",
            ),
            Mistake(
                "scale doubled",
                scaled_with(fewer=2.0),
                "After an overflow you raise the scale; it was too large.",
            ),
            Mistake(
                "good steps kept",
                scaled_with(keep_good=True),
                "After an overflow the good steps are counted from zero again.",
            ),
            Mistake(
                "never doubled",
                scaled_with(doubles=False),
                "Your scale never grows: after `PATIENCE` good steps in a row it is doubled.",
            ),
            Mistake(
                "count kept after doubling",
                scaled_with(keep_after_doubling=True),
                "After a doubling the good steps are counted from zero again.",
            ),
            Mistake(
                "divided by the new scale",
                scaled_with(new_scale=True),
                "You divide by the doubled scale; the gradient was made with the one before.",
            ),
        ),
    ),
    Implement(
        "training.write_whole",
        points=3,
        reference=write_whole,
        forbid=("files.whole_folder",),
        cases=contents,
        run=run_write,
        mistakes=(
            Mistake(
                "written over",
                overwrite,
                "You write over the old file: when the power goes during the write, neither is "
                "there.",
            ),
            Mistake(
                "no sync",
                no_sync,
                "You rename before the bytes are on the disk: the new name may stand on half a "
                "file.",
            ),
            Mistake(
                "sync after the rename",
                late_sync,
                "You sync after the rename: when the power goes between the two, the new name "
                "stands on half a file.",
            ),
            Mistake(
                "the old file synced",
                wrong_sync,
                "You sync the file of the old content; it is the new one that is not yet safe.",
            ),
            Mistake(
                "the old file removed",
                remove_first,
                "Between your remove and your rename there is no file; a rename replaces by "
                "itself.",
            ),
            Mistake(
                "the old file moved away",
                moved_away,
                "You move the old file away first: until the last rename there is no file.",
            ),
            Mistake(
                "copied",
                copied,
                "You write the content a second time, over the old file: a rename does it at once.",
            ),
            Mistake(
                "not renamed",
                not_renamed,
                "The new content is safe, under another name; it never gets its own.",
            ),
            Mistake(
                "a copy left behind",
                old_kept,
                "All is well under the name, but another file is left behind at the end.",
            ),
        ),
    ),
    Debug(
        "training.resume",
        points=2,
        reference=saved,
        forbid=("checkpoint.save_checkpoint",),
        cases=histories,
        run=run_resume,
        mistakes=(
            Mistake(
                "order and random numbers forgotten",
                saving("order", "rng"),
                "The resumed run reads other rows, in another order, and drops other features: "
                "what decides that is not all saved.",
            ),
            Mistake(
                "random numbers forgotten",
                saving("rng"),
                "The rest of this epoch has the right rows, but dropout and the next epoch's order "
                "draw other numbers: the generator is not saved.",
            ),
            Mistake(
                "order forgotten",
                saving("order"),
                "The generator is saved, but it was asked for this epoch's order before: the order "
                "is not saved.",
            ),
            Mistake(
                "the generator itself",
                saving(aliased=("rng",)),
                "You save the generator, not its state: the first run goes on drawing from it. "
                "Save a copy.",
            ),
            Mistake(
                "the arrays themselves",
                saving(aliased=("weights", "velocity")),
                "You save the arrays that training goes on changing in place: the checkpoint "
                "changes with them. Save copies.",
            ),
            Mistake(
                "everything itself",
                saving(aliased=NAMES),
                "Nothing you save is a copy: arrays and generator go on changing with the first "
                "run.",
            ),
            Mistake(
                "velocity forgotten",
                saving("velocity"),
                "The optimizer's velocity is not saved: the resumed run starts from a stand.",
            ),
            Mistake(
                "step forgotten",
                saving("step"),
                "The step is not saved: the schedule of the learning rate starts again.",
            ),
            Mistake(
                "place forgotten",
                saving("place"),
                "The place in the epoch is not saved: the resumed run reads rows a second time.",
            ),
        ),
    ),
    Choose(
        "training.symptom",
        points=1,
        right="c",
        because="Without its averages Adam divides by almost nothing: the first steps are far too "
        "long, until the averages are there again.",
        wrong={
            "a": "Reading some text twice and some never does not show on a curve.",
            "b": "Another dropout mask is as good as the first: nothing shows.",
            "d": "Weights in 16 bits would lose a little at each resume, and not get it back in "
            "200 steps.",
        },
    ),
)
