"""What services send beside plain answers, from a real server: to frozen models, judges and rewards alike."""

import json
import random
import re
import threading

import numpy as np
import pytest
from faulty import PATIENCE, Server
from mutants import kills

from alignpro.errors import AlignProError
from alignpro.llm.arms.judge import Pair, judge
from alignpro.llm.arms.resample import answers
from alignpro.llm.models.chat import without_thought
from alignpro.llm.models.prompt import Prompt, transcript
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.rewards.endpoint import CachedReward, EndpointReward
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.targets import endpoint as endpoint_module
from alignpro.llm.targets import services
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.services import FINISHES, complaint
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Stopped
from alignpro.llm.training.environment import Environment

XS = [f"prompt {i}" for i in range(6)] + ["a painter", "b"]
SAMPLING = Sampling(max_tokens=10)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def raw(data, status=200):
    return status, {}, json.dumps(data).encode()


def error(status, message, code=None, param=None, kind="invalid_request_error", **more):
    return raw({"error": {"message": message, "type": kind, "param": param, "code": code, **more}}, status)


def choice(content="VERDICT: A", finish="stop", usage=(10, 5), **message):
    """A completion as a service sends it."""
    said = {"role": "assistant", "content": content, **message}
    counts = usage and dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return raw(
        {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": said, "finish_reason": finish}],
            "usage": counts,
        }
    )


# --- one server, three who ask it ---


def serving(role, odd):
    """A server for the role, which answers `odd(number, body)` where that is not None."""

    def fault(n, body):
        if (found := odd(n, body)) is not None:
            return found
        if role == "reward":
            return raw({"rewards": [0.5] * len(body["prompts"])})
        return choice()

    return Server(fault)


def settings(**options):
    return EndpointSettings("m", **{"backoff_s": 0.0, "timeout_s": PATIENCE, **options})


def ask(role, server, folder, xs=XS, sampling=SAMPLING, **options):
    """Ask about each prompt; which were refused, and the ledger."""
    if role == "reward":
        made = EndpointReward(server.url, "0,1", settings(**options), Refusals(0.25, most=1.0), batch_size=4)
        reward = CachedReward(made, folder)
        scores = reward.score(xs, ["y"] * len(xs))
        assert set(scores) <= {0.25, 0.5}
        return [score == 0.25 for score in scores], reward.ledger
    target = Cached(Endpoint(server.url, settings(**options), role=role), folder, note=None)
    if role == "judge":
        judged = judge(target, [Pair(x, x, ("p", "q")) for x in xs], sampling)
        failures = [{reading.failure for reading in each.verdicts} for each in judged]
        assert all(each in ({"refused"}, {None}) for each in failures)
        return [each == {"refused"} for each in failures], target.ledger
    return [row[0].finish == "refused" for row in target.respond(xs, sampling)], target.ledger


