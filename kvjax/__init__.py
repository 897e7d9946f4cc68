"""kvjax: decode long contexts with the KV cache kept by different methods, and measure what each costs and loses.

    model = kvjax.load("reference")
    print(kvjax.compare(model, ["full", "kivi-2", "snapkv:tokens=256+int4"], tasks=["needle", "kv"]))

Names are imported when they are first used, so `import kvjax` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvjax.cache import methods
    from kvjax.cache.method import CacheMethod
    from kvjax.calibration.calibrate import calibrate
    from kvjax.engine.calibrated import Calibrated, load_calibration
    from kvjax.engine.generate import Generation, generate, prefill
    from kvjax.engine.sampling import Sampler
    from kvjax.engine.save import load_cache, save_cache
    from kvjax.evaluation.compare import Comparison, compare
    from kvjax.models.huggingface import export, load
    from kvjax.models.language_model import LanguageModel

#: Where each public name lives, as module:name, or a module alone.
_HOMES = {
    "CacheMethod": "kvjax.cache.method:CacheMethod",
    "Calibrated": "kvjax.engine.calibrated:Calibrated",
    "Comparison": "kvjax.evaluation.compare:Comparison",
    "Generation": "kvjax.engine.generate:Generation",
    "LanguageModel": "kvjax.models.language_model:LanguageModel",
    "Sampler": "kvjax.engine.sampling:Sampler",
    "calibrate": "kvjax.calibration.calibrate:calibrate",
    "compare": "kvjax.evaluation.compare:compare",
    "export": "kvjax.models.huggingface:export",
    "generate": "kvjax.engine.generate:generate",
    "load": "kvjax.models.huggingface:load",
    "load_cache": "kvjax.engine.save:load_cache",
    "load_calibration": "kvjax.engine.calibrated:load_calibration",
    "methods": "kvjax.cache.methods",
    "prefill": "kvjax.engine.generate:prefill",
    "save_cache": "kvjax.engine.save:save_cache",
}

__all__ = [
    "CacheMethod",
    "Calibrated",
    "Comparison",
    "Generation",
    "LanguageModel",
    "Sampler",
    "__version__",
    "calibrate",
    "compare",
    "export",
    "generate",
    "load",
    "load_cache",
    "load_calibration",
    "methods",
    "prefill",
    "save_cache",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvjax' has no attribute {name!r}")
    home, _, attribute = _HOMES[name].partition(":")
    module = importlib.import_module(home)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
