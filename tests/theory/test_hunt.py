import json
import math
from functools import partial

import numpy as np
import pytest
from theory_oracle import exact, fields, kills

from alignpro.commands import hunt, main
from alignpro.errors import AlignProError
from alignpro.theory.bounds import BOUNDS, IDENTITIES, STATEMENTS, WRONG_BOUNDS
from alignpro.theory.families import draw
from alignpro.theory.instance import load
from alignpro.theory.search import hunting
from alignpro.theory.search.ascend import ascend
from alignpro.theory.search.found import FLOOR, TEMPERATURES, Target, certificate, evaluate, target
from alignpro.theory.search.shrink import simplify, smallest

SHAPE = (2, 3, 3)
# One size of everything, so that each statement is compiled once for all tests.
climb = partial(ascend, shape=SHAPE, restarts=64, steps=300, seed=0, families=("independent",))
LIKE = ["--restarts", "64", "--steps", "100", "--tries", "500"]
ASCENDED = {"signed_max_abs": 0.49, "never_outperforms": 0.95}  # the suprema are 1/2 and 1


def broken_by_hand(found):
    """The refuted inequality again, from the formulas in 60 digits: lhs − rhs; None where not written out."""
    o = exact(found.instance, found.beta, found.lam, found.prompter)
    tv = o["tv_model"] + o["tv_shift"]
    largest = float(np.max(np.abs(np.asarray(found.instance.reward))))
    broken = {
        "signed_max_abs": o["gap"] - largest * tv + o["prompter_kl"],
        "quarter_l1": o["gap"] - o["r_max"] * tv / 2 + o["prompter_kl"],
        "never_outperforms": -o["gap"],
        "l1_at_most_one": 2 * o["tv_model"] - 1,
    }
    return float(broken[found.target.name]) if found.target.name in broken else None


def refutes(found):
    """Violated in float64, proved in balls, and the same number by hand where that is written out."""
    assert found.violated
    assert found.excess > 0
    assert certificate(found).verdict == "violated"
    by_hand = broken_by_hand(found)
    if by_hand is not None:
        np.testing.assert_allclose(by_hand, found.lhs - found.rhs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WRONG_BOUNDS)
def test_what_is_wrong_is_refuted_by_a_small_instance(name):
    found = smallest(target(name), SHAPE, seed=0, tries=1000).found
    refutes(found)
    assert found.instance.shape <= (1, 2, 2)
    assert found.beta in (*(10.0**n for n in range(-3, 4)), 2.0, 3.0)
    for rows in (found.instance.p, found.instance.prior, found.instance.frozen):
        assert any(np.allclose(np.asarray(rows) * n, np.round(np.asarray(rows) * n)) for n in range(1, 20))


@pytest.mark.parametrize("name", ASCENDED)
def test_what_is_wrong_is_refuted_by_ascent(name):
    """Nearly as far as can be."""
    found = climb(target(name), steps=150).worst
    refutes(found)
    assert found.excess > ASCENDED[name]


@pytest.mark.parametrize("name", ["theorem1", "trained", "pinsker"])
def test_what_is_true_is_approached_and_not_passed(name):
    found = climb(target(name))
    assert found.start < 0.999  # it is the ascent that gets there
    assert 0.999 < found.tightest.tightness <= 1 + 1e-12
    assert found.tightest.rhs >= FLOOR * found.tightest.span
    assert found.worst is None
    assert certificate(found.tightest).verdict == "holds"


def test_ascent_beats_random_search_and_repeats():
    wanted = target("theorem1")
    once, again, other = (climb(wanted, steps=60, seed=seed) for seed in (4, 4, 5))
    np.testing.assert_array_equal(once.tightest.instance.frozen, again.tightest.instance.frozen)
    assert once.tightest.ratio == again.tightest.ratio != other.tightest.ratio
    assert once.tightest.ratio > once.start
    low, high = TEMPERATURES
    assert all(low <= t <= high for t in (once.tightest.beta, once.tightest.lam))


