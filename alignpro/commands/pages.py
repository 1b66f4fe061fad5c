"""Pages of the verbs."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from alignpro.errors import AlignProError

if TYPE_CHECKING:
    from alignpro.llm.arms.resample import Proposals
    from alignpro.rollouts import Rollouts

from alignpro.report.numbers import _limits, interval, number
from alignpro.report.page import Curve, Curves, Dot, Dots, Json, Page, Table

MOST_PROMPTS = 8
"""Whose texts a page shows."""
MOST_FILES = 12
"""Of solve's, that get a section of their own."""


def _some(of: Json, keys: str) -> dict[str, Any]:
    """Those of `of` whose keys are named, with spaces between them."""
    return {key: of[key] for key in keys.split()}


def _dot(label: str, e: Json | None, group: str = "") -> Dot:
    return Dot(label, None, group=group) if e is None else Dot(label, e["value"], e["lo"], e["hi"], group)


def _verdict(bound: Json) -> str:
    return bound["verdict"] + (", vacuous" if bound["vacuous"] else "")


def _shown_estimates(of: Mapping[Any, Json], first: str) -> Table:
    rows = []
    for name, e in of.items():
        said = ["degenerate weights: bounds"] * e["bracket"]
        said += [f"biased {e['bias']}"] * (e["bias"] in ("up", "down"))
        said += [] if e["ess"] is None else [f"effective sample size {e['ess']:.1f}"]
        rows.append((str(name), interval(e), "; ".join(said) or "–", number(e["n"]), e["method"]))
    return Table(f"{first} | value [interval] | remarks | rollouts | how", rows, "wnwnw")


def _add_notes(page: Page, of: Json) -> None:
    """What a result lacks and warns of."""
    if of.get("missing"):
        rows = list(of["missing"].items())
        page.add(
            "Not to be had", "What these rollouts do not tell, and why.", Table("what | why", rows, "ww")
        )
    if of["warnings"]:
        rows = [(str(i), text) for i, text in enumerate(of["warnings"], 1)]
        page.add("Warnings", "What to keep in mind with these numbers.", Table(" | warning", rows, "ww"))


