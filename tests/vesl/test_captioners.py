"""Captioners: the samples' own, a server (a real one on this machine that misbehaves), a tiny random model."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opencloc.data.sample import Sample
from opencloc.errors import BadSample
from opencloc.vesl.captioners import (
    CaptionConfig,
    CaptionerError,
    ExistingCaptioner,
    ServerCaptioner,
    load_captioner,
)


def sample(key: str, color: str = "red", size: tuple[int, int] = (40, 20), **fields: Any) -> Sample:
    return Sample(key=key, image=Image.new("RGB", size, color), **fields)


# --- captions already there ---


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("caption", {"captions": (" a dog", "a hound")}, " a dog"),  # to the letter: it is still the sample's own
        ("all-captions", {"captions": ("a dog", "a hound")}, "a dog\na hound"),
        ("alt-text", {"captions": ("a dog",), "alt_text": "DSC_1"}, "DSC_1"),
        ("caption", {"alt_text": "DSC_1"}, "no caption"),  # the alt-text is no stand-in
        ("alt-text", {"captions": ("a dog",)}, "no alt-text"),
        ("caption", {"captions": ("  ",)}, "no caption"),
    ],
)
def test_existing_captions_are_taken_or_reported_missing(text: Any, fields: dict[str, Any], expected: str) -> None:
    (found,) = ExistingCaptioner(text).caption([sample("k", **fields)])
    assert (found.reason if isinstance(found, BadSample) else found) == expected
    if isinstance(found, BadSample):
        assert found.where == "k"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("batch_size", 0), ("concurrency", 0), ("image_px", 0), ("retries", -1), ("timeout_s", 0)],
)
def test_a_limit_out_of_range_is_refused_by_name(field: str, value: int) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field}.* {value}"):
        CaptionConfig(**fields)


@pytest.mark.parametrize("url", ["http://user:PW@host/v1", "http://host/v1?api_key=KEY", "https://host/v1?PW"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY") as caught:
        CaptionConfig(captioner=url)
    assert "PW@" not in str(caught.value)
    assert "KEY " not in str(caught.value).replace("OPENAI_API_KEY", "")


# --- a server ---

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def reply(status: int, body: Any) -> Answer:
    """An answer with this status and a JSON value or raw bytes, which asks for the repetition at once."""

    def answer(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Retry-After-Ms", "1")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def says(text: str | None) -> Answer:
    return reply(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})


def drops(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    """Breaks off in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def names_the_color(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    """Answers with the image's channels, each on or off, and its size, so that answers show which image was sent."""
    content = question["messages"][0]["content"]
    header, _, data = content[0]["image_url"]["url"].partition(",")
    assert header == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    red, green, blue = (np.asarray(image).mean(axis=(0, 1)) > 128).astype(int)
    says(f"{red}{green}{blue} {image.width}x{image.height}")(handler, question)


class Server(ThreadingHTTPServer):
    """Answers request number i as the i-th of `script` says, the last one for all that follow."""

    def __init__(self, *script: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.questions: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.server.script[0](self, {})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.questions)
            self.server.questions.append(question)
            self.server.headers.append(self.headers)
        self.server.script[min(number, len(self.server.script) - 1)](self, question)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[ServerCaptioner, Server]]]:
    """Starts a server with a script and a captioner (its settings by keyword) that talks to it."""
    started: list[tuple[ServerCaptioner | None, Server, threading.Thread]] = []

    def start(*script: Answer, **settings: Any) -> tuple[ServerCaptioner, Server]:
        server = Server(*script)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((None, server, thread))
        settings = {"server_model": "vlm", "concurrency": 1, "retries": 2, **settings}
        captioner = ServerCaptioner(CaptionConfig(captioner=server.url, **settings))
        started[-1] = captioner, server, thread
        return captioner, server

    yield start
    for captioner, server, thread in started:
        if captioner is not None:
            captioner.close()
        server.shutdown()
        server.server_close()
        thread.join()


def only(captions: list[str | BadSample]) -> str | BadSample:
    assert len(captions) == 1
    return captions[0]


def test_each_image_gets_the_answer_to_its_own_question(serve) -> None:
    captioner, server = serve(names_the_color, concurrency=4, image_px=64)
    colors = ["red", "lime", "blue", "white", "black"] * 4
    captions = captioner.caption([sample(str(i), color, size=(100, 50)) for i, color in enumerate(colors)])
    rgb = {"red": "100", "lime": "010", "blue": "001", "white": "111", "black": "000"}
    assert captions == [f"{rgb[color]} 64x32" for color in colors]
    question = server.questions[0]
    assert (question["model"], question["max_tokens"], question["temperature"]) == ("vlm", 128, 0)
    assert question["messages"][0]["content"][1] == {"type": "text", "text": CaptionConfig().prompt}


