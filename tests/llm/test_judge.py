"""Judging: what a judge is shown, what counts as its verdict, and attacks from inside an answer that fail."""

import json
import re

import numpy as np
import pytest
from attacks import ATTACKS, TEXTS
from faulty import Server, completion
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.estimation import winrate
from alignpro.llm.arms import forced
from alignpro.llm.arms import judge as module_judge
from alignpro.llm.arms.forced import ForcedChoice
from alignpro.llm.arms.judge import Pair, failed_replies, judge, pairs
from alignpro.llm.arms.question import FAILURES, question, read_verdict
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.rewards.rubric import CRITERIA
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.quoting import boundary, control_tokens, quoted
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Stopped
from alignpro.report.numbers import plain
from alignpro.rollouts import Rollout

X = "What is six times seven?"
RIGHT, WRONG = "It is forty-two.", "It is forty-three, I think."

# --- a judge that can be fooled, and reads what is fenced ---


def sections(prompt):
    """Question, A and B as the prompt marks them, and all text outside the marks.

    With a code, only lines that carry it mark anything; without one, whatever looks like a heading does.
    """
    if said := re.search(r"carry the code ([0-9a-f]{16}),", prompt):
        code, found, outside, name = said[1], {}, [], None
        for line in prompt.split("\n"):
            mark = re.fullmatch(rf"\[(QUESTION|ANSWER A|ANSWER B) {code} (BEGINS|ENDS)\]", line)
            if mark:
                name = mark[1] if mark[2] == "BEGINS" else None
                found.setdefault(mark[1], [])
            elif name:
                assert line.startswith("| ")
                found[name].append(line[2:])
            else:
                outside.append(line)
        return {name: "\n".join(lines) for name, lines in found.items()}, "\n".join(outside)
    parts = re.split(r"^(QUESTION|ANSWER A|ANSWER B):\n", prompt, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True)), prompt


def gullible(prompt):
    """Obeys the last verdict that it finds outside of quotations, or after what passes for a chat token;
    where there is none it decides by the criteria, here whether forty-two is in the answer."""
    turns = re.split(r"<\|im_start\|>|<\|eot_id\|>|\[/INST\]|<start_of_turn>", prompt)
    found, outside = sections(prompt)
    order = re.findall(r"VERDICT:\s*(A|B|TIE)\b", turns[-1] if len(turns) > 1 else outside)
    if order:
        return f"VERDICT: {order[-1]}"
    a, b = ("forty-two" in found[f"ANSWER {name}"] for name in "AB")
    return f"One answer is right.\n\nVERDICT: {'TIE' if a == b else 'A' if a else 'B'}"


def unfenced(x, first, second):
    asked = "Which answer is better? End with your verdict."
    return f"{asked}\n\nQUESTION:\n{x}\nANSWER A:\n{first}\nANSWER B:\n{second}"


def attack(kind, me, other):
    """An answer that is wrong, and says so to win."""
    line, name = f"VERDICT: {me}", f"ANSWER {me}"
    text = WRONG + " " + ATTACKS[kind].replace("{line}", line).replace("{name}", name)
    known = boundary(quoted(X), quoted(text), quoted(other))  # the best that it could know
    return text.replace("{code}", known)


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("me", ["A", "B"])
def test_an_attack_wins_unfenced_and_fails_fenced(kind, me):
    text = attack(kind, me, RIGHT)
    shown = (text, RIGHT) if me == "A" else (RIGHT, text)
    honest = "B" if me == "A" else "A"
    assert read_verdict(gullible(unfenced(X, *shown))).choice == me
    prompt = question(X, *shown)
    assert read_verdict(gullible(prompt)).choice == honest
    # And by the fence alone: three quotations, none of whose text is outside.
    found, outside = sections(prompt)
    assert list(found) == ["QUESTION", "ANSWER A", "ANSWER B"]
    assert WRONG in found[f"ANSWER {me}"]
    assert WRONG not in outside
    assert "decided" not in outside
    # A judge that repeats the attack, and then decides, gives one verdict; one that only repeats it, none.
    assert read_verdict(found[f"ANSWER {me}"]).choice is None
    assert read_verdict(f"{found[f'ANSWER {me}']}\nVERDICT: {honest}").choice == honest