def report_of_verify(result: Json) -> Page:
    """Of verify.json."""
    from alignpro.theory.bounds import WRONG_BOUNDS

    names, bad = result["statements"], list(result["refuted"])
    lead = f"No violation of {len(names)} statements in {result['instances']:,} random instances."
    if result["violations"]:
        lead = "Floating point claims violations, none of them proved."
    settings = "seed instances families shapes beta_and_lam_log_uniform_over quantile_levels"
    page = Page(
        "verify",
        "The theory on random instances",
        f"Refuted: {', '.join(bad)}." if bad else lead,
        _some(result, settings),
    )
    page.key("Random instances", number(result["instances"]), f"families: {len(result['families'])}")
    page.key("Statements", number(len(names)), f"{len(bad)} refuted")
    page.key("Violations", number(result["violations"]), "in float64, beyond rounding")
    seconds, compiling = (number(result[key], ".1f") for key in ("seconds", "compile_seconds"))
    page.key("Time", f"{seconds} s", f"{compiling} s to compile")

    rows, dots = [], []
    places = [result["quantile_levels"].index(q) for q in (0.05, 0.5, 0.95)]
    for name in names:
        mine = [row for row in result["results"] if row["statement"] == name]
        checked, violated, unclear, apart = (
            sum(row[key] for row in mine) for key in ("checked", "violations", "inconclusive", "inapplicable")
        )
        said = "REFUTED" if name in bad else "violated" if violated else "no violation"
        cells = ["–"] * 5
        if "slack_over_span_quantiles" in mine[0]:
            least = [row["slack_over_span_quantiles"][0] for row in mine]
            ratios = [row["lhs_over_rhs_quantiles"] for row in mine]
            # Families have equal shares, so quantiles of the mixture are near the median of theirs.
            of = [[r[i] for r in ratios if r[i] is not None] for i in places]
            low, half, high = (median(values) if values else None for values in of)
            dots.append(Dot(name, half, low, high))
            cells[0] = number(min((v for v in least if v is not None), default=None), ".2g")
            cells[1:3] = [number(half, ".2g"), number(high, ".2g")]
        else:
            cells[4] = number(max(row["largest_relative_error"] for row in mine), ".2g")
        if "vacuous_share" in mine[0]:
            cells[3] = f"{fmean(row['vacuous_share'] for row in mine):.0%}"
        rows.append((name, said, *map(number, (checked - apart, violated, unclear)), *cells))
    head = "statement | verdict | checked | violated | unclear | least slack / span"
    head += " | left / right, median | 95% | vacuous | identity error"
    known = [name for name in names if name in WRONG_BOUNDS]
    false = f" Known to be false, and so a test of the tester: {', '.join(known)}." if known else ""
    axis = "left side over right side: median, and 5% to 95% of the instances"
    page.add(
        "Statements",
        "Over all families: the slack over the span of the rewards, and the left side over the right side "
        f"(medians over the families).{false}",
        Table(head, rows, "ww" + "n" * 8),
        Dots("How tight each statement is", axis, dots, [(1.0, "equality")], -1.0) if dots else None,
    )

    if proof := result["certified"]:
        rows = []
        for name in names:
            mine = [row for row in proof["results"] if row["statement"] == name]
            counts = [
                sum(row["verdicts"].get(v, 0) for row in mine) for v in ("holds", "violated", "inconclusive")
            ]
            keys = ("ties", "float64_violations_settled", "float64_violations_unexamined")
            counts += [sum(row[key] for row in mine) for key in keys]
            rows.append((name, *map(number, counts)))
        page.add(
            "Certified",
            f"In ball arithmetic, the {proof['most_doubtful_per_statement_and_family']} most doubtful "
            "instances of each statement and family; settled are float64 violations that are none.",
            Table(
                "statement | proved | refuted | inconclusive | ties | settled | unexamined",
                rows,
                "w" + "n" * 6,
            ),
        )
    if bad:
        rows = []
        for name, worst in result["refuted"].items():
            numbers = (number(worst[key]) for key in ("beta", "lam", "relative_violation"))
            rows.append((name, worst["family"], *numbers, worst["instance"]))
        page.add(
            "Counterexamples",
            "One instance for each refuted statement: of the smallest shape, the worst.",
            Table("statement | family | β | λ | off by, of the span | file", rows, "wwnnnw"),
        )
    rows = []
    for name in result["families"]:
        mine = [row for row in result["results"] if row["family"] == name]
        counts = [
            sum(row[key] for row in mine) for key in ("checked", "violations", "inconclusive", "inapplicable")
        ]
        rows.append((name, *map(number, counts), number(result["family_seconds"][name], ".1f")))
    page.add(
        "Families",
        "Each over all statements; verify.json has them by family and statement.",
        Table("family | checked | violated | unclear | not applicable | seconds", rows, "w" + "n" * 5),
    )
    return page


_ROLES = {
    "smallest": "smallest counterexample",
    "worst": "worst counterexample",
    "tightest": "tightest instance",
}


def report_of_hunt(result: Json) -> Page:
    """Of hunt.json."""
    from alignpro.theory.search.found import target

    every = result["statements"]
    refuted = [name for name, of in every.items() if of["refuted"]]
    page = Page(
        "hunt",
        "Worst cases and counterexamples",
        f"Refuted: {', '.join(refuted)}." if refuted else "No counterexample was found.",
        _some(result, "seed shape restarts steps tries seconds"),
    )
    page.key("Statements", number(len(every)), ", ".join(every))
    page.key("Refuted", number(len(refuted)))
    page.key("Ascents", number(result["restarts"]), f"of {result['steps']} steps, for each statement")

    rows, dots, finds = [], [], []
    for name, of in every.items():
        ratio = of["tightest"]["ratio"] if "tightest" in of else None
        if target(name).equality:  # what is measured is |left − right| over the span of the rewards
            ratio = abs(of["tightest"]["slack_over_span"]) if "tightest" in of else None
        else:
            dots += [
                Dot(name, of["start_ratio"], group="best start"),
                Dot(name, ratio, group="tightest found"),
            ]
        said = ("REFUTED" if of["refuted"] else "no counterexample") + ", interrupted" * of["interrupted"]
        rows.append((name, said, *map(number, (of["start_ratio"], ratio, of["steps"], of["tried"]))))
        for role, words in _ROLES.items():
            if (find := of.get(role)) is None:
                continue
            proof = find["certificate"]
            shape = " × ".join(map(str, find["shape"]))
            numbers = [number(find[key], ".6g") for key in ("beta", "lam", "lhs", "rhs", "ratio")]
            numbers.append(number(find["slack_over_span"], ".3g"))
            by = "float64" if proof is None else f"{proof['bits']} bits"
            finds.append((find["instance"], words, find["verdict"], by, shape, *numbers))
    page.add(
        "Statements",
        "The left side over the right (identities: their distance over the span of the rewards): of the best "
        "random start, and after gradient ascent.",
        Table("statement | finding | best start | tightest | steps | instances tried", rows, "wwnnnn"),
        Dots("How far ascent got", "left side over right side", dots, [(1.0, "equality")]) if dots else None,
    )
    head = "file | what | verdict | by | shape | β | λ | left side | right side | ratio | slack / span"
    page.add(
        "Instances found",
        "Each is saved in the file named; shapes are prompts × rewrites × responses.",
        Table(head, finds, "wwww" + "n" * 7),
    )
    return page


