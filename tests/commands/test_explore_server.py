"""Who is answered, what is taken in from strangers, and what one question may cost the others."""

import io
import itertools
import json
import re
import socket
import stat
import struct
import sys
import threading
import tracemalloc
import webbrowser
import zipfile
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from exploring import HOSTILE, SHAPE, api, ask, family, serving
from mutants import kills, mutated

from alignpro.commands import explore, explore_server
from alignpro.commands.explore import App
from alignpro.errors import AlignProError
from alignpro.theory import check, families
from alignpro.theory.families import draw
from alignpro.theory.instance import KEYS, load
from alignpro.theory.search import exploring as engine

# --- who is answered


def raw(server, request):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_other_users_of_the_machine_are_refused(server):
    def refused(module):
        with serving(server.app, module.Server, close=False) as served:
            for said in ({"Authorization": ""}, {"Authorization": "token x"}, {"Authorization": "token ü"}):
                for path in ("/api/start", "/api/rollout?at=0", "/api/start?token=x", "/api/nothing"):
                    status, _, body = ask(served, path, **said)
                    assert status == 403
                    assert b"token: is missing" in body
                status, _, body = ask(served, "/api/upload", "POST", b"PK", **said)
                assert status == 403
            assert ask(served, "/")[0] == 200  # the empty page
            assert ask(served, "/api/start")[0] == 200
            assert ask(served, f"/api/start?token={served.token}", Authorization="")[0] == 200

    refused(explore_server)
    kills(refused, mutated(explore_server, "if not hmac.compare_digest(", "if not all("))
    kills(refused, mutated(explore_server, "if not hmac.compare_digest(", "if any("))
    with serving(server.app, close=False) as other:
        assert other.token != server.token
        assert len(other.token) == 32


def test_the_browser_is_told_the_token_by_a_file_of_the_users_own(monkeypatch):
    seen = []

    def open_browser(address):
        path = Path(address.removeprefix("file://"))
        seen.append((address, path, stat.S_IMODE(path.parent.stat().st_mode), path.read_text()))

    monkeypatch.setattr(webbrowser, "open", open_browser)
    monkeypatch.setenv("DISPLAY", ":0")
    address = "http://127.0.0.1:1/?token=secret&x=1"
    with explore_server.opening(address):
        ((said, path, mode, text),) = seen
        assert "secret" not in said  # which every user reads in the list of processes
        assert mode == 0o700
        assert text.count("http://127.0.0.1:1/?token=secret&amp;x=1") == 2
        assert path.exists()
    assert not path.exists()
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with explore_server.opening(address):
        assert len(seen) == 1 or sys.platform != "linux"


UPLOAD = b"POST /api/upload HTTP/1.1\r\nHost: H\r\nAuthorization: token T\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://[ HTTP/1.1\r\nHost: H\r\n\r\n", 400),
        (b"GET http://[::1 HTTP/1.1\r\nHost: H\r\n\r\n", 400),
        (b"GET /?" + b"a&" * 50 + b" HTTP/1.1\r\nHost: H\r\n\r\n", 400),
        (b"GET /api/start?%ff=%00&token=%ed%a0%80 HTTP/1.1\r\nHost: H\r\n\r\n", 403),
        (b"GET //[/api/start HTTP/1.1\r\nHost: H\r\n\r\n", 404),
        (b"POST / HTTP/1.1\r\nHost: H\r\nContent-Length: 3\r\n\r\nabc", 501),
        (UPLOAD + b"\r\n", 411),
        (UPLOAD + b"Content-Length: -1\r\n\r\n", 411),
        (UPLOAD + b"Content-Length: 9999999999\r\n\r\n", 413),
        (UPLOAD + b"Content-Length: 9\r\n\r\nPK", 400),
        (b"GET / HTTP/1.1\r\nHost: H\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"\x00\xff\r\n\r\n", 400),
    ],
)
def test_every_request_has_a_reply(server, request_, status):
    host, token = f"127.0.0.1:{server.server_port}".encode(), server.token.encode()
    reply = raw(server, request_.replace(b"H\r\n", host + b"\r\n", 1).replace(b"token T", b"token " + token))
    found = re.match(rb"(?:HTTP/1.1 (\d+) |\{)", reply)
    assert found, reply[:80]
    assert int(found[1] or 400) == status  # a request without a version has a reply without headers
    assert b"Traceback" not in reply


