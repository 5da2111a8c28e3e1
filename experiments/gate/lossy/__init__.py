"""What a quantized engine rounds, and a reference that rounds alike: its tokens are judged by its own definition.

    recipe      Recipe: what is rounded; read from an engine's configuration
    reference   the definition, stated a second time: HF holding dequantized weights, or rounding as the engine does

The package imports nothing of nanovllm.quantization, which it judges.
"""