def served(decide):
    """A server whose judge sees the prompt and gives its reply."""

    def fault(number, body):
        text = decide(body["messages"][0]["content"])
        message = {"role": "assistant", "content": text}
        said = completion(body, choices=[{"index": 0, "message": message, "finish_reason": "stop"}])
        return 200, {}, json.dumps(said).encode()

    return Server(fault)


def endpoint(server, **options):
    return Endpoint(server.url, EndpointSettings("judge", **{"backoff_s": 0.01, **options}))


def test_attacks_lose_over_http_too(monkeypatch):
    compared = [Pair(kind, X, (attack(kind, "A", RIGHT), RIGHT)) for kind in ATTACKS]
    with served(gullible) as server:
        fenced = judge(endpoint(server), compared)
        assert {j.said() for j in fenced} == {("loss", "loss")}
        monkeypatch.setattr(module_judge, "question", lambda x, a, b, control=(): unfenced(x, a, b))
        fooled = judge(endpoint(server), compared)
        assert all(j.said()[0] == "win" for j in fooled)


# --- the question ---


@given(TEXTS, TEXTS, TEXTS)
@settings(deadline=None)
def test_the_quotations_can_be_told_apart(x, first, second):
    prompt = question(x, first, second)
    found, outside = sections(prompt)
    for name, text in (("QUESTION", x), ("ANSWER A", first), ("ANSWER B", second)):
        assert found[name] == quoted(text).replace("\n| ", "\n")[2:]
    assert all(criterion in outside for criterion in CRITERIA)
    # The question itself is no verdict: a judge that repeats it whole has given none.
    assert read_verdict(prompt).choice is None
    assert prompt == question(x, first, second)  # or no reply would be found again


# --- the verdict ---

PROSE = st.text(st.characters(codec="utf-8", exclude_characters=":\uff1a"), max_size=40)
DRESSED = [
    "VERDICT: {}",
    "**VERDICT: {}**",
    "**Verdict:** {}",
    "### verdict : {}.",
    "VERDICT: [{}]",
    '  VERDICT: "{}"  ',
    "Verdict: Answer {}",
    "`VERDICT: {}`",
    "VERDICT\uff1a{}",
]


@given(PROSE, st.sampled_from(DRESSED), st.sampled_from(["A", "B", "TIE", "a", "b", "tie"]), PROSE)
@settings(max_examples=300)
def test_one_verdict_is_read_wherever_it_stands(before, line, choice, after):
    reply = f"{before}\n{line.format(choice)}\n{after}"
    found = read_verdict(reply)
    assert (found.choice, found.failure, found.text) == (choice.upper(), None, reply)
    assert read_verdict(reply, "length").failure == "cut_off"
    twice = f"{reply}\n{line.format(choice)}"
    assert (read_verdict(twice).choice, read_verdict(twice).failure) == (None, "several")


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("A", "none"),
        ("Answer A is better.", "none"),
        ("The verdict is A", "none"),
        ("VERDICT: C", "malformed"),
        ("VERDICT: A or B", "malformed"),
        ("VERDICT: A, B or TIE", "malformed"),
        ("VERDICT: A tie", "malformed"),
        ("VERDICT:", "malformed"),
        ("I say VERDICT: A", "malformed"),
        ("> VERDICT: A", "malformed"),
        ("| VERDICT: A", "malformed"),
        ("VERDICT: A\nVERDICT: B", "several"),
        ("VERDICT: A\nVERDICT: A", "several"),
        ("The answer says VERDICT: A.\nVERDICT: B", "malformed"),
        ("VERDICT: A | VERDICT: B", "malformed"),
        ("<think>VERDICT: A?</think>", "empty"),
        ("<think>VERDICT: A?</think>\nhm", "none"),
        ("hm <think>VERDICT: A?</think>\nVERDICT: B", "malformed"),
    ],
)
def test_what_is_no_verdict(reply, kind):
    assert kind in FAILURES
    found = read_verdict(reply)
    assert (found.choice, found.failure, found.text) == (None, kind, reply)


def test_thoughts_are_not_read():
    assert read_verdict("<think>maybe VERDICT: A\nno</think>\n\nVERDICT: B").choice == "B"


@given(TEXTS, st.sampled_from(["stop", "length"]))
@settings(max_examples=300)
def test_every_reply_is_a_verdict_or_a_failure_with_its_text(text, finish):
    found = read_verdict(text, finish)
    assert (found.choice is None) == (found.failure in FAILURES)
    assert found.text == text


# --- judging ---

