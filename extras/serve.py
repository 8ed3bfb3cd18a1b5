"""An address to ask: OpenAI's chat completions, answered by a base and its value model.

    python -m extras.serve --base DIR --value DIR     # at http://127.0.0.1:8000/v1

So Open WebUI, the openai client and the like can talk to the pair. One request is answered at a
time, the others wait; a client that closes its side of the connection has gone. The options of
sample.py about models and tokens hold; what a request asks for comes first. What cannot be done is
refused, not ignored.
"""

import argparse
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import sample
from plumbing.files import (
    FLAG,
    LIST,
    SEED,
    TABLE,
    TEXT,
    Field,
    InputError,
    Kind,
    Parser,
    command,
    fields_of,
    given,
    list_of,
    number,
    parse_json,
    torchrun,
    whole,
)
from plumbing.pair import Speaker
from plumbing.streaming import GrowingReply

LARGEST = 2**24  # bytes of a request
COUNT = Field(whole(1, 10**9), None)
ROLES = ("system", "developer", "user", "assistant")
MESSAGE = {"role": Field(Kind(f"one of {', '.join(ROLES)}", lambda x: x in [*ROLES]))}
MESSAGE |= {"content": Field(TEXT | list_of(TABLE))}
WANTED = {
    "model": Field(TEXT),
    "messages": Field(list_of(TABLE)),
    "stream": Field(FLAG, False),
    "stream_options": Field(TABLE, {}),
    "temperature": Field(number(0, 2), None),
    "top_p": Field(number(1e-6, 1), None),
    "seed": Field(SEED, None),
    "stop": Field(TEXT | list_of(TEXT), []),
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
}
# what says nothing about the reply (the last two: of tools, which are refused); and what would
# change it, with the value that does not
INDIFFERENT = ("user", "metadata", "store", "service_tier", "safety_identifier")
INDIFFERENT += ("tool_choice", "parallel_tool_calls")
UNCHANGED = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False}
UNCHANGED |= {"tools": [], "logit_bias": {}, "response_format": {"type": "text"}}
UNCHANGED |= {"functions": [], "function_call": "none"}
# of a message likewise: a client sends back what it was given
OF_MESSAGE = ("name", "annotations", "refusal", "audio", "tool_calls", "function_call")
NOTHING = (None, "", [], {})
PATIENCE = 5  # seconds for the rest of a request that is refused
OF_ONE_REPLY = "question explain html compare raw seed prompts out batch_size".split()


def read_message(message: dict, place: str) -> dict:
    """A message as a template wants it; its content may be in parts. Raises InputError."""
    for field, x in message.items():
        meaningless = field in ("name", "annotations") or x in NOTHING
        if field not in MESSAGE and not (field in OF_MESSAGE and meaningless):
            raise InputError(f"{place}.{field}: is not supported; leave it out")
    read = fields_of(message, MESSAGE, place)
    if read["content"] in LIST:
        texts = [fields_of(part, {"text": Field(TEXT)}, place) for part in read["content"]]
        read["content"] = "".join(part["text"] for part in texts)
    return {**read, "role": "system" if read["role"] == "developer" else read["role"]}


class OtherModel(Exception):
    """A request for a model that is not here."""