ROLES = ("target", "judge", "reward")
AZURE = {
    "code": "ResponsibleAIPolicyViolation",
    "content_filter_result": {"hate": {"filtered": False, "severity": "safe"}},
}
AGAINST_WHAT = {
    "Azure": error(
        400,
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
        "content_filter",
        "prompt",
        None,
        innererror=AZURE,
    ),
    "OpenRouter": raw(
        {
            "error": {
                "code": 403,
                "message": 'openai/gpt requires moderation on X. Your input was flagged for "violence".',
                "metadata": {"reasons": ["violence"], "flagged_input": "a painter"},
            }
        },
        403,
    ),
    "Moonshot": error(
        400, "The request was rejected because it was considered high risk", 400, "prompt", "content_filter"
    ),
    "DashScope": error(400, "Input data may contain inappropriate content.", "data_inspection_failed"),
    "DeepSeek": error(400, "Content Exists Risk", "invalid_request_error"),
    "DeepSeek, at first": raw({"detail": "Content Exists Risk"}, 400),
    "Anthropic": raw(
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Output blocked by content filtering policy",
            },
        },
        400,
    ),
    "xAI": raw(
        {"code": "x", "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO"}, 403
    ),
    "OpenAI": error(
        400,
        "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
        "invalid_prompt",
    ),
    "inside a 200": raw({"error": {"code": 403, "message": "blocked", "type": "content_policy_violation"}}),
    "OpenAI, length": error(
        400,
        "This model's maximum context length is 64 tokens. However, you requested 90 tokens.",
        "context_length_exceeded",
        "messages",
    ),
    "vLLM": raw(
        {
            "object": "error",
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 10. This model's maximum "
            "context length is 64 tokens and your request has 60 input tokens (10 > 64 - 60).",
            "type": "BadRequestError",
            "code": 400,
        },
        400,
    ),
    "SGLang": raw(
        {
            "object": "error",
            "message": "The input (90 tokens) is longer than the model's context length (64).",
        },
        400,
    ),
    "llama.cpp": raw(
        {
            "error": {
                "code": 400,
                "message": "request (90 tokens) exceeds the available context size (64 tokens), try",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 90,
            }
        },
        400,
    ),
    "llama.cpp, status 200": raw(
        {"error": {"code": 400, "message": "the request exceeds", "type": "exceed_context_size_error"}}
    ),
    "llama.cpp, status 500": error(500, "Context size has been exceeded.", kind="server_error"),
    "Anthropic, length": error(400, "prompt is too long: 200900 tokens > 200000 maximum"),
    "Mistral": error(422, "Prompt contains 90 tokens, too large for model with 64 maximum context length"),
    "TGI": raw(
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64.",
            "error_type": "v",
        },
        422,
    ),
    "Gemini": error(400, "The input token count (90) exceeds the maximum number of tokens allowed (64)."),
    "a gateway": error(400, "litellm.ContextWindowExceededError: AnthropicException - no", code="400"),
}
"""Errors that refuse what was asked, as the services write them."""
INSTEAD = {
    "finish content_filter": choice(None, "content_filter"),
    "partial": choice("I would first", "content_filter"),
    "no usage": choice(None, "content_filter", usage=None),
    "SAFETY": choice("", "SAFETY"),
    "Anthropic refusal": choice(None, "refusal"),
    "refusal": choice(None, refusal="I'm sorry, I can't help with that."),
    "refusal, empty": choice("", refusal="I'm sorry, I can't help with that."),
    "refusal part": choice([{"type": "refusal", "refusal": "I can't."}]),
    "thought apart": choice("", "length", reasoning_content="Let me think"),
    "thought apart, null": choice(None, "length", reasoning="Let me think"),
    "null": choice(None, "length"),
    "thought not ended": choice("<think>\nThe user wants", "length"),
    "Mistral's thought": choice([{"type": "thinking", "thinking": []}], "length"),
    "thought hidden": raw(
        {
            "choices": [{"message": {"content": ""}, "finish_reason": "length"}],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 10,
                "completion_tokens_details": {"reasoning_tokens": 10},
            },
        }
    ),
}
"""Completions without an answer."""


def painter(response):
    return lambda n, body: response if "painter" in json.dumps(body) else None


def check_refused(role, response, folder):
    with serving(role, painter(response)) as server:
        refused, ledger = ask(role, server, folder)
        assert refused == [x == "a painter" for x in XS]
        asked = 2 * len(XS) if role == "judge" else len(XS)
        assert (ledger.answers, ledger.refused) == (asked, 2 if role == "judge" else 1)
        assert ledger.retries == 0
        assert f", {ledger.refused} refused" in ledger.line()
        # Of a batch of four, halves are asked, then the sample alone.
        assert ledger.calls == len(server.requests) == (2 + 4 if role == "reward" else asked)
        again, hits = ask(role, server, folder)
        assert again == refused
        assert (hits.calls, hits.hits) == (0, asked)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", AGAINST_WHAT)
def test_a_refusal_is_an_answer(kind, role, tmp_path):
    check_refused(role, AGAINST_WHAT[kind], tmp_path)


@pytest.mark.parametrize("role", ["target", "judge"])
@pytest.mark.parametrize("kind", INSTEAD)
def test_a_completion_without_an_answer_is_a_refusal(kind, role, tmp_path):
    check_refused(role, INSTEAD[kind], tmp_path)