def report_of_solve(results: Sequence[Json]) -> Page:
    """Of solve's objects, one for each file."""
    checks = [bound for one in results for bound in one["bounds"].values()]
    bad = sum(bound["verdict"] == "violated" for bound in checks)
    first = results[0]
    page = Page(
        "solve",
        "Exact optima, gap and bounds",
        f"{bad or 'None'} of {len(checks)} bounds {'are' if bad > 1 else 'is'} violated.",
        {**_some(first, "beta lam"), "bounds": list(first["bounds"]), "seed": "none: nothing is random"},
    )
    largest = max((one["gap"] for one in results if one["gap"] is not None), default=None)
    page.key("Instances", number(len(results)))
    page.key("Largest gap", number(largest), "reward units")
    page.key("Bounds that hold", number(sum(b["verdict"] == "holds" for b in checks)), f"of {len(checks)}")
    page.key("Vacuous", number(sum(b["vacuous"] for b in checks)), "true of any policies")

    optima = ("j_star", "j_rho", "gap", "delta1", "delta2", "r_max")
    rows = [(one["file"], *(number(one[key]) for key in optima)) for one in results]
    page.add(
        "Optima",
        "The exact RLHF and prompting optima, and the gap between them, in reward units.",
        Table("instance | J(π*) | J(ρ*) | gap | Δ1 | Δ2 | r_max", rows, "w" + "n" * 6),
    )
    for one in results[:MOST_FILES]:
        rows, dots = [], []
        for name, b in one["bounds"].items():
            upper = b["relation"] == "<="
            terms = ", ".join(f"{key} {number(value)}" for key, value in b["terms"].items())
            rests = "; ".join(key if so else f"NOT SO: {key}" for key, so in b["assumptions"].items())
            cells = ("≤" if upper else "≥", number(b["rhs"]), number(b["slack"]), _verdict(b))
            rows.append((name, *cells, terms or "–", rests or "nothing"))
            dots.append(Dot(name, b["rhs"], group="upper bound" if upper else "lower bound"))
        gap = one["gap"]
        page.add(
            one["file"],
            f"The bounds on its gap; r_max is {one['r_max_convention']}.",
            Table("bound | gap is | right side | slack | verdict | terms | rests on", rows, "wwnnwww"),
            Dots(
                "Each bound beside the gap",
                "reward units",
                dots,
                [] if gap is None else [(gap, f"gap {number(gap)}")],
            ),
        )
    if len(results) > MOST_FILES:
        page.add(f"{len(results) - MOST_FILES} more files", "Their bounds are in what the verb prints.")
    return page


_SEEDED = {"seed": "the bootstrap's is fixed; those of the rollouts are in their file"}


