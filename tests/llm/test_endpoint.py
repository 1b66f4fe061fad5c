"""Endpoints against a real server, and one that fails, stalls and garbles on purpose. Loopback only."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from faulty import PATIENCE, Server, completion, text_of
from scipy import stats

from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import EVALUATION, Sampling, stream_key
from alignpro.llm.targets import http, responses
from alignpro.llm.targets.endpoint import DIALECTS, Endpoint
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Answer, Stopped

SAMPLING = Sampling(max_tokens=10)
PROMPTS = [f"prompt {i}" for i in range(10)]
KEY = "sk-planted-7f3a9c2e51d84b06"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(model, url, **options) -> Endpoint:
    own = {name: options.pop(name) for name in ("weights", "role") if name in options}
    if "extra_body" in options:
        options["extra_body"] = json.dumps(options["extra_body"])
    return Endpoint(url, EndpointSettings(model, **options), **own)


def client(server, **options) -> Endpoint:
    return endpoint("m", server.url, **{"backoff_s": 1e-3, "timeout_s": PATIENCE, **options})


def raw(data, status=200, **headers):
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return status, {k.replace("_", "-"): v for k, v in headers.items()}, body


def test_what_is_sent_and_what_comes_back(monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", KEY)
    with Server() as server:
        target = client(server, key_env="PLANTED_KEY")
        got = target.respond(PROMPTS, SAMPLING, first=2, samples=3, seed=5)
        assert [len(row) for row in got] == [3] * 10
        sent = {
            (body["messages"][0]["content"], body["seed"]): (body, headers)
            for body, headers in server.requests
        }
        assert len(sent) == 30 == target.calls  # a seed for each sample
        for prompt, row in zip(PROMPTS, got, strict=True):
            for index, answer in enumerate(row, start=2):
                body, headers = sent[prompt, stream_key(5, SAMPLING, prompt, index) % 2**31]
                assert body == {
                    "model": "m",
                    "messages": [{"role": "user", "content": prompt}],
                    "temperature": 1.0,
                    "top_p": 1.0,
                    "max_tokens": 10,
                    "seed": body["seed"],
                }
                assert headers["authorization"] == f"Bearer {KEY}"
                text = text_of(body)
                assert answer == Answer(text, "stop", len(prompt), len(text))
        assert target.respond(PROMPTS[3:5], SAMPLING, first=[4, 2], seed=5) == [[got[3][2]], [got[4][0]]]
        client(server).respond(["x"], SAMPLING)
        assert "authorization" not in server.requests[-1][1]


def test_dialects():
    sampling = Sampling(temperature=1.5, top_p=0.6, top_k=20, max_tokens=5)
    with Server() as server:
        with pytest.raises(AlignProError, match="top_k 20: the openai dialect"):
            client(server).respond(["x"], sampling)
        assert not server.requests
        client(server, extra_body={"top_k": 20}).respond(["x"], sampling)
        assert server.requests[-1][0]["top_k"] == 20
        client(server, dialect="vllm").respond(["x"], sampling)
        assert server.requests[-1][0]["top_k"] == 20
        client(server, dialect="vllm").respond(["x"], SAMPLING)
        assert server.requests[-1][0]["top_k"] == -1
        client(server, dialect="transformers").respond(["x"], sampling)
        assert json.loads(server.requests[-1][0]["generation_config"])["top_k"] == 20
    revisions = {
        endpoint("m", "http://h/v1", **options).revision
        for options in (
            {},
            {"dialect": "vllm"},
            {"extra_body": {"top_k": 20}},
            {"extra_body": {"top_k": 21}},
            {"weights": "2"},
        )
    }
    assert len(revisions) == 5  # whatever changes the answers changes the cache key
    one = endpoint("m", "http://h/v1/", dialect="vllm", extra_body={"min_p": 0.1})
    settings = dataclasses.replace(one.settings, max_calls=7, concurrency=1)
    assert dataclasses.replace(one, settings=settings).revision == one.revision


def ordinary(n, body):
    return None


FAULTS = {
    "500": lambda n, body: raw({"error": "boom"}, 500),
    "503": lambda n, body: raw(b"<html>busy</html>", 503),
    "429": lambda n, body: raw({"error": "slow down"}, 429, retry_after="0.01"),
    "429 without Retry-After": lambda n, body: raw({"error": "slow down"}, 429),
    "closed": lambda n, body: "close",
    "stalled": lambda n, body: "stall",
    "dripped": lambda n, body: "drip",
    "empty": lambda n, body: raw(b""),
    "not JSON": lambda n, body: raw(b'{"choices": [{"mess'),
    "not UTF-8": lambda n, body: raw(b'{"\xff\xfe": 1}'),
    "nested": lambda n, body: raw(b"[" * 100_000),
    "a number": lambda n, body: raw(3),
    "no choices": lambda n, body: raw({}),
    "error with status 200": lambda n, body: raw({"error": {"message": "overloaded"}}),
    "empty choices": lambda n, body: raw(completion(body, choices=[])),
    "choices of numbers": lambda n, body: raw(completion(body, choices=[1])),
    "no message": lambda n, body: raw(completion(body, choices=[{"finish_reason": "stop"}])),
    "content a number": lambda n, body: raw(
        completion(body, choices=[{"message": {"content": 4}, "finish_reason": "stop"}])
    ),
    "no finish": lambda n, body: raw(completion(body, choices=[{"message": {"content": "a"}}])),
    "no usage": lambda n, body: raw(completion(body, usage=None)),
    "usage of text": lambda n, body: raw(
        completion(body, usage={"prompt_tokens": "7", "completion_tokens": 1})
    ),
    "negative usage": lambda n, body: raw(
        completion(body, usage={"prompt_tokens": 7, "completion_tokens": -1})
    ),
    "usage of 400 digits": lambda n, body: raw(
        completion(body, usage={"prompt_tokens": 10**400, "completion_tokens": 1})
    ),
    "nested, just readable": lambda n, body: raw(b'{"error": ' + b"[" * 700 + b"]" * 700 + b"}"),
}
SAYS = {
    "500": "status 500 .*boom",
    "503": "status 503 .*busy",
    "429": "status 429 .*slow down",
    "429 without Retry-After": "status 429",
    "closed": "check the server",
    "stalled": "timeout_s 0.3",
    "dripped": "timeout_s 0.3",
    "empty": "is not JSON",
    "not JSON": "is not JSON",
    "not UTF-8": "is not JSON",
    "nested": "is not JSON",
    "a number": r"\(whole\) is 3",
    "no choices": "choices is null",
    "error with status 200": "overloaded",
    "empty choices": r"choices is \[\]",
    "choices of numbers": r"choices is \[1\]",
    "no message": "message is null",
    "content a number": "content is 4",
    "no finish": "finish_reason is null",
    "no usage": "usage is null",
    "usage of text": 'prompt_tokens is "7"',
    "negative usage": "completion_tokens is -1",
    "usage of 400 digits": "prompt_tokens is Infinity",
    "nested, just readable": "answers with an error",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_lasts_is_one_clear_error_after_bounded_tries(kind):
    with Server(lambda n, body: None if n == 0 else FAULTS[kind](n, body)) as server:
        target = client(
            server, retries=2, concurrency=1, timeout_s=0.3 if "timeout" in SAYS[kind] else PATIENCE
        )
        with pytest.raises(Stopped, match=SAYS[kind]) as error:
            target.respond(["a", "b", "c"], SAMPLING)
        assert "\n" not in str(error.value)
        assert "after 3 attempts" in str(error.value)
        assert error.value.reason == "failed"
        assert list(error.value.answers) == [(0, 0)]  # what was answered is carried along
        assert len(server.requests) == target.calls == 4
        assert target.retried == 2
        # A deadline for each read alone would have let it drip to its end.
        assert server.dripped < 100


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_changes_nothing(kind):
    slow = {"timeout_s": 0.3} if "timeout" in SAYS[kind] else {}
    with Server() as server:
        want = client(server).respond(PROMPTS[:3], SAMPLING, samples=2)
    with Server(lambda n, body: FAULTS[kind](n, body) if n in (1, 4) else None) as server:
        assert client(server, **slow).respond(PROMPTS[:3], SAMPLING, samples=2) == want
        assert len(server.requests) == 8


def storm(seed: int, share: float):
    """Each request fails with probability `share`, in one of the ways that cost no time."""
    rng, lock = random.Random(seed), threading.Lock()
    kinds = [kind for kind in FAULTS if kind not in ("stalled", "dripped")]

    def fault(n, body):
        with lock:
            bad, kind = rng.random() < share, rng.choice(kinds)
        return FAULTS[kind](n, body) if bad else None

    return fault


def test_30_percent_failures_end_in_the_same_result():
    with Server() as server:
        want = client(server).respond(PROMPTS, SAMPLING, samples=10, seed=1)
    with Server(storm(0, 0.3)) as server:
        target = client(server, retries=20)  # 0.3^21: it does not fail by chance
        assert target.respond(PROMPTS, SAMPLING, samples=10, seed=1) == want
        assert target.calls == len(server.requests) > 110
        assert target.retried == target.calls - 100
    with Server(storm(0, 0.3)) as server, pytest.raises(Stopped):  # the mutant: no retries
        client(server, retries=0).respond(PROMPTS, SAMPLING, samples=10, seed=1)


def test_a_storm_of_429_is_waited_out():
    with Server() as server:
        want = client(server).respond(PROMPTS, SAMPLING)
    with Server(lambda n, body: FAULTS["429"](n, body) if n < 30 else None) as server:
        target = client(server, concurrency=4, retries=30)
        assert target.respond(PROMPTS, SAMPLING) == want
        assert len(server.requests) == 40 == target.calls
    with Server(lambda n, body: raw({}, 429, retry_after="86400")) as server:
        with pytest.raises(Stopped, match="asks to wait 86400 s"):
            client(server, concurrency=1).respond(PROMPTS, SAMPLING)
        assert len(server.requests) == 1


def test_retry_after():
    assert http.retry_after("2.5") == 2.5
    assert http.retry_after("-3") == 0
    assert http.retry_after(formatdate(time.time() + 1000)) == pytest.approx(1000, abs=60)
    for nothing in (None, "", "soon", "nan", "inf", "99999999999999999999999 Jan"):
        assert http.retry_after(nothing) is None


FINAL = {
    400: (raw({"error": "no such field"}, 400), "no such field.*change the request"),
    401: (raw({"error": "bad key"}, 401), "name the key's variable in key_env"),
    403: (raw({"error": "not yours"}, 403), "key_env"),
    404: (raw({"error": "no such model"}, 404), "check base_url"),
    422: (raw({"detail": "top_k"}, 422), "dialect"),
    "compressed": (raw(b"", content_encoding="gzip, gzip, gzip"), r"compressed \(gzip, gzip, gzip\)"),
    "quota": (raw({"error": {"text": "x" * 500, "code": "insufficient_quota"}}, 429), "top up"),
}


@pytest.mark.parametrize("kind", FINAL)
def test_what_will_not_pass_is_final_at_once(kind):
    fault, says = FINAL[kind]
    with Server(lambda n, body: fault) as server:
        with pytest.raises(Stopped, match=says) as error:
            client(server, concurrency=1).respond(PROMPTS, SAMPLING)
        assert len(server.requests) == 1
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(monkeypatch, status):
    monkeypatch.setenv("PLANTED_KEY", KEY)
    with Server() as thief, Server(lambda n, body: raw(b"", status, location=thief.url)) as server:
        with pytest.raises(Stopped, match="redirects"):
            client(server, key_env="PLANTED_KEY").respond(["x"], SAMPLING)
        assert not thief.requests


def test_certificates_are_verified_however_the_address_is_written(monkeypatch):
    import httpx2

    seen = set()

    def client(**options):
        seen.add(options["verify"])
        raise ImportError("socks")

    monkeypatch.setattr(httpx2, "AsyncClient", client)
    for scheme in ("https", "HTTPS", "Https", "http", "HTTP"):
        with pytest.raises(Stopped, match="check the proxy settings"):
            endpoint("m", f"{scheme}://127.0.0.1:1/v1").respond(["x"], SAMPLING)
        assert seen == {scheme.lower() == "https"}
        seen.clear()


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = endpoint("m", f"http://127.0.0.1:{taken.getsockname()[1]}/v1", backoff_s=1e-3, concurrency=1)
        with pytest.raises(Stopped, match=r"cannot connect.*check base_url"):
            target.respond(PROMPTS, SAMPLING)
        assert target.calls == 3  # not the ten retries of a server that is known to live


def test_an_empty_answer_is_an_answer():
    """Leaving it out, or asking until it is longer, would change the distribution."""
    empty = {
        "choices": [{"message": {"content": ""}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }
    with Server(lambda n, body: raw(empty)) as server:
        assert client(server).respond(["x"], SAMPLING) == [[Answer("", "stop", 3, 1)]]


def test_odd_text_survives(tmp_path):
    from alignpro.llm.targets.ledger import Cached

    odd = "\ud800 \x00 \u2028 💡 __import__('os') {{7*7}}"
    reply = {
        "choices": [{"message": {"content": odd}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 9},
    }
    with Server(lambda n, body: raw(reply)) as server:
        target = client(server)
        got = Cached(target, tmp_path, note=None).respond(["\ud800x"], SAMPLING)
        assert got == [[Answer(odd, "length", 3, 9)]]
        assert Cached(target, tmp_path, note=None).respond(["\ud800x"], SAMPLING) == got
        assert len(server.requests) == 1


def test_an_endless_response_is_cut(monkeypatch):
    monkeypatch.setattr(responses, "LARGEST", 1000)
    with Server(lambda n, body: raw(b" " * 5000)) as server, pytest.raises(Stopped, match="above 1000 bytes"):
        client(server, retries=0).respond(["x"], SAMPLING)


def test_the_budget_of_calls_is_kept_exactly():
    with Server() as server:
        want = client(server).respond(PROMPTS, SAMPLING, samples=3)
    with Server(storm(3, 0.3)) as server:
        target = client(server, max_calls=20)
        with pytest.raises(Stopped, match=r"max_calls 20.*raise it") as error:
            target.respond(PROMPTS, SAMPLING, samples=3)
        assert error.value.reason == "max_calls"
        assert len(server.requests) == target.calls == 20  # retries count
        assert 0 < len(error.value.answers) < 20
        for (position, index), answer in error.value.answers.items():
            assert want[position][index] == answer
        with pytest.raises(Stopped, match="max_calls"):  # for the object's life
            target.respond(PROMPTS[:1], SAMPLING, seed=9)
        assert len(server.requests) == 20


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_budget_of_tokens_is_never_overrun(concurrency):
    with Server() as server:
        free = client(server)
        free.respond(PROMPTS, SAMPLING, samples=5)
        assert free.tokens > 500  # the mutant: no budget
        target = client(server, max_tokens=300, concurrency=concurrency)
        with pytest.raises(Stopped, match="max_tokens 300") as error:
            target.respond(PROMPTS, SAMPLING, samples=5)
        spent = sum(a.prompt_tokens + a.tokens for a in error.value.answers.values())
        assert error.value.reason == "max_tokens"
        # Requests in flight reserve their most, and are waited for before giving up: one more did not fit.
        most = SAMPLING.max_tokens + len(PROMPTS[0]) // 4 + 8
        assert 300 - most < spent == target.tokens <= 300


def test_the_pace_keeps_to_its_rate():
    """In simulated time: any minute holds at most the rate, give or take the request at its edge."""
    rng = random.Random(0)
    for rate, amounts in ((60, [1.0] * 300), (1000, [rng.uniform(1, 90) for _ in range(300)])):
        pace, now, starts = http.Pace(rate), 0.0, []
        for amount in amounts:
            now += rng.expovariate(10)
            starts.append((pace.book(now, amount), amount))
        assert all(b[0] >= a[0] for a, b in itertools.pairwise(starts))
        for t, _ in starts:
            inside = [a for s, a in starts if t <= s < t + 60]
            assert sum(inside) - max(amounts) <= rate + 1e-6
        # Nor slower than it must: the mutant halves the rate.
        assert starts[-1][0] <= sum(amounts) / rate * 60 + now
    assert http.Pace(None).book(5.0, 1e9) == 5.0


def test_the_rate_limits_are_asked(monkeypatch):
    booked = []
    real = http.Pace.book

    def book(self, now, amount):
        booked.append((self.per_minute, amount))
        return real(self, now, amount)

    monkeypatch.setattr(http.Pace, "book", book)
    with Server() as server:
        target = client(server, requests_per_minute=1e6, tokens_per_minute=1e7)
        target.respond(["x" * 40], SAMPLING)
        assert booked == [(1e6, 1), (1e7, 28)]
        # What was booked and not used is given back.
        used = target.tokens
        assert target._http._token_pace.free_at - time.monotonic() < 60 * used / 1e7 + 1


@pytest.mark.parametrize("concurrency", [1, 5])
def test_concurrency(concurrency):
    together, most, lock = 0, 0, threading.Lock()
    meeting = threading.Barrier(concurrency)

    def fault(n, body):
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        meeting.wait(PATIENCE)  # breaks, and fails the test, where fewer come at once
        with lock:
            together -= 1

    with Server(fault) as server:
        client(server, concurrency=concurrency).respond(PROMPTS, SAMPLING)
    assert most == concurrency


def test_below_a_running_loop():
    async def notebook(server):
        return client(server).respond(["a"], SAMPLING)

    with Server() as server:
        assert asyncio.run(notebook(server)) == client(server).respond(["a"], SAMPLING)


def test_an_interrupt_keeps_what_is_in_flight(monkeypatch):
    arrived, go = threading.Event(), threading.Event()

    def fault(n, body):
        arrived.set()
        go.wait(PATIENCE)

    with Server(fault) as server:
        target, caught, stops, finish = client(server, concurrency=2), [], [], http.finish
        # What `finish` is given to call when a notebook is interrupted.
        monkeypatch.setattr(http, "finish", lambda work, stop: stops.append(stop) or finish(work, stop))

        def work():
            with pytest.raises(Stopped) as error:
                target.respond(PROMPTS, SAMPLING)
            caught.append(error.value)

        thread = threading.Thread(target=work)
        thread.start()
        assert arrived.wait(PATIENCE)
        stops[0]()
        stops[0].__self__.loop.call_soon_threadsafe(go.set)  # after the stop has been heard
        thread.join(PATIENCE)
        assert caught[0].reason == "stopped"
        assert len(caught[0].answers) == len(server.requests) <= 2


def test_an_error_of_the_receiver_ends_the_run():
    def full(*_):
        raise AlignProError("the disk is full")

    with Server() as server:
        with pytest.raises(AlignProError, match="the disk is full"):
            client(server, concurrency=2).respond(PROMPTS, SAMPLING, on_answer=full)
        assert len(server.requests) <= 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("base_url", "ftp://h/v1"),
        ("base_url", "file:///etc/passwd"),
        ("base_url", "h/v1"),
        ("base_url", f"http://user:{KEY}@h/v1"),
        ("base_url", f"http://h/v1?key={KEY}"),
        ("base_url", "http://h:99999/v1"),
        ("base_url", "http://h h/v1"),
        ("base_url", None),
        ("key_env", KEY),
        ("key_env", ""),
        ("dialect", "klingon"),
        ("extra_body", {"temperature": 1}),
        ("extra_body", {"x": float("nan")}),
        ("extra_body", 3),
        ("concurrency", 0),
        ("retries", -1),
        ("retries", True),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
        ("backoff_s", "1"),
        ("requests_per_minute", 0),
        ("tokens_per_minute", -1),
        ("max_calls", 0),
        ("max_tokens", 1.5),
    ],
)
def test_bad_fields_are_refused(field, value):
    with pytest.raises(AlignProError, match=field) as error:
        endpoint(**({"model": "m", "url": "http://h/v1"} | {field.replace("base_url", "url"): value}))
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)


def test_a_key_that_is_missing_or_broken(monkeypatch):
    target = endpoint("m", "http://127.0.0.1:1/v1", key_env="PLANTED_KEY")
    monkeypatch.delenv("PLANTED_KEY", raising=False)
    with pytest.raises(AlignProError, match="PLANTED_KEY: that environment variable is not set"):
        target.respond(["x"], SAMPLING)
    for broken in (KEY + "\nx: y", KEY + "é"):
        monkeypatch.setenv("PLANTED_KEY", broken)
        with pytest.raises(AlignProError, match="copy it again") as error:
            target.respond(["x"], SAMPLING)
        assert KEY not in str(error.value)
    assert target.calls == 0


def test_without_the_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(AlignProError, match=r"pip install 'alignpro\[http\]'"):
        endpoint("m", "http://127.0.0.1:1/v1").respond(["x"], SAMPLING)


def test_no_torch_is_needed():
    code = "import sys, alignpro.llm.targets.endpoint, alignpro.llm.targets.ledger; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


LEAKS = """
import logging, sys, traceback
from alignpro.llm.targets import http as module
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.targets.ledger import Cached
url, folder = sys.argv[1:]
logging.basicConfig(level=logging.DEBUG)

