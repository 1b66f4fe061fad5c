import json

import numpy as np
import pytest

from alignpro import verify
from alignpro.errors import AlignProError
from alignpro.theory.bounds import BOUNDS, IDENTITIES, LEMMAS, LOWER_BOUNDS, WRONG_BOUNDS
from alignpro.theory.families import FAMILIES
from alignpro.theory.instance import load
from alignpro.theory.solution import solution


def test_nothing_true_is_violated_and_the_draw_repeats():
    first = verify.verify(instances=3000, seed=1, quiet=True)
    second = verify.verify(instances=300, seed=1, families=("peaked",), quiet=True)
    assert first.violations == 0
    assert sum(t.checked for t in first.tallies if t.statement == "theorem1") == 3000
    rows = [t.row() for t in first.tallies if t.family == "peaked"]
    assert rows == [t.row() for t in second.tallies]  # whatever other families were asked for
    assert {t.statement for t in first.tallies} == {*BOUNDS, *LOWER_BOUNDS, *IDENTITIES, *LEMMAS}
    for tally in first.tallies:
        assert tally.inapplicable == 0 or tally.statement in ("drift", "regularised")
        if tally.statement in IDENTITIES:
            assert tally.largest_error < 1e-12
    kinds = verify.table(first).splitlines()[1 : 1 + len(first.statements)]
    assert [line.split()[0] for line in kinds] == list(first.statements)


def test_a_false_statement_is_refuted_and_its_instance_saved(tmp_path):
    result = verify.verify(("signed_max_abs",), 900, 0, ("signed",), quiet=True)
    assert result.violations > 0
    verify.save(result, tmp_path)
    found = json.loads((tmp_path / "verify.json").read_text())["refuted"]["signed_max_abs"]
    instance = load(tmp_path / found["instance"])
    again = WRONG_BOUNDS["signed_max_abs"](solution(instance, found["beta"], found["lam"]))
    np.testing.assert_allclose(
        (again.lhs - again.rhs) / again.ceiling, found["relative_violation"], rtol=1e-9
    )


def test_a_refuting_prompter_is_saved(tmp_path):
    result = verify.verify(("suboptimality_reversed",), 300, 0, ("independent",), quiet=True)
    verify.save(result, tmp_path)
    found = json.loads((tmp_path / "verify.json").read_text())["refuted"]["suboptimality_reversed"]
    instance = load(tmp_path / found["instance"])
    rho = np.array(found["prompter"])
    again = WRONG_BOUNDS["suboptimality_reversed"](solution(instance, found["beta"], found["lam"], rho))
    assert again.lhs - again.rhs > again.error


def test_a_new_family_and_statement_are_picked_up(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", FAMILIES["sparse"])
    monkeypatch.setitem(verify.STATEMENTS, "mine", verify.STATEMENTS["tight"])
    result = verify.verify(("mine",), 60, 0, ("mine",), quiet=True)
    assert [t.checked for t in result.tallies] == [60]
    assert result.violations == 0


def test_the_sample_is_the_stream_while_it_fits_and_uniform_after():
    sample = verify.Sample(np.random.default_rng(0))
    sample.add(np.arange(101.0))
    assert sample.quantiles() == [0, 5, 50, 95, 100]
    for start in range(0, 400_000, 1000):
        sample.add(101.0 + np.arange(start, start + 1000))
    low, *_, high = sample.quantiles()
    assert low < 100
    assert high > 399_000
    # 50,000 of 400,101 without replacement: the median's standard error is about 840.
    assert abs(sample.quantiles()[2] - 200_000) < 5 * 840
    assert verify.Sample(np.random.default_rng(0)).quantiles() == [None] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statements": ("theorem2",)}, "--bound theorem2: is unknown; give one of theorem1"),
        ({"families": ("dense",)}, "--family dense: is unknown; give one of independent"),
        ({"instances": 3}, "--instances 3: is below one for each of 10 families"),
        ({"seed": -1}, "--seed -1: must not be negative"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(AlignProError) as caught:
        verify.verify(**arguments, quiet=True)
    assert str(caught.value).startswith(message)
