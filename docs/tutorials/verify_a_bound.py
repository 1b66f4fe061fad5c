"""Verify a bound: on one instance by eye, on thousands at random, and beyond doubt where rounding matters."""

import numpy as np

from alignpro.commands.main import main as alignpro
from alignpro.theory import Instance, check, solution

# One prompt, two rewrites (the first is the prompt itself), two responses, the second of which is better.
instance = Instance(
    p=[1.0],
    prior=[[0.5, 0.5]],
    frozen=[[0.8, 0.2], [0.3, 0.7]],
    own=[0],
    reward=[[0.0, 1.0]],
)
s = solution(instance, beta=0.5, lam=0.5)
print("rho*      ", np.round(s.rho_star[0], 3))  # exp(0.2 / 0.5) : exp(0.7 / 0.5), since R = (0.2, 0.7)
print("pi*       ", np.round(s.pi_star[0], 3))  # 0.8 : 0.2 exp(1 / 0.5)
print("J(pi*) - J(rho*) =", round(float(s.j_star - s.j_rho), 3))

for bound in ("theorem1", "tight", "combined"):
    report = check(instance, beta=0.5, lam=0.5, bound=bound)
    print(f"{bound:<9} gap <= {float(report.rhs):.3f}: {report.verdict}")

# Random instances of two families made to be awkward; a verdict that rounding could forge is proved. The
# tester is tested on what is false: with signed rewards, max |r| is the wrong r_max.
verify = ["verify", "--bounds", "theorem1", "signed_max_abs", "--family", "lm_like", "signed"]
print("exit status", alignpro([*verify, "--instances", "4000", "--certify", "2"]))
