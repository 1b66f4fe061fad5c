"""Frozen models that vLLM runs: a stub of its server, and of its module, over a tiny model that really runs.

vLLM itself needs more than these machines have. What the stub does is restated from vLLM 0.32.0 (see
`vllm_stub`); where vLLM is installed its own definitions are compared with it.
"""

import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
import vllm_stub
from mutants import kills, mutated
from scipy import stats

from alignpro.commands.opening import check_target_room
from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.load import load_tokenizer
from alignpro.llm.models.sampling import EVALUATION, Sampling
from alignpro.llm.targets import engine as engine_module
from alignpro.llm.targets import served as served_module
from alignpro.llm.targets import vllm as shared
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.engine import InProcess
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.served import Served
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Answer, Stopped

PROMPTS = ["abc", "de", "abc", "hgfa"]
NUCLEUS, GREEDY = Sampling(top_p=0.7, max_tokens=4), Sampling(temperature=0.0, max_tokens=4)
PAPER = dataclasses.replace(EVALUATION, top_k=4, max_tokens=4)
PLAIN = Sampling(max_tokens=4)
SAMPLINGS = {"plain": PLAIN, "paper": PAPER, "nucleus": NUCLEUS, "greedy": GREEDY}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def local():
    return LocalTarget(tiny_model(0))