def attempt(target, prompt):
    try:
        print(target.respond([prompt], Sampling(), samples=2))
    except Exception as error:
        while error is not None:
            print(repr(error), error.__dict__)
            print("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
            error = error.__cause__ or error.__context__

for mutant in ("none", "no scrub", "repr"):
    print("=====", flush=True)
    print("=====", file=sys.stderr, flush=True)
    if mutant == "no scrub":
        scrub, module.Secret.scrub = module.Secret.scrub, lambda self, text, **_: text
    if mutant == "repr":
        module.Secret.scrub, module.Secret.__repr__ = scrub, lambda self: self.value
    target = Endpoint(url, EndpointSettings("m", "PLANTED_KEY", backoff_s=1e-3, retries=2, concurrency=1))
    print(target, vars(target))
    cached = Cached(target, f"{folder}/{mutant}")
    for prompt in ("ok", "echo", "500", "401", "garbage", "field", "close"):
        attempt(cached, prompt)
        attempt(target, prompt)
    print(cached.ledger.line())
"""


def test_a_planted_key_is_in_no_file_and_no_stream(tmp_path):
    """Against a server that echoes it, with every log on and the local variables of every traceback.

    The mutants do not scrub, or show the key in a repr.
    """
    seen = set()

    def fault(n, body):
        header = server.requests[n][1]["authorization"]
        seen.add(header)
        # Escaped, straddling the place where long texts are cut, and whole.
        escaped = "".join(f"\\u{ord(c):04x}" for c in KEY)
        long = "x" * 185 + KEY
        answer = completion(body)
        match body["messages"][0]["content"]:
            case "echo":
                answer["choices"][0]["message"]["content"] = "you sent " + header
                return raw(json.dumps(answer).encode().replace(KEY.encode(), escaped.encode()))
            case "500":
                return raw({"error": long, "again": header}, 500)
            case "401":
                return raw({"error": f"wrong key {KEY}"}, 401)
            case "garbage":
                return raw((long + header).encode())
            case "field":
                return raw({"choices": long})
            case "close":
                return "close"

    with Server(fault) as server:
        run = subprocess.run(
            [sys.executable, "-c", LEAKS, server.url, str(tmp_path)],
            env={**os.environ, "PLANTED_KEY": KEY},
            capture_output=True,
            timeout=200,
        )
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    assert seen == {f"Bearer {KEY}"}  # it was sent, so it could have leaked
    out, err = run.stdout.split(b"====="), run.stderr.split(b"=====")
    assert b"<key>" in out[1]
    assert b"status 401" in out[1]
    for i, mutant in enumerate(("none", "no scrub", "repr"), start=1):
        files = b"".join(p.read_bytes() for p in (tmp_path / mutant).rglob("*") if p.is_file())
        assert b"prompt" in files
        everything = out[i] + err[i] + files
        assert (KEY[3:15].encode() in everything) == (mutant != "none"), mutant  # a part is a leak too


# --- the real server ---


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` of a tiny model, as a subprocess on a free port; (address, folder)."""
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = tiny_model(seed=1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    command = Path(sys.executable).with_name("transformers")
    if not command.is_file():
        pytest.skip("no `transformers` command beside this Python: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [
                command,
                "serve",
                folder / "model",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--device",
                "cpu",
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for _ in range(600):
            if process.poll() is not None:
                last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
                pytest.skip(f"transformers serve did not start: {' '.join(last)}")
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.1)
        else:
            pytest.skip("transformers serve did not start within a minute")
        yield f"http://127.0.0.1:{port}/v1", folder / "model"
    finally:
        process.kill()
        process.wait()


def real(served, **options) -> Endpoint:
    return endpoint(str(served[1]), served[0], **{"dialect": "transformers", "concurrency": 2, **options})


def test_a_real_server_answers(served):
    target = real(served)
    got = target.respond(["abc", "hg"], EVALUATION, samples=3)
    assert [len(row) for row in got] == [3, 3]
    for row, size in zip(got, (3, 2), strict=True):
        for answer in row:
            assert answer.prompt_tokens == size
            assert 1 <= answer.tokens <= 128
            assert answer.finish == ("length" if answer.tokens == 128 else "stop")
            assert set(answer.text) <= set("abcdefgh")
    assert target.tokens == sum(a.prompt_tokens + a.tokens for row in got for a in row)


def test_a_real_server_refuses(served):
    with pytest.raises(Stopped, match=r"pinned.*change the request"):
        endpoint("another", served[0], dialect="transformers").respond(["a"], SAMPLING)
    with pytest.raises(Stopped, match=r"422.*top_k"):
        real(served, dialect="vllm").respond(["a"], SAMPLING)


def test_a_real_server_samples_as_this_process_does(served):
    """Both first tokens against the exact distribution, by chi-square at a false alarm of 1e-6 each.

    The mutant is the dialect that leaves out top_k.
    """
    import torch

    local = LocalTarget(served[1], dtype="float32", device="cpu")
    sampling = Sampling(temperature=1.5, top_p=0.9, top_k=4, max_tokens=1)
    with torch.no_grad():
        logits = local.model(torch.tensor([local.tokenizer("bad").input_ids])).logits[0, -1].double() / 1.5

    def exact(top_k):
        p = torch.softmax(logits, 0).numpy()
        order = np.argsort(-p)
        p[order[top_k:]] = 0
        p /= p.sum()
        p[order[np.cumsum(p[order]) - p[order] >= 0.9]] = 0
        return p / p.sum()

    def p_value(answers, p):
        # A lone end token comes back as an empty text, and so do <pad> and <unk>: one cell for the three.
        cells = [p[:3].sum(), *p[3:]]
        counts = np.zeros(len(cells))
        for answer in answers:
            counts["abcdefgh".index(answer.text) + 1 if answer.text else 0] += 1
        kept = np.array(cells) > 0
        if counts[~kept].any():
            return 0.0
        return stats.chisquare(counts[kept], np.array(cells)[kept] * counts.sum()).pvalue

    n = 120
    there = real(served).respond(["bad"], sampling, samples=n)[0]
    here = local.respond(["bad"], sampling, samples=n)[0]
    assert p_value(there, exact(4)) > 1e-6
    assert p_value(here, exact(4)) > 1e-6
    mutant = real(served, dialect="openai", extra_body={"top_k": 4})
    with pytest.raises(Stopped, match="top_k"):
        mutant.respond(["bad"], sampling)
    without = endpoint(str(served[1]), served[0], concurrency=2)
    loose = without.respond(["bad"], Sampling(temperature=1.5, top_p=0.9, max_tokens=1), samples=n)[0]
    assert p_value(loose, exact(4)) < 1e-6


def test_the_dialects_are_all_tested():
    assert set(DIALECTS) == {"openai", "vllm", "transformers"}
