"""What a name of transformers is in the version that is installed."""

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The KV cache, as an argument of a model and in what it returns: renamed in transformers 5.2x."""
