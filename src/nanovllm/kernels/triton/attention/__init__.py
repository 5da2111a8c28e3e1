"""Attention over the paged cache in Triton, for decodes and prefills.

backend   TritonAttention: prepares a step and launches the kernels below
decode    decodes, cut into equal pieces of work whatever their lengths
shared    decodes whose sequences share a prefix: its KV is read once for all of them
prefill   prefills and chunks of prompts
tile      the arithmetic of one tile, which all three have in common

backend imports decode, prefill and shared; those import tile.
"""

from nanovllm.kernels.triton.attention.backend import TritonAttention

__all__ = ["TritonAttention"]