def report_of_estimate(result: Json) -> Page:
    """Of estimate.json."""
    low, high = result["reward_range"]
    bounds, axis = result["bounds"], f"reward units, {result['level']:.0%} intervals"
    first = next(b for b in bounds if b["name"] == "theorem1")
    keys = "beta lam level frozen reward_model reward_range sampling prompters"
    page = Page(
        "estimate",
        "Theorem 1 on rollouts",
        f"Theorem 1 about {first['prompter']}: {_verdict(first)}"
        + f"; {first['why']}" * bool(first["why"])
        + ".",
        _some(result, keys) | _SEEDED,
    )
    page.key("Theorem 1", first["verdict"], "vacuous" if first["vacuous"] else "")
    for name, e in ((f"Gap of {first['prompter']}", first["gap"]), ("Right side", first["rhs"])):
        page.key(name, number(e and e["value"]), _limits(e))
    page.key("Rollouts", number(result["n"]), f"of {result['n_prompts']} prompts")

    rows, dots, terms = [], [], []
    for b in bounds:
        name, about = b["name"], b["prompter"]
        cells = (interval(b[key]) for key in ("gap", "rhs", "slack"))
        rows.append((name, about, *cells, _verdict(b), b["why"] or "–"))
        for key, words in (("gap", "gap"), ("rhs", "right side")):
            dots.append(_dot(f"{name}, {about}", b[key], words))
        terms += [(name, about, term, interval(e)) for term, e in b["terms"].items()]
    page.add(
        "Bounds on the gap",
        f"gap ≤ right side, with {result['level']:.0%} intervals over prompts; the slacks' cover jointly. "
        f"Vacuous: the right side is at least the reward's width, {number(high - low)}.",
        Table("bound | about | gap | right side | slack | verdict | why", rows, "wwnnnww"),
        Dots("Each bound beside the gap", axis, dots, [(high - low, "vacuous from here")]),
    )
    page.add(
        "Their terms",
        "What the right sides are made of; the prompter's KL and Jeffreys' divergence are subtracted.",
        Table("bound | about | term | value [interval]", terms, "wwwn"),
    )
    found, gaps = result["quantities"], result["gaps"]
    page.add(
        "Quantities",
        "What these rollouts give of the theory; J is an expected reward, TV a total variation.",
        _shown_estimates(found, "quantity"),
        Dots("Expected rewards", axis, [_dot(name, e) for name, e in found.items() if name.startswith("J(")]),
    )
    page.add(
        "Gaps to the optimum",
        "J(π*) minus the J of each arm; “rlhf − …” has the tuned policy's J in J(π*)'s place.",
        _shown_estimates(gaps, "gap of"),
        Dots("Gap of each arm", axis, [_dot(name, e) for name, e in gaps.items()], [(0.0, "no gap")]),
    )
    if result["splits"]:
        rows = []
        for arm, split in result["splits"].items():
            parts = ("gap", "prompting_ceiling", "kl_regularisation", "optimisation")
            error = f"± {number(split['sampling_error'], '.3g')}"
            rows.append((arm, *(interval(split[key]) for key in parts), error))
        head = "gap of | gap | prompting ceiling | KL regularisation | optimisation | sampling error"
        page.add("Where it comes from", "Each gap is the sum of three parts.", Table(head, rows, "wnnnnn"))
    _add_notes(page, result)
    return page


def report_of_headroom(result: Json) -> Page:
    """Of headroom.json."""
    axis = f"reward units, {result['level']:.0%} intervals"
    settings = {"level": result["level"], "lambda": [at["lam"] for at in result["at"]]} | _SEEDED
    page = Page("headroom", "What prompting could gain", result["answer"], settings)
    page.key("Train at all?", re.split(r"\W", result["answer"])[0].lower())
    for name, e in result["means"].items():
        page.key(f"J({name})", number(e["value"]), _limits(e))
    page.key("Rollouts", number(result["n"]), f"of {result['n_prompts']} prompts")

    groups = {"over_reference": "over ρ_sft", "net": "net of λ KL", "over_none": "over no prompter"}
    rows, dots = [], []
    for at in result["at"]:
        rows.append((f"λ = {number(at['lam'])}", *(interval(at[key]) for key in groups)))
        dots += [_dot(rows[-1][0], at[key], words) for key, words in groups.items() if at[key]]
    page.add(
        "The optimal prompter's gain",
        f"What ρ* would earn at each λ, in reward units, with {result['level']:.0%} intervals over prompts.",
        Table(["", *groups.values()], rows, "wnnn"),
        Dots("Gain at each λ", axis, dots, [(0.0, "no gain")]),
    )
    best = {f"best of {n}": e for n, e in result["best_of"].items()}
    found = {f"J({name})": e for name, e in result["means"].items()}
    found |= {"variance within rewrites": result["within"], "variance between rewrites": result["between"]}
    found |= best | ({"best rewrite drawn, over none": result["ceiling"]} if result["ceiling"] else {})
    page.add(
        "What it rests on",
        "Mean rewards, where their variance is, and what picking the best of n rewrites gains over ρ_sft.",
        _shown_estimates(found, "quantity"),
        Dots(
            "Gain of the best of n over ρ_sft",
            axis,
            [_dot(*item) for item in best.items()],
            [(0.0, "no gain")],
        ),
    )
    _add_notes(page, result)
    return page


