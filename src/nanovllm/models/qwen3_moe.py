"""Qwen3 with mixtures of experts (Qwen Team, 2025): Qwen3, except that a router sends each token through a
few of a layer's MLPs.

Every rank holds its part of every expert, as of any other MLP, so that all ranks have the same work
whatever the router says. With enable_expert_parallel, as in vLLM, rank r of n holds the r-th n-th of the experts
whole: its matmuls are as wide as the checkpoint's, and its work is what the router sends it.
"""

import re
from dataclasses import MISSING, dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.registry import Kernels
from nanovllm.layers.attention import Attention, KVCache
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import TensorParallel, parameter
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.config import KINDS, ModelConfig
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What config.json says of the experts, with HF's defaults."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig) -> "Experts":
        """Raises ValueError for settings that are missing or of another type."""
        # transformers 5 has both names for the first
        given = {key.replace("num_local", "num"): value for key, value in config.own.items()}
        if isinstance(given.get("mlp_only_layers"), list):
            given["mlp_only_layers"] = tuple(given["mlp_only_layers"])
        fields = cls.__dataclass_fields__
        if lacking := [
            name for name, f in fields.items() if f.default is MISSING and name not in given
        ]:
            raise ValueError(f"config.json lacks {', '.join(lacking)}")
        for name, value in given.items():
            allowed, fits = KINDS[fields[name].type]
            if not fits(value):
                raise ValueError(f"config.json has {name}={value!r}; it must be {allowed}")
        if given["num_experts_per_tok"] > given["num_experts"]:
            raise ValueError(
                f"config.json has num_experts_per_tok={given['num_experts_per_tok']}, more than its "
                f"num_experts={given['num_experts']}"
            )
        return cls(**given)

    def in_layer(self, layer: int) -> bool:
        """Whether a layer has experts, not one MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def level_of(kernels: Kernels) -> str:
    """The level of the toggle `kernels` that these operations are of."""
    return str(getattr(kernels.linear, "level", "torch"))


class Router(nn.Module):
    """The experts of each token, and how much each of them counts."""

    def __init__(self, config: ModelConfig, experts: Experts) -> None:
        super().__init__()
        self.weight = parameter(experts.num_experts, config.hidden_size)
        self.top_k, self.normalize = experts.num_experts_per_tok, experts.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] -> shares, experts: [tokens, top_k] each. Shares add up to 1 where config.json has
        norm_topk_prob. Probabilities are computed in float32.
        """
        logits = nn.functional.linear(x, self.weight)
        shares, experts = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.normalize:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(x.dtype), experts


class Expert(nn.Module):
    """The names that a checkpoint has for an expert's part of the tensors that a layer's experts share.

    gate_up: [2 * size, hidden], down: [hidden, size]. whole: of the expert, this rank holds everything.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, whole: bool) -> None:
        super().__init__()
        size = down.shape[1]
        self.gate_up_proj, self.down_proj = nn.Module(), nn.Module()
        self.gate_up_proj.weight = part_of(
            gate_up,
            shard_dim=None if whole else 0,
            parts={"gate": (0, size), "up": (size, 2 * size)},
        )
        self.down_proj.weight = part_of(down, shard_dim=None if whole else 1)


def part_of(
    stored: Tensor, *, shard_dim: int | None, parts: dict[str, tuple[int, int]] | None = None
) -> nn.Parameter:
    """As layers.linear.parameter, in memory that is there."""
    param = nn.Parameter(stored, requires_grad=False)
    param.shard_dim, param.parts = shard_dim, parts  # type: ignore[attr-defined]
    return param


class Qwen3MoeMLP(nn.Module):
    def __init__(
        self, config: ModelConfig, experts: Experts, kernels: Kernels, tp: TensorParallel
    ) -> None:
        super().__init__()
        held, size = experts.num_experts, experts.moe_intermediate_size
        if tp.whole_experts:
            held = tp.share(held, "experts of a layer")
        else:
            size = tp.share(size, "outputs of an expert's gate_proj")
        # the number of this rank's first expert
        self.first = tp.rank * held if tp.whole_experts else 0
        self.gate = Router(config, experts)
        # each in one piece, as a grouped matmul needs them
        self.gate_up = torch.empty(held, 2 * size, config.hidden_size)
        self.down = torch.empty(held, config.hidden_size, size)
        self.experts = nn.ModuleDict(
            {
                str(self.first + i): Expert(gate_up, down, tp.whole_experts)
                for i, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True))
            }
        )
        folder = "triton" if level_of(kernels) == "triton" else "torch"
        self.mix_experts = import_module(f"nanovllm.kernels.{folder}.experts").mix_experts
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.gate(x)
        if self.tp.whole_experts:
            chosen = self.numbered_here(chosen)
        return self.tp.all_reduce(
            self.mix_experts(
                x, shares, chosen, self.gate_up, self.down, some_elsewhere=self.tp.whole_experts
            )
        )

    def numbered_here(self, chosen: Tensor) -> Tensor:
        """Numbers of experts as this rank counts its own, from 0; those of other ranks become the number
        after its last. Any shape.
        """
        held = len(self.experts)
        own = chosen - self.first
        return own.where((own >= 0) & (own < held), held)


class Qwen3MoeDecoderLayer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        experts: Experts,
        layer: int,
        kernels: Kernels,
        attention: Attention,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.self_attn = Qwen3Attention(config, kernels, attention, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp = (
            Qwen3MoeMLP(config, experts, kernels, tp)
            if experts.in_layer(layer)
            else Qwen3MLP(config, kernels, tp)
        )


class Qwen3MoeModel(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        kernels: Kernels,
        attention: Attention,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        experts = Experts.of(config)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.rotary = RotaryEmbedding(
            config.head_dim, max_model_len, config.rope_theta, config.scaled_rope
        )
        self.layers = nn.ModuleList(
            Qwen3MoeDecoderLayer(config, experts, layer, kernels, attention, tp)
            for layer in range(config.num_hidden_layers)
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


class Qwen3MoeForCausalLM(nn.Module):
    packed_modules_mapping = Qwen3ForCausalLM.packed_modules_mapping

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        kernels: Kernels,
        attention: Attention,
        tp: TensorParallel,
    ) -> None:
        super().__init__()
        self.model = Qwen3MoeModel(config, max_model_len, kernels, attention, tp)
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

    def is_elsewhere(self, name: str) -> bool:
        """Whether a checkpoint's tensor is part of an expert that another rank holds whole."""
        found = re.fullmatch(
            r"model\.layers\.(\d+)\.mlp\.experts\.(0|[1-9]\d*)\.(gate|up|down)_proj\.weight", name
        )
        if found is None or int(found[1]) >= len(self.model.layers):
            return False
        mlp, number = self.model.layers[int(found[1])].mlp, found[2]
        return (
            isinstance(mlp, Qwen3MoeMLP)
            and number not in mlp.experts
            and int(number) < len(mlp.gate.weight)
        )
