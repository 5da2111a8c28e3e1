"""StepPlans in, tokens out: one rank's model, KV cache and batch rows, executed eagerly.

`submit` enqueues a step and never waits for the device; `collect` waits for the tokens of that
step. State that outlives a step is kept in rows, one per running request: its block table, its
sampling parameters, its last token. A decode reads its token from its row, so the next step can be
submitted before the host has read the tokens of this one.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.engine.kv_cache import KVCacheSpec, num_blocks_for
from nanovllm.engine.scheduler import StepPlan
from nanovllm.engine.sequence import TokenLogprobs
from nanovllm.engine.stats import StepStats
from nanovllm.kernels.batch import ForwardBatch
from nanovllm.kernels.registry import load_kernels
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import TensorParallel
from nanovllm.models.config import ModelConfig
from nanovllm.models.families import model_class
from nanovllm.models.loader import load_weights

# A step's results on their way to the host: token ids [sampling entries]; where asked for, their log-probabilities
# and ranks, the largest log-probabilities and their token ids.
StepHandle = list[Tensor]


class ModelRunner:
    """One rank on the CPU; gpu/runner.py adds what a GPU needs. Raises MemoryError where weights or
    KV cache do not fit, with what to lower.
    """

    spare = 0  # extra rows and blocks, which no request gets
    processors: Any = None  # requests.logit_processors.LogitProcessors, once a request needs them

    def __init__(
        self,
        resolved: ResolvedConfig,
        model_config: ModelConfig,
        folder: Path,
        stats: StepStats,
        tp: TensorParallel | None = None,
    ) -> None:
        self.config, self.stats, self.tp = resolved, stats, (tp := tp or TensorParallel())
        # The caller's current GPU; a tensor-parallel rank has made the GPU of its number current.
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if resolved.device == "cuda"
            else torch.device("cpu")
        )
        dtype = getattr(torch, resolved.dtype)
        self.kernels = tp.over_shards(load_kernels(resolved.optimizations, stats.kernel_calls))
        self.attention = Attention(
            resolved.optimizations,
            stats.attention_calls,
            num_kv_heads=model_config.num_key_value_heads // tp.size,
            block_size=resolved.block_size,
            head_dim=model_config.head_dim,
            dtype=dtype,
        )
        self.before_the_weights(model_config)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                self.model = model_class(model_config.architecture)(
                    model_config, resolved.max_model_len, self.kernels, self.attention, tp
                )
        finally:
            torch.set_default_dtype(default_dtype)
        load_weights(self.model, folder, tp)
        self.model.to(self.device).eval().requires_grad_(False)

        self.make_rows()

        spec = KVCacheSpec.of(model_config, resolved)
        self.num_blocks = tp.agree_on_least(self.most_blocks(spec))
        self.kv_cache_bytes = self.num_blocks * spec.block_bytes
        self.kv_caches = spec.allocate(self.num_blocks + self.spare, self.device)

    def before_the_weights(self, model_config: ModelConfig) -> None:
        """Called before the model is built. Nothing has to be done on a CPU; gpu/runner.py plans
        memory here.
        """

    def most_blocks(self, spec: KVCacheSpec) -> int:
        """KV blocks that fit beside the weights."""
        return num_blocks_for(self.config, spec)

    def make_rows(self) -> None:
        """Allocates the state of every row, on the runner's device."""
        rows = self.config.max_num_seqs + self.spare
        with self.device:
            self.block_tables = torch.zeros(
                rows, -(-self.config.max_model_len // self.config.block_size), dtype=torch.int32
            )
            self.last_tokens, self.top_ks, self.seeds = torch.zeros(3, rows, dtype=torch.int64)
            self.temperatures, self.top_ps = torch.zeros(2, rows, dtype=torch.float32)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> StepHandle:
        """Enqueues a step, and the copies of its results to the host."""
        return self._read_back(*self._run(plan))

    def _run(self, plan: StepPlan) -> tuple[Tensor, ...]:
        """Enqueues forward pass and sampling of a step; its results, on the device."""
        self._update_rows(plan)
        rows = self._tensor(plan.rows)
        batch = self._batch(plan, rows)
        self.attention.prepare(batch)
        hidden = self.model(batch, self.kv_caches)

        samples = self._tensor([i for i, sampled in enumerate(plan.samples) if sampled])
        logits = self.model.logits(hidden[batch.query_start_loc[1:][samples] - 1])
        rows = rows[samples]
        params = (
            of_rows[rows] for of_rows in (self.temperatures, self.top_ks, self.top_ps, self.seeds)
        )
        edited = logits if self.processors is None else self.processors.edit(logits, hidden, plan)
        token_ids = self.kernels.sample(
            edited,
            *params,
            batch.seq_lens[samples].long(),
            all_greedy=plan.greedy_only,
            any_top_k_top_p=plan.filtered,
        )
        self.last_tokens[rows] = token_ids
        if plan.num_logprobs is None:
            return (token_ids,)
        from nanovllm.kernels.torch.logprobs import logprobs

        return (
            token_ids,
            *logprobs(self.tp.all_gather(logits), token_ids, plan.num_logprobs),
            *(() if self.processors is None else self.processors.of_prompts(plan)),
        )

    def _read_back(self, *tensors: Tensor) -> StepHandle:
        """Enqueues copies of the results to the host."""
        return [tensor.to("cpu", non_blocking=True) for tensor in tensors]

    def collect(self, handle: StepHandle) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Waits for a step. Returns a token for each entry that samples, and their
        log-probabilities where asked for.
        """
        token_ids, *logprobs = (tensor.tolist() for tensor in handle)
        return token_ids, list(zip(*logprobs, strict=True)) if logprobs else None

    def close(self) -> None:
        """Frees the model and the KV cache."""
        self.__dict__.clear()

    def _tensor(self, values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        # A copy from pageable memory would wait for the device.
        return torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda").to(
            self.device, non_blocking=True
        )

    def _update_rows(self, plan: StepPlan) -> None:
        if plan.new_rows:
            rows, temperatures, top_ks, top_ps, seeds, processors = (
                list(column) for column in zip(*plan.new_rows, strict=True)
            )
            if self.processors is not None or any(processors):
                from nanovllm.requests.logit_processors import renew

                renew(self, rows, processors)
            index = self._tensor(rows)
            self.top_ks[index], self.seeds[index] = self._tensor([top_ks, seeds])
            self.temperatures[index], self.top_ps[index] = self._tensor(
                [temperatures, top_ps], torch.float32
            )
        if plan.new_blocks:
            rows, columns, blocks = self._tensor(plan.new_blocks).unbind(1)  # type: ignore[arg-type]
            self.block_tables[rows, columns] = blocks.int()

    def _batch(self, plan: StepPlan, rows: Tensor) -> ForwardBatch:
        """The tensors of a step; slots are derived from the block tables on the device."""
        seq_lens = [
            start + length for start, length in zip(plan.starts, plan.query_lens, strict=True)
        ]
        starts, query_lens = self._tensor(plan.starts), self._tensor(plan.query_lens)
        num_tokens = plan.num_decodes + len(plan.token_ids)
        query_start_loc = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0))
        # [tokens]: the entry of each token
        entry = torch.repeat_interleave(query_lens, output_size=num_tokens)
        positions = (
            torch.arange(num_tokens, device=self.device) + (starts - query_start_loc[:-1])[entry]
        )
        block_size = self.config.block_size
        block_tables = self.block_tables[rows, : -(-max(seq_lens) // block_size)]
        return ForwardBatch(
            torch.cat((self.last_tokens[rows[: plan.num_decodes]], self._tensor(plan.token_ids))),
            positions,
            block_tables[entry, positions // block_size].long() * block_size
            + positions % block_size,
            block_tables,
            self._tensor(seq_lens, torch.int32),
            query_start_loc,
            plan.num_decodes,
            plan.query_lens,
            seq_lens,
        )