def test_a_fault_of_our_own_is_told_too(server, capsys):
    class Broken:
        def answer(self, route, given, body=None):
            raise {"memory": MemoryError, "other": RuntimeError}[route]("of us")

    with serving(Broken(), close=False) as broken:
        for route, said in (("memory", b"smaller shape"), ("other", b"a fault of alignpro's own")):
            status, _, body = ask(broken, f"/api/{route}")
            assert status == 500
            assert said in body
    assert "RuntimeError: of us" in capsys.readouterr().err


# --- what strangers send


def stored(**changes):
    plain = draw("lm_like", 7, SHAPE)[0]
    file = io.BytesIO()
    np.savez_compressed(file, **({key: getattr(plain, key) for key in KEYS} | changes))
    return file.getvalue()


def sent(server, content, name="mine.npz", **headers):
    return ask(server, "/api/upload?" + urlencode({"name": name}), "POST", content, **headers)


def test_an_upload_is_explored_as_a_file_is_solved(server, tmp_path):
    status, _, body = sent(server, stored(), HOSTILE[1] + "x" * 1000)
    assert status == 200, body
    path = tmp_path / "mine.npz"
    path.write_bytes(stored())
    key = re.search(rb'"(upload-[0-9a-f]{12})"', body)[1].decode()
    found = api(server, "solve", source=key, beta=0.3, lam=0.2, prompt=1)
    assert found["gap"] == pytest.approx(check(load(path), 0.3, 0.2).gap, rel=1e-14)
    assert len(api(server, "start")["files"][key]) == 40
    again = load("copy", ask(server, f"/api/npz?source={key}")[2])
    for name in KEYS:
        assert getattr(again, name).tolist() == getattr(load(path), name).tolist()
    for seed in range(explore.UPLOADS):
        assert sent(server, stored(p=np.roll(draw("lm_like", seed, SHAPE)[0].p, 1)))[0] == 200
    files = api(server, "start")["files"]
    assert key not in files
    assert "file" in files
    assert len(files) == explore.UPLOADS + 1


WIDE = {"p": np.full(5000, 1 / 5000), "prior": np.ones((5000, 1)), "frozen": np.ones((1, 1))}
WIDE |= {"own": np.zeros(5000, int), "reward": np.zeros((5000, 1))}


FAULTS = [
    (b"", "is not an .npz file"),
    (b"PK\x03\x04" + bytes(100), "is not an .npz file"),
    (stored()[:-40], "is not an .npz file"),
    (b"\x93NUMPY\x01\x00", "is a single .npy array"),
    (stored(p=np.array([[], {}], object)), "pickled Python objects, which are never read"),
    (stored(extra=np.ones(1)), "unknown key 'extra'"),
    (stored(p=np.array([0.5, 0.5])), "prior: has 3 prompts"),
    (stored(p=np.array([0.5, 0.5, 0.5])), "p sums to 1.5"),
    (stored(reward=np.full((3, 5), np.nan)), "is not finite"),
    (stored(own=np.array([0, 1, 9])), "is no row of frozen"),
    (stored(names=np.array("{")), "names: is not JSON text"),
    (stored(names=np.array("[" * 100_000)), "names: is not JSON text"),
    (stored(**WIDE), "keep X, K and Y each to 4096"),
]


@pytest.mark.parametrize(("content", "said"), FAULTS)
def test_each_fault_of_an_upload_is_one_line(server, content, said):
    status, _, body = sent(server, content)
    sentence = json.loads(body)["error"]
    assert status == 400
    assert sentence.startswith("mine.npz: ")
    assert said in sentence
    assert "\n" not in sentence
    assert len(sentence) < 300


