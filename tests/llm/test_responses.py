"""Keys go where they belong and are shown nowhere; what a server sends is read within limits."""

import base64
import contextlib
import json
import math
import socketserver
import threading
import time
from urllib.parse import quote

import pytest
from faulty import Server
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.rewards.endpoint import STYLES, EndpointReward
from alignpro.llm.targets import keys, responses, served
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.settings import EndpointSettings, check_address

KEY = "sk-proj/7f3a9c2e+51d84b06=Zz"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def json_escaped(text):
    return "".join(f"\\u{ord(c):04x}" for c in text)


WAYS = {
    "plain": KEY,
    "capitals": KEY.upper(),
    "JSON": json.dumps(KEY).replace("/", "\\/"),
    "JSON, every letter": json_escaped(KEY),
    "JSON in JSON": json.dumps(json_escaped(KEY)),
    "JavaScript": "".join(f"\\x{ord(c):02x}" for c in KEY),
    "HTML": "".join(f"&#x{ord(c):x};" for c in KEY),
    "HTML, some letters": KEY.replace("/", "&#x2F;").replace("+", "&plus;").replace("=", "&#61;"),
    "HTML in HTML": KEY.replace("/", "&amp;#x2F;").replace("+", "&amp;plus;"),
    "address": quote(KEY, safe=""),
    "address in an address": quote(quote(KEY, safe=""), safe=""),
    "base64": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64, moved": base64.b64encode(f"x {KEY} y".encode()).decode(),
    "base64, moved again": base64.urlsafe_b64encode(f"xyz{KEY}y".encode()).decode(),
    "hexadecimal": KEY.encode().hex().upper(),
}
CUT = {"cut": KEY[:14], "its end": KEY[-13:], "base64, cut": base64.b64encode(KEY.encode()).decode()[:22]}


def test_no_echo_of_a_key_is_shown():
    """Mutants: escapes are not undone; base64 is no form; a piece is no key."""

    def check(module):
        secret = module.Secret(KEY)
        for form in WAYS.values():
            text = f"you sent {form} to us, λ"
            for got in (secret.scrub(text), secret.said(text)):
                assert "<key>" in got
                assert got.startswith("you sent ")
                assert got.endswith(" to us, λ")
                assert len(got) < len("you sent to us, λ") + 25
        for form in CUT.values():
            assert secret.said(f"wrong key {form}") == "wrong key <key>"

    check(keys)
    kills(check, mutated(keys, "plain, places = _unescaped(text)", "plain, places = text, int"))
    kills(check, mutated(keys, "    if len(data) >= _SHORT:", "    if False:"))
    kills(check, mutated(keys, "self.scrub(text[:_READ], parts=True)", "self.scrub(text[:_READ])"))


def test_what_is_no_key_stays():
    secret = keys.Secret(KEY, "https://h/v1?code=abcd1234&x=1")
    text = 'an answer about 50% of {"a": "\\u00e9 \\/"} &lt;b&gt; sk-proj'
    assert secret.scrub(text) == text
    assert keys.Secret("EMPTY").scrub("EMPTY &#69;MPTY") == "EMPTY &#69;MPTY"
    assert secret.scrub(f"{KEY}, {KEY[:14]}") == f"<key>, {KEY[:14]}"  # an answer loses no more than the key
    assert "abcd1234" not in secret.said("?CODE=ABCD1234").lower()


def test_a_key_in_the_path_of_a_reward_is_not_shown():
    for part in ("sk-7f3a9c2e51d8", "hf_AbCdEfGhIjKl", "a8f5f167f44f4964e6c998dee827110c"):
        assert check_address("url", f"https://h/v1/{part}/score", "") == "https://h/v1/<key>/score"
        assert part not in keys.Secret("", f"https://h/{part}").said(f"no route {part.upper()}").lower()
    for part in ("chat-completions", "gpt-4o-mini-2024-07-18", "deployments", "openai_compatible"):
        assert check_address("url", f"https://h/v1/{part}/score", "") == f"https://h/v1/{part}/score"


def test_where_a_key_goes_is_said_before_the_first_request(monkeypatch, capsys):
    monkeypatch.setenv("PLANTED_KEY", KEY)

    def fault(number, body):
        said.append(capsys.readouterr().err)

    said: list[str] = []
    with Server(fault) as server:
        Endpoint(server.url, EndpointSettings("m", "PLANTED_KEY", dialect="openai")).respond(
            ["a", "b"], sampling()
        )
    assert said[0] == f"alignpro: the key in PLANTED_KEY goes to {server.url}\n"
    assert said[1:] == [""]


def sampling():
    from alignpro.llm.models.sampling import Sampling

    return Sampling(max_tokens=3)