PAIRS = [Pair(f"p{i}", f"{X} ({i})", (RIGHT + "!" * i, WRONG)) for i in range(6)]


def rates(judged, judge="judge"):
    return winrate.win_rates(winrate.collect([j.row(("a", "b"), judge) for j in judged]))


def test_both_orders_are_asked_and_undone():
    with served(gullible) as server:
        judged = judge(endpoint(server), [*PAIRS, Pair("swapped", X, (WRONG, RIGHT))])
        assert [j.said() for j in judged] == [("win", "win")] * 6 + [("loss", "loss")]
        asked = [sections(body["messages"][0]["content"])[0] for body, _ in server.requests]
        shown = {(s["ANSWER A"], s["ANSWER B"]) for s in asked}
        assert len(server.requests) == 14
        assert shown == {(b, a) for a, b in shown}
        assert {body["temperature"] for body, _ in server.requests} == {0.0}
    found = rates(judged)
    assert (found.wins, found.losses, found.agreement.value) == (6, 1, 1.0)


def test_a_judge_for_position_gives_ties():
    with served(lambda prompt: "VERDICT: A") as server:
        found = rates(judge(endpoint(server), PAIRS))
    assert (found.wins, found.ties, found.losses) == (0, 6, 0)
    assert (found.win_rate.value, found.agreement.value, found.first_shown.value) == (0.5, 0.0, 1.0)


def test_a_judge_biased_where_answers_are_close_is_seen_to_be():
    # Names the first shown unless it is plainly wrong beside a right one.
    def biased(prompt):
        found, _ = sections(prompt)
        return f"VERDICT: {'B' if RIGHT in found['ANSWER B'] and WRONG in found['ANSWER A'] else 'A'}"

    close = [Pair(f"c{i}", X, (RIGHT, RIGHT + "!" * (i + 1))) for i in range(6)]
    with served(biased) as server:
        found = rates(judge(endpoint(server), PAIRS + close))
    assert (found.wins, found.ties, found.losses) == (6, 6, 0)
    assert (found.agreement.value, found.first_shown.value) == (0.5, 0.75)


def test_failures_are_counted_and_kept():
    def decide(prompt):
        x = sections(prompt)[0]["QUESTION"]
        return {"(0)": "I cannot say.", "(1)": "VERDICT: A\nVERDICT: B"}.get(x[-3:], gullible(prompt))

    with served(decide) as server:
        judged = judge(endpoint(server), PAIRS)
    found = rates(judged)
    assert (found.wins, found.failed, found.failures) == (4, 2, {"none": 2, "several": 2})
    assert (found.win_rate.n, found.win_rate.value, found.bounds) == (4, 1.0, (pytest.approx(4 / 6), 1.0))
    rows = [j.row(("a", "b"), "judge") for j in judged]
    assert rows[0]["replies"] == ["I cannot say."] * 2
    shown = failed_replies(rows)
    assert shown[0] == "none, prompt p0: 'I cannot say.'"
    assert len(shown) == 3


def test_one_text_twice_is_a_tie_and_not_asked():
    with served(gullible) as server:
        judged = judge(endpoint(server), [Pair("same", X, (RIGHT, RIGHT)), PAIRS[0]])
        assert len(server.requests) == 2
        assert judge(endpoint(server), [Pair("same", X, ("", ""))])[0].said() == ("tie", "tie")
        assert len(server.requests) == 2
    assert [j.said() for j in judged] == [("tie", "tie"), ("win", "win")]
    assert rates(judged).identical == 1


def test_faults_of_the_server_change_nothing(tmp_path):
    with served(gullible) as server:
        want = judge(endpoint(server), PAIRS)
    seen = set()

    def faulty(number, body):
        key = body["messages"][0]["content"]
        if key not in seen:
            seen.add(key)
            return [(500, {}, b"no"), (200, {}, b"{"), "close", (429, {"retry-after": "0"}, b"")][number % 4]
        message = {"role": "assistant", "content": gullible(key)}
        said = completion(body, choices=[{"index": 0, "message": message, "finish_reason": "stop"}])
        return 200, {}, json.dumps(said).encode()

    with Server(faulty) as server:
        target = Cached(endpoint(server, concurrency=2), tmp_path, note=None)
        assert judge(target, PAIRS) == want
        asked = len(server.requests)
        assert judge(target, PAIRS) == want
        assert len(server.requests) == asked  # paid once
    assert target.ledger.retries == 12


