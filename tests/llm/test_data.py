"""Prompts and preference pairs. The tests on real data skip where the packages are not cached."""

import pytest

from alignpro.errors import AlignProError
from alignpro.llm.data import packaged
from alignpro.llm.data.split import SPLITS, normalised, split_of
from alignpro.llm.models import packages

NEEDED = ("llamafactory", "eval-framework", "mtbench")
needs_data = pytest.mark.skipif(
    not all(packages.cached(name) for name in NEEDED),
    reason='fetch them with: python -c "from alignpro.llm.models import packages;'
    + "; ".join(f"packages.fetch('{name}')" for name in NEEDED)
    + '"',
)


def test_the_split_has_the_stated_shares_and_ignores_typography():
    names = [split_of(f"prompt number {i}") for i in range(5000)]
    shares = [names.count(split) / len(names) for split in SPLITS]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.02)
    for i in range(200):
        assert split_of(f"Prompt  number {i}?\n") == names[i]


def test_the_split_never_changes():
    """Golden: moving a prompt between splits would leak test data into a head trained before."""
    second_letters = "".join(split_of(text)[1] for text in "abcdefghijklmnop")  # tRain, vAlidation, tEst
    assert second_letters == "arrrrrarerrrrrrr"


def test_a_pair_needs_a_difference():
    turns = [("system", "be kind"), ("human", "hi")]
    pair = packaged._pair(turns, " yes ", "no", "toy")
    assert pair is not None
    assert (pair.prompt, pair.chosen, pair.rejected) == ("hi", "yes", "no")
    assert packaged._pair(turns, "yes", "yes ", "toy") is None
    assert packaged._pair(turns, "yes", " ", "toy") is None
    assert packaged._pair([("system", "be kind")], "yes", "no", "toy") is None


def test_continuations_of_one_conversation_share_a_split():
    for i in range(100):
        opening = ("user", f"opening {i}")
        one = packaged._pair([opening], "a", "b", "toy")
        two = packaged._pair([opening, ("assistant", "fine"), ("user", "go on")], "a", "b", "toy")
        assert one is not None
        assert two is not None
        assert one.split == two.split
        assert two.prompt.startswith("go on")
        assert f"opening {i}" in two.prompt


def test_orders_nest_and_counts_are_checked():
    texts = [str(i) for i in range(50)]
    assert packaged._take(texts, 10, 3, "texts") == packaged._take(texts, 20, 3, "texts")[:10]
    assert packaged._take(texts, None, 3, "texts") != packaged._take(texts, None, 0, "texts")
    assert sorted(packaged._take(texts, None, 3, "texts")) == sorted(texts)
    for n in (0, 51, -1):
        with pytest.raises(AlignProError, match="choose between 1 and 50"):
            packaged._take(texts, n, 0, "texts")


def test_duplicates_differ_by_more_than_typography():
    assert packaged._distinct(["Why?", "why", " WHY \n", "who", "?!", ""]) == ["Why?", "who"]


@pytest.mark.parametrize("bad", [{"sources": ["nope"]}, {"split": "nope"}])
def test_unknown_names(bad):
    with pytest.raises(AlignProError, match="choose from"):
        packaged.preference_pairs(**bad)


@pytest.mark.weights
@needs_data
class TestRealData:
    @pytest.mark.parametrize("read", [packaged.instructions, packaged.mt_bench])
    def test_every_dataset_has_distinct_prompts(self, read):
        prompts = read()
        assert len(prompts) >= 80
        assert len({normalised(prompt) for prompt in prompts}) == len(prompts)
        assert all(prompt == prompt.strip() and prompt for prompt in prompts)

    def test_instructions_are_short(self):
        short = packaged.instructions(max_words=8)
        assert max(len(text.split()) for text in short) == 8
        assert set(short) < set(packaged.instructions(max_words=20))
        assert packaged.instructions(5, seed=0) == packaged.instructions(9, seed=0)[:5]
        assert packaged.instructions(5, seed=0) != packaged.instructions(5, seed=1)

    def test_no_prompt_is_in_two_splits(self):
        pairs = packaged.preference_pairs()
        by_prompt: dict[str, set[str]] = {}
        for pair in pairs:
            by_prompt.setdefault(normalised(pair.prompt), set()).add(pair.split)
        assert all(len(splits) == 1 for splits in by_prompt.values())
        parts = [packaged.preference_pairs(split=split) for split in SPLITS]
        assert sum(map(len, parts)) == len(pairs)
        assert all(parts)

    @pytest.mark.parametrize("name", packaged.PREFERENCES)
    def test_every_source_has_real_comparisons(self, name):
        pairs = packaged.preference_pairs([name])
        assert len(pairs) >= 290
        assert all(p.source == name and p.prompt and p.chosen and p.rejected for p in pairs)
        assert all(p.chosen != p.rejected for p in pairs)
        # Length alone must not decide: a head would learn nothing else.
        longer = sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs)
        assert 0.35 < longer < 0.65

    def test_reference_answers(self):
        answers = packaged.reference_answers()
        assert len(answers) > 500
        assert all(prompt and answer for prompt, answer in answers)
