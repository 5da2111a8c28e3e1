"""The engine for many clients at once: an asyncio interface, and an HTTP server with OpenAI's API.
Nothing here is loaded before it is asked for.

async_llm    AsyncLLM: generate as an async iterator, cancellation, back-pressure, shutdown
step_thread  the thread that runs the engine's steps, and what it is asked to do between them
streams      what one call of generate waits for: outputs that cross from threads to an event loop
answers      from the tokens of a step to the output of a request, with text that grows

command      `nanovllm serve`
server       its process: uvicorn, SIGTERM, the end of the engine
app          the routes of OpenAI's API, and how a client that leaves ends its requests
protocol     the fields of requests; what is not built is refused by name
responses    the JSON of answers, chunks and usage
errors       exceptions as HTTP statuses with OpenAI's error object
limits       API key, size and time of a request's body
metrics      Prometheus, under vLLM's names
inspection   routes for experiments: empty the prefix cache, what the engine reports of itself
logs         a line for each request, as text or JSON
grafana.json a dashboard of these metrics

Imports point down: command -> server -> app -> protocol, metrics, logs, inspection -> limits -> errors ->
responses, async_llm -> step_thread, streams -> answers. The server needs the extra `serve`;
AsyncLLM does not.
"""

from importlib import import_module

__all__ = ["AsyncLLM", "QueueFullError"]


def __getattr__(name: str) -> object:
    """Loads torch only when an engine is asked for: `nanovllm serve --help` needs none."""
    if name in __all__:
        return getattr(import_module("nanovllm.serving.async_llm"), name)
    raise AttributeError(f"module 'nanovllm.serving' has no attribute {name!r}")
