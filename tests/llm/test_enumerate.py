"""A real prompter and frozen model as an exact instance, against token-by-token scoring."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alignpro.errors import AlignProError
from alignpro.llm.arms.enumerate import Enumeration, enumerate_models, sample
from alignpro.llm.arms.settings import EnumerationSettings
from alignpro.llm.models import packages
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.load import load_model
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.policies.prompter import Template, target_ids
from alignpro.theory import solution

PLAIN = Template(system="", examples=(), request="", opening="", space="")
SETTINGS = EnumerationSettings(rewrites=6, responses=9, rewrite_tokens=8, response_tokens=5, seed=4)
PROMPTS = ("ab", "cde", "f")


class Vowels:
    """r(x, y): the share of y's letters that are a or e, and a little for sharing letters with x."""

    low, high = 0.0, 1.0

    def score(self, prompts, responses):
        return np.array(
            [
                0.8 * sum(c in "ae" for c in y) / max(len(y), 1) + 0.2 * bool(set(x) & set(y))
                for x, y in zip(prompts, responses, strict=True)
            ]
        )

    def describe(self):
        return {"name": "vowels"}


@pytest.fixture(scope="module")
def made():
    prompter, tokenizer = tiny_model(seed=1, vocab="abcdef")
    frozen, frozen_tokenizer = tiny_model(seed=2, vocab="abcdef")
    enumeration = enumerate_models(
        prompter, tokenizer, frozen, frozen_tokenizer, PROMPTS, Vowels(), SETTINGS, template=PLAIN
    )
    return prompter, tokenizer, frozen, frozen_tokenizer, enumeration


def renormalised(model, prompt, sequences):
    """Leaf probabilities by definition: the conditionals, renormalised over each prefix's children."""
    children: dict[tuple, set] = {}
    for s in sequences:
        for t in range(len(s)):
            children.setdefault(tuple(s[:t]), set()).add(s[t])
    out = []
    for s in sequences:
        p = 1.0
        with torch.no_grad():
            rows = model(torch.tensor([[*prompt, *s]])).logits[0, len(prompt) - 1 :].double()
        for t, logits in enumerate(rows[:-1]):
            p *= float(torch.exp(logits[s[t]] - torch.logsumexp(logits[sorted(children[tuple(s[:t])])], 0)))
        out.append(p)
    return np.array(out)


def test_policies_and_rewards_are_exact(made):
    prompter, tokenizer, frozen, frozen_tokenizer, e = made
    instance = e.instance
    rtol = 5e-5  # float32 logits of size ~10, up to 8 steps
    for x, prompt in enumerate(PROMPTS):
        rows, columns = e.rows(x), e.columns(x)
        expected = renormalised(prompter, PLAIN.prompt_ids(tokenizer, prompt), e.rewrite_ids[x])
        np.testing.assert_allclose(instance.prior[x, rows], expected, rtol=rtol)
        assert instance.prior[x].sum() == pytest.approx(1, abs=1e-14)
        assert e.rewrites[x][0] == prompt  # own row: the original prompt
        assert instance.own[x] == rows.start
        for k, rewrite in enumerate(e.rewrites[x]):
            expected = renormalised(frozen, target_ids(frozen_tokenizer, rewrite), e.response_ids[x])
            np.testing.assert_allclose(instance.frozen[rows.start + k, columns], expected, rtol=rtol)
            assert instance.frozen[rows.start + k].sum() == pytest.approx(1, abs=1e-14)
        everywhere = [text for row in e.responses for text in row]
        np.testing.assert_array_equal(
            instance.reward[x], Vowels().score([prompt] * len(everywhere), everywhere)
        )
    # Mutant: without renormalisation the probabilities would not come near one.
    raw = 0.0
    for s in e.response_ids[0]:
        ids = torch.tensor([[*target_ids(frozen_tokenizer, PROMPTS[0]), *s]])
        with torch.no_grad():
            logp = frozen(ids).logits[0].log_softmax(-1)
        n = ids.shape[1] - len(s)
        raw += float(torch.exp(sum(logp[n - 1 + t, token] for t, token in enumerate(s))))
    assert raw < 0.9


def test_sets_are_distinct_and_of_the_size_asked(made):
    e = made[-1]
    for x in range(len(PROMPTS)):
        assert len(set(e.rewrites[x])) == len(e.rewrites[x]) <= SETTINGS.rewrites
        assert len(set(e.response_ids[x])) == len(e.response_ids[x]) == SETTINGS.responses
        assert all(len(s) <= SETTINGS.response_tokens for s in e.response_ids[x])


def test_task_rewards_are_expected_rewards_or_draws_of_them(made):
    e = made[-1]
    s = solution(e.instance, 0.1, 0.1)
    exact = e.task()
    for x in range(len(PROMPTS)):
        leaves = list(range(len(e.rewrites[x])))
        np.testing.assert_allclose(
            exact.reward(x, leaves), np.asarray(s.rewrite_reward)[x, e.rows(x)], rtol=1e-12
        )
    # Draws: the mean of 4,000 lies within 4.5 standard errors (false alarm 7e-6 per rewrite).
    torch.manual_seed(0)
    sampled = e.task(exact_rewards=False)
    for leaf in range(3):
        draws = np.array(sampled.reward(1, [leaf] * 4000))
        truth = exact.reward(1, [leaf])[0]
        assert abs(draws.mean() - truth) < 4.5 * draws.std() / 4000**0.5
        # Mutant: the next rewrite's reward is told apart.
        assert abs(draws.mean() - exact.reward(1, [leaf + 1])[0]) > 4.5 * draws.std() / 4000**0.5


