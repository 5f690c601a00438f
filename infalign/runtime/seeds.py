"""One random stream per sample.

A sample's uniforms depend on (seed, prompt, sample index) alone, never on the batch it was drawn in, a restart or the
number of processes. With inverse-CDF sampling (one uniform per token) that makes every sample reproducible on its own.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def stream(seed: int | str, *names: object) -> np.random.Generator:
    """A generator keyed by `seed` and any further names (prompt key, sample index, purpose).

    >>> bool(stream(0, "abc", 1).random() == stream(0, "abc", 1).random())
    True
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniforms(seed: int | str, key: str, index: int, count: int) -> NDArray[np.float64]:
    """The `count` uniforms in [0, 1) of sample `index` of prompt `key`, one per token.

    A longer request starts with the same numbers: a larger `max_completion_length` extends samples, it does not
    reshuffle them.

    >>> bool((uniforms(0, "k", 3, 8)[:4] == uniforms(0, "k", 3, 4)).all())
    True
    """
    return stream(seed, "tokens", key, index).random(count)
