import json

import numpy as np
import pytest

from alignpro.claims import Claim, of_kind
from alignpro.commands import main
from alignpro.commands import verify as command
from alignpro.errors import AlignProError
from alignpro.theory.bounds import STATEMENTS, WRONG_BOUNDS, tight
from alignpro.theory.families import FAMILIES
from alignpro.theory.instance import load
from alignpro.theory.proof import certify
from alignpro.theory.search import tally, verification
from alignpro.theory.search.verification import verify
from alignpro.theory.solution import solution


def test_nothing_true_is_violated_and_the_draw_repeats():
    first = verify(instances=3000, seed=1, quiet=True)
    second = verify(instances=300, seed=1, families=("peaked",), quiet=True)
    assert first.violations == 0
    assert sum(t.checked for t in first.tallies if t.statement == "theorem1") == 3000
    rows = [t.row() for t in first.tallies if t.family == "peaked"]
    assert rows == [t.row() for t in second.tallies]  # whatever other families were asked for
    true = of_kind(STATEMENTS, "upper bound", "lower bound", "identity", "lemma")
    assert {t.statement for t in first.tallies} == set(true)
    for one in first.tallies:
        assert one.inapplicable == 0 or one.statement in ("drift", "regularised")
        if one.claim.kind == "identity":
            assert one.largest_error < 1e-12
    kinds = command.text(first).splitlines()[1 : 1 + len(first.statements)]
    assert [line.split()[0] for line in kinds] == list(first.statements)


def test_a_false_statement_is_refuted_and_its_instance_saved(tmp_path):
    result = verify(("signed_max_abs",), 900, 0, ("signed",), quiet=True)
    assert result.violations > 0
    command.save(result, "verify", command.page(result), tmp_path)
    found = json.loads((tmp_path / "verify.json").read_text())["refuted"]["signed_max_abs"]
    instance = load(tmp_path / found["instance"])
    again = WRONG_BOUNDS["signed_max_abs"](solution(instance, found["beta"], found["lam"]))
    np.testing.assert_allclose(
        (again.lhs - again.rhs) / again.ceiling, found["relative_violation"], rtol=1e-9
    )


def test_a_refuting_prompter_is_saved(tmp_path):
    result = verify(("suboptimality_reversed",), 300, 0, ("independent",), quiet=True)
    command.save(result, "verify", command.page(result), tmp_path)
    found = json.loads((tmp_path / "verify.json").read_text())["refuted"]["suboptimality_reversed"]
    instance = load(tmp_path / found["instance"])
    rho = np.array(found["prompter"])
    again = WRONG_BOUNDS["suboptimality_reversed"](solution(instance, found["beta"], found["lam"], rho))
    assert again.lhs - again.rhs > again.error


def test_a_new_family_and_statement_are_picked_up(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", FAMILIES["sparse"])
    monkeypatch.setitem(STATEMENTS, "mine", STATEMENTS["tight"])
    result = verify(("mine",), 60, 0, ("mine",), quiet=True)
    assert [t.checked for t in result.tallies] == [60]
    assert result.violations == 0


def test_the_sample_is_the_stream_while_it_fits_and_uniform_after():
    sample = tally.Sample(np.random.default_rng(0))
    sample.add(np.arange(101.0))
    assert sample.quantiles() == [0, 5, 50, 95, 100]
    for start in range(0, 400_000, 1000):
        sample.add(101.0 + np.arange(start, start + 1000))
    low, *_, high = sample.quantiles()
    assert low < 100
    assert high > 399_000
    # 50,000 of 400,101 without replacement: the median's standard error is about 840.
    assert abs(sample.quantiles()[2] - 200_000) < 5 * 840
    assert tally.Sample(np.random.default_rng(0)).quantiles() == [None] * 5


@pytest.fixture
def one_shape(monkeypatch):
    """One compilation per test."""
    monkeypatch.setattr(verification, "_SHAPES", ((2, 4, 3),))


@pytest.mark.usefixtures("one_shape")
def test_the_most_doubtful_instances_are_certified():
    result = verify(("tight", "exact_gap"), 200, 2, ("adversarial", "peaked"), quiet=True, certify=3)
    assert result.findings == 0
    rows = result.json()["certified"]["results"]
    assert [row["verdicts"] for row in rows] == [{"holds": 3}] * 4
    assert sum(row["ties"] for row in rows if row["statement"] == "exact_gap") == 6
    assert rows[0]["most_doubtful"]["name"] == "tight"
    text = command.text(result)
    assert "certified" in text
    assert "no violation of 2 statements" in text
    plain = verify(("tight", "exact_gap"), 100, 2, ("peaked",), quiet=True)
    assert plain.json()["certified"] is None


@pytest.mark.usefixtures("one_shape")
def test_a_refutation_is_proved(tmp_path):
    result = verify(("quarter_l1", "trained_reversed"), 900, 0, ("signed",), quiet=True, certify=1)
    assert result.findings > 0
    command.save(result, "verify", command.page(result), tmp_path)
    found = json.loads((tmp_path / "verify.json").read_text())["refuted"]
    for name in ("quarter_l1", "trained_reversed"):
        rho = found[name]["prompter"]
        instance = load(tmp_path / found[name]["instance"])
        arguments = (found[name]["beta"], found[name]["lam"], name, None if rho is None else np.array(rho))
        assert certify.certify(instance, *arguments).verdict == "violated"


@pytest.mark.usefixtures("one_shape")
def test_a_violation_that_rounding_forged_is_settled(monkeypatch):
    def forged(s):
        return tight(s)._replace(error=0 * s.lam)

    monkeypatch.setitem(STATEMENTS, "forged", Claim(forged, "upper bound"))

    def run(certify):
        return verify(("forged",), 120, 0, ("adversarial",), quiet=True, certify=certify)

    claimed = run(0).findings
    assert 8 < claimed < certify.EXAMINED
    settled = run(1)
    assert (settled.violations, settled.findings) == (claimed, 0)
    assert settled.tallies[0].settled == claimed
    assert not settled.refuted
    assert f"forged: {claimed} float64 violations of 120, none of them proved" in command.text(settled)
    # What nobody has examined is not settled.
    monkeypatch.setattr(certify, "EXAMINED", 5)
    assert run(1).findings == claimed - 5


@pytest.mark.usefixtures("one_shape")
@pytest.mark.parametrize(("certify", "count"), [(["--certify"], 8), (["--certify", "2"], 2)])
def test_the_flag(certify, count, capsys):
    asked = ["verify", "--bounds", "theorem1", "--instances", "60", "--family", "signed"]
    assert main.main([*asked, *certify]) == 0
    assert f"(ball arithmetic on the {count} most doubtful" in capsys.readouterr().out


def test_the_flag_takes_one_number(capsys):
    assert main.main(["verify", "--certify", "1", "2"]) == 2
    assert "--certify 1 2: give one number, or none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statements": ("theorem2",)}, "--bounds theorem2: is unknown; give one of theorem1"),
        ({"families": ("dense",)}, "--family dense: is unknown; give one of independent"),
        ({"instances": 3}, "--instances 3: is below one for each of 10 families"),
        ({"seed": -1}, "--seed -1: must not be negative"),
        ({"certify": -1}, "--certify -1: must not be negative"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(AlignProError) as caught:
        verify(**arguments, quiet=True)
    assert str(caught.value).startswith(message)