@pytest.mark.parametrize("role", ROLES)
def test_without_the_table_a_refusal_ends_the_run(role, tmp_path, monkeypatch):
    """The mutants of both tests above."""
    with monkeypatch.context() as patched:
        patched.setattr(services, "_REFUSAL", re.compile("(?!)"))
        with pytest.raises(Stopped, match="status 400"):
            check_refused(role, AGAINST_WHAT["Azure"], tmp_path / "a")
    if role != "reward":
        monkeypatch.setitem(endpoint_module.FINISHES, "content_filter", "stop")
        kills(lambda folder: check_refused(role, INSTEAD["partial"], folder), tmp_path / "b")


def test_the_words_are_kept_and_a_key_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_KEY", "sk-planted-7f3a9c2e51d84b06")
    said = "blocked by content filtering policy\nfor sk-planted-7f3a9c2e51d84b06" + 1000 * "x"
    with serving("target", painter(error(400, said))) as server:
        target = Endpoint(server.url, settings(key_env="PLANTED_KEY"))
        (answer,) = target.respond(["a painter"], SAMPLING)[0]
    assert answer.text.startswith("blocked by content filtering policy for <key>xxx")
    assert len(answer.text) == 400


def test_the_thought_that_took_the_limit_says_what_helps():
    for role, flag in (("target", "--answer-tokens"), ("judge", "--reply-tokens")):
        with serving(role, painter(INSTEAD["thought apart"])) as server:
            (answer,) = Endpoint(server.url, settings(), role=role).respond(["painter"], SAMPLING)[0]
        assert answer.thought
        assert len(answer.text) < 120  # all of it is shown where too many are
        assert f"took all 10 tokens: raise {flag}, or turn it off by --{role}-extra-body" in answer.text


@pytest.mark.parametrize(
    "said",
    [
        {"error": {"message": "Your account was flagged for abuse of the content policy", "code": 403}},
        {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}},
        {"error": {"message": "max_tokens is too large: 9. This model supports at most 8 completion tokens"}},
        {
            "detail": [
                {"loc": ["body", "x"], "msg": "bad", "input": "context_length_exceeded, content_filter"}
            ]
        },
        {"error": {"message": "The server is overloaded"}},
        {"error": "boom"},
        [],
        7,
    ],
)
def test_what_is_no_refusal(said):
    assert not complaint(said, ["x"]).refused
    assert complaint(said, ["x"]).fields == ()


# --- ends, parts, thoughts ---

