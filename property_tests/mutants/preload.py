"""Loaded once by the process that all others are forked from, so that none of them waits for torch.

Nothing of the project, whose modules are read anew with their mutant; and nothing that starts threads
or looks for a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings

LIBRARIES = (
    "pytest",
    "hypothesis.stateful",
    "hypothesis.extra.numpy",
    "numpy",
    "torch",
    "scipy.stats",
    "scipy.optimize",
    "statsmodels.stats.multitest",
    "statsmodels.api",
    "transformers.models.qwen3.modeling_qwen3",
    "safetensors.torch",
    "tokenizers",
    "jinja2",
    "matplotlib.figure",
    "pydantic",
    "yaml",
    "rich.console",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in LIBRARIES:
        # What is not installed is found missing by the tests that need it.
        with contextlib.suppress(Exception):
            importlib.import_module(_name)
