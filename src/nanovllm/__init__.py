"""nanovllm: a small LLM inference engine whose every optimization can be switched off and measured."""

from nanovllm.config import ALL, BASELINE, EngineConfig, Optimizations
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "ALL",
    "BASELINE",
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "LLMEngine",
    "Logprob",
    "Optimizations",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> object:
    """Load torch only when an engine is asked for: the scheduler and the configuration need none."""
    if name in ("LLM", "LLMEngine"):
        from nanovllm.engine import llm_engine

        return getattr(llm_engine, name)
    raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