@pytest.fixture(scope="module")
def saved(local, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    local.model.save_pretrained(folder)
    local.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def brain(local):
    return vllm_stub.Engine(local.model, local.tokenizer, int(local.tokenizer.eos_token_id))


def served(server, local, **options):
    settings = EndpointSettings(**{"model": "m", "backoff_s": 1e-3, "retries": 2, **options})
    return Served(server.url, settings, local.tokenizer, [1])


@pytest.fixture
def in_process(brain, saved, monkeypatch):
    """Opens `vllm:` of the tiny model; the module is a fake with vLLM's names and defaults."""
    fake = vllm_stub.module(brain)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(engine_module, "find_spec", lambda name: name)
    return lambda **options: (InProcess(saved, dtype="float32", **options), fake)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_log_probs_are_those_of_the_model_in_this_process(name, local, brain, in_process):
    """Of answers, cut or ended, under any prompt, and of any text: to rounding, and impossible alike.

    Mutant: the raw model's in the place of the sampler's, which is what vLLM tells.
    """
    sampling = SAMPLINGS[name]
    with vllm_stub.VLLMServer(brain) as server:
        target, (engine, _) = served(server, local), in_process()
        answers = [row[0] for row in target.respond(PROMPTS, sampling, seed=3)]
        assert [row[0] for row in engine.respond(PROMPTS, sampling, seed=3)] == answers
        refused = Answer("no", "refused", 0, 0)
        for drawn, prompts in ((True, PROMPTS), (False, ["de", "abc", "bbb", "a"])):
            want = local.log_probs(prompts, answers, sampling, drawn=drawn)
            for each in (target, engine):
                np.testing.assert_allclose(
                    each.log_probs(prompts, answers, sampling, drawn=drawn), want, atol=2e-5
                )
            raw = target.log_probs(prompts, answers)
            assert bool((np.abs(raw - want) > 1e-2).any()) == (name != "plain")
        texts = ["", "a", "hello", refused]
        want = local.log_probs(PROMPTS, texts, sampling)
        got = target.log_probs(PROMPTS, texts, sampling)
        np.testing.assert_allclose(got, want, atol=2e-5)
        assert math.isnan(got[3])
    if name in ("paper", "greedy"):
        assert np.isneginf(want[:3]).any()


def test_a_token_under_a_sampling_is_what_the_sampler_of_this_process_has():
    """`under` against `policy.Warper`, on logits at random. Mutants: the orders and slips one would make."""
    from alignpro.llm.models.policy import Warper

    rng = np.random.default_rng(0)

    def check(module):
        for temperature, top_k, top_p in itertools.product((0.5, 1.0, 1.5), (1, 3, 6), (0.3, 0.6, 1.0)):
            sampling = Sampling(temperature, top_p, top_k)
            logits = torch.tensor(rng.normal(0, 2, (4, 9)), dtype=torch.float32)
            raw = torch.log_softmax(logits.double(), -1).numpy()
            rows, tokens = torch.arange(4)[:, None].expand(4, 9), torch.arange(9)[None].expand(4, 9)
            for drawn in (False, True):
                want = Warper(sampling).log_probs(logits, rows, tokens, drawn=drawn).numpy()
                for row, wanted in zip(raw, want, strict=True):
                    best = np.sort(row)[::-1][:top_k]
                    got = [module.under((v, best, v >= best[-1]), sampling, drawn) for v in row]
                    np.testing.assert_allclose(got, wanted, atol=1e-5)

    check(shared)
    for old, new in (
        ("mass = mass / mass.sum() if sampling.top_k else mass", "pass"),
        ("kept[before < sampling.top_p]", "kept[: max(1, (before + mass <= sampling.top_p).sum())]"),
        ("own, kept = own / sampling.temperature, kept / sampling.temperature", "pass"),
        ("own - np.logaddexp(total, own)", "own - total"),
    ):
        kills(check, mutated(shared, old, new))


def test_the_answers_are_draws_from_the_sampling_that_was_asked_for(local, brain):
    """Two tokens under the paper's decoding, against exact probabilities: a false alarm in 10,000.

    The stub's generation_config leaks wherever a request is silent. Mutants: each field not sent.
    """
    sampling = dataclasses.replace(PAPER, top_p=0.9, max_tokens=2)
    texts = [Answer("", "stop", 1, 1, (1,))]
    tokens = [i for i in range(11) if i != 1]
    texts += [Answer("", "length", 1, 2, (i, j)) for i in tokens for j in range(11)]
    exact = np.exp(local.log_probs(["abc"] * len(texts), texts, sampling))
    assert abs(exact.sum() - 1) < 1e-5
    place = {answer.ids: i for i, answer in enumerate(texts)}

    def unlikely(**options):
        (row,) = served(server, local, **options).respond(["abc"], sampling, samples=600, seed=1)
        counts = np.bincount([place[answer.ids] for answer in row], minlength=len(exact))
        if counts[exact == 0].any():
            return True
        some = exact * 600 > 3
        seen = np.append(counts[some], counts[~some].sum())
        expected = np.append(exact[some], exact[~some].sum()) * 600 / exact.sum()
        return bool(stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue < 1e-4)

    with vllm_stub.VLLMServer(brain) as server:
        assert not unlikely()
        for name in ("repetition_penalty", "temperature", "top_p", "top_k", "min_p"):
            assert unlikely(omit=(name,)), name
        assert {path for path, _ in server.requests} == {"/v1/completions"}


def test_what_is_sent_and_read_is_in_vllms_protocol(local, brain):
    with vllm_stub.VLLMServer(brain) as server:
        target = served(server, local)
        (row,) = target.respond(["abc"], PLAIN, samples=5, first=2)
        target.log_probs(["abc"] * 5, row, PLAIN, drawn=True)
        target.log_probs(["abc"], row[:1], PAPER)
        sent = [body for _, body in server.requests]
        answer = server.completion(sent[0] | {"prompt_logprobs": 0})
    assert [body.get("n") for body in sent] == [5, *[None] * 6]  # several answers a request
    assert [body.get("prompt_logprobs") for body in sent] == [None, *[0] * 5, 4]
    for body in sent:
        assert set(body) <= set(vllm_stub.COMPLETION_REQUEST)
        assert all(isinstance(i, int) for i in body["prompt"])
    # Whatever a generation_config could set is set.
    assert set(vllm_stub.NEUTRAL) | {"ignore_eos", "stop_token_ids", "seed"} <= set(sent[0])
    assert (sent[0]["ignore_eos"], sent[0]["stop_token_ids"]) == (True, [1])
    # What is scored is what was sampled, the end among it.
    prompt = sent[0]["prompt"]
    assert {tuple(body["prompt"]) for body in sent[1:6]} == {(*prompt, *a.ids) for a in row}
    assert all((a.ids[-1] == 1) == (a.finish == "stop") for a in row)
    read = {"index", "token_ids", "finish_reason", "logprobs", "prompt_logprobs"}
    assert read <= set(vllm_stub.CHOICE)
    assert set(answer["choices"][0]) <= set(vllm_stub.CHOICE)


def test_the_stub_has_the_fields_of_vllm_where_it_is_installed():
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol", reason="pip install vllm")
    import vllm

    assert set(vllm_stub.COMPLETION_REQUEST) <= set(protocol.CompletionRequest.model_fields)
    assert set(vllm_stub.CHOICE) <= set(protocol.CompletionResponseChoice.model_fields)
    assert protocol.CompletionRequest._DEFAULT_SAMPLING_PARAMS == vllm_stub.NEUTRAL
    for field in dataclasses.fields(vllm_stub.SamplingParams):
        assert hasattr(vllm.SamplingParams(), field.name)


def test_a_sample_is_that_of_its_prompt_and_index_however_it_is_asked_for(local, brain, in_process):
    with vllm_stub.VLLMServer(brain) as server:
        target, (engine, _) = served(server, local), in_process()
        whole = target.respond(["abc", "de"], PLAIN, samples=70, seed=5)
        assert target.calls == 6  # 32 answers at once
        assert engine.respond(["abc", "de"], PLAIN, samples=70, seed=5) == whole
        assert (engine.calls, engine.retried) == (140, 0)
        some = target.respond(["de", "abc", "de"], PLAIN, first=[3, 40, 3], samples=2, seed=5)
        assert some == [whole[1][3:5], whole[0][40:42], whole[1][3:5]]
        assert len({a.ids for a in whole[0]}) > 5
        two = shared.asked_at_once([(0, i) for i in (0, 1, 2, 4, 5)], [(3,)], {0: 7}, 2)
        assert [(len(asked.places), asked.seed) for asked in two] == [(2, 7), (1, 9), (2, 11)]
        assert target.respond(["abc"], PLAIN, samples=70, seed=6) != whole[:1]


def test_log_probabilities_of_samples_are_those_of_the_scorer(local, brain):
    """As the server tells them: under the model's own distribution. Under another they are of the raw model
    or of the sampler as the server was started, so that they are not kept."""
    with vllm_stub.VLLMServer(brain) as server:
        target = served(server, local)
        assert target.line() is None
        answers = target.respond(["abc"], PLAIN, samples=8)[0]
        values = target.log_probs(["abc"] * 8, answers, PLAIN, drawn=True)
        np.testing.assert_allclose([a.log_prob for a in answers], values, atol=1e-5)
        assert "of 8 answers" in target.line()
        for brain.processed in (False, True):
            assert target.respond(["abc"], PAPER)[0][0].log_prob is None


def test_budgets_count_answers_and_log_probabilities_alike(local, brain, tmp_path):
    with vllm_stub.VLLMServer(brain) as server:
        target = served(server, local, max_calls=6, concurrency=1)
        cached = Cached(target, tmp_path, note=None)
        answers = [row[0] for row in cached.respond(PROMPTS, PLAIN, first=[0, 0, 1, 0])]
        assert (len(server.requests), cached.ledger.calls, cached.ledger.answers) == (3, 3, 4)
        score = cached.scorer()
        score(PROMPTS[:2], answers[:2], PLAIN)
        assert cached.total().calls == 5 == len(server.requests)
        before = cached.total()
        with pytest.raises(
            AlignProError, match=r"^max_calls 6: the budget .* is spent; raise it to go on \(while"
        ):
            score(PROMPTS, answers, PLAIN)
        assert len(server.requests) == 6 == cached.total().calls
        assert cached.total().prompt_tokens > before.prompt_tokens
        again = Cached(served(server, local, max_calls=6), tmp_path, note=None)  # another process
        assert again.respond(["abc"], PLAIN, samples=2) == [[answers[0], answers[2]]]
        with pytest.raises(Stopped, match="max_calls"):
            again.respond(["new"], PLAIN)
        assert len(server.requests) == 6


def test_an_answer_that_another_process_has_is_not_asked_for(local, brain):
    with vllm_stub.VLLMServer(brain) as server:
        target = served(server, local)
        has = Answer("kept", "stop", 1, 1, (1,))
        got = target.respond(["abc"], PLAIN, samples=4, known=lambda p, i: has if i in (0, 2) else None)[0]
        assert [a == has for a in got] == [True, False, True, False]
        assert server.requests[0][1]["n"] == 3  # the seeds of one request follow each other
        assert target.respond(["abc"], PLAIN, known=lambda p, i: has) == [[has]]
        assert len(server.requests) == 1


def gone(n, body):
    return (503, {"error": "busy"}) if n < 2 else None


def test_failures_that_pass_are_tried_again_and_others_told_in_one_line(local, brain):
    def faulty(fault, message, act, **options):
        with vllm_stub.VLLMServer(brain) as server:
            server.fault = fault
            with pytest.raises(AlignProError, match=message) as error:
                act(served(server, local, **options))
            assert "\n" not in str(error.value)
            return len(server.requests)

    with vllm_stub.VLLMServer(brain) as server:
        server.fault = gone
        target = served(server, local)
        target.respond(["abc"], PLAIN)
        assert (target.calls, target.retried) == (3, 2)

    def respond(target):
        return target.respond(["abc"], PLAIN)

    def changed(**fields):
        def fault(n, body):
            found = vllm_stub.VLLMServer.completion(server, body)
            found["choices"][0] |= fields
            return 200, found

        return fault

    old = {"message": "Extra inputs are not permitted: repetition_penalty", "code": 400}
    assert (
        faulty(lambda n, b: (400, old), r"leave out what it does not take: --target-omit repe", respond) == 1
    )
    assert faulty(changed(token_ids=None), "token_ids is not a list .*a newer vLLM", respond) == 1
    assert faulty(changed(logprobs=None), "token_logprobs is not a number for each token", respond) == 1
    assert faulty(changed(token_ids=[5], finish_reason="stop"), "token_logprobs|without one of", respond) == 1
    short = changed(token_ids=[5, 5], finish_reason="length", logprobs={"token_logprobs": [-1, -1]})
    assert faulty(short, r"an answer of 2 of 4 tokens ends .*max_new_tokens, --max-model-len", respond) == 1
    assert faulty(lambda n, b: (200, {"choices": []}), "choices is not 1 objects", respond) == 1
    assert faulty(changed(finish_reason="error"), "answers with an error", respond) == 3

    def score(target):
        return target.log_probs(["abc"], ["a"])

    assert faulty(changed(prompt_logprobs=None), "no vLLM that scores", score) == 1
    logits = changed(prompt_logprobs=[None] + [{str(i): {"logprob": 2.0} for i in range(11)}] * 4)
    assert faulty(logits, "2 is no log-probability; serve with --logprobs-mode raw_logprobs", score) >= 1
    many = Sampling(top_k=30)
    faulty(
        lambda n, b: None,
        "larger --max-logprobs, or choose a smaller top_k",
        lambda t: t.log_probs(["abc"], ["a"], many),
    )
    assert (
        faulty(lambda n, b: None, "^model 'x': http.* serves m; name one of these", respond, model="x") == 0
    )
    hot = "^temperature 2.5: vLLM draws at 0 and from 0.01 to 2 only"
    assert faulty(lambda n, b: None, hot, lambda t: t.respond(["a"], Sampling(2.5))) == 0
    warm = Sampling(temperature=0.7)
    with pytest.raises(
        AlignProError, match=r"^temperature 0.7: with top_k 0 .*choose temperature 1, or a top_k"
    ):
        shared.needed(warm)
    flat = (-5.0, np.full(20, -5.0), True)
    with pytest.raises(AlignProError, match=r"^top_p 0.9: keeps more than the 20 likeliest"):
        shared.under(flat, Sampling(top_p=0.9), False)


def test_refusals_and_what_is_too_long(local, brain):
    with vllm_stub.VLLMServer(brain) as server:
        brain.max_model_len = 12
        target = served(server, local)
        got = target.respond(["abc", "a" * 8], PLAIN)
        assert [row[0].finish == "refused" for row in got] == [False, True]
        assert "8 tokens, with 4 more to come and one to score by, are beyond the 12" in got[1][0].text
        with pytest.raises(AlignProError, match=r"^prompt 'aaaaaaaa': 8 tokens, with 4 more to come"):
            check_target_room(target, ["abc", "a" * 8], 4)
        # Whatever was answered can be scored: vLLM draws one token more.
        tight = target.respond(["a" * 7], PLAIN)[0]
        assert np.isfinite(target.log_probs(["a" * 7], tight, PLAIN)).all()
        server.fault = lambda n, body: (400, {"error": {"message": "prompt is too long", "code": 400}})
        assert [a.finish for a in target.respond(["abc"], PLAIN, samples=3)[0]] == ["refused"] * 3


def test_the_dialect_of_messages_is_found_and_nothing_shipped_leaks_in(brain):
    """An endpoint that is asked by messages, without a dialect. Mutant: openai's, which was taken before."""
    with vllm_stub.VLLMServer(brain) as server:
        asked = Endpoint(server.url, EndpointSettings("m"))
        assert " vllm" in asked.revision
        asked.respond(["abc"], PAPER)
        body = server.requests[-1][1]
        assert body["top_k"] == 4
        assert server.params(body) == dataclasses.replace(
            server.params(body),
            **{
                name: value
                for name, value in vllm_stub.NEUTRAL.items()
                if name not in ("temperature", "top_p", "top_k")
            },
        )
        openai = Endpoint(server.url, EndpointSettings("m", dialect="openai"))
        openai.respond(["abc"], PLAIN)
        assert server.params(server.requests[-1][1]).repetition_penalty == 1.8
        server.owner = "someone"
        assert " openai" in Endpoint(server.url, EndpointSettings("m")).revision
    unreached = Endpoint(server.url, EndpointSettings("m"))
    assert " openai" in unreached.revision
    with vllm_stub.VLLMServer(brain) as server:
        unreached.base_url = server.url
        with pytest.raises(AlignProError, match="could not be reached when it was first asked, and is vLLM"):
            unreached.respond(["abc"], PLAIN)


def test_options_pass_through_to_the_engine(in_process, local):
    options = engine_module.parse_engine(
        '{"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "max_model_len": 64}'
    )
    target, fake = in_process(engine=options)
    made = fake.LLM.made[-1]
    assert (made["tensor_parallel_size"], made["gpu_memory_utilization"]) == (2, 0.5)
    assert (made["max_model_len"], target.most(), target.remote) == (64, 64, False)
    assert (made["dtype"], made["generation_config"], made["logprobs_mode"]) == (
        "float32",
        "vllm",
        "raw_logprobs",
    )
    assert in_process()[0].revision != target.revision
    with pytest.raises(AlignProError, match=r"^target_engine 'dtype': is not to be chosen here"):
        engine_module.parse_engine('{"dtype": "auto"}')
    with pytest.raises(AlignProError, match=r"^target_engine '\[\]': is no JSON object"):
        engine_module.parse_engine("[]")


def test_without_vllm_or_with_an_engine_that_fails(in_process, saved, monkeypatch):
    target, fake = in_process()
    monkeypatch.setattr(target.engine, "generate", lambda *_, **__: 1 / 0, raising=False)
    with pytest.raises(Stopped, match=r"vLLM fails \(division by zero\); see its log above"):
        target.respond(["abc"], PLAIN)

    def refuse(*_, **__):
        raise RuntimeError("Engine core\ninitialization failed")

    monkeypatch.setattr(fake, "LLM", refuse)
    with pytest.raises(AlignProError, match=r"^target vllm:.*: vLLM does not load it \(Engine core init"):
        in_process()
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(
            AlignProError, match=r"each training process would load it, all on one GPU; serve it"
        ):
            in_process()
    monkeypatch.setattr(engine_module, "find_spec", lambda name: None)
    with pytest.raises(
        AlignProError, match=r"^target vllm:.*: the package vllm is missing; pip install vllm"
    ):
        InProcess(saved)


def test_a_tokenizer_without_its_model_is_as_the_model_has_it(local, saved):
    tokenizer, ends = load_tokenizer(saved)
    assert ends == local._ends == [1]
    assert tokenizer.pad_token_id == local.tokenizer.pad_token_id
    twin = Served("http://127.0.0.1:9/v1", EndpointSettings("m"), tokenizer, ends)
    other = Served("http://127.0.0.1:9/v1", EndpointSettings("m"), local.tokenizer, ends)
    assert twin.revision == other.revision
    assert twin.revision != Served(twin.base_url, twin.settings, tokenizer, [1, 2]).revision
    assert (
        json.loads(json.dumps(dataclasses.asdict(Answer("a", "stop", 1, 1, (1,), False, -1.5))))["log_prob"]
        == -1.5
    )
    assert served_module.serving("http://127.0.0.1:9/v1", EndpointSettings("m")) is None
