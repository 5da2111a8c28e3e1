"""quantization and kv_cache_dtype: weights and KV cache in fewer bits. Loaded only when on.

weights     Int8Weight, Int4Weight, Fp8Weight: made from a checkpoint's weights by rounding to the nearest
layers      replaces the weights of a loaded model, and the products that read them
experts     a mixture of experts whose weights are quantized         (loaded with such a model)
kv_cache    SmallCacheAttention: keys and values are stored in e4m3
triton      products and attention by Triton kernels                 (loaded on a GPU)

What a quantized engine computes is defined by its weights as they are stored: experiments/gate/lossy/ states the
definition a second time, for HF, and the gate judges by it. Imports: layers, experts, kv_cache, triton -> weights.
"""