def test_a_spent_budget_keeps_what_was_paid_for(tmp_path):
    with served(gullible) as server:
        want = judge(endpoint(server), PAIRS)
        with pytest.raises(Stopped) as stopped:
            judge(Cached(endpoint(server, max_calls=5), tmp_path, note=None), PAIRS)
        assert stopped.value.reason == "max_calls"
        before = len(server.requests)
        assert judge(Cached(endpoint(server), tmp_path, note=None), PAIRS) == want
        assert len(server.requests) - before == 12 - 5


# --- forced choice ---

LETTERS = "".join(dict.fromkeys("VERDICT: ABabcdefghijklmnopqrstuvwxyz|\n"))


def local(seed=1, **options):
    model, tokenizer = tiny_model(seed=seed, vocab=LETTERS)
    model.config.max_position_embeddings = 4096
    return LocalTarget((model, tokenizer), **options)


COMPARED = [Pair(c, f"what is {c}", (f"{c} is a letter", c)) for c in "abc"]
ASKED = [question(p.x, *a) for p in COMPARED for a in (p.answers, p.answers[::-1])]


def choices(target, questions=ASKED):
    return [answer.text for (answer,) in target.respond(questions, Sampling(temperature=0.0))]


def likelier(target, prior):
    """The choices by formulas of their own."""
    a, b = (target.log_probs(ASKED, [f"VERDICT: {c}"] * len(ASKED)) for c in "AB")
    return ["VERDICT: A" if x > prior else "VERDICT: B" for x in a - b]


def test_the_likelier_verdict_is_chosen():
    target = local(seed=8)
    blank = [question(t, t, t, control_tokens(target)) for t in forced.CONTENT_FREE]
    a, b = (np.exp(target.log_probs(blank, [f"VERDICT: {c}"] * 3)) for c in "AB")
    p = (a / (a + b)).mean()
    chosen = choices(ForcedChoice(target))
    assert set(chosen) == set(forced.CANDIDATES)
    assert chosen == likelier(target, np.log(p) - np.log(1 - p))
    # Mutants: no calibration, and swapped candidates.
    assert chosen != likelier(target, 0.0)

    class Swapped(ForcedChoice):
        def log_odds(self, questions):
            return -super().log_odds(questions)

    assert all(x != y for x, y in zip(chosen, choices(Swapped(target)), strict=True))


def test_neither_likelier_is_a_tie():
    class Torn(ForcedChoice):
        def log_odds(self, questions):
            return np.zeros(len(questions))

    assert [j.said() for j in judge(Torn(local()), COMPARED)] == [("tie", "tie")] * 3


def test_a_forced_judge_is_a_target(tmp_path):
    inner = local(batch_size=3)
    target = ForcedChoice(inner)
    assert target.name == "forced choice of Llama"
    assert control_tokens(target) == control_tokens(Cached(target, tmp_path))
    assert "<eos>" in control_tokens(target)
    revisions = [inner.revision, target.revision, ForcedChoice(local(seed=2)).revision]
    assert len(set(revisions)) == 3
    assert ForcedChoice(local()).revision == target.revision
    for calls in (6, 0):
        cached = Cached(ForcedChoice(inner), tmp_path, note=None)
        replies = []
        judged = judge(cached, COMPARED, on_reply=lambda seen=replies: seen.append(1))
        assert (cached.calls, len(replies), cached.ledger.hits) == (calls, 6, 6 - calls)
        assert [v.text for j in judged for v in j.verdicts] == choices(target)
        assert all(None not in j.said() for j in judged)
    twice = target.respond(ASKED[:2], Sampling(), samples=2, seed=5)
    assert [[a.text for a in row] for row in twice] == [[text] * 2 for text in choices(target, ASKED[:2])]


def test_a_forced_judge_stops():
    target = ForcedChoice(local(batch_size=3))
    with pytest.raises(Stopped, match="forced choice of Llama: stopped") as stopped:
        target.respond(ASKED, Sampling(), on_answer=lambda *_: target.stop())
    assert (stopped.value.reason, len(stopped.value.answers)) == ("stopped", 3)
    # What cannot be read is a refusal, and the others are answered.
    *others, (long,) = target.respond([*ASKED, "a" * 5000], Sampling())
    assert long.finish == "refused"
    assert long.text.startswith("5000 tokens, with ")
    assert {row[0].finish for row in others} == {"stop"}


# --- pairs from rollouts, and the verb ---


