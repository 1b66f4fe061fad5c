"""Do 95% intervals cover in 95% of cases? On populations where every estimated quantity is exact.

    python experiments/coverage.py [--repetitions 500] [--seed 0] [--instance FILE.npz ...] [--out FILE.json]
    python experiments/coverage.py --hard [NAME ...] --out FOLDER [--prompts 5 8 12 20 40 60] \
        [--guaranteed] [--beside FOLDER] [--publish FILE.json]

The first: enumerated instances of ordinary rewards. Each repetition draws 60 prompts with rollouts anew.
`--instance` adds saved instances, such as the one that `alignpro demo` keeps of SmolLM2-135M-Instruct. Prints
a Markdown table; writes experiments/results/coverage.json.

The second: the populations of `experiments/populations.py` on which means are hard, through `estimate`,
`compare`, `headroom`, a judge's `rate` and `gain_over`, as users call them. Every population and number of
prompts has a file of its own in `--out`: what is there is not done again, so that it can be run in pieces,
and by several processes with different NAMEs. `--beside` prints another folder's numbers first, such as those
of an earlier version (run this file with its code on PYTHONPATH); `--publish` writes all into one file.
"""

import argparse
import datetime
import json
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from populations import Gains, Problem, draw, gains, problems
from populations import truth as truth_of

from alignpro.errors import AlignProError
from alignpro.estimation import compare, estimate, headroom
from alignpro.estimation.intervals import Estimate, betting, empirical_bernstein
from alignpro.estimation.means import Limits, limits
from alignpro.estimation.race import gain_over
from alignpro.estimation.simulate import Size, simulate
from alignpro.estimation.statements import span
from alignpro.estimation.terms import Terms
from alignpro.estimation.winrate import rate
from alignpro.files import write_json, write_text
from alignpro.theory import FAMILIES, Instance, load, solution

PROMPTS = 60
SIZE = Size(PROMPTS, answers=32, draws=16, answers_per_draw=4)
# (beta, lambda) as shares of the rewards' range, and how much is drawn.
SETTINGS = (
    (0.3, 0.3, SIZE),
    (0.15, 0.2, SIZE._replace(answers_per_draw=6)),
    (0.15, 0.15, SIZE._replace(answers_per_draw=8)),
    (0.02, 0.02, SIZE),
)


def instances(files: list[str], seed: int) -> dict[str, Instance]:
    rng = np.random.default_rng(seed)
    out = {}
    for family in ("independent", "lm_like"):
        batch = FAMILIES[family](rng, 1, (40, 12, 40))
        arrays = [np.asarray(getattr(batch, key))[0] for key in ("p", "prior", "frozen", "own", "reward")]
        out[family] = Instance(*arrays)
    return out | {Path(file).stem: load(file) for file in files}


