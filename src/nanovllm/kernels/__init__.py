"""The operations of a model: one signature each, implementations side by side.

registry     chooses the implementation and counts every call
batch        ForwardBatch: the tensors of a step
torch/       the baseline and reference, on any device
compile      torch/ under torch.compile                (loaded when on)
triton/      Triton kernels for NVIDIA GPUs            (loaded when on)
native/      C++ kernels for CPUs                      (loaded when on)
flash_attn   the FlashAttention library for attention  (loaded when on)

Implementations import batch; triton/, native/ and compile may import torch/. layers/attention.py chooses the attention backend.
"""
