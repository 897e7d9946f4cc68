"""A class-incremental stream of features: tasks of a few classes each, one after another, none of them ever again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from experiments.continual.heads import Contender, descend
from kvjax.typing import Array

Features = NDArray[np.float32]
Labels = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Features f32 [n, E] and labels int32 [n] in 0..classes-1, to train on and to test; tasks: labels in their order.

    batch, passes: of the training.
    """

    train: tuple[Features, Labels]
    test: tuple[Features, Labels]
    tasks: tuple[tuple[int, ...], ...]
    batch: int
    passes: int

    @property
    def classes(self) -> int:
        return sum(map(len, self.tasks))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a head knew when.

    Attributes:
      accuracy: [tasks, tasks], after each task (row) that on each task's test images (column), all classes of the
        stream being possible answers; nan for tasks still to come.
      joint: accuracy on everything of the same head trained on all classes shuffled, with as many steps.
    """

    accuracy: NDArray[np.float64]
    joint: float

    @property
    def seen(self) -> list[float]:
        """After each task the mean accuracy over the tasks so far."""
        return np.nanmean(self.accuracy, axis=1).tolist()

    @property
    def final(self) -> float:
        """Mean accuracy over all tasks at the end."""
        return self.seen[-1]

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy before the end minus that at the end (Chaudhry et al.,
        2018, arXiv 1801.10112)."""
        best = np.nanmax(self.accuracy[:-1, :-1], axis=0)
        return float(np.mean(best - self.accuracy[-1, :-1]))


def learn_stream(contender: Contender, stream: Stream, seed: int, rate: float) -> NDArray[np.float64]:
    """`Outcome.accuracy` of a head that learns task after task."""
    head, labels = contender.head, stream.train[1]
    params, x, tested = head.init(jax.random.key(seed)), *prepared(contender, stream)
    found = np.full((len(stream.tasks),) * 2, np.nan)
    for at, task in enumerate(stream.tasks):
        order = batches(np.flatnonzero(np.isin(labels, task)), stream, np.random.default_rng([seed, at]))
        params = descend(head, params, x, jnp.asarray(labels), jnp.asarray(order), rate)
        right = np.asarray(jnp.argmax(head.logits(params, tested), axis=-1)) == stream.test[1]
        for before, learnt in enumerate(stream.tasks[: at + 1]):
            found[at, before] = right[np.isin(stream.test[1], learnt)].mean()
    return found


def learn_jointly(contender: Contender, stream: Stream, seed: int, rate: float) -> float:
    """Accuracy of a head that learns all classes at once, in as many steps."""
    everything = dataclasses.replace(stream, tasks=(tuple(label for task in stream.tasks for label in task),))
    return float(learn_stream(contender, everything, seed, rate)[0, 0])


def prepared(contender: Contender, stream: Stream) -> tuple[Array, Array]:
    """What the head reads of the images to train on, and of those to test."""
    return contender.prepare(jnp.asarray(stream.train[0])), contender.prepare(jnp.asarray(stream.test[0]))


def batches(rows: NDArray[np.int64], stream: Stream, rng: np.random.Generator) -> NDArray[np.int32]:
    """int32 [steps, batch]: each pass is another shuffle of the rows, without the incomplete last batch."""
    steps = max(1, len(rows) // stream.batch)
    each = [rng.permutation(rows)[: steps * stream.batch] for _ in range(stream.passes)]
    return np.concatenate(each).reshape(steps * stream.passes, -1).astype(np.int32)


def class_means(stream: Stream) -> Outcome:
    """The nearest mean of a class, of the classes so far: it learns one class at a time and cannot forget."""
    (features, labels), (tested, wanted) = stream.train, stream.test
    means = np.stack([features[labels == label].mean(0) for label in range(stream.classes)])
    distances = ((tested[:, None] - means) ** 2).sum(-1)
    found = np.full((len(stream.tasks),) * 2, np.nan)
    for at in range(len(stream.tasks)):
        known = [label for task in stream.tasks[: at + 1] for label in task]
        right = np.asarray(known)[distances[:, known].argmin(1)] == wanted
        for before, learnt in enumerate(stream.tasks[: at + 1]):
            found[at, before] = right[np.isin(wanted, learnt)].mean()
    return Outcome(found, float(found[-1].mean()))


def choose(contender: Contender, stream: Stream, seed: int) -> tuple[float, float]:
    """The rates with the highest final accuracy of the stream, and of joint training, on a stream for choosing."""
    final = [learn_stream(contender, stream, seed, rate)[-1].mean() for rate in contender.rates]
    joint = [learn_jointly(contender, stream, seed, rate) for rate in contender.rates]
    return contender.rates[int(np.argmax(final))], contender.rates[int(np.argmax(joint))]