def rollout(prompt, arm, seed, draw, answer, response):
    rewrite = f"x{prompt}" if arm == "none" else f"better x{prompt} {seed} {draw}"
    parties = {"frozen": "f", "prompter": f"{arm} {seed}", "reward_model": "r", "sampling": "s"}
    logps = dict.fromkeys(
        ("logp_frozen_x", "logp_frozen_rewrite", "logp_prompter", "logp_reference", "logp_policy")
    )
    return Rollout(
        prompt_id=f"p{prompt}",
        x=f"x{prompt}",
        arm=arm,
        seed=seed,
        draw=draw,
        answer=answer,
        rewrite=rewrite,
        response=response,
        reward=0.5,
        reward_low=0.0,
        reward_high=1.0,
        **parties,
        **logps,
    ).line()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    lines = []
    for prompt in range(6):
        for answer in range(2):
            lines.append(rollout(prompt, "none", 0, 0, answer, f"{WRONG} {prompt} {answer}"))
            for seed in range(3):
                lines.append(rollout(prompt, "trained", seed, 0, answer, f"{RIGHT} {seed} {answer}"))
    path.write_text("".join(lines))
    return str(path)


def test_pairs_meet_every_seed(file):
    one = pairs(file, ["trained", "none"])
    assert [p.prompt_id for p in one] == [f"p{i}" for i in range(6)]
    assert [p.rows[0] for p in one] == [(s, 0, a) for a in (0, 1) for s in (0, 1, 2)]
    assert all(p.x == f"x{p.prompt_id[1:]}" for p in one)
    for p in one:
        (seed, _, answer), (_, _, other) = p.rows
        assert p.answers == (f"{RIGHT} {seed} {answer}", f"{WRONG} {p.prompt_id[1:]} {other}")
    every = pairs(file, ["trained", "none"], per_prompt=99)
    assert len(every) == 36
    for i in range(6):
        mine = [p.rows for p in every if p.prompt_id == f"p{i}"]
        assert len({a for a, _ in mine}) == 6
        assert sorted(b for _, b in mine) == [(0, 0, 0)] * 3 + [(0, 0, 1)] * 3
    assert pairs(file, ["trained", "none"], 2, prompts=3) == [
        every[i + k] for i in (0, 6, 12) for k in (0, 1)
    ]


def run(file, out, server, *more):
    where = [server.url, "--judge-model", "judge"] if server else []
    command = ["judge", file, "--arms", "trained", "none", "--out", str(out)]
    return main.main([*command, *(["--judge", *where] if server else []), *more])


def test_the_verb(file, tmp_path, capsys):
    out = tmp_path / "out"
    with served(gullible) as server:
        assert run(file, out, server, "--judge-prices", "2", "8", "--reply-tokens", "99") == 0
        said = capsys.readouterr()
        assert "6 pairs of trained and none, both orders" in said.err
        assert re.search(
            r"judge: 12 calls \(0 cached\), .*at most 1188 answer tokens, costing at most", said.err
        )
        assert "trained : none         100 : 0" in said.out
        assert "over 6 of 6 pairs" in said.out
        assert len(server.requests) == 12
        first = (out / "judgements.jsonl").read_bytes()
        # Again, and with more pairs: nothing is asked twice.
        assert run(file, out, server, "--reply-tokens", "99") == 0
        assert (len(server.requests), (out / "judgements.jsonl").read_bytes()) == (12, first)
        assert run(file, out, server, "--reply-tokens", "99", "--per-prompt", "2", "--json") == 0
        assert len(server.requests) == 24
        printed = capsys.readouterr().out.splitlines()[-1]
        assert json.loads(printed) == json.loads((out / "winrate.json").read_text())
        found = winrate.win_rates(winrate.read(out / "judgements.jsonl"))
        assert json.loads(json.dumps(plain(found))) == json.loads(printed)
        # Another comparison goes elsewhere.
        assert run(file, out, server, "--reply-tokens", "98") == 2
        assert "was started with reply_tokens = 99, not 98" in capsys.readouterr().err
        (tmp_path / "settings.json").write_text("[]")
        assert run(file, tmp_path, server) == 2
        assert (
            "settings.json: missing or damaged; remove it or choose another folder" in capsys.readouterr().err
        )
        assert len(server.requests) == 24