def report_of_compare(result: Json) -> Page:
    """Of compare.json."""
    base, against = result["baseline"], result["against"]
    level = f"{result['level']:.0%} intervals"
    said = []
    for name, a in against.items():
        lo, hi = a["mean"]["lo"], a["mean"]["hi"]
        verb = "earns more than" if lo > 0 else "earns less than" if hi < 0 else "cannot be told from"
        said.append(f"{name} {verb} {base}, {interval(a['mean'])}")
    settings = {"level": result["level"], "arms": list(result["mean"]), "prompts": result["n_prompts"]}
    page = Page("compare", f"Arms compared with {base}", "; ".join(said) + ".", settings | _SEEDED)
    for name, e in list(result["mean"].items())[:4]:
        page.key(f"Mean reward, {name}", number(e["value"]), _limits(e))

    rows = []
    for name, e in result["mean"].items():
        differences = (interval(against.get(name, {}).get(key)) for key in ("mean", "variance", "win_rate"))
        rows.append((name, interval(e), interval(result["variance"][name]), *differences))
    head = ["arm", "mean reward", "variance", f"mean − {base}", f"variance − {base}", "win rate"]
    page.add(
        "Arms",
        f"{result['n_prompts']} prompts, paired, with {level} over prompts; those of the differences cover "
        "jointly over the arms. Win rate: how often an answer earns more than the baseline's, ties a half.",
        Table(head, rows, "wnnnnn"),
        Dots(
            "Mean reward of each arm",
            f"reward units, {level}",
            [_dot(*item) for item in result["mean"].items()],
        ),
    )
    page.add(
        f"Differences from {base}",
        "Of mean rewards, paired over prompts: right of 0 the arm earns more.",
        figure=Dots(
            f"Mean reward minus that of {base}",
            f"reward units, {level}",
            [_dot(name, a["mean"]) for name, a in against.items()],
            [(0.0, "no difference")],
        ),
    )
    page.add(
        f"Win rates against {base}",
        "By the reward, not by a judge.",
        figure=Dots(
            f"Win rate against {base}",
            f"share of pairs, ties a half, {level}",
            [_dot(name, a["win_rate"]) for name, a in against.items()],
            [(0.5, "even")],
        ),
    )
    return page


def report_of_judge(result: Json, record: Json) -> Page:
    """Of winrate.json, and of settings.json beside it."""
    ours, theirs = result["arms"]
    rate, agreement = result["win_rate"], result["agreement"]
    page = Page(
        "judge",
        f"{ours} against {theirs}, judged",
        "No pair got a verdict."
        if rate is None
        else f"{ours} wins {interval(rate)} of the pairs, ties a half.",
        {**record, "judge": result["judge"]},
    )
    page.key("Win rate", number(rate and rate["value"]), _limits(rate))
    tied = f"tied {result['ties']}, failed {result['failed']}"
    page.key("Won : lost", f"{result['wins']} : {result['losses']}", tied)
    page.key("Orders agree", number(agreement and agreement["value"]), _limits(agreement))
    page.key("Pairs", number(result["pairs"]), f"of {result['prompts']} prompts")

    rates = {
        "win rate, ties a half": rate,
        "at equal lengths": result["length_controlled"],
        "orders agree": agreement,
        "first shown preferred": result["first_shown"],
    }
    known = {name: e for name, e in rates.items() if e is not None}
    level = next((f"{e['level']:.0%} intervals" for e in known.values()), "no intervals")
    rows: list[Sequence[str]] = [
        (name, interval(e), number(e and e["n"]), e["method"] if e else "–") for name, e in rates.items()
    ]
    page.add(
        "Rates",
        f"{ours} against {theirs}, each pair judged in both orders, with {level} over prompts. A judge that "
        "is blind to position prefers the answer shown first in half of them.",
        Table("rate | value [interval] | pairs | how", rows, "wnnw"),
        Dots("Rates", f"share of pairs, {level}", [_dot(*item) for item in known.items()], [(0.5, "even")]),
    )
    low, high = map(number, result["bounds"])
    lengths = " and ".join(number(length, ".1f") for length in result["mean_lengths"])
    counts = ("pairs", "prompts", "wins", "ties", "losses", "failed", "identical")
    rows = [(name, number(result[name])) for name in counts]
    rows += [(f"orders that failed: {kind}", number(count)) for kind, count in result["failures"].items()]
    page.add(
        "Counts",
        f"The win rate would be {low} or {high} were every missing verdict one against, or one for, {ours}. "
        f"The answers have {lengths} characters on average; Cohen's κ of both orders is "
        f"{number(result['kappa'])}.",
        Table("of pairs | number", rows, "wn"),
    )
    return page


