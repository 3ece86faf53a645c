"""Rotary positions (Su et al., arXiv 2104.09864): their frequencies, and the rotation itself."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Rope(NamedTuple):
    """The frequencies, and how they are stretched beyond the trained length.

    `kind`: `default`; `linear`, all frequencies divided by `factor`; `llama3` (arXiv 2407.21783) and `yarn` (arXiv
    2309.00071), low frequencies divided, high ones kept; `dynamic` (NTK by length), which is `default` up to
    `original_max_positions` and is refused beyond: there its frequencies depend on the longest record of a batch, so
    that what was sampled with a cache could not be scored again.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0  # trained length; llama3, yarn and dynamic
    low_freq_factor: float = 1.0  # llama3: wavelengths per trained length below which a frequency is divided
    high_freq_factor: float = 4.0  # llama3: ... and above which it is kept
    beta_slow: float = 1.0  # yarn: the same two
    beta_fast: float = 32.0
    truncate: bool = True  # yarn: the ramp between them begins and ends at whole dimensions
    attention_factor: float | None = None  # yarn: scale of the rotated queries and keys; None: 0.1 ln(factor) + 1

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians per position of the `head_dim / 2` pairs, and the scale of sine and cosine; as transformers' torch.

        Raises:
          ValueError: unknown `kind`.
        """
        kept = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        if self.kind in ("default", "dynamic"):
            return kept.astype(np.float32), 1.0
        if self.kind == "linear":
            return (kept / self.factor).astype(np.float32), 1.0
        if self.kind == "llama3":
            turns = self.original_max_positions * kept / (2 * np.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            scale = 1.0
        elif self.kind == "yarn":
            keep = 1 - self._yarn_ramp(head_dim)
            scale = self.attention_factor
            scale = 0.1 * math.log(max(self.factor, 1.0)) + 1.0 if scale is None else scale
        else:
            raise ValueError(f"rope kind {self.kind!r} is unknown; use default, linear, dynamic, llama3 or yarn")
        keep = np.clip(keep, 0.0, 1.0)
        return (keep * kept + (1 - keep) * kept / self.factor).astype(np.float32), scale

    def _yarn_ramp(self, head_dim: int) -> np.ndarray:
        """0 for the pair that turns `beta_fast` times within the trained length, 1 for `beta_slow`, linear between."""
        pair = lambda turns: (
            head_dim * math.log(self.original_max_positions / (2 * math.pi * turns)) / (2 * math.log(self.theta))
        )
        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return (np.arange(head_dim // 2) - low) / (high - low or 0.001)


def rotate(
    x: Float[Array, "B S heads head_dim"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S heads head_dim"]:
    """Every head turned by its token's angles, in float32; pair i is (x[i], x[i + head_dim / 2])."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