def test_an_interrupted_verb_goes_on(file, tmp_path, capsys):
    with served(gullible) as server:
        assert run(file, tmp_path / "whole", server) == 0
        assert run(file, tmp_path / "cut", server, "--judge-max-calls", "5") == 2
        assert "max_calls 5: the budget" in capsys.readouterr().err
        assert run(file, tmp_path / "cut", server) == 0
        assert len(server.requests) == 24
    whole, cut = ((tmp_path / name / "judgements.jsonl").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def filtered(share):
    """A judge whose service refuses some of the prompts."""
    whole = served(gullible)
    answer = whole.fault
    error = {"error": {"message": "no", "code": "content_filter"}}

    def fault(number, body):
        x = re.search(r"\| x(\d)", body["messages"][0]["content"])
        return (400, {}, json.dumps(error).encode()) if int(x[1]) < share else answer(number, body)

    whole.fault = fault
    return whole


def test_a_refused_reply_is_a_failed_verdict(file, tmp_path, capsys):
    with filtered(1) as server:
        assert run(file, tmp_path / "out", server) == 0
        said = capsys.readouterr()
        assert "over 5 of 6 pairs" in said.out
        assert "verdicts that failed: 2 refused" in said.out
        assert ", 2 refused" in said.err
        assert run(file, tmp_path / "out", server) == 0
        assert len(server.requests) == 12
        capsys.readouterr()
    with filtered(4) as server:
        assert run(file, tmp_path / "many", server) == 2
        assert "refused_most 0.2: 8 of 12 answers were refused, the last with 'no'" in capsys.readouterr().err
        assert run(file, tmp_path / "many", server, "--refused-most", "0.9") == 0
        assert len(server.requests) == 12  # what was refused is on file too


def test_an_answer_that_was_refused_is_a_failed_verdict_and_not_asked(tmp_path, capsys):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(
        rollout(0, "none", 0, 0, 0, None)
        + rollout(0, "trained", 0, 0, 0, RIGHT)
        + rollout(1, "none", 0, 0, 0, None)
        + rollout(1, "trained", 0, 0, 0, None)
        + rollout(2, "none", 0, 0, 0, WRONG)
        + rollout(2, "trained", 0, 0, 0, RIGHT)
    )
    with served(gullible) as server:
        assert run(str(path), tmp_path / "out", server) == 0
        assert len(server.requests) == 2
    said = capsys.readouterr()
    assert "(2 with an answer that was refused, not asked)" in said.err
    assert "won 1, lost 0, tied 0, failed 2" in said.out  # two that were both refused are no tie
    assert "verdicts that failed: 4 refused" in said.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    # One that was refused has no length: none of it is in the mean.
    assert [row["lengths"] for row in rows] == [[len(RIGHT), None], [None, None], [len(RIGHT), len(WRONG)]]
    assert f"mean length {len(RIGHT)} against {len(WRONG)} characters" in said.out


def test_a_judge_in_this_process(file, tmp_path, capsys):
    model, tokenizer = tiny_model(seed=1)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    local = ["--judge", str(tmp_path / "model"), "--prompts", "2", "--reply-tokens", "4"]
    assert run(file, tmp_path / "out", None, *local) == 0
    said = capsys.readouterr().out
    assert "failed 2" in said  # random weights give no verdicts, and are not taken to
    assert "over 0 of 2 pairs; 0.000 to 1.000" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert all(kind in FAILURES for row in rows for kind in row["failures"])
    # In another number format it is another judge, whatever chose the first.
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    known = settings["dtype"] or "bfloat16"
    for kind in ("float32", "bfloat16"):
        status = 0 if kind == known else 2
        assert run(file, tmp_path / "out", None, *local, "--dtype", kind) == status
        assert ("was started with dtype = " in capsys.readouterr().err) == bool(status)


def test_a_forced_judge_in_this_process(file, tmp_path, capsys):
    target = local()
    target.model.save_pretrained(tmp_path / "model")
    target.tokenizer.save_pretrained(tmp_path / "model")
    command = ["--judge", str(tmp_path / "model"), "--prompts", "3"]
    assert run(file, tmp_path / "out", None, *command, "--forced") == 0
    said = capsys.readouterr()
    assert "over 3 of 3 pairs" in said.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert {reply for row in rows for reply in row["replies"]} <= set(forced.CANDIDATES)
    assert {row["judge"] for row in rows} == {f"forced choice of {tmp_path / 'model'}"}
    assert run(file, tmp_path / "out", None, *command) == 2
    assert "was started with forced = True, not None" in capsys.readouterr().err


BAD = {
    "one arm twice": ({"--arms": ["none", "none"]}, "--arms none none: name two different arms"),
    "no such arm": ({"--arms": ["none", "rlhf"]}, "--arms rlhf: is no arm here; give two of"),
    "no judge": ({"--judge": ["/nowhere"]}, "model '/nowhere': no such folder"),
    "no model": ({"--judge": ["http://127.0.0.1:1/v1"]}, "judge_model: name the model that"),
    "needless key": ({"--judge-key-env": ["KEY"]}, "judge_key_env: is for an endpoint"),
    "too many prompts": ({"--prompts": ["7"]}, "prompts 7: choose from 1 to the 6 there are"),
    "no prompts": ({"--prompts": ["0"]}, "prompts 0: give a whole number of at least 1"),
    "no pairs": ({"--per-prompt": ["0"]}, "per_prompt 0: give a whole number of at least 1"),
    "temperature": ({"--reply-temperature": ["-1"]}, "reply_temperature -1.0: choose"),
    "forced endpoint": (
        {"--judge": ["http://127.0.0.1:1/v1"], "--forced": []},
        "forced: an endpoint does not",
    ),
    "forced draws": (
        {"--reply-temperature": ["0.5"], "--forced": []},
        "reply_temperature 0.5: a forced choice draws",
    ),
    "refusals": ({"--refused-most": ["2"]}, "refused_most 2.0: give a share from 0 to 1"),
    "extra": (
        {"--judge": ["http://127.0.0.1:1/v1"], "--judge-model": ["m"], "--judge-extra-body": ["[1]"]},
        "extra_body '[1]': is no JSON object; write one such as",
    ),
    "omit": (
        {"--judge": ["http://127.0.0.1:1/v1"], "--judge-model": ["m"], "--judge-omit": ["seed", "messages"]},
        "omit 'messages': is no field that is sent; choose from model, temperature, top_p, max_tokens, seed",
    ),
    "level": ({"--level": ["95"]}, "level 95.0: must lie between"),
    "price": ({"--judge-prices": ["-1", "0"]}, "judge_prices.prompt -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_one_line_and_cost_nothing(case, file, tmp_path, capsys, monkeypatch):
    changes, message = BAD[case]
    monkeypatch.setattr("alignpro.llm.targets.local.LocalTarget.__init__", None)
    given = {"--arms": ["trained", "none"], "--judge": ["smollm2-135m-instruct"], **changes}
    arguments = [word for name, values in given.items() for word in (name, *values)]
    assert main.main(["judge", file, *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"alignpro: error: {message}")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_of_the_judge_reach_it(file, tmp_path):
    seeds = []
    for seed in ("3", "4"):
        with served(gullible) as server:
            more = ["--reply-temperature", "0.5", "--prompts", "1", "--seed", seed]
            assert run(file, tmp_path / seed, server, *more) == 0
            bodies = [body for body, _ in server.requests]
        assert {(b["temperature"], b["max_tokens"], b["top_p"]) for b in bodies} == {(0.5, 256, 1.0)}
        seeds.append({b["seed"] for b in bodies})
    assert seeds[0].isdisjoint(seeds[1])


def test_fields_are_left_out_and_added(file, tmp_path, capsys):
    """Also by a file of options; another choice of them is another run's."""
    config = tmp_path / "options.yaml"
    config.write_text('judge-omit: [seed, top_p]\njudge-extra-body: \'{"reasoning_effort": "low"}\'\n')
    with served(gullible) as server:
        assert run(file, tmp_path / "out", server, "--config", str(config)) == 0
        for body, _ in server.requests:
            assert body.keys() == {"model", "messages", "temperature", "max_tokens", "reasoning_effort"}
        capsys.readouterr()
        assert run(file, tmp_path / "out", server, "--judge-omit", "seed") == 2
        assert "was started with judge_omit = ['seed', 'top_p'], not ['seed']" in capsys.readouterr().err


def test_a_prompt_without_one_arm_is_named(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text(
        rollout(0, "none", 0, 0, 0, "a")
        + rollout(0, "trained", 0, 0, 0, "b")
        + rollout(1, "none", 0, 0, 0, "c")
    )
    with pytest.raises(AlignProError, match="--arms trained: has no rollouts of prompt_id 'p1'"):
        pairs(path, ["trained", "none"])