SAME = {
    "parts": choice(
        [{"type": "text", "text": "VERDICT"}, {"type": "image"}, {"type": "text", "text": ": A"}]
    ),
    "thinking part": choice(
        [
            {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
            {"type": "text", "text": "VERDICT: A"},
        ]
    ),
    "<think>": choice("<think>\nVERDICT: B\n</think>\n\nVERDICT: A"),
    "[THINK]": choice("[THINK]Hm.[/THINK]VERDICT: A"),
    "beginning left out": choice("The user wants\nme to.\n</think>\n\nVERDICT: A"),
    "thought apart": choice("VERDICT: A", reasoning_content="VERDICT: B"),
    **{
        f"finish {name}": choice(finish=name)
        for name in ("eos", "eos_token", "end_turn", "EOS", "stop_sequence")
    },
}


@pytest.mark.parametrize("role", ["target", "judge"])
@pytest.mark.parametrize("kind", SAME)
def test_the_answer_is_read_from_what_surrounds_it(kind, role, tmp_path):
    thought = kind in ("thinking part", "<think>", "[THINK]", "beginning left out", "thought apart")
    with serving(role, lambda n, body: SAME[kind]) as server:
        target = Cached(Endpoint(server.url, settings(), role=role), tmp_path, note=None)
        if role == "judge":
            (found,) = judge(target, [Pair("x", "x", ("p", "q"))])
            assert [reading.choice for reading in found.verdicts] == ["A", "A"]
        (answer,) = target.respond(["x"], SAMPLING)[0]
        assert (answer.text, answer.finish, answer.thought) == ("VERDICT: A", "stop", thought)
        assert target.ledger.thoughts == thought * target.ledger.answers
        assert target.ledger.calls == target.ledger.answers


def test_thoughts_begin_a_text_or_are_none():
    def check(take):
        assert take("a </think> b").text == "a </think> b"
        assert take("No <think>\nof\n</think>\nit").text == "No <think>\nof\n</think>\nit"
        assert take("hm\n</think>\nYes").text == "Yes"
        assert (take(" <think>hm").text, take("<think>hm").cut) == ("", True)
        assert take("plain") == without_thought("plain")

    check(without_thought)
    kills(check, lambda text: type(without_thought("x"))(text.rpartition("</think>")[2].lstrip()))


def test_null_and_empty_are_answers_where_the_model_ended():
    for content in ("", None, []):
        with serving("target", lambda n, body, content=content: choice(content)) as server:
            if content == []:
                with pytest.raises(Stopped, match=r"content is \[\], not a text"):
                    Endpoint(server.url, settings(retries=0)).respond(["x"], SAMPLING)
            else:
                (answer,) = Endpoint(server.url, settings()).respond(["x"], SAMPLING)[0]
                assert (answer.text, answer.finish) == ("", "stop")


PASSES = {
    "error": raw(
        {
            "choices": [
                {
                    "message": {"content": ""},
                    "finish_reason": "error",
                    "error": {"code": 502, "message": "Provider returned error"},
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 0},
        }
    ),
    **{name: choice("cut", name) for name in ("network_error", "insufficient_system_resource", "abort")},
    "200 with an error": raw({"error": {"message": "overloaded", "code": 529}}),
    "200 with a text": raw({"error": "try again"}),
}


@pytest.mark.parametrize(
    ("role", "kind"),
    [(role, kind) for role in ROLES for kind in PASSES if role != "reward" or kind.startswith("200")],
)
def test_an_error_inside_a_200_is_asked_again(role, kind, tmp_path):
    with serving(role, lambda n, body: PASSES[kind] if n % 2 == 0 else None) as server:
        refused, ledger = ask(role, server, tmp_path, concurrency=1)
        assert not any(refused)
        assert ledger.retries == len(server.requests) / 2
    with serving(role, lambda n, body: PASSES[kind]) as server:
        with pytest.raises(Stopped, match=r"after 3 attempts: .*(try later|check)") as failed:
            ask(role, server, tmp_path / "lasting", retries=2, concurrency=1)
        assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (choice(None, "tool_calls", tool_calls=[{"id": "1"}]), "tool_calls is .*turn its tools off"),
        (choice("x", "tool_calls"), 'finish_reason is "tool_calls", not one of stop, eos'),
        (choice("x", "klingon"), 'finish_reason is "klingon", not one of stop, eos'),
    ],
)
def test_other_ends_are_one_error(response, says):
    with serving("target", lambda n, body: response) as server:
        with pytest.raises(Stopped, match=says):
            Endpoint(server.url, settings(concurrency=1)).respond(["x", "y"], SAMPLING)
        assert len(server.requests) == 1


def test_every_end_is_one_of_four():
    assert set(FINISHES.values()) == {"stop", "length", "refused", "failed"}
    assert all(name == name.lower() for name in FINISHES)


# --- fields that a service does not take ---


def unsupported(name, better=""):
    return error(
        400,
        f"Unsupported parameter: '{name}' is not supported with this model.{better}",
        "unsupported_parameter",
        name,
    )


def no_max_tokens(n, body):
    return (
        unsupported("max_tokens", " Use 'max_completion_tokens' instead.") if "max_tokens" in body else None
    )


def no_temperature(n, body):
    return unsupported("temperature") if "temperature" in body else None


def not_both(n, body):
    text = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
    return error(400, text) if {"temperature", "top_p"} <= body.keys() else None


def no_seed(n, body):
    fault = {
        "type": "extra_forbidden",
        "loc": ["body", "seed"],
        "msg": "Extra inputs are not permitted",
        "input": 3,
    }
    return raw({"object": "error", "message": {"detail": [fault]}}, 422) if "seed" in body else None


def only_one(n, body):
    text = "Unsupported value: 'temperature' does not support 0.7. Only the default (1) value is supported."
    wrong = body.get("temperature", 1) != 1
    return error(400, text, "unsupported_value", "temperature") if wrong else None


