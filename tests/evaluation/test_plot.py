"""The Pareto plot: its geometry, its colours, and names that do not collide."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.evaluation import plot
from kvjax.evaluation.place import DISTANCES, overlap, place
from kvjax.evaluation.summary import Point, points, summarise
from tests.evaluation.records import ACCURACY, FULL_BYTES, record, sweep

AREA = np.array([0.0, 0.0, 400.0, 300.0])


@given(
    st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), min_size=1, max_size=12),
    st.lists(st.floats(10, 90), min_size=12, max_size=12),
)
def test_names_stay_inside_the_plot(anchors, widths):
    sizes = np.array([(width, 14.0) for width in widths[: len(anchors)]])
    boxes = place(np.array(anchors), sizes, np.zeros((0, 4)), AREA)
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], sizes)
    assert (boxes >= -1e-9).all() and (boxes[:, 2:] <= AREA[2:] + 1e-9).all()


def test_names_of_a_column_of_points_do_not_overlap():
    anchors = np.array([(200.0, 100.0 + 9 * i) for i in range(8)])
    dots = np.concatenate([anchors - 6, anchors + 6], axis=1)
    boxes = place(anchors, np.full((8, 2), (60.0, 14.0)), dots, AREA)
    for one, other in itertools.combinations(boxes, 2):
        assert overlap(one[None], other[None]) == 0
    assert overlap(boxes, dots).sum() == 0
    near = np.clip(anchors, boxes[:, :2], boxes[:, 2:])
    assert np.linalg.norm(near - anchors, axis=1).max() <= 2 * max(DISTANCES)


def test_the_overlap_of_boxes_is_their_common_area():
    box = np.array([[0.0, 0.0, 10.0, 4.0]])
    others = np.array([[5.0, 1.0, 20.0, 3.0], [9.0, 3.0, 12.0, 9.0], [10.0, 0.0, 11.0, 4.0], [-9.0, 5.0, 9.0, 6.0]])
    assert overlap(box, others) == 5 * 2 + 1 * 1


SVG = "{http://www.w3.org/2000/svg}"


def drawn(scored: list[Point], width: int = 820, height: int = 440) -> ElementTree.Element:
    return ElementTree.fromstring(plot.pareto(scored, width=width, height=height, standalone=True))


def place_of(element: ElementTree.Element) -> tuple[float, float]:
    return float(element.attrib["x"]), float(element.attrib["y"])


def names(root: ElementTree.Element) -> list[str]:
    """The names of the methods."""
    return ["".join(e.itertext()).strip() for e in root.iter(f"{SVG}g") if e.get("class") == "label"]


def ticks(root: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where each text stands that is no method's name."""
    texts = list(root.iter(f"{SVG}text"))
    return {e.text or "": place_of(e) for e in texts[: len(texts) - len(names(root))]}


def dots(root: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where the dot of each method stands."""
    groups = [(group, group.findtext(f"{SVG}title")) for group in root.iter(f"{SVG}g")]
    return {tip.rpartition(": ")[0]: place_of(use) for group, tip in groups if tip for use in group.iter(f"{SVG}use")}


@pytest.mark.parametrize("size", [(352, 384), (1040, 460)])
def test_dots_and_bars_stand_where_the_axes_say(size):
    scored = points(summarise(sweep()))
    root = drawn(scored, *size)
    at, places = ticks(root), dots(root)
    top, bottom, full, half = at["100%"][1], at["0%"][1], at["full"][0], at["1/2"][0]
    bars = [
        np.array(re.findall(r"[\d.]+", path.attrib["d"]), float).reshape(-1, 2)
        for path in root.iter(f"{SVG}path")
        if path.attrib["d"].count("L") == 1
    ]
    offset = at["0%"][1] - (size[1] - 58)  # a text's baseline lies below the middle of its height
    for row, score in scored:
        x = full + np.log2(row.cache_bytes / FULL_BYTES) * (full - half)
        low, mean, high = (bottom + value * (top - bottom) - offset for value in (score.low, score.mean, score.high))
        np.testing.assert_allclose(places[row.method], (x, mean), atol=0.01)
        assert min(np.abs(bar - [[x, low], [x, high]]).max() for bar in bars if len(bar) == 2) < 0.01


def test_every_method_is_named_and_described_once():
    scored = points(summarise(sweep()))
    root = drawn(scored)
    assert names(root) == list(dots(root)) == list(ACCURACY)
    assert "int4: 95 % (9" in (root.findtext(f"{SVG}desc") or "")


def test_the_plot_has_only_the_colours_and_the_font_of_the_page():
    drawing = plot.pareto(points(summarise(sweep())))
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b|DejaVu|nan|inf\b", drawing)
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing))
    defined = set(re.findall(r"--\w+", plot.style_sheet()))
    assert colours - {"none"} <= {f"var({name})" for name in defined}


def test_the_same_points_give_the_same_plot():
    scored = points(summarise(sweep()))
    assert plot.pareto(scored) == plot.pareto(scored)


@pytest.mark.parametrize("smallest", [1.0, 0.9, 0.26, 0.25, 0.004])
@pytest.mark.parametrize("width", [352, 1040])
def test_sizes_below_and_above_all_dots_are_marked_and_legible(smallest, width):
    """A dot has a mark to its left, or stands on it; and marks do not touch."""
    scored = points(summarise([record("full"), record("m", cache_bytes=FULL_BYTES * smallest, ratio=smallest)]))
    root = drawn(scored, width)
    marks = sorted(x for name, (x, _) in ticks(root).items() if name == "full" or re.fullmatch(r"1/\d+", name))
    leftmost = min(x for x, _ in dots(root).values())
    assert np.diff(marks).min(initial=np.inf) >= 40
    assert marks[0] <= leftmost + 0.01 or width < 600
    assert leftmost >= 44


def test_a_single_method_and_one_of_any_name_can_be_plotted():
    drawn(points(summarise([record("full")])))
    assert names(drawn(points(summarise([record("$a_b$ <&>")])))) == ["$a_b$ <&>"]


def test_reports_import_matplotlib_only_to_draw():
    code = "import sys, kvjax.evaluation.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
