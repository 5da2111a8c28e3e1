"""Weights of 8 and 4 bits. A weight is rounded once, when it is made, and stays as it is stored: a product reads the
stored bits and their scales.

    int8   W8A16: symmetric, a scale for each output channel                      q in -127 .. 127    w = q * scale
    int4   W4A16: asymmetric, scale and zero point for each 128 inputs of each
           output channel (the last group may be shorter)                         q in 0 .. 15        w = (q - zero) * scale
    fp8    W8A8: e4m3, a scale for each output channel; activations are rounded
           in each product, with a scale for each token                           q in -448 .. 448    w = q * scale

Rounding is to the nearest, ties to even (round-to-nearest, RTN), computed in float32 from weights in the engine's dtype. Scales
of int8 and int4 are rounded to the engine's dtype before weights are divided by them, as they are stored in it; those of fp8
are float32.

A rank that holds some of the inputs of a weight (the shard of a row-parallel projection) takes scales and groups from the whole
weight, so that any number of ranks computes with the same numbers.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.linear import TensorParallel

GROUP = 128
"""Inputs that share a scale and a zero point in int4."""
E4M3 = torch.float8_e4m3fn
E4M3_LARGEST = 448.0


class QuantizedWeight(nn.Module):
    """One weight, [outputs, inputs], or that of many experts, [experts, outputs, inputs].

    weight: in the engine's dtype, this rank's part. tp: the ranks that share its inputs; None: this rank holds all of them.
    """

    level: ClassVar[str]

    def __init__(self, weight: Tensor, tp: TensorParallel | None) -> None:
        super().__init__()
        self.dtype, self.inputs = weight.dtype, weight.shape[-1]
        self.tp = tp if tp is not None and tp.size > 1 else None
        self.first_input = self.tp.rank * self.inputs if self.tp else 0
        self.all_inputs = self.tp.size * self.inputs if self.tp else self.inputs
        self._make(weight.detach().float())

    def _make(self, wide: Tensor) -> None:
        """Stores `wide`, float32."""
        raise NotImplementedError

    def dequantized(self, expert: int | None = None) -> Tensor:
        """What is stored, as numbers in the engine's dtype: [outputs, inputs]; with `expert`, of that expert."""
        raise NotImplementedError

    def product(self, x: Tensor, bias: Tensor | None = None, expert: int | None = None) -> Tensor:
        """x: [tokens, inputs] -> [tokens, outputs] in x's dtype: the twin of the kernels, on any device."""
        return F.linear(x, self.dequantized(expert).to(x.dtype), bias)

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())

    def _of(self, name: str, expert: int | None) -> Tensor:
        tensor: Tensor = getattr(self, name)
        return tensor if expert is None else tensor[expert]

    def _largest(self, values: Tensor) -> Tensor:
        """Over the ranks that share the inputs: [..., n] -> [..., n]."""
        if self.tp is None:
            return values
        gathered = self.tp.all_gather(values)
        return gathered.unflatten(-1, (self.tp.size, values.shape[-1])).amax(-2)


class Int8Weight(QuantizedWeight):
    """packed: int8 [..., outputs, inputs]; scales: [..., outputs, 1] in the engine's dtype."""

    level = "int8"

    def _make(self, wide: Tensor) -> None:
        scales = _scales(self._largest(wide.abs().amax(-1, keepdim=True)) / 127, self.dtype)
        packed = (wide / scales.float()).round_().clamp_(-127, 127).to(torch.int8)
        self._keep(packed=packed, scales=scales)

    def dequantized(self, expert: int | None = None) -> Tensor:
        packed, scales = self._of("packed", expert), self._of("scales", expert)
        return (packed.float() * scales.float()).to(self.dtype)


