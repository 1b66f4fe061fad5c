"""Cache and ledger: nothing asked twice, nothing lost to kills, faults or full disks, every cost counted."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from faulty import Server
from kept import lines
from mutants import kills, mutated

from alignpro import locks
from alignpro.commands import opening
from alignpro.commands.options import EnvironmentSettings
from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.prompt import Prompt
from alignpro.llm.models.sampling import EVALUATION, Sampling
from alignpro.llm.targets import ledger, store
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.ledger import FILE, Cached, Estimate, Prices, cache_key, spent
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.store import OLD_FILE, Store
from alignpro.llm.targets.target import Answer, Stopped, arrange, jobs

SAMPLING = Sampling(max_tokens=9)
PROMPTS = [f"prompt {i}" for i in range(6)]


class Fake:
    """Answers by hashing; `salt` makes two of them disagree. `fail_at` raises at that call."""

    name, revision, remote, retried = "fake", "1", False, 0

    def __init__(self, salt="", fail_at=None):
        self.salt, self.fail_at, self.calls, self.asked = salt, fail_at, 0, []

    def respond(self, prompts, sampling, *, first=0, samples=1, seed=0, on_answer=None):
        asked, answers = jobs(prompts, first, samples, seed), {}
        for p, i in asked:
            self.calls += 1
            if self.calls == self.fail_at:
                raise Stopped("the target failed; mend it", "failed", answers)
            self.asked.append((prompts[p], i))
            what = json.dumps([self.salt, prompts[p], i, seed, asdict(sampling)])
            text = hashlib.sha256(what.encode()).hexdigest()[: 2 + i % 5]
            answers[p, i] = Answer(text, "stop", len(prompts[p]), len(text))
            if on_answer:
                on_answer(p, i, answers[p, i])
        return arrange(asked, answers, len(prompts))


def endpoint(url, **options):
    return Endpoint(url, EndpointSettings("m", **options))


def cached(target, folder, **options):
    return Cached(target, folder, **{"note": None, **options})


def test_each_answer_is_asked_once(tmp_path):
    want = Fake().respond(PROMPTS, SAMPLING, samples=4)
    one = Fake()
    assert cached(one, tmp_path).respond(PROMPTS, SAMPLING, samples=4) == want
    assert len(one.asked) == len(set(one.asked)) == 24
    two = Fake()
    again = cached(two, tmp_path)
    assert again.respond(PROMPTS, SAMPLING, samples=4) == want
    assert again.respond(PROMPTS[2:4], SAMPLING, first=[1, 3]) == [[want[2][1]], [want[3][3]]]
    assert not two.asked
    assert again.respond(["new", *PROMPTS, "new"], SAMPLING, samples=5)[1][:4] == want[0]
    # Only what is missing, and the prompt that comes twice once.
    assert sorted(two.asked) == sorted([("new", i) for i in range(5)] + [(p, 4) for p in PROMPTS])


def test_samples_of_one_prompt_are_not_one_answer(tmp_path, monkeypatch):
    rows = cached(Fake(), tmp_path / "a").respond(["x"], SAMPLING, samples=8)[0]
    assert len({a.text for a in rows}) == 8
    # The mutant: a key without the sample index.
    key = ledger.cache_key
    monkeypatch.setattr(ledger, "cache_key", lambda *parts: key(*parts[:-1], 0))
    rows = cached(Fake(), tmp_path / "b").respond(["x"], SAMPLING, samples=8)[0]
    assert len({a.text for a in rows}) == 1


def test_the_key_is_all_that_determines_an_answer():
    base = ("m", "1", SAMPLING, 0, "x", 0)
    others = [
        ("n", "1", SAMPLING, 0, "x", 0),
        ("m", "2", SAMPLING, 0, "x", 0),
        *(("m", "1", replace(SAMPLING, **{k: v}), 0, "x", 0) for k, v in asdict(EVALUATION).items()),
        ("m", "1", SAMPLING, 1, "x", 0),
        ("m", "1", SAMPLING, 0, "y", 0),
        ("m", "1", SAMPLING, 0, "x", 1),
        ("m1", "", SAMPLING, 0, "x", 0),  # parts do not run into each other
    ]
    assert len({cache_key(*parts) for parts in (base, *others)}) == len(others) + 1
    assert cache_key(*base) == cache_key("m", "1", Sampling(temperature=1, max_tokens=9), 0, "x", 0)
    assert len(cache_key(*base)) == 64


def test_a_local_model_is_the_same_behind_the_cache(tmp_path):
    target = LocalTarget(tiny_model(seed=1), batch_size=4)
    want = target.respond(["abc", "d"], EVALUATION, samples=3)
    calls = target.calls
    for _ in range(2):
        assert cached(target, tmp_path).respond(["abc", "d"], EVALUATION, samples=3) == want
        assert target.calls == calls + 6
    other = LocalTarget(tiny_model(seed=2))
    assert cached(other, tmp_path).respond(["abc", "d"], EVALUATION, samples=3) != want


def test_answers_reach_the_caller_in_their_places(tmp_path):
    cached(Fake(), tmp_path).respond(PROMPTS[:2], SAMPLING, samples=2)
    got = {}
    rows = cached(Fake(), tmp_path).respond(
        [*PROMPTS[:3], PROMPTS[2]], SAMPLING, samples=3, on_answer=lambda p, i, a: got.update({(p, i): a})
    )
    assert got == {(p, i): rows[p][i] for p in range(4) for i in range(3)}


# --- the ledger ---


def test_the_ledger_adds_up(tmp_path):
    prices = Prices(prompt=2.0, answer=8.0)
    target = cached(Fake(), tmp_path, prices=prices)
    rows = target.respond(PROMPTS, SAMPLING, samples=3)
    target.respond(PROMPTS, SAMPLING, samples=3)
    flat = [a for row in rows for a in row]
    prompt_tokens, tokens = sum(a.prompt_tokens for a in flat), sum(a.tokens for a in flat)
    summary = target.ledger.summary()
    seconds, cost = summary.pop("seconds"), summary.pop("cost")
    assert summary == {
        "calls": 18,
        "retries": 0,
        "answers": 18,
        "hits": 18,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "thoughts": 0,
        "refused": 0,
    }
    assert cost == pytest.approx((2 * prompt_tokens + 8 * tokens) / 1e6)
    assert seconds > 0
    on_file = target.total()
    assert (on_file.calls, on_file.answers, on_file.tokens) == (18, 18, tokens)
    assert on_file.cost == pytest.approx(cost)
    assert on_file.seconds == pytest.approx(seconds, abs=1e-4)
    assert spent(tmp_path) == {"fake": on_file}
    assert json.loads(json.dumps(target.ledger.summary())) == target.ledger.summary()
    assert "18 answers in 18 calls" in target.ledger.line()
    assert "\n" not in target.ledger.line()
    assert cached(Fake(), tmp_path / "unpriced").ledger.cost is None


def test_every_request_is_in_the_ledger_also_those_without_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rng = random.Random(0)
    with Server(lambda n, body: (500, {}, b"") if rng.random() < 0.3 or n >= 40 else None) as server:
        target = cached(endpoint(server.url, backoff_s=1e-3, max_wait_s=0.01, retries=12), tmp_path)
        with pytest.raises(Stopped):
            target.respond(PROMPTS, SAMPLING, samples=20)
        total = target.total()
        assert total.calls == target.ledger.calls == len(server.requests) > 40
        assert total.retries == target.ledger.retries > 10
        assert total.answers == target.ledger.answers < 40


def test_the_estimate_comes_before_the_first_call_and_bounds_it(tmp_path):
    events = []

    class Watched(Fake):
        def respond(self, *args, **kwargs):
            events.append("asked")
            return super().respond(*args, **kwargs)

    target = cached(Watched(), tmp_path, prices=Prices(1, 2), note=events.append)
    target.respond(PROMPTS, SAMPLING, samples=2)
    assert events[1] == "asked"
    sizes = 12 * (len(PROMPTS[0]) // 4 + 8)
    before = Estimate(12, 0, sizes, 12 * 9, (sizes + 2 * 12 * 9) / 1e6, None)
    assert events[0] == f"fake: {before.line()}"
    assert target.ledger.calls == before.calls
    assert target.ledger.tokens <= before.tokens
    assert target.ledger.cost <= before.cost
    target.respond([*PROMPTS, "new", "new"], SAMPLING, samples=3)
    assert re.match(
        r"fake: 9 calls \(12 cached\), about .* answer tokens, costing .*, about \d+ s$", events[2]
    )
    target.respond(PROMPTS, SAMPLING, samples=2)
    assert len(events) == 4  # nothing to ask, nothing to say
    local, said = LocalTarget(tiny_model()), []
    cached(local, tmp_path, note=said.append).respond(["abc"], SAMPLING, samples=2)
    assert "about 6 prompt tokens" in said[0]
    chat = Prompt("x", [{"role": "user", "content": "y" * 400}])  # all of it is asked, and paid for
    cached(Fake(), tmp_path / "chat", note=said.append).respond([chat], SAMPLING)
    assert "about 111 prompt tokens" in said[1]


def test_the_estimate_is_printed_on_standard_error(tmp_path, capsys):
    Cached(Fake(), tmp_path).respond(["x"], SAMPLING)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("alignpro: fake: 1 calls (0 cached)")


@pytest.mark.parametrize("bad", [-1, None, float("nan"), float("inf"), "1", True])
def test_bad_prices(bad):
    with pytest.raises(AlignProError, match=r"prices\.answer"):
        Prices(1, bad)


# --- stops and faults ---


def test_a_stop_carries_everything_and_the_next_run_goes_on(tmp_path):
    want = Fake().respond(PROMPTS, SAMPLING, samples=2)
    cached(Fake(), tmp_path).respond(PROMPTS[:2], SAMPLING, samples=1)
    failing = Fake(fail_at=5)
    with pytest.raises(Stopped, match="mend it") as error:
        cached(failing, tmp_path).respond(PROMPTS, SAMPLING, samples=2)
    assert len(error.value.answers) == 2 + 4
    assert all(want[p][i] == a for (p, i), a in error.value.answers.items())
    last = Fake()
    assert cached(last, tmp_path).respond(PROMPTS, SAMPLING, samples=2) == want
    assert len(last.asked) == 12 - 6


def test_a_budget_stops_and_a_larger_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        for _ in range(2):  # what is spent stays spent
            with pytest.raises(Stopped, match=r"max_calls 7: .* raise it to go on") as error:
                cached(endpoint(server.url, max_calls=7), tmp_path).respond(PROMPTS, SAMPLING, samples=2)
            assert (error.value.reason, len(error.value.answers)) == ("max_calls", 7)
        got = cached(endpoint(server.url, max_calls=12), tmp_path).respond(PROMPTS, SAMPLING, samples=2)
        assert len(server.requests) == 12
        assert got == endpoint(server.url).respond(PROMPTS, SAMPLING, samples=2)


KEY = cache_key("fake", "1", SAMPLING, 0, "prompt 0", 0)
LINE = f'"key":"{KEY}","model":"fake","revision":"1","sampling":{{}},"seed":0,"prompt":"prompt 0","sample":0,'
OLD = [
    "{" + LINE + '"answer":{"text":"kept","finish":"stop","prompt_tokens":8,"tokens":2,"ids":null,'
    '"thought":false},"calls":3,"retries":2,"seconds":0.5,"cost":0.25}',
    '{"model":"fake","revision":"1","calls":2,"retries":1,"seconds":1.5}',  # of what was never answered
    "{" + LINE + '"answer":{"text":"second","finish":"stop","prompt_tokens":8,"tokens":2},"calls":1,'
    '"retries":0,"seconds":0.5}',
]


@pytest.mark.parametrize("mutant", ["", "mutant"])
def test_the_lines_of_an_earlier_version_are_taken_over_once(tmp_path, mutant):
    """The mutant forgets that it did."""
    old = "".join(line + "\n" for line in OLD)
    (tmp_path / OLD_FILE).write_text(old)
    for _ in range(3):
        target = Fake()
        again = cached(target, tmp_path)
        assert again.respond(PROMPTS[:1], SAMPLING) == [[Answer("kept", "stop", 8, 2)]]
        assert not target.asked
        total = again.total()
        if mutant:
            again._store._db.execute("DELETE FROM imported")
    counts = (total.calls, total.retries, total.answers, total.tokens, total.seconds, total.cost)
    assert (counts == (6, 3, 2, 4, 2.5, 0.25)) == (not mutant)
    assert (tmp_path / OLD_FILE).read_text() == old


VERSION_1 = """
CREATE TABLE answers (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, line TEXT NOT NULL);
CREATE TABLE spent (owner TEXT PRIMARY KEY, calls INTEGER NOT NULL, retries INTEGER NOT NULL,
    answers INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL,
    thoughts INTEGER NOT NULL, seconds REAL NOT NULL, cost REAL);
