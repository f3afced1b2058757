"""The routes of a server: OpenAI's API, and what fleets ask of one.

| route                                            | answers                                                    |
|--------------------------------------------------|------------------------------------------------------------|
| GET /v1/models, /v1/models/NAME                  | the package, and its LoRA adapters as models of their own  |
| POST /v1/completions, /v1/chat/completions       | texts, at once or as a stream                              |
| POST /v1/responses                               | the same as a chat; nothing is kept                        |
| POST /tokenize, /detokenize                      | ids of a text or of a chat; text of ids                    |
| POST /v1/messages, /v1/messages/count_tokens     | the same as Anthropic's API has it; how long a prompt is   |
| POST /v1/embeddings, /v1/score, /v1/rerank       | vectors and scores of texts, where the package has them    |
| GET /                                            | a page to chat on, and its two files                       |
| GET /package, /parity.json                       | what the package is, for people; its parity report         |
| GET /health, /ready                              | 200 while the process lives; 503 while it takes no calls   |
| GET /metrics, /version                           | for Prometheus; of the distribution and the package        |
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtimes.errors import NotReadyError, Olmo2ExportError
from runtimes.generation.generate import encode_prompt
from runtimes.serve.about import About, own_version
from runtimes.serve.calls import Call, ChatCall, CompletionCall, read_chat, read_completion
from runtimes.serve.desk import Desk
from runtimes.serve.edge import CALL_ID, NOTES, PROGRESS, json_response, problem_response, to_json
from runtimes.serve.measures import (
    MeasureCall,
    Values,
    embeddings_answer,
    encoded_texts,
    read_embeddings,
    read_rerank,
    read_score,
    rerank_answer,
    score_answer,
)
from runtimes.serve.messages import MessageWriter, error_document, read_messages
from runtimes.serve.metrics import CONTENT_TYPE, Metrics
from runtimes.serve.model import ServedModel
from runtimes.serve.page_files import PATHS, page_file
from runtimes.serve.problems import CallError, Problem, problem_of
from runtimes.serve.progress import Progress
from runtimes.serve.requests import Capacity, Request, Scored, Started
from runtimes.serve.responses import ResponseWriter, read_response, told_choice
from runtimes.serve.strict_json import Fields, parse_object
from runtimes.serve.texts import Answering, Patience, Ping, Said, measured
from runtimes.serve.writers import ChatWriter, CompletionWriter, merged_chat, merged_completion, usage

_SHORT = 4096  # characters that are encoded in the event loop
_MOST_IDS = 1 << 20
_GONE = 499  # a client that does not wait for its answer, as nginx writes it


class Routes:
    """What the routes share."""

    def __init__(
        self,
        model: ServedModel,
        desk: Desk,
        metrics: Metrics,
        *,
        about: About | None = None,
        page: bool = True,
        patience: Patience | None = None,
        ready: Callable[[], bool] | None = None,
    ) -> None:
        """Take what is served.

        Args:
            model: whose texts.
            desk: takes requests.
            metrics: that `/metrics` shows.
            about: the package, for people; None: there is none to tell of.
            page: there is a page at `/`.
            patience: how long things may take.
            ready: tells whether calls are taken; None: while there is an engine.
        """
        self._model, self._desk, self._metrics = model, desk, metrics
        self._about, self._page = about, page
        self._patience = patience or Patience()
        self._ready = ready or (lambda: desk.open)

    def app(self) -> Starlette:
        """Return the application."""
        post, get = ["POST"], ["GET"]
        routes = [
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.one_model, methods=get),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/chat/completions", self.chats, methods=post),
            Route("/v1/responses", self.responses, methods=post),
            Route("/v1/messages", self.messages, methods=post),
            Route("/v1/messages/count_tokens", self.counted, methods=post),
            Route("/v1/embeddings", self.embeddings, methods=post),
            Route("/v1/score", self.scores, methods=post),
            Route("/v1/rerank", self.ranks, methods=post),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/health", self.health, methods=get),
            Route("/ready", self.ready, methods=get),
            Route("/metrics", self.metrics, methods=get),
            Route("/version", self.version, methods=get),
            Route("/package", self.package, methods=get),
            Route("/parity.json", self.parity, methods=get),
            *(Route(path, page_file, methods=get) for path in PATHS if self._page),
        ]
        handlers: Mapping[Any, Any] = {
            HTTPException: _http_problem,
            Olmo2ExportError: _problem,
            Exception: _internal_problem,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    # Texts

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        return await _while_connected(http, self._complete(http))

    async def chats(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        return await _while_connected(http, self._chat(http))

    async def responses(self, http: HttpRequest) -> Response:
        """POST /v1/responses."""
        return await _while_connected(http, self._respond(http))

    async def messages(self, http: HttpRequest) -> Response:
        """POST /v1/messages."""
        return await _while_connected(http, self._message(http))

    async def counted(self, http: HttpRequest) -> Response:
        """POST /v1/messages/count_tokens."""
        parsed = read_messages(parse_object(await http.body()), self._model, counted=True)
        return json_response({"input_tokens": len(await self._chat_ids(parsed))})

    async def _complete(self, http: HttpRequest) -> Response:
        parsed = read_completion(parse_object(await http.body()), self._model)
        capacity = self._capacity()
        tokenizer = self._model.tokenizer
        ids = [await self._ids(prompt) for prompt in parsed.prompts]
        requests = [_request(parsed.call, f"{_id(http)}-{n}", prompt, capacity) for n, prompt in enumerate(ids)]
        echo = _echoes(parsed, ids, tokenizer.decode) if parsed.echo else None
        writer = CompletionWriter(requests, tokenizer, echo=echo, token_ids=parsed.call.token_ids)
        form = self._form(http, parsed.call, "cmpl", "text_completion")
        answering = await self._begun(http, requests, parsed.call)
        if parsed.call.stream:
            return _EventStream(_events(answering, writer, form, parsed.call, http), answering)
        pieces = await _all_pieces(answering, writer, http)
        return json_response({**form, "choices": merged_completion(pieces), "usage": _usage(answering)})

    async def _chat(self, http: HttpRequest) -> Response:
        parsed = read_chat(parse_object(await http.body()), self._model)
        request, writer = await self._chat_writer(http, parsed)
        answering = await self._begun(http, [request], parsed.call)
        if parsed.call.stream:
            form = self._form(http, parsed.call, "chatcmpl", "chat.completion.chunk")
            return _EventStream(_events(answering, writer, form, parsed.call, http), answering)
        form = self._form(http, parsed.call, "chatcmpl", "chat.completion")
        pieces = await _all_pieces(answering, writer, http)
        return json_response({**form, "choices": merged_chat(pieces), "usage": _usage(answering)})

    async def _respond(self, http: HttpRequest) -> Response:
        parsed = read_response(parse_object(await http.body()), self._model)
        request, chat = await self._chat_writer(http, parsed)
        form = {
            "id": f"resp_{_id(http)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": parsed.call.model,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_output_tokens": request.max_new_tokens,
            "tool_choice": told_choice(parsed.tool_choice),
        }
        writer = ResponseWriter(chat, form)
        answering = await self._begun(http, [request], parsed.call)
        if parsed.call.stream:
            return _EventStream(_response_events(answering, writer, http), answering)
        await _said(answering, writer, http)
        writer.last(_usage(answering))
        return json_response(writer.document)

    async def _message(self, http: HttpRequest) -> Response:
        parsed = read_messages(parse_object(await http.body()), self._model)
        request, chat = await self._chat_writer(http, parsed)
        writer = MessageWriter(chat, _id(http), parsed.call.model)
        answering = await self._begun(http, [request], parsed.call)
        if parsed.call.stream:
            return _EventStream(_message_events(answering, writer, http), answering)
        await _said(answering, writer, http)
        writer.last(_usage(answering))
        return json_response(writer.document)

    async def _chat_writer(self, http: HttpRequest, parsed: ChatCall) -> tuple[Request, ChatWriter]:
        """Return the engine's request of a chat, and what writes its answer."""
        capacity = self._capacity()
        chat = self._model.chat
        assert chat is not None  # read_chat refuses a model without
        ids = await self._chat_ids(parsed)
        request = _request(parsed.call, f"{_id(http)}-0", ids, capacity)
        tools, token_ids = parsed.tools is not None, parsed.call.token_ids
        writer = ChatWriter(request, self._model.tokenizer, thinking=chat.thinks, tools=tools, token_ids=token_ids)
        return request, writer

    async def _begun(self, http: HttpRequest, requests: Sequence[Request], call: Call) -> Answering:
        notes = http.scope[NOTES]
        notes |= {"model": call.model, "stream": call.stream, "prompt_tokens": sum(len(r.prompt_ids) for r in requests)}
        answering = Answering(
            self._desk,
            self._model.tokenizer,
            requests,
            stop=call.stop,
            metrics=self._metrics,
            patience=self._patience,
        )
        http.scope[PROGRESS] += answering.progress.values()
        await answering.begin()
        return answering

    async def _ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        tokenizer = self._model.tokenizer
        if len(prompt) <= _SHORT:
            return tuple(encode_prompt(tokenizer, prompt))
        return tuple(await asyncio.to_thread(encode_prompt, tokenizer, prompt))

    async def _chat_ids(self, call: ChatCall) -> tuple[int, ...]:
        chat = self._model.chat
        assert chat is not None
        encode = chat.template.encode
        return tuple(await asyncio.to_thread(encode, self._model.tokenizer, call.messages, tools=call.tools))

    def _form(self, http: HttpRequest, call: Call, kind: str, name: str) -> dict[str, Any]:
        """Return the fields that every answer has."""
        return {
            "id": f"{kind}-{_id(http)}",
            "object": name,
            "created": int(time.time()),
            "model": call.model,
            "system_fingerprint": self._model.fingerprint,
        }

    def _capacity(self) -> Capacity:
        if self._desk.capacity is None:
            raise NotReadyError("the model is being loaded; try again later")
        return self._desk.capacity

    # Whole texts

    async def embeddings(self, http: HttpRequest) -> Response:
        """POST /v1/embeddings."""

        async def work() -> Response:
            capacity = self._capacity()
            call = read_embeddings(parse_object(await http.body()), self._model, capacity.hidden_size)
            return json_response(embeddings_answer(call, *await self._measured(http, call)))

        return await _while_connected(http, work())

    async def scores(self, http: HttpRequest) -> Response:
        """POST /v1/score."""

        async def work() -> Response:
            call = read_score(parse_object(await http.body()), self._model)
            found, tokens = await self._measured(http, call)
            return json_response(score_answer(call, found, tokens, self._model.labels, _id(http)))

        return await _while_connected(http, work())

    async def ranks(self, http: HttpRequest) -> Response:
        """POST /v1/rerank."""

        async def work() -> Response:
            call = read_rerank(parse_object(await http.body()), self._model)
            return json_response(rerank_answer(call, *await self._measured(http, call), _id(http)))

        return await _while_connected(http, work())

    async def _measured(self, http: HttpRequest, call: MeasureCall) -> tuple[Values, int]:
        """Return what was measured of a call's texts, and how many tokens they have."""
        self._capacity()
        sequences = await asyncio.to_thread(encoded_texts, call, self._model)
        request = replace(call.measured, id=_id(http), sequences=sequences)
        progress = Progress(request)
        tokens = progress.prompt_tokens
        http.scope[NOTES] |= {"model": call.model, "texts": len(sequences), "prompt_tokens": tokens}
        http.scope[PROGRESS].append(progress)
        more: dict[str, Any] = {"metrics": self._metrics, "patience": self._patience}
        return await measured(self._desk, request, progress=progress, **more), tokens

    # About the server

    async def models(self, _: HttpRequest) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self._described(name) for name in self._model.names]})

    async def one_model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME."""
        name = http.path_params["name"]
        self._model.adapter(name)
        return json_response(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        capacity = self._desk.capacity
        return {
            "id": name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "olmo2-export",
            "parent": None if name == self._model.name else self._model.name,
            "max_model_len": None if capacity is None else capacity.max_cache_length,
        }

    async def tokenize(self, http: HttpRequest) -> Response:
        """POST /tokenize: `prompt`, or `messages` of a chat."""
        fields = Fields(parse_object(await http.body()))
        fields.text("model")
        messages = fields.list("messages", 4096)
        if messages is not None:
            fields.done()
            body = {"model": self._model.name, "messages": messages}
            ids: Sequence[int] = await self._chat_ids(read_chat(body, self._model))
        else:
            prompt = fields.text("prompt")
            added = fields.any("add_special_tokens") is not False
            fields.done()
            if prompt is None:
                raise CallError("prompt: expected a text, found none", "prompt")
            encode = self._model.tokenizer.encode
            ids = await asyncio.to_thread(encode, prompt, add_special_tokens=added)
        found = {"tokens": list(ids), "count": len(ids), "max_model_len": self._capacity().max_cache_length}
        return json_response(found)

    async def detokenize(self, http: HttpRequest) -> Response:
        """POST /detokenize: `tokens`."""
        fields = Fields(parse_object(await http.body()))
        fields.text("model")
        tokens = fields.list("tokens", _MOST_IDS)
        fields.done()
        most = self._capacity().vocab_size
        if tokens is None or not all(type(i) is int and 0 <= i < most for i in tokens):
            raise CallError(f"tokens: expected a list of ids from 0 to {most - 1}", "tokens")
        return json_response({"prompt": self._model.tokenizer.decode(tokens)})

    async def health(self, _: HttpRequest) -> Response:
        """GET /health: the process answers."""
        return json_response({"status": "ok"})

    async def ready(self, _: HttpRequest) -> Response:
        """GET /ready: calls are taken."""
        ready = self._ready()
        return json_response({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def metrics(self, _: HttpRequest) -> Response:
        """GET /metrics, in Prometheus' form."""
        self._metrics.waiting(self._desk.waiting)
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def version(self, _: HttpRequest) -> Response:
        """GET /version."""
        capacity = self._desk.capacity
        document = {
            "version": own_version(),
            "model": self._model.name,
            "package": self._model.checksum,
            "variant": None if capacity is None else capacity.variant,
            "exact": None if capacity is None else capacity.exact,
        }
        return json_response(document)

    async def package(self, _: HttpRequest) -> Response:
        """GET /package: what is served, for people."""
        capacity, model = self._capacity(), self._model
        chat = None if model.chat is None else {"thinks": model.chat.thinks, "tools": model.chat.takes_tools}
        document = {
            "model": model.name,
            "variant": capacity.variant,
            "exact": capacity.exact,
            "max_model_len": capacity.max_cache_length,
            "chat": chat,
            "forms": capacity.forms,
            "labels": list(model.labels),
            "about": None if self._about is None else self._about.document(capacity.variant),
        }
        return json_response(document)

    async def parity(self, _: HttpRequest) -> Response:
        """GET /parity.json: the parity report, as it lies in the package."""
        found = None if self._about is None else self._about.parity()
        if found is None:
            raise CallError("this package has no parity report; run olmo2-export verify", status=404, code="not_found")
        return Response(found, media_type="application/json")


