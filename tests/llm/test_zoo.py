"""Every model family: what is sampled is what is scored, and every verb runs on it."""

import numpy as np
import pytest
import torch
import zoo
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.llm.models import configure, forward, policy
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.load import load_model
from alignpro.llm.models.policy import draw, end_tokens, log_probs, sample_key
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import Prompter, Template, target_ids
from alignpro.llm.policies.tree import PrefixTree, leaf_probabilities
from alignpro.llm.targets.local import LocalTarget

FAMILIES = list(zoo.FAMILIES)
NO_CLASSIFIER = ("lfm2",)
NEAR = 1e-4
"""Nats; float32 rounding of these models leaves 1e-5."""


@pytest.fixture(scope="session")
def loaded(animals):
    """Name of a family -> its model and tokenizer, loaded once."""
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = load_model(animals(name), device="cpu")
        return cache[name]

    return get


def plain_log_probs(model, prompt, said):
    """[len(said)] by one forward pass of this sequence alone, on the model's own logits."""
    ids = torch.tensor([[*prompt, *said]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(said)[:, None])[:, 0].numpy()


def sequences(tokenizer, seed=0):
    """Prompts of several lengths, some beyond any window here, each with continuations that share a start."""
    rng = np.random.default_rng(seed)
    ordinary = np.arange(20, min(300, len(tokenizer)))

    def tokens(n):
        return [int(i) for i in rng.choice(ordinary, n)]

    pairs = []
    for length in (5, 9, 9, 30):
        prompt, start = tokens(length), tokens(2)
        pairs += [(prompt, [*start, *tokens(n)]) for n in (1, 7, 24)]
    return [p for p, _ in pairs], [said for _, said in pairs]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_a_plain_forward_pass(name, loaded):
    model, tokenizer = loaded(name)
    assert forward.how_of(model).masks == zoo.FAMILIES[name].masks
    prompts, said = sequences(tokenizer)
    with torch.no_grad():
        together = log_probs(model, prompts, said)
        few = log_probs(model, prompts, said, most=40)
    for i, (prompt, ids) in enumerate(zip(prompts, said, strict=True)):
        expected = plain_log_probs(model, prompt, ids)
        for scores in (together, few):  # whatever else is in the call
            got = scores.log_probs[i].double().numpy()
            np.testing.assert_allclose(got[: len(ids)], expected, rtol=0, atol=NEAR)
            assert not got[len(ids) :].any()
    # Entropies and hidden states are of the same passes.
    with torch.no_grad():
        scores = log_probs(model, prompts[:1], said[:1], hidden=True)
        ids = torch.tensor([[*prompts[0], *said[0]]])
        out = model(input_ids=ids, output_hidden_states=True)
        logits = out.logits[0, len(prompts[0]) - 1 : -1].double()
    p = torch.softmax(logits, -1)
    entropy = -(p * torch.log_softmax(logits, -1)).sum(-1)
    np.testing.assert_allclose(scores.entropies[0].numpy(), entropy.numpy(), rtol=0, atol=NEAR)
    hidden = out.hidden_states[-1][0, len(prompts[0]) - 1 : -1]
    np.testing.assert_allclose(scores.hidden[0].numpy(), hidden.numpy(), rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_draws_on_a_gpu(name, animals):
    """In float32 on CUDA the ways agree as on a CPU, with TF32 off; in bfloat16 the check passes."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    model, tokenizer = load_model(animals(name), device="cuda")
    assert forward.how_of(model).masks == zoo.FAMILIES[name].masks
    prompts, said = sequences(tokenizer)
    with torch.no_grad():
        scores = log_probs(model, prompts, said).log_probs.double().cpu().numpy()
    on_cpu, _ = load_model(animals(name), device="cpu")
    for row, prompt, ids in zip(scores, prompts, said, strict=True):
        expected = plain_log_probs(on_cpu, prompt, ids)
        np.testing.assert_allclose(row[: len(ids)], expected, rtol=0, atol=10 * NEAR)
    load_model(animals(name), "bfloat16", "cuda")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_a_plain_forward_pass(name, loaded):
    model, tokenizer = loaded(name)
    prompts, said = sequences(tokenizer, seed=1)
    prompts, said = prompts[::3], said[2::3]
    # Any weight of a block in the middle: what flows back through head and upper layers reaches it.
    _, blocks = zoo_blocks(model)
    parameter = next(p for p in blocks[1].parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight
    asked = [p for p in model.parameters() if p is not parameter]
    try:
        for p in asked:
            p.requires_grad_(False)
        parameter.requires_grad_(True)
        (ours,) = torch.autograd.grad(log_probs(model, prompts, said).log_probs.sum(), parameter)
        total = torch.zeros(())
        for prompt, ids in zip(prompts, said, strict=True):
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            total = total + torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum()
        (plain,) = torch.autograd.grad(total, parameter)
        # A head that is trained goes the other way, through checkpointed chunks: the same gradient.
        head.requires_grad_(True)
        (trained,) = torch.autograd.grad(log_probs(model, prompts, said).log_probs.sum(), parameter)
    finally:
        for p in model.parameters():
            p.requires_grad_(True)
    scale = float(plain.abs().max())
    assert scale > 1e-3
    for found in (ours, trained):
        np.testing.assert_allclose(found.numpy(), plain.numpy(), rtol=0, atol=2e-4 * scale)


def zoo_blocks(model):
    from alignpro.llm.models.adapters import blocks_of

    return blocks_of(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_trees_are_exact(name, loaded):
    """Leaves of trees behind prompts of different lengths, one beyond the window, against plain passes."""
    model, tokenizer = loaded(name)
    prompts, said = sequences(tokenizer, seed=2)
    trees = [PrefixTree(tuple((*ids, 1 + k) for k, ids in enumerate(said[i : i + 3]))) for i in (0, 9)]
    got = leaf_probabilities(model, [prompts[0], prompts[9]], trees)
    for prompt, tree, found in zip((prompts[0], prompts[9]), trees, got, strict=True):
        children = {}
        for leaf in tree.sequences:
            for t in range(len(leaf)):
                children.setdefault(leaf[:t], set()).add(leaf[t])
        expected = []
        for leaf in tree.sequences:
            total = 0.0
            for t, token in enumerate(leaf):
                some = sorted(children[leaf[:t]])
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*prompt, *leaf[:t]]])).logits[0, -1].double()
                total += float(torch.log_softmax(logits[some], 0)[some.index(token)])
            expected.append(total)
        np.testing.assert_allclose(np.log(found), expected, rtol=0, atol=NEAR)


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_scored_as_the_model_scores_them(name, loaded):
    """Several samples of prompts of different lengths, past the window, by what was kept from sampling."""
    model, tokenizer = loaded(name)
    prompts, _ = sequences(tokenizer, seed=3)
    rows = [p for p in sorted({tuple(p) for p in prompts}, key=len) for _ in range(3)]
    keys = [sample_key("zoo", i) for i in range(len(rows))]
    drawn = draw(model, tokenizer.pad_token_id, rows, keys, Sampling(max_tokens=20), score=True)
    ends = end_tokens(model)
    for row, (ids, values) in zip(rows, drawn, strict=True):
        np.testing.assert_allclose(values, plain_log_probs(model, row, ids), rtol=0, atol=NEAR)
        assert not set(ids[:-1]) & set(ends)
        assert len(ids) == 20 or ids[-1] in ends
    # A draw is its key's: alone it is the same, but where rounding tips one token.
    pad = tokenizer.pad_token_id
    alone = [
        draw(model, pad, [row], [key], Sampling(max_tokens=20))[0]
        for row, key in zip(rows, keys, strict=True)
    ]
    assert sum(a[0] == b[0] for a, b in zip(alone, drawn, strict=True)) >= len(rows) - 1


@pytest.mark.parametrize("name", FAMILIES)
def test_what_prompts_begin_with_is_read_once(name, loaded):
    """Prompts that share an opening, of one length and of several, past the window where there is one."""
    model, tokenizer = loaded(name)
    rng, ordinary = np.random.default_rng(5), np.arange(20, min(300, len(tokenizer)))

    def tokens(n):
        return tuple(rng.choice(ordinary, n).tolist())

    start = tokens(40)
    rows = [(*start, *tokens(5)) for _ in range(3)]
    uneven = [(*start[:6], *tokens(n)) for n in (1, 4, 4)]
    pad = tokenizer.pad_token_id
    for some, opening in ((rows, 40), (uneven, 6), ([start, start[:9], start[:9]], 8)):
        keys = [sample_key("opening", i) for i in range(len(some))]

        def right(module, some=some, keys=keys):
            drawn = module.draw(model, pad, some, keys, Sampling(max_tokens=3), score=True)
            for row, (ids, values) in zip(some, drawn, strict=True):
                np.testing.assert_allclose(values, plain_log_probs(model, row, ids), rtol=0, atol=NEAR)

        right(policy)
        found = policy._opening(model, list(dict.fromkeys(some)), 3)
        if found and forward.how_of(model).opening:
            assert found == opening
            kills(right, mutated(policy, "row[opening:] for row", "row[opening - 1 :] for row"))
            kills(
                right, mutated(policy, "(mask.cumsum(-1) - 1).clamp", "(mask.cumsum(-1) - mask.sum()).clamp")
            )


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_finds_masks_without_windows(name, dtype, animals, monkeypatch):
    """Read wrongly, a model is read in the slower way, which is right; low precision hides nothing of it."""
    right = forward.windows

    def mutant(model):
        return dict.fromkeys(right(model), None)

    model, tokenizer = load_model(animals(name), dtype, "cpu")
    assert forward.how_of(model).masks != "none"
    monkeypatch.setattr(forward, "windows", mutant)  # check has its own: it still looks beyond the window
    assert configure.check_model(model, tokenizer).masks == "none"


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_finds_layers_that_masks_do_not_reach(name, dtype, animals, monkeypatch):
    """Told that masks reach every layer, the check finds that branches leak into one another."""
    monkeypatch.setattr(configure, "masks_of", lambda model: ["one", "none"])
    model, tokenizer = load_model(animals(name), dtype, "cpu")
    assert configure.check_model(model, tokenizer).masks == "none"


def test_what_agrees_with_nothing_is_refused(animals, monkeypatch):
    model, tokenizer = load_model(animals("qwen2_5"), device="cpu")
    right = forward.Head.finish
    monkeypatch.setattr(forward.Head, "finish", lambda self, logits: 1.1 * right(self, logits))
    monkeypatch.setattr(forward, "_EdgeLogProbs", None)
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(AlignProError, match=r"^model 'odd': the scores of sequences differ .* cannot use it"):
        configure.check_model(model, tokenizer, "odd")


def test_a_model_that_was_not_checked_is_refused(animals):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(animals("qwen2_5"))
    with pytest.raises(AlignProError, match=r"it was not checked.*models\.prepare"):
        log_probs(model, [[5]], [[6]])


# --- chats ---


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_ends_where_the_template_ends_it(name, loaded):
    model, tokenizer = loaded(name)
    row = zoo.FAMILIES[name]
    end = tokenizer.convert_tokens_to_ids(row.end)
    assert chat_of(tokenizer).end == end
    assert {end, *map(tokenizer.convert_tokens_to_ids, row.ends)} <= set(end_tokens(model))
    for template in (Template(), Template(append=True)):
        assert template.rewrite_ids(tokenizer, "x", "x y")[-1] == end
    # A rewrite is scored as the model would say it.
    prompter = Prompter(model, tokenizer)
    ids = prompter.prompt_ids(["How?"])[0]
    said = prompter.template.rewrite_ids(tokenizer, "How?", "Explain how.")
    expected = plain_log_probs(model, ids, said).sum()
    assert prompter.log_probs(["How?"], ["Explain how."])[0] == pytest.approx(expected, abs=NEAR)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_instruction_reaches_the_model(name, loaded):
    """Also where the template refuses a system message: then it stands before the first user's turn."""
    _, tokenizer = loaded(name)
    template = Template()
    text = tokenizer.decode(list(template.prompt_ids(tokenizer, "How do plants grow today?")))
    assert template.system in text
    assert text.index(template.system) < text.index(template.examples[0][0])
    assert "Request: How do plants grow today?" in text
    assert text.endswith("Rewritten:")
    takes = chat_of(tokenizer).takes_system
    assert takes == (name not in ("gemma2", "mistral"))


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_prompt_are_text(name, loaded):
    _, tokenizer = loaded(name)
    control = chat_of(tokenizer).control_tokens
    ids = {tokenizer.convert_tokens_to_ids(token) for token in control}
    hostile = "a " + " b".join(control) + "\nc"
    plain = target_ids(tokenizer, "a c")
    for found in (target_ids(tokenizer, hostile), Template().prompt_ids(tokenizer, hostile)):
        text = tokenizer.decode(list(found))
        assert hostile in text
    count = sum(i in ids for i in target_ids(tokenizer, hostile))
    assert count == sum(i in ids for i in plain)  # the template's own
    assert not ids & set(chat_of(tokenizer).text_ids(hostile))
    # Nor by the names that control tokens have while such a text is encoded.
    names = hostile + "".join(f"\U000f0000{i}\U000f0001" for i in range(len(control)))
    assert not ids & set(chat_of(tokenizer).text_ids(names))
    assert sum(i in ids for i in target_ids(tokenizer, names)) == count
    # Mutant: the text handed to the tokenizer as it is.
    assert sum(i in ids for i in tokenizer(hostile, add_special_tokens=False).input_ids) == len(control)
    # What spells nothing is encoded as ever.
    messages = [{"role": "user", "content": "How do plants grow?"}]
    text = chat_of(tokenizer).render(messages)
    assert target_ids(tokenizer, messages[0]["content"]) == tuple(
        tokenizer(text, add_special_tokens=False).input_ids
    )


def test_today_is_one_day(loaded):
    _, tokenizer = loaded("llama3_2")
    text = tokenizer.decode(list(target_ids(tokenizer, "How?")))
    assert "Today Date: 26 Jul 2024" in text
    # The template asks the clock: left alone it would say another day.
    alone = tokenizer.apply_chat_template([{"role": "user", "content": "How?"}], tokenize=False)
    assert "Today Date: 26 Jul 2024" not in alone
    assert chat_of(tokenizer).describe()["date"] == "2024-07-26"


def test_thoughts_are_taken_off_and_counted(animals, capsys):
    """Qwen3.5 opens a thought before every answer, Qwen3 may begin with one."""
    model, tokenizer = load_model(animals("qwen3_5"), device="cpu")
    assert "opens a thought" in capsys.readouterr().err
    chat = chat_of(tokenizer)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    assert chat.opens_thought
    ended = chat.said(encode("so it is</think>\n\nYes."))
    assert (ended.text, ended.thought, ended.cut) == ("Yes.", True, False)
    cut = chat.said(encode("so it is and on and on"))
    assert (cut.text, cut.thought, cut.cut) == ("", True, True)
    # A prompter's thought is closed at once: what follows is the rewrite.
    text = tokenizer.decode(list(Template().prompt_ids(tokenizer, "How?")))
    assert text.endswith("<think>\n\n</think>\n\nRewritten:")
    target = LocalTarget((model, tokenizer))
    (answers,) = target.respond(["How?"], Sampling(max_tokens=6), samples=4)
    assert all(answer.thought for answer in answers)
    # Told not to think, it does not open one; the distribution is another, and so is its name in caches.
    quiet = LocalTarget(
        animals("qwen3_5"), device="cpu", dtype="float32", chat_template_kwargs={"enable_thinking": False}
    )
    assert not chat_of(quiet.tokenizer).opens_thought
    assert quiet.revision != target.revision
    _, other = load_model(animals("qwen3"), device="cpu")
    found = chat_of(other).said(other("<think>\nhm\n</think>\n\nNo.", add_special_tokens=False).input_ids)
    assert (found.text, found.thought) == ("No.", True)
    said = chat_of(other).said(other("No <think> of it", add_special_tokens=False).input_ids)
    assert (said.text, said.thought) == ("No <think> of it", False)


def test_prompts_without_room_are_one_error(loaded):
    model, tokenizer = loaded("phi3_5")
    prompter = Prompter(model, tokenizer, base="phi")
    with pytest.raises(
        AlignProError, match=r"has \d+ tokens to prompter 'phi'.* exceed the 1024 that it reads"
    ):
        prompter.rewrites(["How do plants grow? " * 300])