CREATE TABLE under_way (owner TEXT, process TEXT, tokens INTEGER NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (owner, process));
CREATE TABLE imported (file TEXT PRIMARY KEY);
PRAGMA user_version = 1;
"""


@pytest.mark.parametrize("mutant", ["", "mutant"])
def test_a_file_of_the_first_form_is_gone_on_with(tmp_path, monkeypatch, mutant):
    """Before refusals were counted; the mutant does not change the table."""
    if mutant:
        monkeypatch.setattr(store, "_FROM_1", "SELECT 1")
    old = sqlite3.connect(tmp_path / FILE)
    old.executescript(VERSION_1)
    old.execute("INSERT INTO answers (key, line) VALUES (?, ?)", (bytes.fromhex(KEY), OLD[0]))
    old.execute('INSERT INTO spent VALUES (\'["fake", "1"]\', 3, 2, 1, 8, 2, 0, 0.5, 0.25)')
    old.commit()
    old.close()

    def goes_on():
        for again in range(2):
            target = cached(Fake(), tmp_path)
            assert target.respond(PROMPTS[:1], SAMPLING) == [[Answer("kept", "stop", 8, 2)]]
            assert target.respond(PROMPTS[1:2], SAMPLING)[0][0].text
            total = target.total()
            assert (total.calls, total.answers, total.refused, total.cost) == (4, 2, 0, 0.25), again
        assert target._store._db.execute("PRAGMA user_version").fetchone() == (2,)

    if mutant:
        with pytest.raises(AlignProError, match="no column named refused"):
            goes_on()
    else:
        goes_on()


def test_answers_leave_as_lines_and_come_back(tmp_path):
    want = cached(Fake(), tmp_path / "a", prices=Prices(1, 2)).respond(PROMPTS, SAMPLING, samples=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / OLD_FILE).write_text("\n".join(lines(tmp_path / "a")))
    target = Fake()
    again = cached(target, tmp_path / "b")
    assert again.respond(PROMPTS, SAMPLING, samples=2) == want
    assert not target.asked
    assert again.total().summary() == pytest.approx(
        cached(Fake(), tmp_path / "a").total().summary(), abs=1e-4
    )


def test_an_earlier_file_torn_in_its_last_line_is_whole_again(tmp_path):
    want = Fake().respond(PROMPTS[:2], SAMPLING)
    cached(Fake(), tmp_path / "whole").respond(PROMPTS[:2], SAMPLING)
    one, two = (line.encode() + b"\n" for line in lines(tmp_path / "whole"))
    for cut in sorted({0, 1, *range(2, len(two), 60), len(two) - 2, len(two) - 1, len(two)}):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / OLD_FILE).write_bytes(one + two[:cut])
        target = Fake()
        assert cached(target, folder).respond(PROMPTS[:2], SAMPLING) == want
        # All but the newline is an answer.
        assert target.asked == ([(PROMPTS[1], 0)] if cut < len(two) - 1 else [])


def test_damaged_lines_are_asked_again_and_said(tmp_path):
    want = cached(Fake(), tmp_path / "whole").respond(PROMPTS, SAMPLING)
    old = [line.encode() for line in lines(tmp_path / "whole")]
    old[1] = b"\xff\x00garbage"
    old[2] = b"[" * 50_000
    old[3] = old[3].replace(b'"text":"', b'"text":3,"x":"')
    old[4] = old[4].replace(b'"finish":"stop"', b'"finish":"maybe"')
    (tmp_path / OLD_FILE).write_bytes(b"\n".join(old) + b"\n")
    notes, target = [], Fake()
    assert cached(target, tmp_path, note=notes.append).respond(PROMPTS, SAMPLING) == want
    assert [p for p, _ in target.asked] == PROMPTS[1:5]
    assert "4 damaged lines" in notes[0]


def test_a_damaged_file_is_one_line_that_says_what_helps(tmp_path):
    """However it is damaged: never another answer, never a traceback."""
    want = cached(Fake(), tmp_path / "whole").respond(PROMPTS, SAMPLING, samples=20)
    data, page, told = (tmp_path / "whole" / FILE).read_bytes(), 4096, []
    assert not (tmp_path / "whole" / f"{FILE}-wal").exists()  # all is in the one file, once it is closed
    kinds = {"garbage": b"garbage " * 1000, "cut": data[: len(data) // 2], "short": data[:50]}
    kinds |= {"a line": data.replace(b'"finish":"stop"', b'"finish":"3top"')}
    kinds |= {"a letter": data.replace(b"CREATE TABLE", b"CREATE T\xacBLE", 1)}  # which SQLite quotes
    for i in range(len(data) // page):
        kinds[f"page {i} gone"] = data[: i * page] + bytes(page) + data[(i + 1) * page :]
    for kind, content in kinds.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / FILE).write_bytes(content)
        got, said = None, ""
        try:
            got = cached(Fake(), folder).respond(PROMPTS, SAMPLING, samples=20)
        except AlignProError as error:
            said = str(error)
        if said:
            assert "damaged" in said
            assert "move it away" in said
            assert "\n" not in said
            told.append(kind)
            (folder / FILE).unlink()  # the remedy
            got = cached(Fake(), folder).respond(PROMPTS, SAMPLING, samples=20)
        assert got == want
    assert {"garbage", "cut", "short", "a line", "a letter", "page 0 gone"} <= set(told)
    assert len(told) > len(kinds) / 2


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignProError, match=r"folder .*name a folder you can write to"):
        cached(Fake(), tmp_path / "file" / "x")
    with pytest.raises(AlignProError, match="name the folder of a run"):
        spent(tmp_path)
    newer = cached(Fake(), tmp_path / "newer")
    newer._store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(AlignProError, match="newer alignpro; update this one"):
        cached(Fake(), tmp_path / "newer")
    (tmp_path / FILE).mkdir()
    with pytest.raises(AlignProError, match=f"cannot read .*{FILE}"):
        cached(Fake(), tmp_path)


# The scripts below fork: each child is a process of its own, without paying for its imports.
COMMON = """
import contextlib, json, os, random, resource, signal, sqlite3, sys, time
from alignpro import locks
from alignpro.llm.targets import http, ledger, store
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Answer, Stopped, arrange, jobs
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.targets.ledger import Cached
SAMPLING = Sampling(max_tokens=9)
PROMPTS = [f"prompt {i}" for i in range(40)]
LOG = os.open("asked", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class Slow:
    name, revision, remote, retried, calls, salt = "slow", "1", False, 0, 0, ""
    def wait(self):
        time.sleep(0.001)
    def respond(self, prompts, sampling, *, first=0, samples=1, seed=0, on_answer=None):
        asked, answers = jobs(prompts, first, samples, seed), {}
        for p, i in asked:
            self.calls += 1
            os.write(LOG, json.dumps([prompts[p], i]).encode() + b"\\n")
            self.wait()
            answers[p, i] = Answer(f"{self.salt}{prompts[p]} {i}", "stop", 3, 2)
            if not LATE:
                on_answer(p, i, answers[p, i])
        if LATE:  # the mutant: written when all are there
            for (p, i), answer in answers.items():
                on_answer(p, i, answer)
        return arrange(asked, answers, len(prompts))

def forked(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid
LATE = False
"""

KILLS = (
    COMMON
    + """
url, kills, samples, LATE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "late"
asking = EndpointSettings("m", concurrency=4, backoff_s=1e-3, retries=20)
make = (lambda: Endpoint(url, asking)) if url else Slow
rng, killed = random.Random(0), 0
def done():
    if not url:
        return open("asked").read().count(chr(10))
    with contextlib.closing(sqlite3.connect(store.FILE)) as file:  # before this process forks again
        return file.execute("SELECT count(*) FROM answers").fetchone()[0]
Cached(make(), ".", note=None).total()
http.client_library()
for _ in range(kills):
    goal, patience = done() + rng.randint(1, 12 if url else 25), time.monotonic() + 20
    pid = forked(lambda: Cached(make(), ".", note=None).respond(PROMPTS, SAMPLING, samples=samples))
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while done() < goal and time.monotonic() < patience and not os.waitid(os.P_PID, pid, flags):
        time.sleep(0.004)
    time.sleep(rng.uniform(0, 0.002))
    os.kill(pid, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
LATE = False
target = Cached(make(), ".", note=None)
rows = target.respond(PROMPTS, SAMPLING, samples=samples)
texts = [[a.text for a in row] for row in rows]
print(json.dumps({"killed": killed, "hits": target.ledger.hits, "texts": texts}))
"""
)


def script(text, folder, *arguments):
    run = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def asks(folder):
    return (folder / "asked").read_text().splitlines()


def test_kill_9_loses_at_most_the_answer_in_flight(tmp_path):
    got = script(KILLS, tmp_path, "", 30, 20, "")
    assert got["killed"] >= 20
    assert got["texts"] == [[f"prompt {p} {i}" for i in range(20)] for p in range(40)]
    assert 0 < got["hits"] < 800  # the kills fell in the middle
    assert 800 <= len(asks(tmp_path)) <= 800 + got["killed"]
    total = spent(tmp_path)["slow"]
    assert total.answers == 800
    assert total.calls <= len(asks(tmp_path))


def test_answers_written_late_are_lost_to_kills(tmp_path):
    """The mutant of the test above."""
    got = script(KILLS, tmp_path, "", 10, 20, "late")
    assert len(asks(tmp_path)) > 800 + got["killed"]


def test_kill_9_over_a_failing_endpoint(tmp_path):
    rng, lock, answered = random.Random(0), threading.Lock(), []

    def fault(n, body):
        with lock:
            kind = rng.random()
            if kind >= 0.3:
                answered.append(n)
                return None
        return "close" if kind < 0.1 else (429, {"retry-after": "0"}, b"") if kind < 0.2 else (200, {}, b"{")

    with Server(fault) as server:
        got = script(KILLS, tmp_path, server.url, 12, 10, "")
        clean = endpoint(server.url, backoff_s=1e-3).respond
        server.fault = lambda n, body: None
        want = clean([f"prompt {i}" for i in range(40)], SAMPLING, samples=10)
    assert got["killed"] >= 8
    assert got["texts"] == [[a.text for a in row] for row in want]
    assert 400 <= len(answered) <= 400 + got["killed"] * 4  # those in flight


TWO = (
    COMMON
    + """
import multiprocessing
both = multiprocessing.Barrier(2)
def work(name):
    target = Slow()
    target.wait = lambda: both.wait(60)  # neither is ahead: each answer is a race of its own
    target.salt = name  # the two disagree, so each must take what the other wrote first
    rows = Cached(target, ".", note=None).respond(PROMPTS[:10], SAMPLING, samples=10)
    open(name, "w").write(json.dumps([[a.text for a in row] for row in rows]))
if sys.argv[1] == "mutant":
    add = store.Store.add
    def own(self, owner, spent, line=None, lasting=False):
        add(self, owner, spent, line, lasting)
        return line and Answer(**line["answer"])
    store.Store.add = own
pids = [forked(lambda: work(name)) for name in ("one", "two")]
codes = [os.waitpid(pid, 0)[1] for pid in pids]
print(json.dumps([codes, json.load(open("one")), json.load(open("two"))]))
"""
)


@pytest.mark.parametrize("mutant", ["", "mutant"])
def test_two_processes_on_one_file_agree(tmp_path, mutant):
    codes, one, two = script(TWO, tmp_path, mutant)
    assert codes == [0, 0]
    assert (one == two) == (not mutant)
    assert len(lines(tmp_path)) == 100
    third = Fake()
    third.name = "slow"
    again = cached(third, tmp_path).respond([f"prompt {i}" for i in range(10)], SAMPLING, samples=10)
    assert not third.asked
    assert mutant or [[a.text for a in row] for row in again] == one


FORKS = (
    COMMON
    + """
import gc
from multiprocessing import get_context
if sys.argv[1] == "mutant":
    store.Store.before_fork = lambda self: self._lock.acquire()
mine, fork = Cached(Slow(), ".", note=None), get_context("fork")
mine.total()
begun, go = fork.Semaphore(0), fork.Event()
def work(name, inherited):
    target = mine if inherited else Cached(Slow(), ".", note=None)
    target.respond(PROMPTS[:1], SAMPLING)
    begun.release()
    go.wait(60)
    target.respond(PROMPTS, SAMPLING, samples=20)
    open(name, "w").write(target._store._process)
pids = [forked(lambda: work(name, name == "heir")) for name in ("heir", "own")[sys.argv[1] == "mutant":]]
for _ in pids:
    begun.acquire(timeout=60)
names = {mine._store._process}
mine.respond(PROMPTS[:2], SAMPLING, samples=20)  # this process goes on as well
del mine
gc.collect()
go.set()
codes = [os.waitpid(pid, 0)[1] for pid in pids]
with contextlib.closing(sqlite3.connect(store.FILE)) as file:
    kept = file.execute("SELECT count(*) FROM answers").fetchone()[0]
names |= {open(name).read() for name in ("heir", "own") if os.path.exists(name)}
print(json.dumps([codes, kept, len(names)]))
"""
)


def test_a_process_that_forks_with_its_file_open_loses_nothing(tmp_path):
    """Whether its copy goes on with the same object or with one of its own; nor does a copy book in the
    name of the process that it was made from."""
    assert script(FORKS, tmp_path, "") == [[0, 0], 800, 3]


def test_answers_are_lost_to_a_process_that_forks_with_its_file_open(tmp_path):
    """The mutant of the test above: the copy holds no lock, so that whose file it was takes its log away."""
    codes, kept, _ = script(FORKS, tmp_path, "mutant")
    assert codes == [0]
    assert kept < 800


FULL = (
    COMMON
    + """
target, out = Cached(Slow(), ".", note=None), {}
target.total()
limit = os.path.getsize(store.FILE + "-wal") + 200_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
if sys.argv[1] == "mutant":
    @contextlib.contextmanager
    def no_transaction(self, lasting=False):
        with self._lock, self._told():
            yield
    store.Store._transaction = no_transaction
try:
    target.respond(PROMPTS, SAMPLING)
except Stopped as error:
    out["error"], out["answers"], out["reason"] = str(error), len(error.answers), error.reason
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
out["total"] = target.total().answers
last = Cached(Slow(), ".", note=None)
out["texts"] = [row[0].text for row in last.respond(PROMPTS, SAMPLING)]
out["hits"] = last.ledger.hits
print(json.dumps(out))
"""
)


@pytest.mark.parametrize("mutant", ["", "mutant"])
def test_a_full_disk_is_one_error_and_the_file_stays_whole(tmp_path, mutant):
    """The limit cuts a write short, as a full disk does. The mutant keeps counts without answers."""
    got = script(FULL, tmp_path, mutant)
    assert f"cannot write {FILE}" in got["error"]
    assert "free space and run again" in got["error"]
    assert "\n" not in got["error"]
    assert 0 < got["hits"] < 40
    assert got["answers"] == got["hits"] + 1  # the error carries the one that could not be written
    assert (got["total"] == got["hits"]) == (not mutant)
    assert got["texts"] == [f"prompt {i} 0" for i in range(40)]
    assert len(asks(tmp_path)) == 40 + 1


def test_a_full_disk_below_an_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        target = cached(endpoint(server.url, concurrency=2), tmp_path)
        want = target.respond(PROMPTS[:2], SAMPLING)
        longer = [*PROMPTS[:2], *("x" * 5000 + prompt for prompt in PROMPTS)]
        file = target._store._db
        (pages,) = file.execute("PRAGMA page_count").fetchone()
        file.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(Stopped, match=r"cannot write .* disk is full; free space") as error:
            target.respond(longer, SAMPLING)
        assert (0, 0) in error.value.answers
        assert len(error.value.answers) == len(server.requests)  # what was paid for is there
        file.execute(f"PRAGMA max_page_count = {pages + 1000}")
        assert target.respond(longer, SAMPLING)[:2] == want


# --- several processes ---


BUDGET = (
    COMMON
    + """
url, kind, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
http.client_library()
if sys.argv[4] == "mutant":
    store.Store.meter = lambda *_: None
if sys.argv[4] == "nothing locks":
    def unsupported(*_):
        raise OSError(37, "no locks here")
    locks.fcntl.lockf = locks.fcntl.flock = unsupported
def work(name):
    target = Endpoint(url, EndpointSettings("m", concurrency=4, backoff_s=1e-3, retries=20, **{kind: most}))
    try:
        Cached(target, ".", note=None).respond([f"{name} {i}" for i in range(60)], SAMPLING)
    except Stopped as error:
        open(name, "w").write(json.dumps([error.reason, target.calls, target.tokens]))
pids = [forked(lambda: work(name)) for name in "abcd"]
codes = [os.waitpid(pid, 0)[1] for pid in pids]
print(json.dumps([codes, [json.load(open(name)) for name in "abcd" if os.path.exists(name)]]))
"""
)


@pytest.mark.parametrize("how", ["", "mutant", "nothing locks"])
@pytest.mark.parametrize(("kind", "most"), [("max_calls", 50), ("max_tokens", 400)])
def test_four_processes_hold_one_budget(tmp_path, kind, most, how):
    """Each of the mutant's has it for itself."""
    mutant = how == "mutant"
    rng, lock = random.Random(0), threading.Lock()

    def fault(n, body):
        with lock:
            return (500, {}, b"") if rng.random() < 0.2 else None  # retries count

    with Server(fault) as server:
        codes, ends = script(BUDGET, tmp_path, server.url, kind, most, how)
        requests = len(server.requests)
    assert codes == [0] * 4
    assert [reason for reason, _, _ in ends] == [kind] * 4
    calls, tokens = (sum(end[i] for end in ends) for i in (1, 2))
    assert calls == requests
    total = spent(tmp_path)["m"]
    assert (total.calls == calls) == (not mutant)
    assert total.prompt_tokens + total.tokens == tokens
    if kind == "max_calls":
        assert (calls == most) == (not mutant)
    else:
        # One more did not fit.
        assert (most - SAMPLING.max_tokens - 8 - 2 < tokens <= most) == (not mutant)


@pytest.mark.parametrize("mutant", [False, True])
def test_what_another_has_on_file_by_now_is_not_paid_for_again(tmp_path, monkeypatch, mutant):
    """The mutant looks only before it begins."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    arrived, go = threading.Event(), threading.Event()

    def fault(n, body):
        if n == 0:
            arrived.set()
            go.wait(20)

    if mutant:
        respond = Endpoint.respond
        monkeypatch.setattr(Endpoint, "respond", lambda *a, known, **options: respond(*a, **options))
    with Server(fault) as server:
        first, got = cached(endpoint(server.url, concurrency=1), tmp_path), []
        thread = threading.Thread(target=lambda: got.extend(first.respond(PROMPTS, SAMPLING, samples=2)))
        thread.start()
        assert arrived.wait(20)
        second = cached(endpoint(server.url), tmp_path)
        want = second.respond(PROMPTS, SAMPLING, samples=2)
        go.set()
        thread.join(20)
        assert got == want
        assert len(server.requests) == (24 if mutant else 13)
        assert first.ledger.hits == (0 if mutant else 11)
        assert second.total().calls == len(server.requests)


def check_killed(module, folder):
    """What a killed process booked counts as spent, since the service may have given it."""
    settings = EndpointSettings("m", max_tokens=100, timeout_s=1.0)
    file, another = module.Store(folder), module.Store(folder)
    meter, other = file.meter("x"), another.meter("x")
    assert meter.book(settings, 60, False) is None
    assert other.book(settings, 60, False) == "wait"
    now, later = module.time.time, time.time() + 60
    module.time.time = lambda: later
    try:
        assert other.book(settings, 60, False) == "max_tokens"
        assert other.book(settings, 30, False) is None
        assert other.book(settings, 30, False) == "wait"
        other.settle(30)
        assert other.book(settings, 41, False) == "max_tokens"
        assert other.book(replace(settings, max_tokens=101), 41, False) is None
    finally:
        module.time.time = now
    assert another.spent()["x"]["calls"] == 3


def test_a_killed_process_has_spent_what_it_booked(tmp_path):
    (tmp_path / "right").mkdir()
    check_killed(store, tmp_path / "right")
    for i, (right, wrong) in enumerate(
        [
            ("FROM under_way WHERE owner = ? AND tokens", "FROM under_way WHERE owner = ? AND until > 1e12"),
            ("if booked and until > time.time()", "if booked"),
            ("tokens = tokens - ?", "tokens = tokens - 0 * ?"),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        kills(lambda module, i=i: check_killed(module, tmp_path / str(i)), mutated(store, right, wrong))


def nothing_locks(monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(locks.fcntl, "lockf", unsupported)
    monkeypatch.setattr(locks.fcntl, "flock", unsupported)


def check_locks_by_folder(module, folder, monkeypatch, code):
    file, lock = folder / FILE, folder / f"{FILE}.lock"
    monkeypatch.setattr(module, "BUSY_S", 0.1)
    with monkeypatch.context() as here:
        nothing_locks(here, code)
        first = module.Store(folder)
        first.add("x", {"calls": 1})
    second = module.Store(folder)  # whose locks work again, and who must do as the first
    for each in (first, second):
        assert each._db.execute("PRAGMA journal_mode").fetchone() == ("truncate",)
        each._db.execute("BEGIN IMMEDIATE")
        assert lock.is_dir()
        each._db.execute("COMMIT")
        assert not lock.exists()
    assert sqlite3.connect(file).execute("SELECT calls FROM spent").fetchone() == (1,)
    lock.mkdir()  # by a process that lives
    ended = threading.Event()

    def touch():
        while not ended.wait(0.02):
            with contextlib.suppress(FileNotFoundError):  # a mutant's work
                os.utime(lock)

    living = threading.Thread(target=touch)
    living.start()
    try:
        with pytest.raises(AlignProError, match="another process has it"):
            first.add("x", {"calls": 1})
    finally:
        ended.set()
        living.join()
    second.add("x", {"calls": 1})
    assert first.spent()["x"]["calls"] == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_that_locks_nothing(tmp_path, monkeypatch, code):
    (tmp_path / "right").mkdir()
    check_locks_by_folder(store, tmp_path / "right", monkeypatch, code)
    for i, (right, wrong) in enumerate(
        [
            ("if mine and locks.age(self._folder_lock) > 2 * BUSY_S:", "if mine:"),
            ("if mine and locks.age(self._folder_lock) > 2 * BUSY_S:", "if False:"),
            ("if not by_folder.exists() and not", "by_folder.unlink(missing_ok=True)\n        if not"),
        ]
    ):
        (tmp_path / str(i)).mkdir()

        def check(module, i=i):
            try:
                check_locks_by_folder(module, tmp_path / str(i), monkeypatch, code)
            except (AlignProError, sqlite3.Error, pytest.fail.Exception) as error:
                raise AssertionError from error

        kills(check, mutated(store, right, wrong))


def test_no_write_ahead_log_where_machines_share_the_folder(tmp_path, monkeypatch):
    """It needs memory that processes share."""
    assert Store(tmp_path)._wal == (not locks.several_machines(tmp_path))
    monkeypatch.setattr(locks, "several_machines", lambda _: True)
    assert not (file := Store(tmp_path))._wal
    assert file._db.execute("PRAGMA journal_mode").fetchone() == ("truncate",)


def check_scores(module, folder):
    """Scores lie beside the answers that runs share, so that their budget is one; those of a run that was
    begun with its own stay."""

    def file(run, shared):
        settings = EnvironmentSettings(reward=("http://127.0.0.1:1/x@0,1",), answers_folder=shared)
        return module.World(settings).reward(folder / run)._cached._store.path.parent

    shared = str(folder / "shared")
    assert file("alone", None) == folder / "alone" / "scores"
    assert file("one", shared) == file("two", shared) == folder / "shared" / "scores"
    assert file("alone", shared) == folder / "alone" / "scores"


def test_runs_that_share_answers_share_the_budget_of_scores(tmp_path):
    check_scores(opening, tmp_path / "right")
    for i, (right, wrong) in enumerate(
        [
            ("is not None and not scores.exists()", "is not None"),
            ('.expanduser() / "scores"', ' / ".." / folder'),
        ]
    ):
        kills(lambda module, i=i: check_scores(module, tmp_path / str(i)), mutated(opening, right, wrong))


def test_neither_fcntl_nor_torch_is_needed(tmp_path):
    """So on Windows."""
    code = "import sys; sys.modules['fcntl'] = None\n" + COMMON.replace("resource, signal, ", "")
    code += "Cached(Slow(), '.', note=None).respond(PROMPTS[:2], SAMPLING)\n"
    code += "print(json.dumps(['torch' in sys.modules, Cached(Slow(), '.', note=None).total().answers]))"
    assert script(code, tmp_path) == [False, 2]
