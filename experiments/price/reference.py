"""The unquantized reference of a price, and what rounding to the compute dtype does to it.

The reference is the gate's: HF transformers in a precision whose own error is negligible, with
weights rounded to the engine's dtype. Every engine that computes in bfloat16 differs from it, lossy
or not. That share, the *noise floor*, is measured by injecting rounding into the reference: the
output of every linear layer, norm, embedding and decoder layer is rounded to the dtype, as every
engine that keeps activations in it has to do. Engines round in more places than these, so the floor
is on the low side and the price that is left on the high side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gate.reference_model import last_hidden_states
from experiments.gate.rescoring import DTYPE, Mutation, Rescorer


class Reference:
    """The reference model of a checkpoint.

    mutate: changes the reference in place, for planted errors (planted.py). Raises what
    `gate.rescoring.Rescorer` does, for instance ValueError for an unknown dtype.
    """

    def __init__(
        self,
        model_dir: str | Path,
        dtype: str,
        *,
        device: str | None = None,
        mutate: Mutation | None = None,
    ) -> None:
        rescorer = Rescorer(model_dir, dtype, device=device, mutate=mutate)
        self.model, self.device, self.dtype = rescorer.reference, rescorer.device, dtype
        self.head = self.model.get_output_embeddings()

    @torch.inference_mode()
    def read(self, token_ids: list[int]) -> Reading:
        """Reads a prompt of two tokens or more, once exactly and once with injected rounding."""
        if len(token_ids) < 2:
            raise ValueError(
                f"a prompt of {len(token_ids)} token predicts nothing; give prompts of two tokens or more"
            )
        ids = torch.tensor([token_ids[:-1]], device=self.device)
        hidden = last_hidden_states(self.model, ids)[0]
        with rounded(self.model, DTYPE[self.dtype]):
            rounded_hidden = last_hidden_states(self.model, ids)[0]
        return Reading(self, torch.tensor(token_ids[1:]), hidden, rounded_hidden)


class Reading:
    """A prompt that the reference has read: logits of any of its positions, a few at a time, so that
    the whole table [positions, vocab] is never in memory.
    """

    def __init__(
        self, reference: Reference, targets: Tensor, hidden: Tensor, rounded_hidden: Tensor
    ) -> None:
        """targets: [n], the token that follows each position; hidden, rounded_hidden: [n, hidden]."""
        self.targets = targets
        self._reference, self._hidden, self._rounded = reference, hidden, rounded_hidden

    def __len__(self) -> int:
        return len(self.targets)

    @torch.inference_mode()
    def logits(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Of positions first to last - 1: the reference's and the rounded ones, both [n, vocab]."""
        exact: Tensor = self._reference.head(self._hidden[first:last])
        noisy: Tensor = self._reference.head(self._rounded[first:last])
        return exact, noisy.to(DTYPE[self._reference.dtype]).to(noisy.dtype)


@contextmanager
def rounded(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Rounds what linear layers, norms, embeddings and decoder layers return to `dtype` and back."""

    def around(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].to(dtype).to(output[0].dtype), *output[1:])
        return output.to(dtype).to(output.dtype)

    kinds = (nn.Linear, nn.Embedding)
    layers = set(model.base_model.layers)
    hooks = [
        module.register_forward_hook(around)
        for module in model.modules()
        if isinstance(module, kinds) or module in layers or type(module).__name__.endswith("Norm")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
