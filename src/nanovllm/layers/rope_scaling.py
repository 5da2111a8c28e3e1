"""Rotary frequencies of models whose context was extended beyond the one they were trained on.
Loaded when config.json names another rope type than 'default'.

    linear     all frequencies are divided by `factor`: positions are interpolated (Chen et al., 2023)
    llama3     low frequencies are divided by `factor`, high ones are kept, those between are mixed (Llama 3.1)
    yarn       the same with other bounds, and cosines and sines are scaled as well (Peng et al., 2023)
    dynamic    nothing is changed up to max_position_embeddings, and longer texts are not taken: beyond,
               the frequencies would depend on the length of the whole text, cached keys included

Formulas and defaults are those of HF transformers. Nothing here imports torch.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

Frequencies = Any  # float64 tensor [head_dim / 2], radians per token, highest first


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Called with the unscaled frequencies and rope_theta -> the scaled ones, and what cosines and
    sines are multiplied with.
    """

    factor: float

    def __call__(self, frequencies: Frequencies, theta: float) -> tuple[Frequencies, float]:
        return frequencies / self.factor, 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Wavelengths up to original / high_freq_factor tokens are kept, from original / low_freq_factor
    tokens on they are multiplied with `factor`; between, linear in the frequency.
    """

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float

    def __call__(self, frequencies: Frequencies, theta: float) -> tuple[Frequencies, float]:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor), 1.0


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """Frequencies that turn more than beta_fast times within the original context are kept, those
    that turn less than beta_slow times are divided by `factor`; between, linear in the index.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __call__(self, frequencies: Frequencies, theta: float) -> tuple[Frequencies, float]:
        half = len(frequencies)

        def index(turns: float) -> float:
            """Of the frequency that turns so often within the original context."""
            ratio = self.original_max_position_embeddings / (2 * math.pi * turns)
            return half * math.log(ratio) / math.log(theta)

        first, last = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        if first == last:
            last += 0.001
        places = frequencies.new_tensor(range(half))
        divided = ((places - first) / (last - first)).clamp(0.0, 1.0)
        scaled = frequencies * (1.0 - divided + divided / self.factor)
        return scaled, self._amplitude()

    def _amplitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class DynamicRope:
    """Nothing is changed within the context that is taken, whatever the factor."""

    factor: float

    def __call__(self, frequencies: Frequencies, theta: float) -> tuple[Frequencies, float]:
        return frequencies, 1.0


TYPES: dict[str, Any] = {
    "linear": LinearRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
    "dynamic": DynamicRope,
}
OF_EVERY_TYPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section")
"""Keys that models/config.py reads."""
ORIGINAL = "original_max_position_embeddings"


def read_scaled_rope(
    rope: dict[str, Any], raw: dict[str, Any], folder: Path | str
) -> dict[str, Any]:
    """The fields of ModelConfig that a rope type other than 'default' decides.

    rope: rope_parameters or rope_scaling of raw, which is config.json. With yarn the longest context
    becomes original_max_position_embeddings * factor, as in vLLM; HF has no limit. Raises ValueError
    for another type, and for keys that are missing, unknown or have a value out of range.
    """
    name = rope.get("rope_type", rope.get("type"))
    if name not in TYPES:
        known = ", ".join(map(repr, TYPES))
        raise ValueError(
            f"{folder} has rope_type={name!r}; this engine computes 'default', {known}"
        )
    fields = TYPES[name].__dataclass_fields__
    given = {
        key: value for key, value in rope.items() if key not in OF_EVERY_TYPE and value is not None
    }
    if ORIGINAL in fields:
        # HF prefers what stands outside, and takes the whole context where nothing is named
        named = raw.get(ORIGINAL), given.get(ORIGINAL), raw.get("max_position_embeddings")
        given[ORIGINAL] = next((value for value in named if value is not None), None)
    else:
        given.pop(ORIGINAL, None)  # HF does not read it for this type
    if unknown := [key for key in given if key not in fields]:
        raise ValueError(
            f"{folder} has {unknown[0]}={given[unknown[0]]!r} for rope_type={name!r}, which this engine does not compute; "
            f"known are {', '.join(fields)}"
        )
    needed = [key for key, field in fields.items() if field.default is MISSING]
    if lacking := [key for key in needed if key not in given]:
        raise ValueError(f"{folder} lacks {', '.join(lacking)} for rope_type={name!r}")
    for key, value in given.items():
        allowed, fits = _KINDS.get(key, _NUMBER)
        if not fits(value):
            raise ValueError(f"{folder} has {key}={value!r} for its rope; it must be {allowed}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in given and high in given and given[low] >= given[high]:
            raise ValueError(
                f"{folder} has {low}={given[low]!r} and {high}={given[high]!r} for its rope; the first must be less"
            )
    decided = {"scaled_rope": TYPES[name](**given)}
    if name == "yarn":
        decided["max_position_embeddings"] = int(given[ORIGINAL] * given["factor"])
    return decided


def _is_number(value: Any, least: float = 0.0) -> bool:
    return type(value) in (int, float) and least <= value < math.inf


_NUMBER = "a number above 0", lambda value: _is_number(value) and value > 0
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "factor": ("a number, 1 or more", lambda value: _is_number(value, 1.0)),
    ORIGINAL: (
        "a whole number, 1 or more",
        lambda value: _is_number(value, 1.0) and value == int(value),
    ),
    "truncate": ("true or false", lambda value: type(value) is bool),
}