@pytest.mark.parametrize("role", ["target", "judge"])
@pytest.mark.parametrize(
    ("takes", "gone"),
    [
        (no_max_tokens, {"max_tokens"}),
        (no_temperature, {"temperature"}),
        (not_both, {"top_p"}),
        (only_one, set()),
    ],
)
def test_what_changes_nothing_is_left_out_by_itself(takes, gone, role, tmp_path, monkeypatch):
    """No flag, no failure: the name of the limit, and neutral values. The mutant does not learn."""
    with serving(role, takes) as server:
        refused, ledger = ask(role, server, tmp_path, concurrency=1)
        assert not any(refused)
        assert ledger.retries == 0
        assert ledger.calls == len(server.requests) == ledger.answers + bool(gone)  # learnt once
        sent = server.requests[-1][0]
        assert not gone & sent.keys()
        assert {"model", "messages", "seed"} <= sent.keys()
        assert sent.get("max_tokens", sent.get("max_completion_tokens")) == 10
        # Many at once find out together.
        more, _ = ask(role, server, tmp_path / "more", concurrency=8)
        assert not any(more)
        monkeypatch.setattr(Endpoint, "_does_without", lambda *_: False)
        if gone:
            with pytest.raises(Stopped, match="leave out what it does not take"):
                ask(role, server, tmp_path / "mutant")


def test_a_value_that_is_meant_is_never_left_out_silently(tmp_path):
    cases = [
        ("target", only_one, "temperature", {}, Sampling(temperature=0.7)),
        ("judge", only_one, "temperature", {}, Sampling(temperature=0.0)),
        ("target", no_seed, "seed", {}, SAMPLING),
        ("judge", no_seed, "seed", {}, SAMPLING),
        # What a model ships would apply instead.
        ("target", no_temperature, "temperature", {"dialect": "vllm"}, SAMPLING),
    ]
    for i, (role, takes, name, options, sampling) in enumerate(cases):
        with serving(role, takes) as server:
            with pytest.raises(Stopped, match=f"leave out what it does not take: --{role}-omit {name} "):
                ask(role, server, tmp_path / f"{i}", sampling=sampling, concurrency=1, **options)
            assert len(server.requests) == 1
            refused, ledger = ask(role, server, tmp_path / f"{i}", sampling=sampling, omit=(name,), **options)
            assert not any(refused)
            assert (ledger.retries, name in server.requests[-1][0]) == (0, False)


def test_a_reward_omits_and_adds_fields(tmp_path):
    def takes(n, body):
        if "model" in body:
            return unsupported("model")
        return None if body.get("normalize") is True else error(422, "normalize is missing")

    with serving("reward", takes) as server:
        with pytest.raises(Stopped, match="leave out what it does not take: --reward-omit model"):
            ask("reward", server, tmp_path, concurrency=1)
        options = {"omit": ["model"], "extra_body": '{"normalize": true}'}
        assert ask("reward", server, tmp_path, **options)[0] == [False] * len(XS)


def test_fields_are_part_of_the_revision_only_where_given():
    def revisions(make):
        plain = make()
        others = [
            make(omit=("seed",)),
            make(omit=("top_p", "seed")),
            make(extra_body='{"a": 1}'),
            make(extra_body='{"a": 2}'),
            make(omit=("seed",), extra_body='{"a": 1}'),
        ]
        assert len({plain, *others}) == 6
        assert make(extra_body="{}") == plain
        assert make(omit=("seed", "top_p")) == others[1]
        return plain

    # As it was before there were such fields: caches keep their keys.
    assert (
        revisions(lambda **o: Endpoint("http://h/v1", EndpointSettings("m", **o)).revision)
        == "http://h/v1 openai"
    )
    first = EndpointReward("http://h/r", "0,1", EndpointSettings("m"))
    marks = {
        EndpointReward("http://h/r", "0,1", EndpointSettings("m", **o)).revision
        for o in ({}, {"omit": ("model",)}, {"extra_body": '{"a": 1}'})
    }
    assert len(marks) == 3
    assert first.revision == digest("http://h/r", "rewards", "m", first.template).hex()


