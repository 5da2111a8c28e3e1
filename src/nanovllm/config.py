"""What a user asks for (`EngineConfig`) and what it becomes on this machine (`ResolvedConfig`).

An optimization is a field of `Optimizations` (toggles/table.py); nothing else switches one. 'auto' is
resolved once, by `EngineConfig.resolve`, and only resolved values are used and recorded.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Self

# LEVELS is for those who import it from here
from nanovllm.toggles.table import ALL, BASELINE, LEVELS, Device, Optimizations  # noqa: F401


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} is not allowed; it must be {allowed}")


def _whole(high: int, optional: bool = False) -> tuple[Callable[[Any], bool], str]:
    """The check and the words for a whole number from 1 to `high`; None is allowed too where
    `optional`.
    """
    return (
        lambda value: (value is None and optional) or (type(value) is int and 1 <= value <= high),
        f"a whole number from 1 to {high}",
    )


# What each argument of `EngineConfig` must be, and how an error says it.
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (
        lambda value: isinstance(value, str) and value != "",
        "a folder, a preset or a hub id",
    ),
    "tokenizer": (
        lambda value: value is None or (isinstance(value, str) and value != ""),
        "None, a folder, a preset or a hub id",
    ),
    "skip_tokenizer_init": (lambda value: type(value) is bool, "True or False"),
    "dtype": (
        lambda value: value in ("auto", "float32", "bfloat16", "float16"),
        "'auto', 'float32', 'bfloat16' or 'float16'",
    ),
    "device": (lambda value: value in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'"),
    "max_num_seqs": _whole(2**31 - 1),
    "block_size": _whole(2**31 - 1),
    "max_model_len": _whole(2**31 - 1, optional=True),
    "max_num_batched_tokens": _whole(2**31 - 1, optional=True),
    "kv_cache_memory_bytes": _whole(2**63 - 1, optional=True),
    "gpu_memory_utilization": (
        lambda value: isinstance(value, Real) and 0 < value <= 1,  # type: ignore[operator]
        "in (0, 1]",
    ),
    "seed": (lambda value: value is None or isinstance(value, Integral), "None or a whole number"),
    "enable_expert_parallel": (lambda value: type(value) is bool, "True or False"),
    "optimizations": (lambda value: isinstance(value, Optimizations), "Optimizations or a dict"),
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What was asked for, under vLLM's names. None and 'auto' are resolved against the model and
    the machine.

    Raises ValueError for a value out of range, with what is allowed.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0  # None, once vLLM's default, is taken as 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_expert_parallel: bool = False  # a rank holds some experts whole, not a part of each
    optimizations: Optimizations = field(default_factory=lambda: ALL)

    def __post_init__(self) -> None:
        for name, (fits, allowed) in ALLOWED.items():
            value = getattr(self, name)
            _require(fits(value), name, value, allowed)
        # past the __setattr__ of a frozen class
        vars(self).update(
            gpu_memory_utilization=float(self.gpu_memory_utilization), seed=int(self.seed or 0)
        )

    @classmethod
    def from_kwargs(cls, model: str, **kwargs: Any) -> Self:
        """Accepts vLLM's constructor arguments. Raises TypeError for an unknown argument, and where
        an optimization is given twice.
        """
        own = {f.name for f in dataclasses.fields(cls)}
        if set(kwargs) - own:
            from nanovllm.toggles.vllm_names import translate

            kwargs = translate(kwargs, own)
        if isinstance(kwargs.get("optimizations"), dict):
            kwargs["optimizations"] = Optimizations(**kwargs["optimizations"])
        paths = {
            name: os.fspath(path)
            for name, path in {"model": model, **kwargs}.items()
            if isinstance(path, os.PathLike)
        }
        return cls(**{"model": model, **kwargs, **paths})

    def resolve(
        self, *, device: Device, dtype: str, max_position_embeddings: int
    ) -> "ResolvedConfig":
        """Fixes every open value for a model on `device`. max_position_embeddings: the model's own
        limit, in tokens. Raises ValueError where values contradict each other.
        """
        _require(
            dtype != "auto" and ALLOWED["dtype"][0](dtype),
            "dtype",
            dtype,
            "'float32', 'bfloat16' or 'float16' (the checkpoint has none of them: choose)",
        )
        max_model_len = self.max_model_len or max_position_embeddings
        _require(
            max_model_len <= max_position_embeddings,
            "max_model_len",
            max_model_len,
            f"at most the model's max_position_embeddings, {max_position_embeddings}",
        )
        # vLLM's value for a large GPU; a quarter of it on a CPU, where 16 k tokens would take
        # seconds per step.
        budget = self.max_num_batched_tokens or max(
            16_384 if device == "cuda" else 4_096, self.max_num_seqs
        )
        _require(
            budget >= self.max_num_seqs,
            "max_num_batched_tokens",
            budget,
            f"at least max_num_seqs, {self.max_num_seqs}: each running request decodes one token per step",
        )
        return ResolvedConfig(
            **{
                **vars(self),
                "device": device,
                "dtype": dtype,
                "max_model_len": max_model_len,
                "max_num_batched_tokens": budget,
                "optimizations": self.optimizations.resolve(device, True, dtype),
            }
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """What runs and what is recorded: no 'auto' is left. num_kv_blocks and kv_cache_bytes are known
    once the weights are loaded.
    """

    max_model_len: int
    max_num_batched_tokens: int
    num_kv_blocks: int = 0
    kv_cache_bytes: int = 0
