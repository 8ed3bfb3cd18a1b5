"""The address, asked by OpenAI's own client."""

import argparse
import http.client
import json
import socket
import sys
import threading
import time

import pytest
from conftest import assert_refused

openai = pytest.importorskip("openai", reason="the client is not installed")

import sample  # noqa: E402
from extras import serve  # noqa: E402
from plumbing.pair import Speaker  # noqa: E402

QUESTION = [{"role": "user", "content": "Where is the dog?"}]


@pytest.fixture(scope="module")
def server(base_dir, value_dir):
    """Small models at a free port of this machine."""
    words = ["--base", base_dir, "--value", value_dir, "--max_new_tokens", 12, "--device", "cpu"]
    speaker = Speaker(sample.arguments([*map(str, words)]))
    server = serve.Server(("127.0.0.1", 0), speaker)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(server):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def ask(client, server):
    def ask(messages=QUESTION, **options):
        return client.chat.completions.create(model=server.name, messages=messages, **options)

    return ask


@pytest.fixture
def said(run, base_dir, value_dir):
    """What sample.py says."""

    def said(*words):
        models = ["--base", base_dir, "--value", value_dir, "--max_new_tokens", 12]
        return run("sample.py", *models, *words).stdout.removesuffix("\n")

    return said


def text(reply) -> str:
    return reply.choices[0].message.content


def test_a_reply_is_what_sample_says(ask, said):
    reply = ask()
    assert text(reply) == said("Where is the dog?") and reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.role == "assistant"
    usage = reply.usage
    assert usage.completion_tokens == 12 and usage.prompt_tokens > 12
    assert usage.total_tokens == usage.prompt_tokens + 12


def test_a_stream_is_the_same_reply(ask):
    whole = ask()
    chunks = [*ask(stream=True, stream_options={"include_usage": True})]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert len(pieces) > 3 and "".join(filter(None, pieces)) == text(whole)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert [*ask(stream=True)][-1].usage is None  # only if it is asked for


def test_a_request_comes_before_the_command_line(ask, said):
    assert text(ask(max_tokens=3)) != text(ask()) == text(ask(max_completion_tokens=12))
    warm = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    drawn = ("--temperature", 0.9, "--top_p", 0.8, "--seed", 7, "Where is the dog?")
    assert text(ask(**warm)) == said(*drawn) == text(ask(**warm)) != text(ask())
    assert len({text(ask(temperature=2)) for _ in range(4)}) > 1  # without a seed
    stop = text(ask())[4:6]
    cut = ask(stop=["never", stop])
    assert text(cut) == text(ask()).partition(stop)[0] and cut.choices[0].finish_reason == "stop"
    assert text(ask(stop=stop)) == text(cut)


def test_system_prompts_and_parts(ask, said):
    system = {"role": "system", "content": "You are a cat."}
    told = said("--system", "You are a cat.", "Where is the dog?")
    assert text(ask([system, *QUESTION])) == told != text(ask())
    assert text(ask([{**system, "role": "developer"}, *QUESTION])) == told
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": " the dog?"}]
    assert text(ask([{"role": "user", "content": parts}])) == text(ask())


@pytest.mark.parametrize(
    "options, word",
    [
        ({"n": 2}, "n: is not supported"),
        ({"temperature": 3}, "temperature = 3"),
        ({"logprobs": True}, "logprobs: is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ({"extra_body": {"best_of": 3}}, "best_of: is not supported"),
        ({"messages": []}, "the last one must be the user's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must be the user's"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]: role = 'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]: content = 3"),
        ({"messages": [{**QUESTION[0], "colour": "red"}]}, "messages[0].colour: is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0]: text is missing",
        ),
        ({"messages": [{"role": "user", "content": "dog " * 300}]}, "the context is 256"),
    ],
)
def test_what_cannot_be_done_is_refused(ask, options, word):
    with pytest.raises(openai.BadRequestError) as error:
        ask(**options)
    assert word in error.value.message
    assert text(ask(n=1, user="me", tools=[])) == text(ask())  # and what changes nothing is not


def test_models_and_places(client, server):
    assert [model.id for model in client.models.list()] == [server.name] == ["base+value"]
    assert client.models.retrieve(server.name).id == server.name
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=QUESTION)
    with pytest.raises(openai.NotFoundError, match="nothing at /v1/embeddings"):
        client.embeddings.create(model=server.name, input="a")