def test_the_theory_holds_on_it(made):
    e = made[-1]
    s = solution(e.instance, 0.2, 0.1)
    reward = np.asarray(e.instance.reward) @ np.asarray(e.instance.frozen).T
    weights = np.asarray(e.instance.prior) * np.exp(reward / 0.1)
    star = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(s.rho_star), star, rtol=1e-11, atol=1e-300)


def test_given_rewrites_are_scored_as_they_are(made):
    """The same strategies of every prompt, by a template that appends; nothing of them is drawn."""
    prompter, tokenizer, frozen, frozen_tokenizer, _ = made
    models = prompter, tokenizer, frozen, frozen_tokenizer
    template = replace(PLAIN, append=True)
    given = [[x, *(with_instruction(x, s) for s in ("ab", "c", "fed"))] for x in PROMPTS]

    def go(rewrites, template=template):
        return enumerate_models(*models, PROMPTS, Vowels(), SETTINGS, template=template, rewrites=rewrites)

    e = go(given)
    assert [list(row) for row in e.rewrites] == given
    for x, prompt in enumerate(PROMPTS):
        ids = [template.rewrite_ids(tokenizer, prompt, text) for text in given[x]]
        expected = renormalised(prompter, template.prompt_ids(tokenizer, prompt), ids)
        np.testing.assert_allclose(e.instance.prior[x, e.rows(x)], expected, rtol=5e-5)
        for k, rewrite in enumerate(given[x]):
            expected = renormalised(frozen, target_ids(frozen_tokenizer, rewrite), e.response_ids[x])
            row = e.instance.frozen[e.rows(x).start + k, e.columns(x)]
            np.testing.assert_allclose(row, expected, rtol=5e-5)
    for wrong in ([row[1:] for row in given], [[*row, row[1]] for row in given], [[x] for x in PROMPTS]):
        with pytest.raises(AlignProError, match=r"^rewrites of 'ab': give the prompt itself first"):
            go(wrong)
    with pytest.raises(AlignProError, match="are of 2 prompts"):
        go(given[:2])
    with pytest.raises(AlignProError, match=r"^rewrite 'ab  c': this prompter says 'ab c' for it"):
        go([["ab", "ab  c"], *given[1:]])
    with pytest.raises(AlignProError, match=r"says 'b' for it"):
        go([["ab", "zb"], *([x, x + "a"] for x in PROMPTS[1:])], PLAIN)


def test_save_and_load(made, tmp_path):
    e = made[-1]
    e.save(tmp_path)
    again = Enumeration.load(tmp_path)
    assert replace(again, instance=e.instance) == e
    for key in ("p", "prior", "frozen", "own", "reward"):
        np.testing.assert_array_equal(getattr(again.instance, key), getattr(e.instance, key))
    (tmp_path / "texts.json").write_text("{")
    with pytest.raises(AlignProError, match=r"texts\.json: missing or damaged"):
        Enumeration.load(tmp_path)


def test_equal_seeds_give_equal_samples_and_leave_the_global_state_alone():
    model, tokenizer = tiny_model(seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [
        sample(model, tokenizer, [(3, 4), (5,)] * 4, max_new_tokens=6, seed=s, batch=3) for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)
    for tokens in draws[0]:
        assert 1 <= len(tokens) <= 6
        assert tokenizer.eos_token_id not in tokens[:-1]


def test_bad_input_is_named(made):
    prompter, tokenizer, frozen, frozen_tokenizer, _ = made

    class Unbounded(Vowels):
        def score(self, prompts, responses):
            return super().score(prompts, responses) + 1

    def go(prompts=PROMPTS, reward=None):
        return enumerate_models(
            prompter,
            tokenizer,
            frozen,
            frozen_tokenizer,
            prompts,
            reward or Vowels(),
            SETTINGS,
            template=PLAIN,
        )

    with pytest.raises(AlignProError, match="repeated"):
        go(("ab", "ab"))
    with pytest.raises(AlignProError, match=r"prompt 'ab', .* outside the declared \[0, 1\]"):
        go(reward=Unbounded())
    with pytest.raises(AlignProError, match=r"^rewrites 1: "):
        EnumerationSettings(rewrites=1)
    with pytest.raises(AlignProError, match="candidate_temperature"):
        EnumerationSettings(candidate_temperature=0.0)


@pytest.mark.weights
def test_smollm2_is_enumerated_exactly():
    if not packages.cached("smollm2"):
        pytest.skip("SmolLM2 is not in the cache; `make demo` fetches it")
    model, tokenizer = load_model("smollm2-135m-instruct")

    class Length:
        low, high = 0.0, 1.0

        def score(self, prompts, responses):
            return np.array([min(len(y), 100) / 100 for y in responses])

        def describe(self):
            return {"name": "length"}

    settings = EnumerationSettings(rewrites=3, responses=3, rewrite_tokens=8, response_tokens=4)
    prompt = "Explain why the sky is blue."
    e = enumerate_models(model, tokenizer, model, tokenizer, [prompt], Length(), settings)
    expected = renormalised(model, Template().prompt_ids(tokenizer, prompt), e.rewrite_ids[0])
    np.testing.assert_allclose(e.instance.prior[0], expected, rtol=1e-3)
    expected = renormalised(model, target_ids(tokenizer, e.rewrites[0][1]), e.response_ids[0])
    np.testing.assert_allclose(e.instance.frozen[1], expected, rtol=1e-3)
