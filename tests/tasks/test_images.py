"""The drawn images: what the seed decides, what a class looks like, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.errors import UsageError
from kvjax.tasks.images import CLASSES, SHAPES, Style, image_batch

PLAIN = Style(radius=(9.0, 9.0), shift=0, turn=0, stretch=0, contrast=(1.0, 1.0), tint=0, texture=0, strokes=0, noise=0)

LABELS = [8, 5, 3, 8, 5, 9, 4, 9]
MEANS = [0.0261, -0.1816, -0.084, -0.2107, 0.2543, -0.299, 0.0575, 0.0016]


def test_shapes_dtypes_and_range() -> None:
    images, labels = image_batch(0, 40)
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.float32
    assert labels.shape == (40,) and labels.dtype == np.int32
    assert images.min() >= -1 and images.max() <= 1 and abs(images.mean()) < 0.1 and 0.2 < images.std() < 0.6


def test_the_seed_decides_and_the_count_does_not() -> None:
    images, labels = image_batch(5, 9)
    fewer, same = image_batch(5, 4)
    np.testing.assert_array_equal(fewer, images[:4])
    np.testing.assert_array_equal(same, labels[:4])
    np.testing.assert_array_equal(image_batch([5], 9)[0], images)
    others = [image_batch(seed, 9)[0] for seed in (6, [5, 0], [5, 1])]
    assert all(abs(other - images).mean() > 0.1 for other in others)


def test_the_default_images_stay_what_they_are() -> None:
    """Studies name images by their seed. Rounded, since machines differ in the last bits of a sine."""
    images, labels = image_batch(0, 8)
    assert labels.tolist() == LABELS
    np.testing.assert_allclose(images.mean((1, 2, 3)), MEANS, atol=1e-4)


def test_classes_are_drawn_from_those_that_are_asked_for_and_evenly() -> None:
    assert set(image_batch(0, 60, classes=(7, 2))[1]) == {2, 7}
    counts = np.bincount(image_batch(1, 2000, style=PLAIN)[1], minlength=10)
    assert counts.min() > 150 and counts.max() < 250


@pytest.mark.parametrize("label", range(10))
def test_a_plain_picture_is_the_shape_of_its_class(label: int) -> None:
    """What is lighter than the corner of a plain picture is where the shape's formula says."""
    image = image_batch(3, 1, classes=(label,), style=PLAIN)[0][0].mean(-1)
    y, x = (np.mgrid[:32, :32] - 15.5) / 9.0
    inside = SHAPES[CLASSES[label]](-x, -y)  # half a turn is in the middle of the range of angles
    lighter = image > image[0, 0] + 0.3
    sure = np.abs(inside) > 0.08
    assert (lighter == (inside > 0))[sure].mean() > 0.99
    assert 0.05 < lighter.mean() < 0.5


@pytest.mark.parametrize("classes", [(), (10,), (-1, 2)])
def test_classes_that_do_not_exist_are_refused(classes: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="classes must be some of 0 to 9"):
        image_batch(0, 1, classes)