class Int4Weight(QuantizedWeight):
    """packed: uint8 [..., outputs, inputs / 2], an even input in the low four bits and the next one in the high four;
    scales: [..., outputs, groups] in the engine's dtype; zeros: uint8 [..., outputs, groups].

    Groups are those of the whole weight: where a rank's inputs begin or end inside of one, the ranks agree on its scale.
    Raises ValueError for an odd number of inputs on a rank.
    """

    level = "int4"

    def _make(self, wide: Tensor) -> None:
        if self.inputs % 2:
            raise ValueError(
                f"quantization='int4' packs inputs in pairs, and a weight has {self.inputs} on each rank: use 'int8', or "
                "another tensor_parallel_size"
            )
        # of the whole weight, those of other ranks' inputs at 0: a range always holds 0
        index = (self._groups(wide.device) + self.first_input // GROUP).expand(wide.shape)
        none = wide.new_zeros(*wide.shape[:-1], -(-self.all_inputs // GROUP))
        high = self._largest(none.scatter_reduce(-1, index, wide, "amax"))
        low = -self._largest(-none.scatter_reduce(-1, index, wide, "amin"))
        scales = _scales((high - low) / 15, self.dtype)
        zeros = (-low / scales.float()).round_().clamp_(0, 15)
        own = slice(self.first_input // GROUP, (self.first_input + self.inputs - 1) // GROUP + 1)
        scales, zeros = scales[..., own], zeros[..., own]
        per_input = self._groups(wide.device)
        steps = (wide / scales.float()[..., per_input]).round_()
        packed = (steps + zeros[..., per_input]).clamp_(0, 15).to(torch.uint8)
        packed = packed[..., 0::2] | packed[..., 1::2] << 4
        self._keep(packed=packed, scales=scales, zeros=zeros.to(torch.uint8))

    def dequantized(self, expert: int | None = None) -> Tensor:
        packed, scales, zeros = (self._of(name, expert) for name in ("packed", "scales", "zeros"))
        groups = self._groups(packed.device)
        steps = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float()
        return ((steps - zeros.float()[..., groups]) * scales.float()[..., groups]).to(self.dtype)

    def _groups(self, device: torch.device) -> Tensor:
        """The group of each of this rank's inputs, its first one being 0: int64 [inputs]."""
        place = torch.arange(self.inputs, device=device) + self.first_input % GROUP
        return place // GROUP


class Fp8Weight(QuantizedWeight):
    """packed: float8_e4m3fn [..., outputs, inputs]; scales: float32 [..., outputs, 1].

    An activation is divided by scale = its token's largest magnitude / 448 and rounded to e4m3 as well; over ranks that share the
    inputs, the largest of all of them, at the cost of one more collective.
    """

    level = "fp8"

    def _make(self, wide: Tensor) -> None:
        scales = _scales(
            self._largest(wide.abs().amax(-1, keepdim=True)) / E4M3_LARGEST, torch.float32
        )
        self._keep(packed=to_e4m3(wide / scales), scales=scales)

    def dequantized(self, expert: int | None = None) -> Tensor:
        packed, scales = self._of("packed", expert), self._of("scales", expert)
        return (packed.float() * scales).to(self.dtype)

    def product(self, x: Tensor, bias: Tensor | None = None, expert: int | None = None) -> Tensor:
        rounded, x_scales = self.rounded(x)
        y = F.linear(rounded.float(), self._of("packed", expert).float())
        y = y * x_scales * self._of("scales", expert)[:, 0]
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, inputs] -> e4m3 [tokens, inputs] and float32 scales [tokens, 1]."""
        wide = x.float()
        scales = _scales(
            self._largest(wide.abs().amax(-1, keepdim=True)) / E4M3_LARGEST, torch.float32
        )
        return to_e4m3(wide / scales), scales


WEIGHTS: dict[str, type[QuantizedWeight]] = {
    made.level: made for made in (Int8Weight, Int4Weight, Fp8Weight)
}


def check_fp8(name: str, level: str, device: torch.device) -> None:
    """Raises ValueError on a GPU whose hardware has no e4m3."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            f"{name}={level!r} needs a GPU of compute capability 8.9 or more, such as an RTX 4070 or an H100, and this one has "
            f"{found[0]}.{found[1]}. Use {name}={'int8' if name == 'quantization' else 'auto'!r}."
        )


def to_e4m3(wide: Tensor) -> Tensor:
    """Rounds to the nearest e4m3, ties to even; what lies beyond 448 becomes 448 (some conversions make NaN of it)."""
    return wide.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(E4M3)


def _scales(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored. Where all weights are 0, any scale will do: 1."""
    rounded = exact.to(dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
