"""Test a conjecture of your own: let Hypothesis look for the simplest instance on which it is false."""

from hypothesis import given, settings

from alignpro.theory import solution
from alignpro.theory.testing import counterexample, instances, temperatures

problem = (instances(shape=(1, 2, 2)), temperatures(1e-3, 1e3))  # one shape is compiled once


def more_kl_more_gap(instance, lam):
    """Conjecture: a prompter that moves further from ρ_sft has the smaller gap. (λ halved; β = 1.)"""
    near, far = solution(instance, 1.0, lam), solution(instance, 1.0, lam / 2)
    rounding = near.gap_error + far.gap_error
    return bool((far.gap <= near.gap + rounding).all())


def prompter_beats_no_prompter(instance, lam):
    """Conjecture: ρ* earns at least what the prompt itself earns."""
    s = solution(instance, 1.0, lam)
    return bool((s.delta2 <= s.gap_error).all())


print("less lambda, less gap:", counterexample(more_kl_more_gap, *problem))  # None: not refuted, and true

instance, lam = counterexample(prompter_beats_no_prompter, *problem)
print("rho* beats x itself:   refuted with lambda =", lam)
for name in ("prior", "frozen", "own", "reward"):
    print(f"  {name:<7}", getattr(instance, name).tolist())


# What survived becomes a test: 100 instances whenever the suite runs, with the failure made small.
@settings(deadline=None, derandomize=True)
@given(*problem)
def test_more_kl_more_gap(instance, lam):
    assert more_kl_more_gap(instance, lam)


test_more_kl_more_gap()
print("as a test: passed")