def test_as_many_requests_are_in_flight_as_configured(serve) -> None:
    together = threading.Barrier(3)  # nobody is answered before all three have asked

    def waits(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        together.wait()
        says("a dog")(handler, question)

    captioner, _ = serve(waits, concurrency=3)
    assert captioner.caption([sample(str(i)) for i in range(6)]) == ["a dog"] * 6


@pytest.mark.parametrize("fault", [reply(500, {}), reply(503, b"<html>bad gateway"), reply(429, {}), drops])
def test_a_fault_that_passes_costs_a_repetition_and_no_caption(serve, fault: Answer) -> None:
    captioner, server = serve(fault, says("a dog"))
    assert only(captioner.caption([sample("k")])) == "a dog"
    assert len(server.questions) == 2


def test_a_server_that_never_answers_fails_that_image(serve) -> None:
    asked_again = threading.Event()

    def hangs(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        asked_again.wait()
        handler.close_connection = True

    captioner, _ = serve(hangs, retries=0, timeout_s=0.1)
    found = only(captioner.caption([sample("k")]))
    asked_again.set()
    assert isinstance(found, BadSample)
    assert found.reason == "caption server failed"


@pytest.mark.parametrize(
    ("fault", "reason", "detail", "asked"),
    [
        (reply(500, b"CUDA\nerror"), "caption server failed", "status 500: CUDA error", 3),
        (reply(400, {"error": "image too small"}), "caption server refused the image", "image too small", 1),
        (reply(200, b"{not json"), "caption server failed", "", 1),
        (reply(200, {"unexpected": "shape"}), "caption server failed", "unusable answer", 1),
        (reply(200, {"choices": []}), "caption server failed", "unusable answer", 1),
        (says(""), "empty caption", "", 1),
        (says("  \n"), "empty caption", "", 1),
        (says(None), "empty caption", "", 1),
    ],
)
def test_a_fault_that_stays_fails_that_image_only(serve, fault: Answer, reason: str, detail: str, asked: int) -> None:
    captioner, server = serve(says("a"), *[fault] * asked, says("c"), retries=2)
    first, second, third = captioner.caption([sample("x"), sample("y"), sample("z")])
    assert (first, third) == ("a", "c")
    assert isinstance(second, BadSample)
    assert (second.reason, second.where) == (reason, "y")
    assert detail in second.detail
    assert len(server.questions) == 2 + asked


@pytest.mark.parametrize(
    ("status", "message"), [(401, r"status 401.*\$MY_KEY, which is not set"), (404, r"status 404.*no model vlm")]
)
def test_a_wrong_key_or_model_stops_the_run(serve, status: int, message: str) -> None:
    captioner, server = serve(reply(status, {"error": "no model vlm"}), api_key_env="MY_KEY")
    with pytest.raises(CaptionerError, match=message):
        captioner.caption([sample(str(i)) for i in range(50)])
    assert len(server.questions) < 50


def test_the_key_comes_from_the_named_variable(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    captioner, server = serve(says("a dog"), api_key_env="MY_KEY")
    captioner.caption([sample("k")])
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_without_a_model_name_the_servers_only_one_is_used(serve) -> None:
    captioner, server = serve(reply(200, {"data": [{"id": "org/vlm"}]}), server_model=None)
    assert captioner.model_id == f"org/vlm at {server.url}"
    with pytest.raises(CaptionerError, match=r"'a', 'b'.*choose"):
        serve(reply(200, {"data": [{"id": "a"}, {"id": "b"}]}), server_model=None)
    with pytest.raises(CaptionerError, match=r"set captions\.server_model"):
        serve(reply(200, {"data": 3}), server_model=None)


def test_a_server_that_is_not_there_stops_the_run() -> None:
    server = Server(says("a dog"))
    url = server.url
    server.server_close()
    captioner = ServerCaptioner(CaptionConfig(captioner=url, server_model="vlm", retries=1))
    with pytest.raises(CaptionerError, match=r"127.0.0.1.*cannot be reached"):
        captioner.caption([sample("k")])
    captioner.close()


def test_a_malformed_address_is_refused() -> None:
    with pytest.raises(CaptionerError, match="http://:bad"):
        load_captioner(CaptionConfig(captioner="http://:bad"))