def measure(instance: Instance, beta: float, lam: float, size: Size, repetitions: int, rng) -> list[dict]:
    """Coverage, bias and spread of every estimator at one setting."""
    s = solution(instance, beta, lam)
    prior, star = np.asarray(instance.prior), np.asarray(s.rho_star)
    trained = 0.5 * prior + 0.5 * star
    t = solution(instance, beta, lam, trained)
    low, high = float(np.min(instance.reward)), float(np.max(instance.reward))

    def e(values) -> float:
        return float(s.average(values))

    gap_rhs = (high - low) * (e(s.tv_model) + e(s.tv_shift)) - e(s.prompter_kl)
    truth = {
        "J(none)": e(s.original),
        "J(sft)": e(s.reference),
        "J(pi*)": float(s.j_star),
        "TV(pi*,pi_F)": e(s.tv_model),
        "beta log Z*": beta * e(s.log_z_star),
        "TV(pi_F(.|x),pi_F(.|x'))": e(s.tv_shift),
        "J(rho*)": float(s.j_rho),
        "lambda log Z": e(s.value),
        "lambda KL(rho*||rho_sft)": e(s.prompter_kl),
        "lambda KL(trained||rho_sft)": e(t.kl_to_reference),
        "lambda KL(trained||rho*)": e(t.kl_to_star),
        "gap of rho*": float(s.j_star - s.j_rho),
        "gap of trained": float(t.j_star - t.j_rho),
        "slack of the span form": gap_rhs - float(s.j_star - s.j_rho),
    }
    rows = {name: {"values": [], "lower": [], "upper": []} for name in truth}
    info: dict[str, dict] = {}
    per = max(1, 200_000 // (PROMPTS * size.draws * size.answers_per_draw))
    done = 0
    while done < repetitions:
        count = min(per, repetitions - done)
        rollouts = simulate(
            instance, rng, size._replace(prompts=count * PROMPTS), prompters={"trained": trained}
        )
        terms = Terms(rollouts, beta, lam)
        found = {
            "J(none)": terms.j("none"),
            "J(sft)": terms.j("sft"),
            "J(pi*)": terms.j_pi(),
            "TV(pi*,pi_F)": terms.tv_model(),
            "beta log Z*": terms.value_model(),
            "TV(pi_F(.|x),pi_F(.|x'))": terms.tv_shift(),
            "J(rho*)": terms.j_rho(),
            "lambda log Z": terms.value(),
            "lambda KL(rho*||rho_sft)": terms.star_kl(),
            "lambda KL(trained||rho_sft)": terms.kl_reference("trained"),
            "lambda KL(trained||rho*)": terms.shortfall("trained"),
            "gap of rho*": terms.gap(None),
            "gap of trained": terms.gap("trained"),
            "slack of the span form": span(terms).slack,
        }
        for name, term in found.items():
            for key in ("values", "lower", "upper"):
                side = getattr(term, key)
                rows[name][key].append((term.values if side is None else side).reshape(count, PROMPTS))
            info[name] = {"bias_stated": term.bias, "bracket": term.weak, "bounded": term.bounded}
            info[name] |= {"low": term.low, "high": term.high, "ess": term.ess}
            info[name]["reaches"] = [reach for _, reach in term.rows]
        done += count
    out = []
    for name, true in truth.items():
        values, lower, upper = (np.concatenate(rows[name][k]) for k in ("values", "lower", "upper"))
        sides, reaches = [values], info[name]["reaches"]
        if info[name]["bracket"]:
            sides = [lower, upper]
        found = [_limits([side], [reach]) for side, reach in zip(sides, reaches, strict=True)]
        lo = np.maximum(found[0].lo[:, 0], info[name]["low"])
        hi = np.minimum(found[-1].hi[:, 0], info[name]["high"])
        # Quantities that are exactly 0, or exactly known, are covered up to rounding.
        slip = 1e-9 * (high - low)
        mean = values.mean(-1)
        row = {
            "quantity": name,
            "truth": true,
            "bias": float(mean.mean() - true),
            "bias_error": float(mean.std(ddof=1) / np.sqrt(repetitions)),
            "sd": float(mean.std(ddof=1)),
            "coverage": float(np.mean((lo - slip <= true) & (true <= hi + slip))),
            "width": float(np.median(hi - lo)),
            **{k: info[name][k] for k in ("bias_stated", "bracket", "ess")},
        }
        if info[name]["bounded"]:
            for kind in (betting, empirical_bernstein):
                l2, h2 = kind(values, info[name]["low"], info[name]["high"], 0.95)
                row[kind.__name__] = {
                    "coverage": float(np.mean((l2 <= true) & (true <= h2))),
                    "width": float(np.median(h2 - l2)),
                }
        out.append(row)
    out.append(_joint(rows, truth, info))
    return out


def _limits(values, reaches, level: float = 0.95, joint: bool = False) -> Limits:
    """Limits of rows of `values`, [repetitions, prompts] each, within `reaches`, as the verbs give them."""
    low, high = np.array(reaches).T
    return limits(np.stack(values, -2), low, high, level, joint=joint)


def _joint(rows, truth, info) -> dict:
    """Simultaneous coverage of both gaps and the slack: joint limits beside Bonferroni. Brackets apart."""
    names = ("gap of rho*", "gap of trained", "slack of the span form")
    bracket = any(info[n]["bracket"] for n in names)
    out = {"quantity": "jointly: both gaps and the slack", "bracket": bracket}
    if bracket:
        return out
    values = [np.concatenate(rows[n]["values"]) for n in names]
    true, reaches = np.array([truth[n] for n in names]), [info[n]["reaches"][0] for n in names]
    for kind, found in {
        "joint": _limits(values, reaches, joint=True),
        "bonferroni": _limits(values, reaches, 1 - 0.05 / len(names)),
    }.items():
        lo, hi = found.lo, found.hi
        out[f"coverage_{kind}"] = float(np.mean(np.all((lo <= true) & (true <= hi), -1)))
        out[f"width_{kind}"] = float(np.median(hi - lo))
    return out


Found = dict[str, Estimate | None]


def _of_gains(
    case: Gains, prompts: int, rng: np.random.Generator, guaranteed: bool
) -> tuple[Found, dict[str, float]]:
    """The held-out gain of `instruct`, both means, and a judge's win rate of like chances."""
    ours = case.draw(rng, (prompts, 1))
    if guaranteed:
        ends = limits(ours.T, np.zeros(1), np.ones(1), 0.95, sure=True)
        one = Estimate(*(float(end[0]) for end in ends[:3]), 0.95, prompts, prompts, "betting", "none")
        return {"mean": one}, {"mean": case.mean}
    base = np.clip(0.5 + 0.1 * rng.standard_normal((prompts, 1)), 0.0, 1.0)
    gain = gain_over(ours, base, 0.0, 1.0)
    won = (rng.random(prompts) < case.mean).astype(float)
    found = {"mean": gain.mean, "gain": gain.gain, "judge": rate(won, np.arange(prompts), 0.95)}
    return found, {"mean": case.mean, "gain": case.mean - 0.5, "judge": case.mean}


def _of_rollouts(
    case: Problem, prompts: int, rng: np.random.Generator, guaranteed: bool
) -> tuple[Found, dict[str, float]]:
    rollouts, true = draw(case, prompts, rng), truth_of(case)
    report = estimate(rollouts, case.beta, case.lam, interval="guaranteed" if guaranteed else "bootstrap")
    compared = compare(rollouts, ["none", "trained"])
    both = compared.against["trained"]
    found: Found = {name: e for name, e in report.quantities.items() if name in true}
    found |= {f"gap {arm}": e for arm, e in report.gaps.items() if f"gap {arm}" in true}
    found |= {f"slack {b.name}": b.slack for b in report.bounds if f"slack {b.name}" in true}
    if guaranteed:
        return {name: e for name, e in found.items() if e is None or e.guaranteed}, true
    found |= {"difference": both.mean, "win rate": both.win_rate}
    found |= {"variance trained": compared.variance["trained"], "difference of variances": both.variance}
    try:
        at = headroom(rollouts, (case.lam,))
    except AlignProError:  # refused: no interval is given
        return found, true
    found |= {"gain over sft": at.at[0].over_reference, "gain over none": at.at[0].over_none}
    # The answer in place of an interval: wrong where it says yes or no against the truth.
    wrong = (at.decision == "yes" and true["gain over none"] <= 0) or (
        at.decision == "no" and true["gain over none"] > 0.01
    )
    said = replace(at.at[0].net, value=float(wrong), lo=-1.0, hi=float(not wrong) - 0.5)
    return found | {"headroom's answer": said}, true | {"headroom's answer": 0.0}


def hard(
    case: Gains | Problem, prompts: int, repetitions: int, seed: int, guaranteed: bool = False
) -> dict[str, dict[str, float | None]]:
    """How often each interval covers, how wide it is, and how often it has no width or is not given."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for i in range(repetitions):
        rng = np.random.default_rng([seed, prompts, i])
        of = _of_gains if isinstance(case, Gains) else _of_rollouts
        found, true = of(case, prompts, rng, guaranteed)  # type: ignore[arg-type]
        for name, e in found.items():
            given = e is not None and max(abs(e.lo), abs(e.hi)) < 1e300
            inside = e is None or e.lo - 1e-9 <= true[name] <= e.hi + 1e-9
            width = float(e.hi - e.lo) if e is not None and given else np.inf
            rows.setdefault(name, []).append((float(inside), width))
    out = {}
    for name, seen in rows.items():
        covered, width = np.array(seen).T
        out[name] = {
            "covered": float(covered.mean()),
            "width": number if np.isfinite(number := float(np.median(width))) else None,
            "no width": float((width <= 1e-12).mean()),
            "not given": 1.0 - float(np.isfinite(width).sum()) / repetitions,
        }
    return out


def _all_hard(options: argparse.Namespace) -> None:
    cases = {**gains(), **problems()}
    folder = Path(options.out or "runs/coverage")
    folder.mkdir(parents=True, exist_ok=True)
    everything = []
    for name in options.hard or cases:
        for prompts in options.prompts:
            path = folder / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{prompts}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            if known.get("repetitions") != options.repetitions:
                rows = hard(cases[name], prompts, options.repetitions, options.seed, options.guaranteed)
                known = {"population": name, "prompts": prompts, "repetitions": options.repetitions}
                known |= {"seed": options.seed, "date": datetime.date.today().isoformat(), "rows": rows}
                write_json(path, known)
            other = Path(options.beside) / path.name if options.beside else None
            before = json.loads(other.read_text())["rows"] if other and other.exists() else {}
            everything.append(known | ({"before": before} if before else {}))
            print(f"\n{name}, {prompts} prompts\n\n| interval | covered | width | no width | not given |")
            print("|---|---|---|---|---|")
            for key, row in known["rows"].items():
                was = before.get(key)
                print(f"| {key} | {' | '.join(_beside(was, row, column) for column in row)} |", flush=True)
    if options.publish:
        lines = ",\n".join(json.dumps(_short(known)) for known in everything)  # a line for each
        head = json.dumps({"level": 0.95, "machine": machine()})
        write_text(options.publish, f'{head[:-1]}, "results": [\n{lines}\n]}}\n')


def _short(value: Any) -> Any:
    """Numbers of four digits."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _beside(was: dict[str, float | None] | None, row: dict[str, float | None], column: str) -> str:
    def said(value: float | None) -> str:
        return "none" if value is None else f"{value:.3f}" if column == "width" else f"{value:.1%}"

    return ("" if was is None else said(was[column]) + " -> ") + said(row[column])


def cpu() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, str | int | None]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    return {"cpu": cpu(), "cores": os.cpu_count(), **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instance", nargs="*", default=[], help="saved instances (.npz)")
    parser.add_argument("--out", default="")
    parser.add_argument("--hard", nargs="*", help="populations of populations.py; all of them without names")
    parser.add_argument("--prompts", nargs="*", type=int, default=[5, 8, 12, 20, 40, 60])
    parser.add_argument("--beside", default="", help="a folder with results of --hard")
    parser.add_argument("--guaranteed", action="store_true", help="of --hard, as with estimate --guaranteed")
    parser.add_argument("--publish", default="", help="file for all results of --hard")
    options = parser.parse_args()
    if options.hard is not None:
        return _all_hard(options)
    options.out = options.out or str(Path(__file__).parent / "results" / "coverage.json")
    results = []
    for name, instance in instances(options.instance, options.seed).items():
        width = float(np.ptp(instance.reward))
        for i, (beta, lam, size) in enumerate(SETTINGS):
            rng = np.random.default_rng([options.seed, i])
            rows = measure(instance, beta * width, lam * width, size, options.repetitions, rng)
            setting = {"instance": name, "beta": beta * width, "lam": lam * width, **size._asdict()}
            results.append(setting | {"rows": rows})
            print(f"\n{name}, beta {beta:g}, lambda {lam:g} of the range, {size}\n", flush=True)
            print("| quantity | truth | bias ± its error | sd | coverage | width | stated bias | ESS |")
            print("|---|---|---|---|---|---|---|---|")
            for r in rows[:-1]:
                cover = f"{r['coverage']:.3f}" + (" (bracket)" if r["bracket"] else "")
                ess = "" if r["ess"] is None else f"{r['ess']:.1f}"
                print(
                    f"| {r['quantity']} | {r['truth']:.4f} | {r['bias']:+.4f} ± {r['bias_error']:.4f} | "
                    f"{r['sd']:.4f} | {cover} | {r['width']:.4f} | {r['bias_stated']} | {ess} |"
                )
            if not rows[-1]["bracket"]:
                print("\njointly", {k: round(v, 4) for k, v in rows[-1].items() if "_" in k}, flush=True)
    given = f"--repetitions {options.repetitions} --seed {options.seed}"
    if options.instance:
        given += " --instance " + " ".join(Path(file).name for file in options.instance)
    content = {
        "command": f"python experiments/coverage.py {given}",
        "date": datetime.date.today().isoformat(),
        "seed": options.seed,
        "repetitions": options.repetitions,
        "level": 0.95,
        "machine": machine(),
        "results": results,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, content)


if __name__ == "__main__":
    main()