class Server(ThreadingHTTPServer):
    """A pair of models at an address."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], speaker: Speaker):
        super().__init__(address, Handler)
        models = [speaker.args.base, *speaker.args.value]
        self.name = "+".join(Path(model).resolve().name for model in models)
        self.speaker = speaker
        self.turn = threading.Lock()

    def read(self, body: dict) -> dict:
        """A request's fields, checked, with the prompt's ids. Raises InputError and OtherModel."""
        for field, x in body.items():
            if field not in (*WANTED, *INDIFFERENT) and x not in (None, UNCHANGED.get(field)):
                raise InputError(f"{field}: is not supported; leave it out")
        wanted = fields_of(body, WANTED, "the request")
        if wanted["model"] != self.name:
            raise OtherModel(f"there is no model {wanted['model']!r} here, only {self.name!r}")
        messages = [read_message(m, f"messages[{i}]") for i, m in enumerate(wanted["messages"])]
        if not messages or messages[-1]["role"] != "user":
            raise InputError("messages: the last one must be the user's")
        if messages[0]["role"] != "system":
            messages = self.speaker.opening() + messages
        if wanted["top_p"] not in (None, 1) and not (
            self.speaker.args.temperature
            if wanted["temperature"] is None
            else wanted["temperature"]
        ):
            raise InputError("top_p: has no effect at temperature 0; give a temperature too")
        prompt = self.speaker.fitting(self.speaker.tokenizer.prompt(messages))
        return {**wanted, "prompt": prompt}

    def answer(self, wanted: dict, ended: dict) -> Iterator[str]:
        """The reply, piece by piece; then `ended` says why it has ended, and counts tokens."""
        speaker, prompt = self.speaker, wanted["prompt"]
        stops = [wanted["stop"]] if wanted["stop"] in TEXT else wanted["stop"]
        reply = GrowingReply(speaker.tokenizer, [*speaker.args.stop, *filter(None, stops)])
        choice = {key: wanted[key] for key in ("temperature", "top_p") if wanted[key] is not None}
        generate = speaker.decoder(speaker.base, speaker.values, **choice)

        # without a seed each reply is another one
        seed = secrets.randbelow(2**31) if wanted["seed"] is None else wanted["seed"]
        most = wanted["max_completion_tokens"] or wanted["max_tokens"]
        most = min(most or speaker.args.max_new_tokens, speaker.context - len(prompt))
        for ids in generate([prompt], most, seed=seed, stop=speaker.tokenizer.stop):
            begins = not reply.text.strip()
            piece = reply.step(ids[0])
            yield piece.lstrip() if begins else piece  # no space between question and answer
            if reply.ended:
                break
        yield reply.rest()
        stopped = reply.ended or reply.ids[-1] in speaker.tokenizer.stop
        counts = {"prompt_tokens": len(prompt), "completion_tokens": len(reply.ids)}
        ended["usage"] = {**counts, "total_tokens": sum(counts.values())}
        ended["finish_reason"] = "stop" if stopped else "length"


class Handler(BaseHTTPRequestHandler):
    """A request, as https://platform.openai.com/docs/api-reference/chat describes it."""

    server: Server
    unread = False  # whether a part of the request is still to come

    @property
    def place(self) -> str:
        """The path, without what may stand behind it."""
        return urlsplit(self.path).path.rstrip("/")

    def do_GET(self) -> None:
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "ivl"}
        known = {"/v1/models": {"object": "list", "data": [model]}}
        known[f"/v1/models/{self.server.name}"] = model
        if self.place in known:
            self.send(known[self.place])
        else:
            self.refuse(f"there is nothing at {self.path}", 404)

    do_HEAD = do_GET  # `send` leaves the body out

    def do_OPTIONS(self) -> None:
        """What a browser asks before a page of another address may ask."""
        self.send_response(204)
        self.send_header("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS")
        asked = self.headers.get("Access-Control-Request-Headers", "*")
        self.send_header("Access-Control-Allow-Headers", asked)
        self.end_headers()

    def do_POST(self) -> None:
        self.unread = True
        try:
            if self.place != "/v1/chat/completions":
                raise OtherModel(f"there is nothing at {self.path}")
            body = parse_json(self.body().decode(errors="replace"), "the request")
            if body not in TABLE:
                raise InputError("the request is no JSON object")
            while not self.server.turn.acquire(timeout=0.2):
                self.check_listener()
            try:
                self.check_listener()
                self.reply(self.server.read(body))
            finally:
                self.server.turn.release()
        except InputError as problem:
            self.refuse(str(problem), 400)
        except OtherModel as problem:
            self.refuse(str(problem), 404)
        except ConnectionError:
            pass  # whoever asked has gone, and the reply ends with them

    def body(self) -> bytes:
        """What a request brings, in one piece or in several. Raises InputError."""
        pieces, total = [], 0
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        while True:
            text = self.headers.get("Content-Length", "")
            if chunked:
                text = self.rfile.readline(100).split(b";")[0].strip().decode(errors="replace")
            try:
                size = int(text, 16 if chunked else 10)
            except ValueError:
                size = -1
            total += size
            if size < 0 or total > LARGEST:
                raise InputError(f"a request needs a length, of at most {LARGEST} bytes")
            pieces.append(self.rfile.read(size))
            if chunked:
                self.rfile.readline(100)  # a line ends each piece, the empty one too
            if not chunked or size == 0:
                self.unread = False
                return b"".join(pieces)

    def check_listener(self) -> None:
        """Raises ConnectionError if nobody waits for the answer any more."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def reply(self, wanted: dict) -> None:
        """Answers, all at once or piece by piece."""
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        about |= {"model": self.server.name, "object": "chat.completion"}
        ended: dict = {}
        pieces = self.heard(self.server.answer(wanted, ended))
        if not wanted["stream"]:
            message = {"role": "assistant", "content": "".join(pieces)}
            usage = ended.pop("usage")
            choice = {"index": 0, "message": message, "logprobs": None, **ended}
            self.send({**about, "choices": [choice], "usage": usage})
            return

        # server-sent events: who speaks, each piece, why it has ended
        about["object"] += ".chunk"
        self.begin(200, "text/event-stream")
        self.event({**about, "choices": [chunk({"role": "assistant", "content": ""})]})
        for piece in filter(None, pieces):
            self.event({**about, "choices": [chunk({"content": piece})]})
        self.event({**about, "choices": [chunk({}, ended["finish_reason"])]})
        if wanted["stream_options"].get("include_usage"):
            self.event({**about, "choices": [], "usage": ended["usage"]})
        self.event("[DONE]")

    def heard(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces of a reply, as long as somebody waits for them."""
        for piece in pieces:
            self.check_listener()
            yield piece

    def event(self, data: dict | str) -> None:
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def refuse(self, message: str, status: int) -> None:
        about = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.send({"error": about}, status)
        if not self.unread:
            return
        # the answer stands before all of the request was read: the rest is read and forgotten, or
        # the connection would break before the answer is seen
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(PATIENCE)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and self.rfile.read1(2**16):
                pass

    def send(self, answer: dict, status: int = 200) -> None:
        self.begin(status, "application/json")
        if self.command != "HEAD":
            self.wfile.write(json.dumps(answer).encode())
            self.wfile.flush()

    def begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()

    def log_message(self, *_) -> None:
        """What people ask is nobody else's business."""


def chunk(delta: dict, reason: str | None = None) -> dict:
    return {"index": 0, "delta": delta, "finish_reason": reason}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all who reach this machine")
    parser.add_argument("--port", type=whole(0, 65535), default=8000, help="0: a free one (8000)")
    ours, rest = parser.parse_known_args()
    if torchrun():
        raise InputError("an address is one process's: leave out torchrun")
    for name in given(sample.parsed(rest), *OF_ONE_REPLY):
        raise InputError(f"{name}: belongs to one reply; leave it out")
    speaker = Speaker(sample.arguments(rest))
    try:
        server = Server((ours.host, ours.port), speaker)
    except OSError as problem:
        raise InputError(f"--host {ours.host} --port {ours.port}: {problem.strerror}") from None
    print(f"{server.name} answers at http://{ours.host}:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    command(main)
