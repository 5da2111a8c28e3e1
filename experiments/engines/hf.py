"""The adapter of HF transformers: `generate` on static batches with left padding.

Requests are taken in order of arrival, `max_num_seqs` at a time. A batch runs until its longest
member has ended, and tokens of the others beyond their own `max_tokens` are cut off. The settings
are the fastest for this: inference mode, SDPA, a KV cache, no EOS processing if EOS is ignored, no
streaming.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from experiments.engines import check_config, options_of, own_cores
from experiments.records.types import Answer, Config, LogprobAnswer, Request, Toggles


class Adapter:
    """config: max_num_seqs, the size of a batch; dtype ("float32" | "bfloat16" | "float16"); device
    ("cpu" | "cuda").
    """

    name = "hf"
    not_over_time = "HF's `generate` serves one batch to its end and takes no request while it runs"
    allowed = ("max_num_seqs", "dtype", "device", "seed")

    def __init__(self, model: str, config: Config) -> None:
        check_config(self.name, config, self.allowed)
        self._model_path = model
        self._config = {"device": "cpu", "seed": 0, **config}

    def load(self) -> Config:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._torch, self._transformers = torch, transformers
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            self._model_path,
            dtype=getattr(torch, self._config["dtype"]),
            attn_implementation="sdpa",
            local_files_only=True,
        )
        self._model.to(self._config["device"]).eval()
        eos = self._model.generation_config.eos_token_id
        self._eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        # otherwise `generate` would use the checkpoint's defaults, such as an EOS that a request
        # ignores
        self._model.generation_config = transformers.GenerationConfig()
        return {
            **self._config,
            "attn_implementation": self._model.config._attn_implementation,
            "batching": "static",
            "torch_threads": torch.get_num_threads(),
            "worker_cores": own_cores(),
        }

    def serve(self, requests: list[Request]) -> Answer:
        size = self._config["max_num_seqs"]
        outputs: list[list[int]] = []
        request_times: list[list[float]] = []
        step_times: list[list[float]] = []
        begin = time.perf_counter()
        for first in range(0, len(requests), size):
            batch = requests[first : first + size]
            batch_begin = time.perf_counter()
            rows, moments = self._generate(batch)
            # `generate` returns when the last row has ended; no request finishes earlier
            end = time.perf_counter() - begin
            outputs += rows
            request_times += [[0.0, moments[0] - begin, end]] * len(batch)
            prompt_tokens = sum(len(request["prompt_token_ids"]) for request in batch)
            step_times.append([moments[0] - batch_begin, prompt_tokens, 0])
            for step, (before, after) in enumerate(itertools.pairwise(moments), start=1):
                # rows that had not ended
                step_times.append([after - before, 0, sum(len(row) > step for row in rows)])
        return {
            "duration_s": time.perf_counter() - begin,
            "outputs": outputs,
            "finish_reasons": [
                self._reason(r, output) for r, output in zip(requests, outputs, strict=True)
            ],
            "request_times_s": request_times,
            "step_times_s": step_times,
        }

    def logprobs(self, requests: list[Request]) -> LogprobAnswer:
        """Serves requests and keeps the logits of every step (see WithLogprobs). Not timed."""
        size = self._config["max_num_seqs"]
        outputs: list[list[int]] = []
        logprobs: list[list[float]] = []
        for first in range(0, len(requests), size):
            batch = requests[first : first + size]
            steps: list[Any] = []
            rows, _ = self._generate(batch, steps)
            # [batch, steps, vocab]
            values = self._torch.stack([step.float().log_softmax(-1) for step in steps], dim=1)
            outputs += rows
            logprobs += [
                [float(values[i, step, token]) for step, token in enumerate(row)]
                for i, row in enumerate(rows)
            ]
        return {"outputs": outputs, "logprobs": logprobs}

    def reset(self) -> None:
        """Does nothing: no state is kept between batches."""

    def counters(self) -> dict[str, int]:
        return {}

    def toggles(self) -> Toggles:
        return {}

    def close(self) -> None:
        del self._model

    def _generate(
        self, batch: list[Request], logits: list[Any] | None = None
    ) -> tuple[list[list[int]], list[float]]:
        """The outputs, cut to what each request asked for, and the time of each step. logits: a list
        to which those of each step are added.
        """
        torch = self._torch
        width = max(len(request["prompt_token_ids"]) for request in batch)
        ids = torch.tensor(
            [[0] * (width - len(r["prompt_token_ids"])) + r["prompt_token_ids"] for r in batch]
        )
        mask = torch.tensor(
            [[0] * (width - len(n)) + [1] * len(n) for n in (r["prompt_token_ids"] for r in batch)]
        )
        moments: list[float] = []
        goes_on = torch.zeros(len(batch), dtype=torch.bool, device=self._config["device"])

        def note_time(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            moments.append(time.perf_counter())
            return goes_on

        with (
            torch.inference_mode(),
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        ):
            # `generate` uses one random generator per batch; the same work gives the same tokens
            torch.manual_seed(batch[0]["seed"])
            config = self._generation_config(batch)
            if logits is not None:
                config.return_dict_in_generate = config.output_logits = True
            generated = self._model.generate(
                input_ids=ids.to(self._config["device"]),
                attention_mask=mask.to(self._config["device"]),
                generation_config=config,
                stopping_criteria=[note_time],
            )
            if logits is not None:
                logits += generated.logits
                generated = generated.sequences
            rows = generated[:, width:].tolist()
        return [self._cut(request, row) for request, row in zip(batch, rows, strict=True)], moments

    def _generation_config(self, batch: list[Request]) -> Any:
        """Raises ValueError if the requests of a batch have different sampling parameters, which
        `generate` does not support, or options, whose meaning there is another one.
        """
        for request in batch:
            options_of(self.name, request, known=())
        settings = {(r["temperature"], r["top_k"], r["top_p"], r["ignore_eos"]) for r in batch}
        if len(settings) > 1:
            raise ValueError(
                "hf: all requests of a batch must have the same (temperature, top_k, top_p, ignore_eos); given "
                f"{sorted(settings)}"
            )
        temperature, top_k, top_p, ignore_eos = settings.pop()
        sampling = (
            {"temperature": temperature, "top_k": max(top_k, 0), "top_p": top_p}
            if temperature > 0
            else {}
        )
        return self._transformers.GenerationConfig(
            max_new_tokens=max(r["max_tokens"] for r in batch),
            do_sample=temperature > 0,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None if ignore_eos else self._eos_ids or None,
            bos_token_id=None,
            **sampling,
        )

    def _cut(self, request: Request, row: list[int]) -> list[int]:
        row = row[: request["max_tokens"]]
        if not request["ignore_eos"]:
            for index, token in enumerate(row):
                if token in self._eos_ids:
                    return row[: index + 1]
        return row

    def _reason(self, request: Request, output: list[int]) -> str:
        ended = not request["ignore_eos"] and bool(output) and output[-1] in self._eos_ids
        return "stop" if ended else "length"