_PANELS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "reward units": (("reward", "score"), ("objective, reward − λ KL", "ppo/objective")),
    "KL to ρ_sft, nats": (("sampled", "ppo/kl_k1"), ("sampled", "kl")),
    "explained variance": (("critic", "ppo/explained_variance"),),
    "entropy, nats a token": (("policy", "entropy"),),
    "share clipped": (("ratios", "ppo/clip_fraction"), ("ratios", "clip_ratio/region_mean")),
    "tokens of an answer": (("mean", "completions/mean_length"),),
}
"""By panel of the learning curves: the curves, and the keys of metrics.jsonl that hold them, where any do."""
_TABLE_ROWS = 12


def report_of_train(metrics: Sequence[Json], record: Json) -> Page:
    """Of metrics.jsonl and settings.json."""

    def of(key: str) -> list[float | None]:
        return [line.get(key) for line in metrics]

    panels: list[tuple[str, list[Curve]]] = []
    columns: dict[str, str] = {}
    for axis, curves in _PANELS.items():
        there = [(name, key) for name, key in curves if any(value is not None for value in of(key))]
        columns |= {key: name if axis == "reward units" else axis for name, key in there}
        if there:
            bands = [[e and 2 * e for e in of(f"{key}_stderr")] for _, key in there]
            panels.append(
                (axis, [Curve(*c, b) for c, b in zip([(n, of(k)) for n, k in there], bands, strict=True)])
            )
    first, last = metrics[0], metrics[-1]
    task = record.get("settings", {}).get("task")
    start, end = number(first["score"]), number(last["score"])
    page = Page(
        "train",
        f"Training the {'RLHF oracle' if task == 'rlhf' else 'prompter'}",
        f"The mean reward of a round went from {start} to {end}, on the prompts that were trained on; "
        "alignpro rollout tells what it is on others.",
        record,
    )
    page.key("Mean reward of a round", end, f"at first {start}")
    for name, key in (("Objective", "ppo/objective"), ("KL, nats", "ppo/kl_k1"), ("KL, nats", "kl")):
        if key in columns:
            page.key(name, number(last.get(key)), f"at first {number(first.get(key))}")
    page.key("Optimizer steps", number(last["step"]), f"{len(metrics)} rounds")

    every = -(-len(metrics) // _TABLE_ROWS)
    kept = [line for i, line in enumerate(metrics) if i % every == 0 or line is last]
    rows = [(number(line["step"]), *(number(line.get(key)) for key in columns)) for line in kept]
    left_out = f" The table has one in {every}." if every > 1 else ""
    page.add(
        "Learning curves",
        f"One point for each of {len(metrics)} rounds; bands are ± 2 standard errors. A round's samples are "
        f"few, so that single points mean little.{left_out}",
        Table(["step", *columns.values()], rows, "w" + "n" * len(columns)),
        Curves([line["step"] for line in metrics], "optimizer steps", panels),
    )
    return page


def _fitting(metrics: Sequence[Json], unit: str, panels: Mapping[str, str]) -> tuple[str, Curves]:
    """How a loss fell: a sentence, and a curve for each key of metrics.jsonl."""
    there = [(axis, key) for axis, key in panels.items() if any(key in line for line in metrics)]
    curves = [(axis, [Curve(key, [line.get(key) for line in metrics])]) for axis, key in there]
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    said = f"On the batches learned from, the loss went from {number(first)} to {number(last)} {unit}."
    return said, Curves([line["step"] for line in metrics], "optimizer steps", curves)


def report_of_sft(metrics: Sequence[Json], found: Json) -> Page:
    """Of metrics.jsonl and of `Prompter.facts["sft"]`."""
    measured = found["nats_per_token"]
    part = "test" if "test" in measured else next(iter(measured))
    before, after = (number(measured[part][when], ".3f") for when in ("before", "after"))
    page = Page(
        "sft",
        "Fine-tuning a prompter on rewrites",
        f"On held-out rewrites ({part}) the prompter needs {after} nats per token; before, {before}.",
        {key: found[key] for key in found if key != "nats_per_token"},
    )
    page.key("Nats per token", after, f"before {before}; {part}, {found['pairs'][part]} pairs")
    page.key("Pairs learned from", number(found["pairs"]["train"]), f"{found['left_out']} too long, left out")
    page.key("Optimizer steps", number(metrics[-1]["step"]))
    rows = [
        (name, number(found["pairs"][name]), number(e["before"], ".4f"), number(e["after"], ".4f"))
        for name, e in measured.items()
    ]
    dots = [Dot(name, e[when], group=when) for name, e in measured.items() for when in ("before", "after")]
    page.add(
        "Held-out rewrites",
        "Mean −log ρ(x′|x) over the tokens, the end included, of rewrites that were not learned from.",
        Table("split | pairs | before | after", rows, "wnnn"),
        Dots("What a held-out rewrite costs", "nats per token", dots),
    )
    panels = {"nats per token": "loss", "share of tokens foreseen": "mean_token_accuracy"}
    said, curves = _fitting(metrics, "nats per token", panels)
    page.add("Learning", said, None, curves)
    return page


def report_of_reward_model(metrics: Sequence[Json], found: Json) -> Page:
    """Of metrics.jsonl and reward.json."""
    parts = [part for part in ("train", "validation", "test") if f"{part}_accuracy" in found]
    test, longer = found["test_accuracy"], found["test_accuracy_of_longer_wins"]
    page = Page(
        "reward-model",
        "A reward learned from preferences",
        f"On pairs never seen it prefers the chosen answer in a share of {interval(test, '.3f')}; preferring "
        f"the longer one, in {interval(longer, '.3f')}.",
        _some(found, "settings base template max_tokens pairs prompts truncated bounds loss"),
    )
    page.key("Accuracy, test", number(test["value"], ".3f"), f"{_limits(test)}; {test['prompts']} prompts")
    page.key("By length alone", number(longer["value"], ".3f"), _limits(longer))
    page.key("Loss, test", number(found["test_loss"], ".3f"), f"nats; of a coin {math.log(2):.3f}")
    learned = sum(n for name, n in found["pairs"].items() if name.endswith(" train"))
    page.key("Pairs learned from", number(learned), f"{metrics[-1]['step']} optimizer steps")
    rows = [
        (part, interval(e, ".3f"), number(e["prompts"]), number(found[f"{part}_loss"], ".4f"))
        for part, e in ((part, found[f"{part}_accuracy"]) for part in parts)
    ]
    rows.append(("test, by length", interval(longer, ".3f"), number(longer["prompts"]), "–"))
    dots = [_dot(part, found[f"{part}_accuracy"], "the reward") for part in parts]
    dots.append(_dot("test", longer, "the longer answer"))
    page.add(
        "How good it is",
        "The share of pairs in which the chosen answer has the larger reward, averaged within prompts first; "
        "95% intervals over prompts. Pairs of train were learned from.",
        Table("split | accuracy | prompts | loss, nats", rows, "wnnn"),
        Dots("Pairwise accuracy", "share of pairs, 95% intervals", dots, [(0.5, "a coin")]),
    )
    panels = {"nats": "loss", "share of pairs": "accuracy", "r(x, chosen) − r(x, rejected), raw": "margin"}
    said, curves = _fitting(metrics, "nats", panels)
    page.add("Learning", said, None, curves)
    return page


def report_of_rollout(found: "Rollouts", rows: Iterable[Json], record: Json) -> Page:
    """Of rollouts.jsonl, as columns and as rows, and of settings.json beside it."""
    from alignpro.estimation.terms import Arm, Term, estimates

    means: dict[str, Json] = {}
    for name in found.arms:
        try:
            arm = Arm(found, name)
            term = Term(arm.mean(arm.reward), found.low, found.high, frozenset({name}), "none", "")
            means[name] = asdict(estimates({name: term}, found, 0.95)[name])
        except AlignProError:  # too few prompts, or one that the arm lacks: no interval
            means[name] = {"value": float(found.reward[found.rows(name)].mean()), "lo": None, "hi": None}
    prompts = len(found.prompt_ids)
    page = Page(
        "rollout",
        "Rollouts of prompters and policies",
        f"{len(found):,} rollouts of {prompts} prompts by {len(found.arms)} arms. What they say of "
        "Theorem 1, and of differences between the arms, tell alignpro estimate, headroom and compare.",
        record,
    )
    for name, e in list(means.items())[:4]:
        page.key(f"Mean reward, {name}", number(e["value"]), _limits(e))
    page.add(
        "Mean reward by arm",
        f"On a scale from {number(found.low)} to {number(found.high)}, with 95% intervals over prompts where "
        "there are enough of them.",
        Table(
            "arm | mean reward | rollouts | seeds",
            [
                (name, interval(e), number(int(mine.sum())), number(len(set(found.seed[mine].tolist()))))
                for name, e in means.items()
                for mine in (found.rows(name),)
            ],
            "wnnn",
        ),
        Dots(
            "Mean reward of each arm", "reward units, 95% intervals", [_dot(*item) for item in means.items()]
        ),
    )
    texts: dict[str, dict[str, Json]] = {}
    for row in rows:
        first = row["draw"] == 0 and row["answer"] == 0
        if first and (row["prompt_id"] in texts or len(texts) < MOST_PROMPTS):
            texts.setdefault(row["prompt_id"], {}).setdefault(row["arm"], row)
    page.add(
        "Texts",
        f"The first draw of {len(texts)} of {prompts} prompts, as the models wrote it, with invisible "
        "characters spelled out.",
        Table(
            "prompt | arm | rewrite | answer | reward",
            [
                (
                    row["x"],
                    arm,
                    row["rewrite"] if row["rewrite"] and arm != "none" else "–",
                    row["response"],
                    number(row["reward"]),
                )
                for of in texts.values()
                for arm, row in of.items()
            ],
            "twttn",
        ),
    )
    return page


def report_of_resample(proposals: Sequence["Proposals"], lams: Sequence[float], record: Json) -> Page:
    """Of proposals.jsonl at each λ, and of settings.json beside it."""
    import numpy as np

    from alignpro.estimation.intervals import LEAST_PROMPTS, bootstrap_t
    from alignpro.llm.arms.resample import best_of_n, star

    n = min(len(p.rewrites) for p in proposals)
    prior = np.array([np.mean(p.rewards) for p in proposals])

    def gain(values: list[float]) -> dict[str, float | None]:
        each = np.array(values) - prior
        lo, hi = bootstrap_t(each, 0.95) if len(each) >= LEAST_PROMPTS else (None, None)
        return {"value": each.mean(), "lo": lo, "hi": hi}

    rows, dots = [], []
    for lam in lams:
        found = [star(p, lam) for p in proposals]
        e, few = gain([s.value for s in found]), sum(bool(s.warning) for s in found)
        kl, ess = fmean(s.kl for s in found), fmean(s.ess for s in found)
        remark = f"too few on {few} of {len(found)} prompts" if few else "–"
        rows.append((f"λ = {number(lam)}", interval(e), number(kl, ".3f"), number(ess, ".1f"), remark))
        dots.append(_dot(rows[-1][0], e, "reweighted to ρ*"))
    for size in sorted({2**i for i in range(1, n.bit_length())} | {n}):
        e, bound = (
            gain([best_of_n(p, size).values[-1] for p in proposals]),
            math.log(size) - (size - 1) / size,
        )
        rows.append((f"best of {size}", interval(e), f"≤ {bound:.3f}", "–", "–"))
        dots.append(_dot(rows[-1][0], e, "best of n"))
    page = Page(
        "resample",
        "The training-free prompter",
        "Rewrites drawn from ρ_sft and reweighted to ρ*, or cut to the best of n. R̂ chose, so these "
        "gains are optimistic: alignpro rollout --arms star best_of_n asks afresh.",
        {**record, "lambda": list(lams)},
    )
    page.key("Mean reward of ρ_sft", number(float(prior.mean())), "by R̂")
    for row in rows[:2]:
        page.key(f"Gain, {row[0]}", row[1].split(" [")[0], f"KL {row[2]} nats")
    page.key("Prompts", number(len(proposals)), f"{n} rewrites of each")
    page.add(
        "Gains over ρ_sft",
        "In reward units, with 95% intervals over prompts where there are enough of them; KL to ρ_sft in "
        f"nats, and the effective sample size of {n}.",
        Table("how | gain | KL | effective sample size | remarks", rows, "wnnnw"),
        Dots("Gain over ρ_sft, by R̂", "reward units, 95% intervals", dots, [(0.0, "no gain")]),
    )
    texts = []
    for p, mean in zip(proposals[:MOST_PROMPTS], prior.tolist(), strict=False):
        best = max(range(len(p.rewrites)), key=p.rewards.__getitem__)
        texts.append((p.prompt, p.rewrites[best], number(p.rewards[best]), number(mean)))
    page.add(
        "Rewrites",
        f"The one of largest R̂ for {len(texts)} of {len(proposals)} prompts, beside the mean R̂ of all.",
        Table("prompt | best rewrite | its R̂ | mean R̂", texts, "ttnn"),
    )
    return page
