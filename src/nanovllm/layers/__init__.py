"""The layers of a model: parameters, and which of them a tensor-parallel rank holds.

attention          Attention: chooses the backend, stores K and V, attends; the model owns the projections
linear             matmuls sharded over ranks; TensorParallel, the group of one
embed_head         token embedding and output head
layernorm          RMSNorm
rotary_embedding   cosines and sines of positions
rope_scaling       frequencies of an extended context       (loaded when config.json names one)

Layers import kernels.registry, kernels.batch and each other's `linear`; rope_scaling imports nothing. Models import
layers.
"""
