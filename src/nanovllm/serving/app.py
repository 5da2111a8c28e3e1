"""The HTTP interface: OpenAI's completions and chat completions over an AsyncLLM.

RequestLog -> Limits -> the route -> AsyncLLM.generate, one for each prompt -> Writer
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from nanovllm.outputs import RequestOutput
from nanovllm.requests.chat import prompts_of
from nanovllm.sampling_params import SamplingParams
from nanovllm.serving.async_llm import AsyncLLM
from nanovllm.serving.errors import ApiError, api_error, timed_out
from nanovllm.serving.limits import Limits
from nanovllm.serving.logs import LOG, RequestLog
from nanovllm.serving.metrics import Metrics
from nanovllm.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from nanovllm.serving.responses import DONE, ChatWriter, CompletionWriter, Writer, event

CLIENT_GONE = 499
"""The status in the log of a request whose client went away before its answer began (nginx's code)."""


@dataclass(frozen=True)
class Settings:
    """model_names: under which the model is served; the first is the one in answers. api_key: None
    asks for none. chat_template: the text of a Jinja template, None takes the checkpoint's.
    dev_endpoints: also those of inspection.py.
    """

    model_names: tuple[str, ...]
    api_key: str | None = None
    chat_template: str | None = None
    max_body_bytes: int = 4 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    dev_endpoints: bool = False


class EventStream(StreamingResponse):
    """Ends the requests behind it however the response ends, even if it never began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], work: "Work", headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers)
        self._events, self._work = events, work

    async def __call__(self, *given: Any) -> None:
        try:
            await super().__call__(*given)
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
            await self._work.aclose()


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def create_app(llm: AsyncLLM, settings: Settings) -> RequestLog:
    """The ASGI application. The AsyncLLM is the caller's to shut down."""
    app = FastAPI(title="nanovllm", docs_url="/docs", redoc_url=None)
    metrics = Metrics(llm, settings.model_names[0])
    defaults = llm.get_default_sampling_params()
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        await llm.check_health()
        return Response()

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": started,
                    "owned_by": "nanovllm",
                    "root": llm.engine.config.model,
                    "parent": None,
                    "max_model_len": llm.engine.config.max_model_len,
                }
                for name in settings.model_names
            ],
        }

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        params = checked(body, lambda: body.params(defaults))
        return await answer(body, request, "cmpl", CompletionWriter, body.prompts(), params)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        params = checked(body, lambda: body.params(defaults))

        def prompt() -> Any:
            (found,) = prompts_of(
                llm.engine,
                [body.messages],
                chat_template=settings.chat_template,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            return {"prompt_token_ids": found[1]}

        try:
            length = sum(map(text_length, body.messages))
            prompts = [await llm.in_tokenizing_thread(prompt, length)]
        except Exception as error:  # noqa: BLE001  raised again, as what the client is told
            raise_known(error)
        return await answer(body, request, "chatcmpl", ChatWriter, prompts, params)

    def checked(body: GenerationRequest, make: Any) -> SamplingParams:
        if body.model is not None and body.model not in settings.model_names:
            raise ApiError(
                404,
                f"the model {body.model!r} is not served here; known are {', '.join(settings.model_names)}",
                param="model",
                code="model_not_found",
            )
        try:
            made: SamplingParams = make()
            return made
        except (ValueError, TypeError) as error:
            raise_known(error)

    async def answer(
        body: GenerationRequest,
        request: Request,
        prefix: str,
        writer_type: type[Writer],
        prompts: list[Any],
        params: SamplingParams,
    ) -> Response:
        asked = len(prompts) * getattr(params, "n", 1)
        if asked > llm.max_unfinished:  # as 429 it would be tried again in vain
            raise ApiError(
                400,
                f"the request asks for {asked} answers ({len(prompts)} prompts, n={getattr(params, 'n', 1)}), and this server "
                f"holds {llm.max_unfinished} at most (max_num_seqs + --max-queue); send several smaller requests",
                param="n" if len(prompts) == 1 else "prompt",
            )
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        writer = writer_type(
            request_id, settings.model_names[0], bool(body.stream), getattr(params, "n", 1)
        )
        if isinstance(body, CompletionRequest) and isinstance(writer, CompletionWriter):
            writer.with_token_ids = bool(body.return_token_ids)
        work = Work(llm, settings.request_timeout_s, request_id, prompts, params, body)
        fields = request.state.log
        fields["request_id"] = request_id
        headers = {"X-Request-Id": request_id}
        response: Response | None = None
        try:
            if body.stream:
                # what is refused, or fails before the first token, is answered by a status
                first = await unless_gone(request, work.next())
                stream = events(body, work, writer, first, len(prompts), fields)
                response = EventStream(stream, work, {**headers, "Cache-Control": "no-cache"})
                return response
            outputs = await unless_gone(request, work.last_outputs())
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:  # noqa: BLE001  raised again, as what the client is told
            raise_known(error)
        finally:
            if response is None:
                await work.aclose()
        content = writer.whole(outputs)
        fields |= writer.usage.as_json()
        return JSONResponse(content, headers=headers)

    async def refuse(request: Request, error: Exception) -> Response:
        # a ValueError that comes here was not the client's
        known = api_error(error) if isinstance(error, (ApiError, RuntimeError)) else None
        if known is None:
            LOG.error("a request failed", exc_info=error)
            known = ApiError(500, "internal error", "server_error")
        metrics.refused(known.status)
        getattr(request.state, "log", {})["error"] = known.body["error"]["message"]
        return JSONResponse(known.body, known.status, known.headers)

    async def refuse_status(request: Request, error: HTTPException) -> Response:
        return await refuse(
            request,
            ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})),
        )

    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        return await refuse(request, invalid_body(error))

    if settings.dev_endpoints:
        import_module("nanovllm.serving.inspection").add_routes(app, llm)
    app.add_exception_handler(RequestValidationError, refuse_body)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, refuse_status)  # type: ignore[arg-type]
    for kind in (ApiError, RuntimeError, Exception):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(
        Limits,  # type: ignore[arg-type]
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    return RequestLog(app)


class Work:
    """The calls of `generate` behind one HTTP request. Ends them when it is closed."""

    def __init__(
        self,
        llm: AsyncLLM,
        limit_s: float,
        request_id: str,
        prompts: list[Any],
        params: SamplingParams,
        body: GenerationRequest,
    ) -> None:
        self._limit_s, self._timed_out = limit_s, False
        kind: Any = "delta" if body.stream else "final_only"
        names = [f"{request_id}-{i}" for i in range(len(prompts))]
        outputs = [
            llm.generate(prompt, params, name, output_kind=kind, priority=body.priority or 0)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        self._outputs = outputs[0] if len(outputs) == 1 else None
        self._several = interleaved(outputs)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self._timed_out = True
            self._stopping = [asyncio.ensure_future(llm.abort(name)) for name in names]

        self._timer = loop.call_later(limit_s, stop)

    async def next(self) -> tuple[int, RequestOutput] | None:
        """The next output and the number of its prompt; None at the end. Raises what generate
        raises, and ApiError where it takes too long.
        """
        try:
            if self._outputs is not None:
                found = 0, await anext(self._outputs)
            else:
                found = await anext(self._several)
        except StopAsyncIteration:
            found = None  # type: ignore[assignment]
        except (ValueError, TypeError) as error:  # one of the prompts cannot be served
            raise_known(error)
        if self._timed_out:
            raise timed_out(self._limit_s)
        return found

    async def last_outputs(self) -> list[tuple[int, RequestOutput]]:
        """The only outputs of requests that are no streams."""
        found = []
        while (output := await self.next()) is not None:
            found.append(output)
        return found

    async def aclose(self) -> None:
        self._timer.cancel()
        if self._outputs is not None:
            await self._outputs.aclose()
        await self._several.aclose()


async def events(
    body: GenerationRequest,
    work: Work,
    writer: Writer,
    first: tuple[int, RequestOutput] | None,
    num_prompts: int,
    fields: dict[str, Any],
) -> AsyncIterator[bytes]:
    """The events of a stream, from its first output on. fields: of its line in the log."""
    at_end, always = body.wants_usage
    output = first
    try:
        for begun in writer.begin(num_prompts):
            yield begun
        while output is not None:
            yield writer.chunk(*output, always)
            output = await work.next()
        if at_end:
            yield writer.event([], True)
    except Exception as error:  # noqa: BLE001  the status was sent long ago
        # as in `refuse`: a ValueError that comes here was not the client's
        known = api_error(error) if isinstance(error, (ApiError, RuntimeError)) else None
        if known is None:
            LOG.exception("a stream failed")
            known = ApiError(500, "internal error", "server_error")
        fields["error"] = known.body["error"]["message"]
        yield event(known.body)
    finally:
        fields |= writer.usage.as_json()
    yield DONE


async def interleaved(
    iterators: list[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The items of all iterators as they come, with the number of the iterator. Ends them all when
    one raises, and when it is closed.
    """
    reading = {asyncio.ensure_future(anext(one)): i for i, one in enumerate(iterators)}  # type: ignore[arg-type]
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = reading.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                reading[asyncio.ensure_future(anext(iterators[i]))] = i  # type: ignore[arg-type]
                yield i, item
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for one in iterators:
            await one.aclose()


async def unless_gone(request: Request, work: Any) -> Any:
    """What `work`, a coroutine, returns. Raises ClientGoneError, and cancels it, where the client
    closes its connection first.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def text_length(message: dict[str, Any]) -> int:
    """Characters of a message's content, which may be a list of parts. The rest of it is checked by
    the chat template.
    """
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return sum(len(text) for text in texts if isinstance(text, str))


def raise_known(error: Exception) -> NoReturn:
    """Raises what the client is to be told, or the error itself where that is a mistake of ours."""
    known = api_error(error)
    if known is None or known is error:
        raise error
    raise known from error


def invalid_body(error: RequestValidationError) -> ApiError:
    """Which field is wrong, and why."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', message)}")
    if not where and first["type"] in ("missing", "model_attributes_type"):
        return ApiError(
            400,
            "the body must be a JSON object, sent with the header `Content-Type: application/json`",
        )
    named = ".".join(where)
    return ApiError(
        400, f"{named}: {message}" if named else message, param=where[0] if where else None
    )
