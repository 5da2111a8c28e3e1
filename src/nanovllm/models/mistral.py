"""Mistral 7B from version 0.2 on (Jiang et al., 2023): a Llama, since it attends to all earlier tokens.

The sliding window of version 0.1 is not computed: models/families.py asks for `sliding_window: null`.
"""

from nanovllm.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Llama's layers under Mistral's name."""
