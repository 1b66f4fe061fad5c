"""Cache and ledger: nothing asked twice, nothing lost to kills, faults or full disks, every cost counted."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest
from faulty import Server

from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import EVALUATION, Sampling
from alignpro.llm.targets import ledger
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.ledger import FILE, Cached, Prices, cache_key, spent
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Answer, Stopped, arrange, jobs

SAMPLING = Sampling(max_tokens=9)
PROMPTS = [f"prompt {i}" for i in range(6)]


class Fake:
    """Answers by hashing; `salt` makes two of them disagree. `fail_at` raises at that call."""

    name, revision, remote, retried = "fake", "1", False, 0

    def __init__(self, salt="", fail_at=None):
        self.salt, self.fail_at, self.calls, self.asked = salt, fail_at, 0, []

    def stop(self):
        pass

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
    before = target.estimate(PROMPTS, SAMPLING, samples=2)
    assert (before.calls, before.hits, before.seconds) == (12, 0, None)
    assert not events
    target.respond(PROMPTS, SAMPLING, samples=2)
    assert events[1] == "asked"
    assert events[0] == f"fake: {before.line()}"
    assert target.ledger.calls == before.calls
    assert target.ledger.tokens <= before.tokens == 12 * 9
    assert before.prompt_tokens >= 12 * 2
    assert target.ledger.cost <= before.cost
    assert before.cost == pytest.approx((before.prompt_tokens + 2 * before.tokens) / 1e6)
    after = target.estimate([*PROMPTS, "new", "new"], SAMPLING, samples=3)
    assert (after.calls, after.hits) == (6 + 3, 12)
    assert after.seconds > 0
    target.respond(PROMPTS, SAMPLING, samples=2)
    assert len(events) == 2  # nothing to ask, nothing to say
    local = LocalTarget(tiny_model())
    assert cached(local, tmp_path).estimate(["abc"], SAMPLING, samples=2).prompt_tokens == 6


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
        with pytest.raises(Stopped) as error:
            cached(endpoint(server.url, max_calls=7), tmp_path).respond(PROMPTS, SAMPLING, samples=2)
        assert (error.value.reason, len(error.value.answers)) == ("max_calls", 7)
        got = cached(endpoint(server.url, max_calls=5), tmp_path).respond(PROMPTS, SAMPLING, samples=2)
        assert len(server.requests) == 12
        assert got == endpoint(server.url).respond(PROMPTS, SAMPLING, samples=2)


def test_a_file_torn_anywhere_in_its_last_line_is_whole_again(tmp_path):
    want = Fake().respond(PROMPTS[:2], SAMPLING)
    cached(Fake(), tmp_path / "whole").respond(PROMPTS[:2], SAMPLING)
    data = (tmp_path / "whole" / FILE).read_bytes()
    start = data.index(b"\n") + 1
    for cut in range(start, len(data)):
        (tmp_path / FILE).write_bytes(data[:cut])
        target = Fake()
        assert cached(target, tmp_path).respond(PROMPTS[:2], SAMPLING) == want
        # All but the newline is still an answer, once something follows it.
        assert target.asked == [(PROMPTS[1], 0)]
        fresh = Fake()
        reread = cached(fresh, tmp_path)
        assert reread.respond(PROMPTS[:2], SAMPLING) == want
        assert not fresh.asked


def test_damaged_lines_are_asked_again_and_said(tmp_path):
    want = cached(Fake(), tmp_path).respond(PROMPTS, SAMPLING)
    lines = (tmp_path / FILE).read_bytes().splitlines()
    lines[1] = b"\xff\x00garbage"
    lines[2] = b"[" * 50_000
    lines[3] = lines[3].replace(b'"text":"', b'"text":3,"x":"')
    lines[4] = lines[4].replace(b'"finish":"stop"', b'"finish":"maybe"')
    (tmp_path / FILE).write_bytes(b"\n".join(lines) + b"\n")
    notes, target = [], Fake()
    assert cached(target, tmp_path, note=notes.append).respond(PROMPTS, SAMPLING) == want
    assert [p for p, _ in target.asked] == PROMPTS[1:5]
    assert "4 damaged lines" in notes[0]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignProError, match=r"folder .*name a folder you can write to"):
        cached(Fake(), tmp_path / "file" / "x")
    with pytest.raises(AlignProError, match="name the folder of a run"):
        spent(tmp_path)
    (tmp_path / FILE).mkdir()
    with pytest.raises(AlignProError, match=f"cannot read .*{FILE}"):
        cached(Fake(), tmp_path)


# The scripts below fork: each child is a process of its own, without paying for its imports.
COMMON = """
import json, os, random, resource, signal, sys, time
from alignpro.llm.targets import ledger
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
for _ in range(kills):
    pid = forked(lambda: Cached(make(), ".", note=None).respond(PROMPTS, SAMPLING, samples=samples))
    time.sleep(rng.uniform(0.005, 0.04))
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
        got = script(KILLS, tmp_path, server.url, 20, 10, "")
        clean = endpoint(server.url, backoff_s=1e-3).respond
        server.fault = lambda n, body: None
        want = clean([f"prompt {i}" for i in range(40)], SAMPLING, samples=10)
    assert got["killed"] >= 10
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
    append = ledger._File.append
    def own(self, row):
        append(self, row)
        return Answer(**row["answer"])
    ledger._File.append = own
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
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert len({line["key"] for line in lines}) == 100
    third = Fake()
    third.name = "slow"
    again = cached(third, tmp_path).respond([f"prompt {i}" for i in range(10)], SAMPLING, samples=10)
    assert not third.asked
    assert mutant or [[a.text for a in row] for row in again] == one