def test_a_field_of_ones_own_replaces_one_that_is_omitted():
    with serving("target", lambda n, body: None if "max_tokens" in body else choice("x")) as server:
        options = {"omit": ("max_tokens",), "extra_body": '{"max_completion_tokens": 77}'}
        (answer,) = Endpoint(server.url, settings(**options)).respond(["x"], SAMPLING)[0]
        assert answer.text == "x"
        assert server.requests[-1][0]["max_completion_tokens"] == 77
    with pytest.raises(AlignProError, match="extra_body 'seed': has its own setting"):
        Endpoint("http://h/v1", settings(extra_body='{"seed": 1}'))
    with pytest.raises(AlignProError, match="omit 'sead': is no field that is sent; choose from model, temp"):
        Endpoint("http://h/v1", settings(omit=("sead",)))
    with pytest.raises(AlignProError, match="omit 'seed': is no field that is sent; choose from model"):
        EndpointReward("http://h/r", "0,1", settings(omit=("seed",)))
    with pytest.raises(AlignProError, match="extra_body 'prompts'"):
        EndpointReward("http://h/r", "0,1", settings(extra_body='{"prompts": 1}'))


# --- all of it at once ---


@pytest.mark.parametrize("role", ROLES)
def test_failures_and_refusals_lose_nothing(role, tmp_path, monkeypatch):
    """30% of the requests fail, 5% of the prompts are refused; the mutant knows no refusal."""
    xs = [f"prompt {i}{' painter' if i % 20 == 7 else ''}" for i in range(100)]
    failures = [
        error(500, "boom"),
        error(429, "slow down"),
        "close",
        (200, {}, b"{"),
        PASSES["200 with an error"],
    ]
    rng, lock, failed = random.Random(0), threading.Lock(), []

    def odd(n, body):
        with lock:
            if rng.random() < 0.3:
                failed.append(n)
                return rng.choice(failures)
        return painter(AGAINST_WHAT["Azure"])(n, body)

    with serving(role, odd) as server:
        refused, ledger = ask(role, server, tmp_path, xs, retries=30)
        assert refused == ["painter" in x for x in xs]
        asked = 200 if role == "judge" else 100
        assert (ledger.answers, ledger.refused, ledger.hits) == (asked, asked // 20, 0)
        assert ledger.calls == len(server.requests)
        assert ledger.retries == len(failed) > asked / 20
        again, hits = ask(role, server, tmp_path, xs)
        assert again == refused
        assert (hits.calls, hits.answers, hits.hits) == (0, 0, asked)
        assert np.isclose(sum(refused), 5)
        monkeypatch.setattr(services, "_REFUSAL", re.compile("(?!)"))
        with pytest.raises(Stopped, match="status 400"):
            ask(role, server, tmp_path / "mutant", xs, retries=30)


def test_a_budget_counts_the_whole_conversation(monkeypatch):
    """A request starts only where it fits; the mutant counts the last turn alone."""
    x = Prompt("x", [{"role": "user", "content": "a word " * 600}, {"role": "assistant", "content": "y"}])

    def check(transcript):
        monkeypatch.setattr(endpoint_module, "transcript", transcript)
        with Server() as server:
            target = Endpoint(server.url, settings(max_tokens=200))
            stopped = ""
            try:
                target.respond([x], SAMPLING)
            except Stopped as error:
                stopped = error.reason
            assert (stopped, len(server.requests)) == ("max_tokens", 0)

    check(transcript)
    kills(check, str)


def test_a_refused_answer_is_no_text_to_resample():
    def odd(_n, body):
        return choice("Yes.") if int(body["seed"]) % 2 else AGAINST_WHAT["DeepSeek"]

    with serving("target", odd) as server:
        refusals = Refusals(most=1.0)
        given = Environment(
            load_reward("clean"), Endpoint(server.url, settings()), SAMPLING, refusals=refusals
        )
        [found] = answers(given, ["x"], 8)
    pairs = set(zip(found.rewrites, found.rewards, strict=True))
    assert pairs == {("Yes.", 1.0), ("", 0.0)}
    assert 0 < refusals.refused < 8
