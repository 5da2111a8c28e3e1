"""The sampling parameters of `generate` where none are given: as in vLLM, what
generation_config.json recommends. Loaded then.
"""

import warnings
from pathlib import Path
from typing import Any

from nanovllm.models.config import read_if_there
from nanovllm.sampling_params import SamplingParams

HONOURED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "max_new_tokens": "max_tokens",
    "repetition_penalty": "repetition_penalty",
    "min_p": "min_p",
}
"""Name in generation_config.json -> our name."""
NOTHING = {"repetition_penalty": 1, "min_p": 0}
"""Values at which an option changes nothing, so that it need not be loaded."""
LEFT_OUT: dict[str, Any] = {
    "do_sample": True,
    "min_new_tokens": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": 0,
    "stop_strings": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "guidance_scale": 1,
    "exponential_decay_length_penalty": None,
    "max_time": None,
    "watermarking_config": None,
}
"""Settings that HF or vLLM act on and this engine does not have, with the value at which they
change nothing. Any other value is warned about.
"""


def default_params(folder: Path) -> SamplingParams:
    """The recommended parameters. Raises ValueError where the file recommends a value out of range."""
    file = folder / "generation_config.json"
    said = {name: value for name, value in read_if_there(file).items() if value is not None}
    if left_out := [
        f"{name}={said[name]!r}"
        for name, nothing in LEFT_OUT.items()
        if said.get(name, nothing) != nothing
    ]:
        warnings.warn(
            f"{file} recommends {', '.join(left_out)}, which this engine leaves out; give `generate` sampling_params of "
            "your own to choose (temperature=0 where no sampling is meant)",
            stacklevel=3,
        )
    try:
        return SamplingParams(
            **{
                ours: said[theirs]
                for theirs, ours in HONOURED.items()
                if theirs in said and said[theirs] != NOTHING.get(theirs)
            }
        )
    except ValueError as error:
        raise ValueError(
            f"{file} recommends what is not allowed: {error}. Give `generate` sampling_params of your own"
        ) from error