def test_an_identity_is_not_broken_and_a_mutant_is():
    def off(s):
        return IDENTITIES["exact_gap"](s._replace(shift=s.shift * (1 + 1e-3)))

    def holds(wanted):
        assert smallest(wanted, SHAPE, tries=100).found is None

    holds(target("exact_gap"))
    kills(holds, Target("exact_gap", off, equality=True))


def test_a_conjecture_of_ones_own():
    def half(s):
        return BOUNDS["tight"](s._replace(tv_model=0.9 * s.tv_model))

    found = smallest(Target("half", half), SHAPE, tries=400).found
    assert found.violated
    assert found.instance.shape == (1, 1, 2)


def test_padding_changes_nothing():
    rng = np.random.default_rng(0)
    for family in ("independent", "sparse", "signed"):
        for instance in draw(family, 0, (1, 2, 3), 5):
            beta, lam = 10.0 ** rng.uniform(-2, 2, 2)
            padded, plain = (
                evaluate(target("trained"), instance, beta, lam, shape=to) for to in (SHAPE, None)
            )
            for side in ("lhs", "rhs", "span"):
                np.testing.assert_allclose(
                    getattr(padded, side), getattr(plain, side), rtol=1e-12, atol=1e-14
                )
            assert padded.rho_star.shape == plain.rho_star.shape == (1, 2)
            np.testing.assert_allclose(padded.pi_star, plain.pi_star, rtol=1e-12)


def test_simplify_keeps_what_it_shows():
    wanted = target("signed_max_abs")
    for instance in draw("signed", 3, SHAPE, 20):
        found = evaluate(wanted, instance, 0.317, 2.91)
        simple = simplify(found, SHAPE)
        assert simple.violated == found.violated
        if found.violated:
            assert simple.excess >= 0.99 * found.excess
            assert math.prod(simple.instance.shape) <= math.prod(found.instance.shape)
        elif found.tightness > -math.inf:
            assert simple.tightness >= found.tightness - 1e-3


