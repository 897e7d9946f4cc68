"""Array aliases and the dimension glossary that every shape comment uses.

B batch · T query tokens · S key/value slots · L layers · D embed_dim · N query heads ·
K kv heads · G = N/K query heads per kv head · H head_dim · F mlp_dim · V vocabulary ·
M blocks · R rows that read one kv head (G·T) · P pool slots

Activations are [B, T, N, H]; caches are [B, K, S, H].
"""

from __future__ import annotations

from typing import Any

import jax

Array = jax.Array
PyTree = Any