class _EventStream(StreamingResponse):
    """Server-sent events of an answer, which is given up where the client goes away, be it before the first."""

    def __init__(self, events: AsyncIterator[bytes], answering: Answering) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()

    def close(self) -> None:
        """Give up what is not answered."""
        self._answering.close()


async def _events(
    answering: Answering,
    writer: CompletionWriter | ChatWriter,
    form: Mapping[str, Any],
    call: Call,
    http: HttpRequest,
) -> AsyncIterator[bytes]:
    """Yield the events of a stream; one that breaks off ends in an error and without [DONE]."""
    more = {"usage": None} if call.include_usage else {}
    try:
        if isinstance(writer, ChatWriter):
            for piece in writer.first():
                yield _event({**form, "choices": [piece], **more})
        async for news in answering.news():
            match news:
                case Said():
                    for piece in writer.pieces(news):
                        yield _event({**form, "choices": [piece], **more})
                case Scored() if isinstance(writer, CompletionWriter):
                    writer.score(news)
                case Ping():
                    yield b": ping\n\n"
                case Started() | Scored():
                    pass
        if call.include_usage:
            yield _event({**form, "choices": [], "usage": _usage(answering)})
        yield b"data: [DONE]\n\n"
    except Olmo2ExportError as error:
        yield _event(_broken_off(error, http).document())
    finally:
        _note(answering, http)