def test_what_is_sent_inflates_to_so_much_only(server, monkeypatch):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("p.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**24) + b" " * 2**24)
        for key in KEYS[1:]:
            archive.writestr(f"{key}.npy", b"")
    bomb = file.getvalue()
    assert len(bomb) < 2**16

    def bounded(limit):
        tracemalloc.start()
        try:
            with pytest.raises(AlignProError, match=r"^x: "):
                load("x", bomb, most=limit)
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()

    bounded(2**20)
    kills(bounded, 2**30)
    monkeypatch.setattr(explore, "MOST_BYTES", 2**20)
    assert b"mine.npz: its arrays take 16,777,228 bytes; keep them to 1,048,576" in sent(server, bomb)[2]


def test_another_site_sends_nothing(server):
    for site in ("cross-site", "same-site"):
        assert sent(server, stored(), **{"Sec-Fetch-Site": site})[0] == 403
    assert sent(server, stored(), Host="evil.example")[0] == 403
    assert ask(server, "/api/solve", "POST", b"x")[0] == 501


# --- what a question costs the others


def test_no_family_makes_a_square_of_the_rewrites():
    def frugal(module, name="lm_like"):
        tracemalloc.start()
        try:
            module.FAMILIES[name](np.random.default_rng(0), 1, (1, 2000, 1))
            assert tracemalloc.get_traced_memory()[1] < 2000 * 2000 * 8 / 4
        finally:
            tracemalloc.stop()

    for name in families.FAMILIES:
        frugal(families, name)
    right = "(np.asarray(index)[..., None] == np.arange(n)).astype(float)"
    kills(frugal, mutated(families, right, "np.eye(n)[index]"))


def text(of):
    return {name: str(value) for name, value in of.items()}


def answered_meanwhile(app, patience=60):
    """An instance is answered about while another is computed."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (app.answer("instance", text(family("signed"))), done.set()))
    with app._of(text(family("lm_like"))):
        thread.start()
        assert done.wait(patience)
    thread.join()


def test_one_instance_holds_up_no_other():
    app, shared = App(), threading.Lock()
    answered_meanwhile(app)
    for held in app.held.values():
        held.lock = shared
    kills(lambda app: answered_meanwhile(app, patience=0.5), app)


def test_compiled_code_is_given_back(monkeypatch):
    given_back = []
    monkeypatch.setattr(engine, "forget", lambda: given_back.append(1))
    monkeypatch.setattr(explore, "SHAPES", 2)
    monkeypatch.setattr(explore, "HELD", 2)
    app = App()
    for k in range(2, 5):
        for _ in range(2):
            with app._of(text(family("lm_like", (1, k, 2)))):
                pass
        assert len(app.held) <= 2
        assert len(app.shapes) <= 2
    assert len(given_back) == 1


def test_ctrl_c_waits_for_what_is_computed_and_begins_nothing():
    app, order = App(), []
    with app._of(text(family("signed"))):
        thread = threading.Thread(target=lambda: (app.close(), order.append("closed")))
        thread.start()
        order.append("computed")
    thread.join()
    assert order == ["computed", "closed"]
    with pytest.raises(AlignProError, match="has ended"):
        app.answer("instance", text(family("lm_like")))


def test_a_sweep_is_what_check_says_at_each_lam(server):
    instance = draw("lm_like", 3, SHAPE)[0]
    about = api(server, "instance", **family("lm_like"))

    def agree(parts, wrong=0.0):
        rows = sorted((row for part in parts for row in part), key=lambda row: row["lam"])
        assert len(rows) == engine.PARTS * engine.POINTS
        assert rows[0]["lam"] == about["low"]
        assert rows[-1]["lam"] == pytest.approx(about["high"])
        ratios = [b["lam"] / a["lam"] for a, b in itertools.pairwise(rows)]
        assert min(ratios) == pytest.approx(max(ratios))
        for row in rows[::7]:
            for name in engine.SWEPT:
                said = check(instance, 0.2 + wrong, row["lam"], name)
                assert row[name] == pytest.approx(said.rhs, rel=1e-12)
                assert row["gap"] == pytest.approx(said.gap, rel=1e-12)

    parts = [
        api(server, "sweep", **family("lm_like"), beta=0.2, part=i)["rows"] for i in range(about["parts"])
    ]
    agree(parts)
    kills(agree, parts[:-1])
    kills(lambda found: agree(found, 0.01), parts)
    for bad in ({"part": 20}, {"beta": 0}, {"part": 0, "beta": 1, "lam": 1}):
        status = ask(server, "/api/sweep?" + urlencode({**family("lm_like"), "beta": 1, "part": 0, **bad}))[0]
        assert status == 400
