"""The layers of a model: parameters, and which of them a tensor-parallel rank holds.

linear             matmuls sharded over ranks; TensorParallel, the group of one
embed_head         token embedding and output head
layernorm          RMSNorm
rotary_embedding   cosines and sines of positions

Layers import kernels.registry and each other's `linear`; models import layers.
"""