def test_a_bound_key_goes_to_its_host_alone(monkeypatch):
    """Mutant: wherever it is asked to."""
    monkeypatch.setenv("PLANTED_KEY", KEY)
    monkeypatch.setenv("PLANTED_KEY_HOST", "api.example.org other.example.org")

    def check(module):
        assert module.read_key("PLANTED_KEY", "https://API.example.org:8443/v1").value == KEY
        try:
            module.read_key("PLANTED_KEY", "https://evil.example.org/v1")
        except AlignProError as error:
            said = str(error)
        else:
            said = "it was sent"
        assert "PLANTED_KEY: is for api.example.org and other.example.org alone" in said

    check(keys)
    kills(check, mutated(keys, "host not in hosts", "not host"))
    with pytest.raises(AlignProError, match="PLANTED_KEY_HOST"):
        EndpointReward("http://127.0.0.1:1/r", "0,1", EndpointSettings(key_env="PLANTED_KEY"))


class Dripping(socketserver.BaseRequestHandler):
    """Sends a letter every while, and never ends."""

    def handle(self):
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not self.server.ended.wait(0.02):
            self.request.sendall(b" ")


def test_what_is_asked_first_ends_at_its_deadline_too():
    """A deadline for each read alone would have let it drip for ever."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        server.ended, server.daemon_threads = threading.Event(), True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started = time.monotonic()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/v1/models"
            assert responses.get(url, keys.Secret(""), 0.3) is None
            assert time.monotonic() - started < 10
        finally:
            server.ended.set()
            server.shutdown()


def test_numbers_of_a_server_are_of_a_size():
    assert responses.read_json(b'[1, 123456789012345, -7, 1.5, "1"]') == [1, 123456789012345, -7, 1.5, "1"]
    for digits in (16, 400, 100_000):
        (found,) = responses.read_json(b"[" + b"9" * digits + b"]")
        assert isinstance(found, float)


ODD = (
    None,
    True,
    "",
    [],
    {},
    -1,
    2**40,
    10**400,
    1e308,
    math.inf,
    math.nan,
    "\ud800",
    "9" * 6000,
    [None],
    {"a": 1},
)
REPLIES = {
    "chat": {
        "choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    },
    "tokens": {
        "choices": [
            {
                "index": 0,
                "token_ids": [3, 1],
                "logprobs": {"token_logprobs": [-0.1, -0.3]},
                "finish_reason": "stop",
                "prompt_logprobs": [None, {"4": {"logprob": -0.1}}],
            }
        ]
    },
    "rewards": {"rewards": [0.5, 0.2]},
    "score": {"data": [{"index": 0, "score": 0.1}, {"index": 1, "score": 0.2}]},
    "classify": {"data": [{"index": 0, "probs": [0.1]}, {"index": 1, "probs": [0.2]}]},
}


def changed(value):
    """JSON texts of `value` with each of its parts gone, odd, or nested deep."""
    marked = "@@"

    def places(part):
        yield marked
        if isinstance(part, dict | list):
            for key in part if isinstance(part, dict) else range(len(part)):
                for inner in places(part[key]):
                    other = part.copy()
                    other[key] = inner
                    yield other
                other = part.copy()
                del other[key]
                yield other

    for text in map(json.dumps, places(value)):
        yield from (text.replace(f'"{marked}"', json.dumps(odd)) for odd in ODD)
        yield from (text.replace(f'"{marked}"', "[" * n + "]" * n) for n in (100, 900))


def test_whatever_a_server_sends_is_told_in_a_line():
    """Each part of each reply that is read, in each odd form. Mutant: tokens are not looked at."""
    _, tokenizer = tiny_model(seed=0)
    chat = Endpoint("http://h/v1", EndpointSettings("m", dialect="openai"))
    scores = {d: EndpointReward("http://h/r", "clip:0,1", EndpointSettings("m", dialect=d)) for d in STYLES}
    secret = keys.Secret(KEY)

    def check(module):
        by_tokens = module.Served("http://h/v1", EndpointSettings("m"), tokenizer, [1])
        readers = {d: lambda v, d=d: scores[d]._read(v, ["a", "b"], ["c", "d"], 0, secret) for d in STYLES}
        readers["chat"] = lambda v: chat._parse(v, secret, sampling())
        readers["tokens"] = lambda v: (
            by_tokens._read_answers(v, (3, 4), 1, sampling()),
            by_tokens._read_tops(v, (3,), (4,), 1),
        )
        for name, reply in REPLIES.items():
            for text in changed(reply):
                with contextlib.suppress(AlignProError, RecursionError):
                    try:
                        readers[name](responses.read_json(text.encode()))
                    except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as error:
                        assert isinstance(error, AlignProError), (text[:300], error)  # noqa: PT017
                        raise

    check(served)
    kills(check, mutated(served, "is_int(i) and 0 <= i < _TOKENS", "is_int(i)"))
