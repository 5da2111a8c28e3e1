"""Translates vLLM's constructor arguments. Loaded only when one is given that this engine does not
have under that name.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from nanovllm.toggles.row import Toggle, toggles_of
from nanovllm.toggles.table import ALL


def switches(toggles: Mapping[str, Toggle]) -> dict[str, tuple[str, Mapping[Any, Any]]]:
    """{vLLM's name: (our name, {vLLM's value: our level})}; a value that is not listed is the level."""
    return {row.vllm[0]: (name, row.vllm[1]) for name, row in toggles.items() if row.vllm}


TOGGLES = toggles_of(ALL)
SWITCHES = switches(TOGGLES)

WITHOUT_EFFECT = frozenset(
    {
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_log_stats",
        "disable_sliding_window",
        "enable_log_requests",
        "max_logprobs",
        "max_parallel_loading_workers",
        "max_seq_len_to_capture",
        "prefix_caching_hash_algo",
        "served_model_name",
        "swap_space",
        "trust_remote_code",
        "use_tqdm_on_load",
    }
)
"""Arguments of vLLM that change no token of any request here, whatever their value: logging, limits
of an HTTP server, memory that this engine does not use. trust_remote_code is a permission, of which
no use is made: no code of a checkpoint is ever run.
"""
ONLY: dict[str, tuple[Any, ...]] = {
    "additional_config": (None, {}),
    "calculate_kv_scales": (False,),
    "code_revision": (None,),
    "compilation_config": (None, {}),
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "distributed_executor_backend": (None, "mp", "uni"),
    "download_dir": (None,),
    "enable_lora": (False,),
    "enable_prompt_embeds": (False,),
    "enable_sleep_mode": (False,),
    "generation_config": ("auto",),
    "hf_config_path": (None,),
    "hf_overrides": (None, {}),
    "hf_token": (None,),
    "kv_cache_dtype": ("auto",),
    "kv_transfer_config": (None,),
    "limit_mm_per_prompt": (None, {}),
    "load_format": ("auto", "safetensors"),
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "mm_processor_kwargs": (None, {}),
    "model_impl": ("auto",),
    "num_gpu_blocks_override": (None,),
    "override_generation_config": (None, {}),
    "pipeline_parallel_size": (1,),
    "pooler_config": (None,),
    "quantization": (None,),
    "revision": (None,),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "runner": ("auto", "generate"),
    "scheduling_policy": ("fcfs",),
    "speculative_config": (None,),
    "structured_outputs_config": (None,),
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
}
"""Arguments of vLLM that are not built here, with the values that ask for nothing. Any other value
is refused, because the result would not be the one that was asked for.
"""


def translate(kwargs: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Arguments of EngineConfig, for some that may be vLLM's. own: the names that EngineConfig knows. None leaves
    a switch as it is, as in vLLM. Arguments that change no result are dropped.

    Raises TypeError for an unknown argument, and where a switch is given twice; ValueError for a switch that is
    neither on nor off, and for a value that asks for something that is not built.
    """
    for name, allowed in ONLY.items():
        if name in kwargs and kwargs[name] not in allowed:
            raise ValueError(
                f"{name}={kwargs[name]!r} is not built in this engine, and without it results would differ; leave it "
                f"out, or give {' or '.join(map(repr, allowed))}"
            )
    kwargs = {name: v for name, v in kwargs.items() if name not in {*WITHOUT_EFFECT, *ONLY}}
    known = {*own, *SWITCHES} - {"model"}
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(
            f"unknown argument {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    given = {
        name: value for name, value in kwargs.items() if name in SWITCHES and value is not None
    }
    named = [name for name in kwargs if name in SWITCHES]
    if "optimizations" in kwargs and named:
        raise TypeError(
            f"{', '.join(named)} given twice: inside `optimizations` and as an argument of vLLM's; keep one"
        )
    changes = {}
    for name, value in given.items():
        ours, levels = SWITCHES[name]
        is_count = type(TOGGLES[ours].levels[0]) is int
        if not is_count and type(value) is not bool:
            raise ValueError(f"{name}={value!r} is not allowed; it must be True, False or None")
        changes[ours] = levels.get(value, value)
    others = {name: value for name, value in kwargs.items() if name in own}
    return {"optimizations": dataclasses.replace(ALL, **changes), **others}
