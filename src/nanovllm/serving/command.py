"""The command `nanovllm serve`. Its libraries (the extra `serve`) and the engine are loaded when it
runs.
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[
        str, typer.Argument(help="checkpoint folder, Hugging Face id or preset, such as tiny")
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="NANOVLLM_API_KEY", help="clients must send it (better: in the variable)"
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="name in the API (default: MODEL; several are allowed)"),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="KEY=VALUE",
            help="argument of LLM, value as JSON or text, e.g. max_num_seqs=64",
        ),
    ] = None,
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority")] = "fcfs",
    max_queue: Annotated[
        int, typer.Option(min=0, help="requests that may wait; more are answered with 429")
    ] = 1024,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="larger requests are answered with 413")
    ] = 4 << 20,
    header_timeout_s: Annotated[
        float, typer.Option(min=0.001, help="longest time for a client to send a request's head")
    ] = 10.0,
    request_timeout_s: Annotated[
        float, typer.Option(min=0.001, help="longest time for a request")
    ] = 600.0,
    drain_timeout_s: Annotated[
        float, typer.Option(min=0, help="longest time for unfinished requests after SIGTERM")
    ] = 30.0,
    chat_template: Annotated[
        Path | None, typer.Option(help="file with a Jinja template (default: the checkpoint's)")
    ] = None,
    dev_endpoints: Annotated[
        bool,
        typer.Option(
            "--dev-endpoints", help="for experiments: POST /reset_prefix_cache, GET /engine"
        ),
    ] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="logs as JSON lines")] = False,
) -> None:
    """Serve a model to OpenAI clients over HTTP."""
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        fail(
            f"`nanovllm serve` needs {', '.join(missing)}, which the extra `serve` brings: "
            "pip install 'nanovllm[serve]', or `make setup EXTRAS=serve` in a clone"
        )
    from nanovllm.requests.chat import read_template
    from nanovllm.serving import logs
    from nanovllm.serving.app import Settings
    from nanovllm.serving.async_llm import AsyncLLM
    from nanovllm.serving.server import serve as serve_engine

    logs.set_up(json_logs)
    try:
        settings = Settings(
            model_names=tuple(served_model_name or [model]),
            api_key=api_key,
            chat_template=None if chat_template is None else read_template(chat_template),
            max_body_bytes=max_body_bytes,
            header_timeout_s=header_timeout_s,
            request_timeout_s=request_timeout_s,
            dev_endpoints=dev_endpoints,
        )
        llm = AsyncLLM(
            model,
            scheduling_policy=scheduling_policy,
            max_queue=max_queue,
            **engine_arguments(engine or []),
        )
    except (ValueError, TypeError, OSError) as error:
        fail(str(error))
    logging.getLogger("nanovllm.serving").info("%s is loaded", model)
    serve_engine(llm, settings, host=host, port=port, drain_timeout_s=drain_timeout_s)


def engine_arguments(given: list[str]) -> dict[str, Any]:
    """{"max_num_seqs": 64} of ["max_num_seqs=64"]. A value that is no JSON is a text; a name with a
    dot, such as optimizations.overlap=true, is one of a dict. Raises ValueError without a `=`.
    """
    found: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--engine {item}: write KEY=VALUE, e.g. max_num_seqs=64")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        group, dot, key = name.partition(".")
        if dot:
            found.setdefault(group, {})[key] = value
        else:
            found[name] = value
    return found


def fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(2)
