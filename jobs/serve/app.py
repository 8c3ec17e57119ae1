"""The HTTP side: OpenAI's routes, jllm's `/generate`, and errors in OpenAI's form."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from headrace.jobs.serve.answers import Answer, Answerer, Ask, BusyError
from headrace.jobs.serve.requests import ChatRequest, Request, TextRequest, parse
from headrace.schemas.errors import DataError, HeadraceError

LOCAL = ["127.0.0.1", "localhost", "[::1]"]
MOST_BYTES = 8 << 20  # of a request
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Served:
    """Names under which a model answers: with its adapter, and without."""

    answerer: Answerer
    names: dict[str, bool]  # name -> with the adapter; the first is the default

    @property
    def default(self) -> str:
        """Return the name that answers requests without one."""
        return next(iter(self.names))

    def wants_adapter(self, name: str) -> bool:
        """Return whether a name asks for the adapter.

        Raises:
            UnknownModelError: nothing is served under it.
        """
        if name not in self.names:
            raise UnknownModelError(f"model {name!r:.80} is not served; {', '.join(self.names)} is")
        return self.names[name]


class UnknownModelError(HeadraceError):
    """A name under which nothing is served."""


@dataclass(frozen=True)
class Form:
    """The way in which a route reads a request and writes its answer."""

    request: type[Request]
    kind: str
    prompt: Callable[[Any], Any]
    choice: Callable[[str], dict[str, Any]]
    chunk: Callable[[str], dict[str, Any]]


CHAT = Form(
    ChatRequest,
    "chat.completion",
    lambda request: [message.as_dict() for message in request.messages],
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"role": "assistant", "content": text}},
)
TEXT = Form(
    TextRequest,
    "text_completion",
    lambda request: request.prompt,
    lambda text: {"text": text},
    lambda text: {"text": text},
)


def build_app(served: Served, hosts: list[str] | None = None) -> Starlette:
    """Return the application.

    Args:
        hosts: values of the Host header that are answered. Default: this machine's own names, so
            that no page in a browser reaches it under another name.
    """

    async def begin(request: Any, form: Form, name: str) -> Answer:
        adapter = served.wants_adapter(name)
        ask = Ask(form.prompt(request), request.sampling(), request.stops, adapter)
        return await run_in_threadpool(served.answerer.ask, ask)

    async def complete(http: HttpRequest, form: Form) -> Response:
        request = parse(form.request, await read_body(http))
        name = request.model or served.default
        answer = await begin(request, form, name)
        if request.stream:
            return StreamingResponse(streamed(answer, form, name), media_type="text/event-stream")
        text = await run_in_threadpool(lambda: "".join(answer))
        return JSONResponse(whole(answer, form, name, text))

    async def chat(http: HttpRequest) -> Response:
        return await complete(http, CHAT)

    async def text(http: HttpRequest) -> Response:
        return await complete(http, TEXT)

    async def generate(http: HttpRequest) -> Response:
        body = await read_body(http)
        form = CHAT if isinstance(body, dict) and "messages" in body else TEXT
        answer = await begin(parse(form.request, body), form, served.default)
        return JSONResponse({"text": [await run_in_threadpool(lambda: "".join(answer))]})

    async def models(_: HttpRequest) -> Response:
        listed = [{"id": name, "object": "model", "owned_by": "headrace"} for name in served.names]
        return JSONResponse({"object": "list", "data": listed})

    async def health(_: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", text, methods=["POST"]),
            Route("/generate", generate, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or LOCAL)],
        exception_handlers={HeadraceError: refused},
    )


async def read_body(http: HttpRequest) -> Any:
    """Return a request's JSON.

    Raises:
        DataError: it is none, or too large.
    """
    content = bytearray()
    async for part in http.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise DataError(f"a request of more than {MOST_BYTES:,} bytes; send less")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise DataError("the body is no JSON") from None


async def refused(_: HttpRequest, error: Exception) -> Response:
    """Return an error in OpenAI's form."""
    status = 404 if isinstance(error, UnknownModelError) else 400
    status = 503 if isinstance(error, BusyError) else status
    kind = "server_error" if status == 503 else "invalid_request_error"
    body = {"message": str(error), "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status)


def head(form: Form, name: str) -> dict[str, Any]:
    """Return what an answer and each of its chunks begin with."""
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": form.kind,
        "created": int(time.time()),
        "model": name,
    }


def whole(answer: Answer, form: Form, name: str, text: str) -> dict[str, Any]:
    """Return an answer in one piece."""
    choice = {"index": 0, "finish_reason": answer.finish_reason, **form.choice(text)}
    used = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }
    return {**head(form, name), "choices": [choice], "usage": used}


def streamed(answer: Answer, form: Form, name: str) -> Iterator[str]:
    """Yield an answer as server-sent events; an error ends it as an event of its own."""
    shared = head(form, name)
    if form is CHAT:
        shared["object"] = "chat.completion.chunk"
    try:
        for text in answer:
            yield event(shared, {"index": 0, "finish_reason": None, **form.chunk(text)})
    except HeadraceError as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
        return
    last: dict[str, Any] = {"delta": {}} if form is CHAT else {"text": ""}
    yield event(shared, {"index": 0, "finish_reason": answer.finish_reason, **last})
    yield DONE


def event(shared: dict[str, Any], choice: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps({**shared, 'choices': [choice]})}\n\n"
