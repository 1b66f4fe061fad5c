"""A server of `alignpro explore` with hostile texts, questions to it, and its page in a browser."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from urllib.parse import urlencode

import pytest

from alignpro.commands import explore_server
from alignpro.commands.explore import App
from alignpro.rollouts import Rollout
from alignpro.theory import Instance, Names
from alignpro.theory.families import draw

HOSTILE = (
    "<img src=x onerror='window.hacked=1'></script><script>window.hacked=1</script>",
    "\u202eevil\u0000 {{7*7}} <b>bold</b>",
    '\'; DROP TABLE; "quoted" & entity',
)
SHAPE = (3, 4, 5)


def rollout(prompt, arm, rewrite, draw=0, answer=0, reward=0.5, seed=0, **changes):
    row = {
        "prompt_id": f"id{prompt}",
        "x": HOSTILE[prompt],
        "arm": arm,
        "seed": seed,
        "draw": draw,
        "answer": answer,
        "rewrite": rewrite,
        "response": f"{HOSTILE[0]} answer {prompt}{draw}{answer}",
        "reward": reward,
        **dict.fromkeys(
            ("logp_frozen_x", "logp_frozen_rewrite", "logp_prompter", "logp_reference", "logp_policy")
        ),
        "frozen": HOSTILE[0],
        "prompter": arm,
        "reward_model": "judge",
        "sampling": "{}",
        "reward_low": 0.0,
        "reward_high": 1.0,
    }
    return Rollout(**(row | changes))


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    x, k, y = SHAPE
    plain = draw("lm_like", 5, SHAPE)[0]
    labels = Names(
        HOSTILE, tuple(f"{HOSTILE[0]} {i}" for i in range(k)), tuple(f"answer {i}" for i in range(y))
    )
    Instance(plain.p, plain.prior, plain.frozen, plain.own, plain.reward, labels).save(folder / "named.npz")
    rows = [rollout(p, "none", HOSTILE[p], reward=0.25) for p in range(x)]
    rows += [
        rollout(p, "trained", f"rewrite {p}{d} of Ärger", d, a, (p + d + a) / 8)
        for p in range(x)
        for d in range(3)
        for a in range(2)
        if p != 2
    ]
    (folder / "rollouts.jsonl").write_text("\n".join(row.line() for row in rows), encoding="utf-8")
    return folder


@contextmanager
def serving(app, made=explore_server.Server, close=True):
    with made(app) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            if close:  # or Python ends in the midst of a computation
                app.close()


@pytest.fixture(scope="session")
def server(files):
    app = App(file=str(files / "named.npz"), texts=str(files / "rollouts.jsonl"))
    with serving(app) as server:
        yield server


def ask(server, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        headers = {"Authorization": f"token {server.token}"} | headers
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def api(server, route, **parameters):
    status, _, body = ask(server, f"/api/{route}?{urlencode(parameters)}")
    found = json.loads(body, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert status == 200, found
    return found


def family(name, shape=SHAPE, seed=3):
    return {"source": name, **dict(zip("xky", shape, strict=True)), "seed": seed}


@contextmanager
def opened(chromium, server, width=1280, height=900, **options):
    """The page, once drawn, and its complaints, of which none may be left at the end."""
    context = chromium.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    complaints = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on(
        "request",
        lambda r: None if r.url.startswith((server.origin, "data:", "blob:")) else complaints.append(r.url),
    )
    page.goto(server.address)
    page.wait_for_selector("html[data-shown]", timeout=60_000)
    try:
        yield page, complaints
        assert [c for c in complaints if "400 (Bad Request)" not in c] == []
    finally:
        context.close()


def shown(page, timeout=20.0):
    """Wait until what is drawn is what the controls say."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        said = page.evaluate(
            "[document.documentElement.dataset.shown,"
            " `${+$('beta').value} ${+$('lam').value} ${$('prompt').value}`]"
        )
        if said[0] == said[1]:
            return
        time.sleep(0.02)
    pytest.fail(f"drawn {said[0]!r}, controls say {said[1]!r}")
