"""`calibrate`: runs text through a model and finds what a method must know of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from kvjax.cache.layer_cache import LayerData, blank_data
from kvjax.cache.method import CacheMethod
from kvjax.calibration.codebooks import Codebooks
from kvjax.calibration.factors import LowRankFactors
from kvjax.calibration.finder import Finder, Task
from kvjax.calibration.gates import Gates
from kvjax.calibration.importance import Importance
from kvjax.calibration.layer_bits import LayerBits
from kvjax.calibration.lazy_layers import LazyLayers
from kvjax.calibration.observe import model_dims
from kvjax.calibration.prefix_shares import PrefixShares
from kvjax.calibration.retrieval_heads import RetrievalHeads
from kvjax.calibration.samples import Samples
from kvjax.engine.calibrated import PARTS, Calibrated, weights_digest
from kvjax.engine.request import Prompt, as_count, as_method, check_kind
from kvjax.errors import UsageError
from kvjax.models.language_model import LanguageModel
from kvjax.progress import Track, silent, track

LENGTH = 2048

FINDERS: tuple[Finder, ...] = (
    RetrievalHeads(),
    Gates(),
    LazyLayers(),
    PrefixShares(),
    LayerBits(),
    Codebooks(),
    LowRankFactors(),
    Importance(),
)
"""Tables, shares and bits first: what the others find may depend on them."""


def calibrate(
    model: LanguageModel,
    method: str | CacheMethod | Calibrated,
    text: Prompt | Sequence[Prompt] | None = None,
    *,
    samples: int = 16,
    length: int | None = None,
    batch: int = 1,
    seed: int = 0,
    finders: Sequence[Finder] = (),
    progress: Track | None = track,
) -> Calibrated:
    """Finds what the parts of a method must know of a model: codebooks, factors, networks, tables of heads or layers.

    Args:
      method: a name, a `CacheMethod`, or an earlier calibration, which is made anew.
      text: texts, or rows of token ids. Heads of RazorAttention are found without any.
      samples: windows of the text that are run, at most. length: tokens of each; default 2,048, or the model's limit.
      batch: windows at a time.
      seed: of random draws.
      finders: with choices of your own, such as `Codebooks(weighting="plain")`; each replaces the default of its class.
      progress: what shows it; by default a bar on stderr. None is silent.

    Returns:
      The method and what was found; it stands wherever a method does, and `save` writes it.

    Raises:
      UsageError: nothing is to be found for this method, text is missing, or what is found does not fit the model.
    """
    check_kind("model", model, LanguageModel, 'kvjax.load("reference")')
    named = as_method(method)
    plain = named.method if isinstance(named, Calibrated) else named
    length = min(LENGTH, model.config.max_positions) if length is None else as_count("length", length)
    dims = model_dims(model, length)
    own = {type(finder): finder for finder in finders}
    everyone = [own.pop(type(finder), finder) for finder in FINDERS] + list(own.values())
    chosen = [finder for finder in everyone if finder.fits(plain, dims)]
    if not chosen:
        raise UsageError(f"method {plain.name!r} needs to know nothing of the model, so there is nothing to calibrate")
    windows = None
    if any(finder.reads for finder in chosen):
        if text is None:
            raise UsageError(f"method {plain.name!r} is calibrated on sample texts, and none was given (--text FILE)")
        windows = Samples.of(model, text, as_count("samples", samples), length)
    task = Task(model, plain, windows, max(1, as_count("batch", batch)), as_count("seed", seed), progress or silent)
    layers, notes = [LayerData()] * len(dims), []
    for finder in chosen:
        found = finder.find(task)
        task = dataclasses.replace(task, method=found.method)
        layers = [_joined(*pair) for pair in zip(layers, found.layers, strict=True)] if found.layers else layers
        notes += found.notes
    made = Calibrated(task.method, tuple(layers), weights_digest(model), tuple(notes))
    _check_complete(made, model, length)
    return made


def _joined(first: LayerData, second: LayerData) -> LayerData:
    """What either has."""
    return LayerData(**{part: getattr(first if getattr(second, part) is None else second, part) for part in PARTS})


def _check_complete(made: Calibrated, model: LanguageModel, length: int) -> None:
    """Raises UsageError where a part needs arrays that no finder has found."""
    for dims, layer in zip(model_dims(model, length), made.layers, strict=True):
        needed = jax.eval_shape(lambda dims=dims: blank_data(made.method, dims))
        for part in PARTS:
            expected, got = (jax.tree.map(lambda x: tuple(x.shape), getattr(data, part)) for data in (needed, layer))
            if expected != got:
                raise UsageError(
                    f"method {made.method.name!r}: the {part} of layer {dims.layer} need arrays of shapes {expected}; "
                    f"the finders have found {got}. A part of your own needs a finder: calibrate(…, finders=[…])"
                )
