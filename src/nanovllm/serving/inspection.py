"""Routes for experiments on a server, off unless `--dev-endpoints` asks for them: whoever can reach the
server could otherwise slow down everybody else.

    POST /reset_prefix_cache   forgets every prefix that no running request uses; vLLM's path, in its development mode
    GET /engine                the resolved configuration, counters and toggles of the engine
"""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from nanovllm.serving.async_llm import AsyncLLM


def add_routes(app: FastAPI, llm: AsyncLLM) -> None:
    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        await llm.reset_prefix_cache()
        return Response()

    @app.get("/engine")
    async def engine() -> Response:
        return JSONResponse(await llm.between_steps(described))


def described(engine: Any) -> dict[str, Any]:
    """What an LLMEngine reports of itself; called between two steps."""
    return {
        "resolved": engine.resolved_config(),
        "counters": engine.stats(),
        "toggles": engine.toggles(),
    }