def test_q2_is_answered_in_plain_numpy(tmp_path, capsys):
    """The prompter optimal for λ outperforms π*: sup of −gap/span is 1, and 1×2×2 is the least shape."""
    assert main.main(["hunt", "q2", *LIKE, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "never_outperforms (lhs <= rhs, known wrong): REFUTED" in said
    row = json.loads((tmp_path / "hunt.json").read_text())["statements"]["never_outperforms"]
    assert row["smallest"]["shape"] == [1, 2, 2]
    assert row["smallest"]["verdict"] == row["worst"]["verdict"] == "violated"
    assert row["worst"]["slack_over_span"] < -0.99
    for role in ("smallest", "worst"):
        instance, beta, lam = load(tmp_path / row[role]["instance"]), row[role]["beta"], row[role]["lam"]
        p, prior, frozen, own, reward = fields(instance)
        gap = 0.0
        for x in range(len(p)):
            pi = frozen[own[x]] * np.exp((reward[x] - reward[x].max()) / beta)
            r = frozen @ reward[x]
            rho = prior[x] * np.exp((r - r[prior[x] > 0].max()) / lam)
            gap += p[x] * (pi @ reward[x] / pi.sum() - rho @ r / rho.sum())
        np.testing.assert_allclose(gap, row[role]["rhs"], rtol=1e-9)
        assert gap < 0


def test_no_smaller_shape_can_outperform():
    for shape in ((2, 1, 3), (2, 3, 1)):
        for instance in draw("sparse", 1, shape, 30) + draw("signed", 1, shape, 30):
            assert not evaluate(target("q2"), instance, 0.3, 0.1, shape=SHAPE).violated


def test_what_is_written_reloads_to_the_same_verdict(tmp_path, capsys):
    names = ["signed_max_abs", "trained"]
    assert main.main(["hunt", *names, *LIKE, "--out", str(tmp_path)]) == 1
    capsys.readouterr()
    content = json.loads((tmp_path / "hunt.json").read_text())
    for name in names:
        for role in ("smallest", "worst", "tightest"):
            row = content["statements"][name].get(role)
            if row is not None:
                rho = None if row["prompter"] is None else np.array(row["prompter"])
                instance = load(tmp_path / row["instance"])
                found = evaluate(target(name), instance, row["beta"], row["lam"], rho, SHAPE)
                assert found.verdict == row["float64_verdict"]
                np.testing.assert_allclose([found.lhs, found.rhs], [row["lhs"], row["rhs"]], rtol=1e-9)
    assert set(content["statements"]["signed_max_abs"]) >= {"smallest", "worst"}
    assert content["statements"]["trained"]["refuted"] is False


def test_tables_show_the_instance():
    instance = draw("sparse", 0, (1, 3, 2))[0]
    shown = hunt.tables(evaluate(target("trained"), instance, 0.5, 0.25, shape=SHAPE))
    assert "beta 0.5   lam 0.25   1 x 3 x 2" in shown
    assert shown.count("rewrite") == 1 + 3
    assert f"rewrite {int(instance.own[0])} = the prompt" in shown
    assert all(word in shown for word in ("rho_sft", "rho*", " rho ", " R ", "pi*", "reward"))


def test_numbers_are_shown_short():
    shown = [hunt.short(v) for v in (1 / 3, 0.3, 1.0, 2 / 7, 0.123456, 1e-12, 0.1 + 0.2, math.inf)]
    assert shown == ["1/3", "0.3", "1", "2/7", "0.1235", "1e-12", "0.3", "inf"]


def test_interrupting_keeps_what_was_found(tmp_path, capsys, monkeypatch):
    def stop(done, best):
        if done > 1:
            raise KeyboardInterrupt

    found = climb(target("theorem1"), progress=stop)
    assert found.interrupted
    assert found.tightest is not None
    calls = []

    def later(tried):
        calls.append(tried)
        if tried == 60:
            raise KeyboardInterrupt

    cut = smallest(target("signed_max_abs"), SHAPE, progress=later)
    assert cut.interrupted
    assert cut.tried == 60
    assert cut.found.violated  # the simplest until then
    monkeypatch.setattr(hunting, "ascend", lambda *a, **k: found)
    assert main.main(["hunt", "theorem1", "pinsker", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr()
    assert "interrupted: this is what was found so far" in said.out
    assert "pinsker" not in said.out
    assert said.err.endswith("alignpro: interrupted\n")
    row = json.loads((tmp_path / "hunt.json").read_text())["statements"]["theorem1"]
    assert row["interrupted"]


def test_the_clock_ends_both_routes():
    assert climb(target("theorem1"), steps=10**6, seconds=1e-9).steps == 0
    cut = smallest(target("theorem1"), SHAPE, seconds=1e-9)
    assert (cut.tried, cut.found, cut.interrupted) == (0, None, False)


BAD = {
    "unknown": (["theorem2"], "BOUND theorem2: is unknown; give one of theorem1"),
    "none": ([], "BOUND: none given; name at least one of theorem1"),
    "shape": (["theorem1", "--shape", "1", "0", "2"], "--shape 1 0 2: give the sizes X K Y"),
    "huge": (["theorem1", "--shape", "1", "2", "65"], "--shape 1 2 65: give the sizes"),
    "restarts": (["theorem1", "--restarts", "0"], "--restarts 0: must be positive"),
    "steps": (["theorem1", "--steps", "-1"], "--steps -1: must be positive"),
    "tries": (["theorem1", "--tries", "0"], "--tries 0: must be positive"),
    "seed": (["theorem1", "--seed", "-1"], "--seed -1: must not be negative"),
    "seconds": (["theorem1", "--seconds", "nan"], "--seconds nan: must be positive and finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, tmp_path, capsys):
    arguments, message = BAD[case]
    assert main.main(["hunt", *arguments, "--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"alignpro: error: {message}")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_every_statement_and_alias_has_a_target():
    for name in STATEMENTS:
        assert target(name).name == name
    assert target("q2") == target("outperform") == target("never_outperforms")
    with pytest.raises(AlignProError, match="q3"):
        target("q3")
