"""What an engine on a CPU adds to the model runner. Loaded when it is asked for.

packed_layers   kernels=native: the weights of a loaded model, packed
runner          CpuRunner: quantizes or packs the weights; with overlap, steps run in a thread of their own

Imports: runner -> packed_layers -> layers, kernels.native; runner -> quantization, when on.
"""