FULL = (
    COMMON
    + """
if sys.argv[1] == "mutant":
    os.ftruncate = lambda *_: None
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
target, out = Cached(Slow(), ".", note=None), {}
try:
    target.respond(PROMPTS, SAMPLING)
except Stopped as error:
    out["error"], out["answers"], out["reason"] = str(error), len(error.answers), error.reason
data = open("answers.jsonl", "rb").read()
out["whole"], out["lines"] = data.endswith(b"\\n"), len(data.splitlines())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
last = Cached(Slow(), ".", note=None)
out["texts"] = [row[0].text for row in last.respond(PROMPTS, SAMPLING)]
out["hits"] = last.ledger.hits
print(json.dumps(out))
"""
)


@pytest.mark.parametrize("mutant", ["", "mutant"])
def test_a_full_disk_is_one_error_and_the_file_stays_readable(tmp_path, mutant):
    """The limit cuts a write short, as a full disk does. The mutant leaves the half line there."""
    got = script(FULL, tmp_path, mutant)
    assert f"cannot write {FILE}" in got["error"]
    assert "free space and run again" in got["error"]
    assert "\n" not in got["error"]
    assert got["whole"] == (not mutant)
    # The answer that could not be written is carried by the error.
    assert got["answers"] == got["lines"] + (not mutant) == got["hits"] + 1
    assert got["texts"] == [f"prompt {i} 0" for i in range(40)]
    assert len(asks(tmp_path)) == 40 + 1


def test_a_full_disk_below_an_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write, full = os.write, False

    def no_space(handle, data):
        if full:
            raise OSError(28, "No space left on device")
        return write(handle, data)

    with Server() as server:
        target = cached(endpoint(server.url, concurrency=2), tmp_path)
        want = target.respond(PROMPTS[:2], SAMPLING)
        full = True
        monkeypatch.setattr(ledger.os, "write", no_space)
        with pytest.raises(Stopped, match="No space left on device") as error:
            target.respond(PROMPTS, SAMPLING)
        assert (0, 0) in error.value.answers
        assert len(error.value.answers) == len(server.requests)  # what was paid for is there
        full = False
        assert target.respond(PROMPTS, SAMPLING)[:2] == want
