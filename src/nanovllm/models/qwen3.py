"""Qwen3 for causal language modelling (Qwen Team, 2025): pre-norm decoder, grouped-query attention
with normed heads, SwiGLU.

Parameter names are those of the checkpoint, except for the fused projections of
`packed_modules_mapping`.
"""

from torch import Tensor, nn

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.registry import Kernels
from nanovllm.layers.attention import Attention, KVCache
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear, TensorParallel
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.config import ModelConfig


class Qwen3Attention(nn.Module):
    def __init__(
        self, config: ModelConfig, kernels: Kernels, attention: Attention, tp: TensorParallel
    ) -> None:
        super().__init__()
        q_size, kv_size = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            {"q": q_size, "k": kv_size, "v": kv_size},
            config.attention_bias,
            kernels.linear_qk_norm_rope_store_kv,
            tp,
        )
        self.o_proj = RowParallelLinear(
            q_size, config.hidden_size, config.attention_bias, kernels, tp
        )
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps, kernels) for _ in range(2)
        )
        self.attention = attention

    def forward(self, x: Tensor, cos_sin: Tensor, kv_cache: KVCache, batch: ForwardBatch) -> Tensor:
        return self.o_proj(
            self.attention(
                self.qkv_proj,
                (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps),
                x,
                cos_sin,
                kv_cache,
                batch,
            )
        )


class Qwen3MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size,
            {"gate": config.intermediate_size, "up": config.intermediate_size},
            False,
            kernels.linear_silu_and_mul,
            tp,
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, False, kernels, tp
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_up_proj(x))


class Qwen3DecoderLayer(nn.Module):
    def __init__(
        self, config: ModelConfig, kernels: Kernels, attention: Attention, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.self_attn = Qwen3Attention(config, kernels, attention, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp = Qwen3MLP(config, kernels, tp)


class Qwen3Model(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        kernels: Kernels,
        attention: Attention,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.rotary = RotaryEmbedding(
            config.head_dim, max_model_len, config.rope_theta, config.scaled_rope
        )
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, kernels, attention, tp)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(self, batch: ForwardBatch, kv_caches: list[KVCache]) -> Tensor:
        """-> hidden states after the last norm: [tokens, hidden]."""
        residual = self.embed_tokens(batch.token_ids)
        cos_sin = self.rotary(batch.positions)
        x = self.layers[0].input_layernorm(residual)
        for i, (layer, kv_cache) in enumerate(zip(self.layers, kv_caches, strict=True)):
            if i > 0:
                x, residual = layer.input_layernorm.add(x, residual)
            x = layer.self_attn(x, cos_sin, kv_cache, batch)
            x, residual = layer.post_attention_layernorm.add(x, residual)
            x = layer.mlp(x)
        return self.norm.add(x, residual)[0]


class Qwen3ForCausalLM(nn.Module):
    packed_modules_mapping = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        kernels: Kernels,
        attention: Attention,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.model = Qwen3Model(config, max_model_len, kernels, attention, tp)
        self.lm_head = (
            self.model.embed_tokens
            if config.tie_word_embeddings
            else VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, only_head=True)
        )

    def forward(self, batch: ForwardBatch, kv_caches: list[KVCache]) -> Tensor:
        """-> hidden states: [tokens, hidden]."""
        return self.model(batch, kv_caches)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, this rank's part of the vocabulary]."""
        return self.lm_head.logits(hidden)