def _named(event: Mapping[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + _event(event)


async def _message_events(answering: Answering, writer: MessageWriter, http: HttpRequest) -> AsyncIterator[bytes]:
    """Yield the events of /v1/messages, each with its name."""
    try:
        async for news in answering.news():
            match news:
                case Started():
                    for event in writer.first(_usage(answering)):
                        yield _named(event)
                case Said():
                    for event in writer.events(news):
                        yield _named(event)
                case Ping():
                    yield _named({"type": "ping"})
        for event in writer.last(_usage(answering)):
            yield _named(event)
    except Olmo2ExportError as error:
        yield _named(error_document(_broken_off(error, http)))
    finally:
        _note(answering, http)


async def _said(answering: Answering, writer: ResponseWriter | MessageWriter, http: HttpRequest) -> None:
    """Have a writer hear a whole answer."""
    try:
        async for news in answering.news():
            if isinstance(news, Said):
                writer.events(news)
    finally:
        _note(answering, http)
        answering.close()


async def _response_events(answering: Answering, writer: ResponseWriter, http: HttpRequest) -> AsyncIterator[bytes]:
    """Yield the events of /v1/responses, each with its name."""
    try:
        for event in writer.first():
            yield _named(event)
        async for news in answering.news():
            if isinstance(news, Said):
                for event in writer.events(news):
                    yield _named(event)
            elif isinstance(news, Ping):
                yield b": ping\n\n"
        for event in writer.last(_usage(answering)):
            yield _named(event)
    except Olmo2ExportError as error:
        yield _named(writer.failed(_broken_off(error, http).document()))
    finally:
        _note(answering, http)


async def _all_pieces(
    answering: Answering, writer: CompletionWriter | ChatWriter, http: HttpRequest
) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = []
    try:
        async for news in answering.news():
            if isinstance(news, Said):
                pieces += writer.pieces(news)
            elif isinstance(news, Scored) and isinstance(writer, CompletionWriter):
                writer.score(news)
    finally:
        _note(answering, http)
        answering.close()
    return pieces


async def _while_connected(http: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """Return what comes of some work, which is cancelled when the client goes away."""
    await http.body()  # what comes behind it says that the client has gone

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=_GONE)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Olmo2ExportError):
                late = await working
                if isinstance(late, _EventStream):  # begun at the last moment, and nobody reads it
                    late.close()


def _request(call: Call, name: str, ids: tuple[int, ...], capacity: Capacity) -> Request:
    new = call.base.max_new_tokens
    if new < 0:  # as many as fit, and one at least, so that a prompt that is too long is said to be
        new = max(1, min(capacity.max_cache_length, capacity.kv_tokens // call.base.choices) - len(ids))
    return replace(call.base, id=name, prompt_ids=ids, max_new_tokens=new)


def _echoes(
    parsed: CompletionCall, ids: Sequence[tuple[int, ...]], decode: Callable[[Sequence[int]], str]
) -> list[str]:
    return [
        prompt if isinstance(prompt, str) else decode(tokens)
        for prompt, tokens in zip(parsed.prompts, ids, strict=True)
    ]


def _usage(answering: Answering) -> dict[str, Any]:
    return usage(answering.prompt_tokens, answering.new_tokens, answering.reused_tokens)


def _note(answering: Answering, http: HttpRequest) -> None:
    http.scope[NOTES] |= {"completion_tokens": answering.new_tokens, "cached_tokens": answering.reused_tokens}


def _broken_off(error: Olmo2ExportError, http: HttpRequest) -> Problem:
    """Return what the client of a stream is told of an error, which the status does not say any more."""
    problem = problem_of(error)
    http.scope[NOTES] |= {"error": str(error), "error_code": problem.code or problem.type}
    return problem


def _event(document: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(document) + b"\n\n"


def _id(http: HttpRequest) -> str:
    call_id: str = http.scope[CALL_ID]
    return call_id


async def _problem(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Olmo2ExportError)
    return problem_response(problem_of(error), http.url.path)


async def _http_problem(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is no such path", 405: f"{http.method} is not what this path takes"}
    message = f"{http.url.path}: {said.get(error.status_code, error.detail)}"
    problem = Problem(error.status_code, message, "invalid_request_error", code="not_found")
    response = problem_response(problem, http.url.path)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _internal_problem(http: HttpRequest, error: Exception) -> Response:
    """The log has what happened; a client is told no more than that something did."""
    return problem_response(Problem(500, f"internal error: {type(error).__name__}", "server_error"), http.url.path)