def raw(server, request: bytes) -> bytes:
    """What a client gets that speaks by itself."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as line:
        line.sendall(request)
        got = b""
        while piece := line.recv(65536):
            got += piece
    return got


def test_damaged_requests_are_refused_and_the_next_is_answered(server, ask):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: "
    for body in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        answer = raw(server, head + str(len(body)).encode() + b"\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.0 400") and b'"error"' in answer
    for length in (b"-1", b"x", b"99999999999"):
        assert raw(server, head + length + b"\r\n\r\n").startswith(b"HTTP/1.0 400")
    assert text(ask())


def test_who_leaves_ends_the_reply_and_others_wait_their_turn(server, ask, monkeypatch):
    left = threading.Event()
    real = server.speaker.decoder
    steps = []

    def decoder(*models, **options):
        def generate(*args, **how):
            for i, ids in enumerate(real(*models, **options)(*args, **how)):
                steps.append(i)
                if len(steps) == 3:
                    assert left.wait(60)
                yield ids

        return generate

    monkeypatch.setattr(server.speaker, "decoder", decoder)
    stream = ask(stream=True)
    next(iter(stream))
    second = threading.Thread(target=lambda: others.append(text(ask())))
    others: list[str] = []
    second.start()
    second.join(0.5)
    assert not others  # it waits
    stream.close()
    left.set()
    second.join(60)
    assert len(others) == 1 and steps.count(0) == 2


def test_the_command_line(run, monkeypatch, base_dir, value_dir):
    class Stop(Exception):
        pass

    opened = []

    def stop(server, *_):
        opened.append((server.server_address, server.speaker.args))
        server.server_close()
        raise Stop

    monkeypatch.setattr(serve.Server, "serve_forever", stop)
    models = ["--base", str(base_dir), "--value", str(value_dir)]
    monkeypatch.setattr(sys, "argv", ["serve.py", *models, "--port", "0", "--alpha", "0.5"])
    with pytest.raises(Stop):
        serve.main()
    ((host, _), args) = opened[0]
    assert host == "127.0.0.1" and args.alpha == [0.5]  # this machine only, unless told
    assert isinstance(args, argparse.Namespace) and json.dumps(args.temperature) == "0.0"
    for words in (["hello"], ["--html", "x"], ["--prompts", "x"], ["--port", "70000"]):
        name = "question" if words == ["hello"] else words[0].lstrip("-")
        assert_refused(run("extras/serve.py", *models, *words), name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(run("extras/serve.py", *models, "--port", port), f"--port {port}")


# ---------------------------------------------------------------- what clients send, by hand


def request(server, method="POST", path="/v1/chat/completions", body=None, **headers) -> tuple:
    """The status, the headers and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


@pytest.fixture
def asked(server):
    return {"model": server.name, "messages": QUESTION}


def test_a_page_of_another_address_may_ask(server, asked):
    headers = {"Origin": "http://localhost:3000", "Access_Control_Request_Method": "POST"}
    headers["Access_Control_Request_Headers"] = "authorization,content-type"
    status, answer, body = request(server, "OPTIONS", **headers)
    assert status == 204 and body == b"" and "POST" in answer["Access-Control-Allow-Methods"]
    assert answer["Access-Control-Allow-Headers"] == "authorization,content-type"
    for given in (request(server, body=asked), request(server, "GET", "/v1/models")):
        assert given[0] == 200 and given[1]["Access-Control-Allow-Origin"] == "*"


def test_paths_as_clients_write_them(server, asked):
    for path in ("/v1/models/", "/v1/models?limit=5"):
        assert request(server, "GET", path)[0] == 200
    assert request(server, path="/v1/chat/completions/?x=1", body=asked)[0] == 200
    assert request(server, "HEAD", "/v1/models")[0::2] == (200, b"")
    assert request(server, "GET", "/v2")[0] == 404


def test_a_message_goes_back_as_it_was_given(client, server, ask):
    said = ask().choices[0].message.model_dump()
    assert {"refusal", "annotations"} <= said.keys()
    again = [*QUESTION, {**said, "annotations": [], "name": "bob"}, *QUESTION]
    assert text(ask(again)) == text(
        ask([*QUESTION, {"role": "assistant", "content": said["content"]}, *QUESTION])
    )
    ask(extra_body={"function_call": "none", "functions": []})
    for more in ({"tool_calls": [{"id": "1"}]}, {"refusal": "No."}, {"colour": "red"}):
        with pytest.raises(openai.BadRequestError, match="is not supported"):
            ask([*QUESTION, {**said, **more}, *QUESTION])


def test_a_request_in_pieces(server, asked):
    body = json.dumps(asked).encode()
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:]))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(server, head + pieces + b"0\r\n\r\n").startswith(b"HTTP/1.0 200")
    for wrong in (b"zz\r\n", b"-5\r\n", b"fffffffff\r\n"):
        assert raw(server, head + wrong).startswith(b"HTTP/1.0 400")


@pytest.mark.parametrize(
    "path, size, status",
    [("/v1/chat/completions", 2**24 + 1, 400), ("/v1/embeddings", 2_000_000, 404)],
)
def test_a_refusal_is_seen_however_long_the_request(server, path, size, status):
    for _ in range(3):
        got, _, body = request(server, path=path, body=b"a" * size)
        assert got == status and b'"error"' in body


def test_top_p_without_a_temperature_is_refused(ask):
    with pytest.raises(openai.BadRequestError, match="top_p: has no effect"):
        ask(top_p=0.9)
    assert text(ask(top_p=0.9, temperature=1.0, seed=1))
    assert text(ask(top_p=1.0)) == text(ask())


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_requests_whose_client_has_gone_keep_nobody_waiting(
    server, asked, ask, monkeypatch, stream, chunked
):
    """One leaves in the middle of its reply, three in the queue."""
    real = server.speaker.decoder
    begun, steps, go_on = [], [], threading.Event()

    def decoder(*models, **options):
        def generate(*args, **how):
            begun.append(0)
            for ids in real(*models, **options)(*args, **how):
                steps.append(ids)
                if len(steps) == 2:
                    assert go_on.wait(60)
                yield ids

        return generate

    monkeypatch.setattr(server.speaker, "decoder", decoder)
    body = json.dumps({**asked, "stream": stream}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\n"
    parts = [head + b"Content-Length: %d\r\n\r\n" % len(body) + body]
    if chunked:  # whose last line comes late
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        parts = [head + b"%x\r\n%s\r\n0\r\n" % (len(body), body), b"\r\n"]

    def send(client):
        for part in parts:
            client.sendall(part)
            time.sleep(0.1)

    clients = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(4)]
    send(clients[0])
    while len(steps) < 2:
        time.sleep(0.01)
    for client in clients[1:]:
        send(client)
    for client in clients:
        client.close()
    time.sleep(0.5)  # those in the queue look again
    go_on.set()
    assert text(ask())
    assert len(begun) == 2  # the one that was begun, and the last
    assert len(steps) <= 3 + 12  # the one that was begun ends at once
