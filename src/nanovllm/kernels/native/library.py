"""The compiled kernels, with their signatures."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nanovllm import cxx

# the codes of vec.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "add_rms_norm": (_I, _P, _P, _P, _P, _P, _L, _L, _F),
    "pack": (_I, _P, _P, _L, _L, _L),
    "linear": (_I, _P, _P, _P, _P, _L, _L, _L),
    "linear_silu_and_mul": (_I, _P, _P, _P, _P, _L, _L, _L),
    "silu_and_mul": (_I, _P, _P, _L, _L),
    "qkv_norm_rope_store_kv": (_I, *[_P] * 5, _F, *[_P] * 7, *[_L] * 7),
    "attend": (_I, *[_P] * 5, _L, _P, _P, *[_L] * 6, _F),
    "sample": (_I, _P, _L, _P, _P, _P, _I, _P, _L, _L),
    "gumbel_noise": (_P, _P, _P, _L, _L),
}


@cache
def library() -> ctypes.CDLL:
    """The kernels of this folder, compiled at the first use on a machine. A call releases the GIL.

    Raises CompilerError, OSError as nanovllm.cxx.
    """
    loaded = cxx.load(cxx.library(Path(__file__).parent))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


@cache
def panel() -> int:
    """Outputs in a panel of packed weights."""
    return int(library().nr())


def dtype_code(dtype: torch.dtype) -> int:
    """Raises TypeError for a dtype that the kernels do not compute in."""
    if dtype not in DTYPES:
        raise TypeError(f"native kernels compute in float32 and bfloat16, not {dtype}")
    return DTYPES[dtype]
