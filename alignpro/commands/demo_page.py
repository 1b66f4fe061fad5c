"""The page of `alignpro demo`."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from alignpro.report.numbers import Json, interval, number
from alignpro.report.page import (
    MOST_PROMPTS,
    BarPanel,
    Bars,
    Curve,
    Curves,
    Dot,
    Dots,
    Page,
    Panel,
    Stack,
    Stacks,
    Table,
)

if TYPE_CHECKING:
    from alignpro.llm.arms.demo import DemoResult

EXAMPLES = "examples.csv"
PROMPTERS = {"sft": "ρ_sft", "theta": "ρ_θ", "star": "ρ*"}

_BOUNDS = {
    "theorem1": "Theorem 1",
    "span": "Span form",
    "tight": "Tight form",
    "law": "Laws of rewards",
    "trained": "Trained form",
}
_TERMS = {
    "model": "model: TV(π*, π_F)",
    "prompt_shift": "+ prompt shift: TV(π_F(x), π_F(x′))",
    "shortfall": "+ shortfall: λ KL(ρ ‖ ρ*)",
    "prompter_kl": "λ KL(ρ ‖ ρ_sft)",
}
_REWARDS = {
    "no_prompter": "no prompter",
    "sft": "ρ_sft, untrained",
    "theta": "ρ_θ, trained",
    "star": "ρ*, optimal",
    "ceiling": "best of all prompters",
    "rlhf": "π*, RLHF optimum",
}
_ANSWERS = {
    "no_prompter": "the frozen model",
    "theta": "the frozen model, asked ρ_θ's favourite",
    "rlhf": "π*",
}
_VERDICTS = {"inconclusive": "is inconclusive", "inapplicable": "does not apply", "violated": "is violated"}
_MOST_REWRITES, _FOLD, _BEST = 8, 0.02, 3


def _n(value: float | None, form: str = "z.3f") -> str:
    return number(value, form)


def _sizes(sizes: Sequence[int]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{least}" if least == most else f"{least}–{most}"


def _ratio(bound: Json) -> float | None:
    """The gap over the right side, where both are positive."""
    return bound["gap"] / bound["rhs"] if bound["gap"] > 0 and bound["rhs"] > 0 else None


def _verdict(bound: Json) -> str:
    return _VERDICTS.get(bound["verdict"], str(bound["verdict"]))


def _rows(result: "DemoResult") -> Iterator[tuple[str, str, Json]]:
    """Each bound with each prompter that it was checked for: name, prompter, report."""
    for name, by_prompter in result.bounds.items():
        for who in PROMPTERS:
            if who in by_prompter:
                yield _BOUNDS.get(name, name), who, by_prompter[who]


def page(result: "DemoResult") -> Page:
    """The demo's page; its four figures are files beside it."""
    settings, sizes, training = result.settings, result.sizes, result.settings["training"]
    rewards, policies, theorem = result.rewards, result.policies, result.bounds["theorem1"]["star"]
    sft, theta, star = (policies[who] for who in PROMPTERS)
    page = Page(
        "demo",
        result.title,
        "A prompter rewrites a user's prompt, a frozen language model answers the rewrite, and a reward "
        "scores that answer to the original prompt. Prompt optimization changes the prompter only; RLHF "
        "would change the model itself. Theorem 1 of Align-Pro bounds the reward that prompting leaves on "
        "the table, the gap to the RLHF optimum π*.\n\n"
        f"Here both were {settings['model']}, with the reward model {settings['reward']}, on "
        f"{sizes['prompts']} prompt{'s' * (sizes['prompts'] != 1)}, each with {_sizes(sizes['rewrites'])} "
        f"rewrites and {_sizes(sizes['responses'])} responses. On these sets every term of the theorem was "
        f"computed exactly, before, during and after {training['algorithm'].upper()} training of "
        f"{training['iterations'] * training['epochs']} optimizer steps. All rewards are in reward units, on "
        f"a scale from 0 to 1; λ = {result.lam}, β = {result.beta}.",
        settings,
    )
    page.key(
        "Share of the possible gain that training closed",
        _n(theta["closed"], "z.1%"),
        f"of F(ρ*) − F(ρ_sft) = {_n(star['objective'] - sft['objective'], 'z.4f')}",
    )
    page.key(
        "Expected reward, before → after",
        f"{_n(rewards['sft'])} → {_n(rewards['theta'])}",
        f"optimum {_n(rewards['star'])}; no prompter {_n(rewards['no_prompter'])}",
    )
    gaps = f"{_n(sft['gap'])} → {_n(theta['gap'])}"
    page.key("Gap to RLHF, before → after", gaps, f"at the optimum ρ*: {_n(star['gap'])}")
    ratio = _ratio(theorem)
    loose = f": {_n(1 / ratio, '.1f')} × the gap" if ratio else ""
    note = f"{_n(theorem['gap'])} ≤ {_n(theorem['rhs'])}{loose}{'; vacuous' * theorem['vacuous']}"
    page.key("Theorem 1", _verdict(theorem), note)
    page.add("What came out", "", points=_findings(result))
    page.add("How to read it", "What is exact, and what is not.", points=_caveats(result))
    _add_figures(page, result)
    _add_prompts(page, result)
    described = "The reward, as it describes itself."
    page.add("The reward model", described, facts=result.reward_model, folded=True)
    page.add("Time", "Seconds of each stage.", facts=result.seconds)
    return page


def _findings(result: "DemoResult") -> list[str]:
    r, theorem, span = result.rewards, result.bounds["theorem1"]["star"], _n(result.span)
    gain, over, beyond = r["theta"] - r["sft"], r["theta"] - r["no_prompter"], r["rlhf"] - r["ceiling"]
    moved = f"Training {'raised' if gain >= 0 else 'lowered'} the expected reward by {_n(abs(gain))}, from "
    moved += f"{_n(r['sft'])} to {_n(r['theta'])}. "
    if r["sft"] < r["no_prompter"]:
        moved += "Untrained, the prompter did harm: without any prompter the reward is "
    else:
        moved += "Without any prompter it is "
    moved += f"{_n(r['no_prompter'])}. The trained one "
    moved += f"is {_n(over)} above that." if over > 0 else "does not exceed that."
    best = f"Even the best of all prompters cannot exceed {_n(r['ceiling'])} on these rewrites, "
    if beyond > 0:
        best += f"so a gap of {_n(beyond)} to the RLHF optimum ({_n(r['rlhf'])}) is out of prompting's reach."
    else:
        best += f"which is no less than the RLHF optimum's {_n(r['rlhf'])}: prompting can match it."
    said, ratio = f"Theorem 1, a statement about ρ*, {_verdict(theorem)}. ", _ratio(theorem)
    if ratio:
        the = "It is loose: the" if ratio < 0.5 else "The"
        said += f"{the} gap is {_n(ratio, 'z.1%')} of its right side. "
    if theorem["vacuous"]:
        said += f"It is vacuous: its right side {_n(theorem['rhs'])} is no smaller than the span of the "
        said += f"rewards, {span}, so it would hold whatever the policies."
    else:
        little = ", if little" * (theorem["rhs"] > 0.9 * result.span)
        said += f"Its right side, {_n(theorem['rhs'])}, lies below the span of the rewards, {span}, so it "
        said += f"does say something{little}."
    every = [bound for *_, bound in _rows(result)]
    verdicts = [bound["verdict"] for bound in every]
    counts = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in sorted(set(verdicts)))
    vacuous = sum(bound["vacuous"] for bound in every)
    checks = f"Of {len(every)} checks (each bound with each prompter it is for): {counts}, vacuous {vacuous}."
    return [moved, best, said, checks]


def _caveats(result: "DemoResult") -> list[str]:
    settings, model = result.settings, result.reward_model
    rewarded = "the exact R(x, x′), without the noise of sampled responses"
    if not settings["exact_rewards"]:
        rewarded = "r(x, y) of one sampled response per rewrite"
    reward = "The reward is a model, not a judgement of people."
    if right := model.get("test_accuracy"):
        reward += f" On held-out pairs it prefers the preferred answer in {_accuracy(right)}; chance is 50%."
    else:
        reward += " It states no accuracy."
    if by_source := model.get("test_accuracy_by_source"):
        reward += f" By source: {'; '.join(f'{name} {_accuracy(a)}' for name, a in by_source.items())}."
    if longer := model.get("test_accuracy_of_longer_wins"):
        reward += f" Preferring the longer answer scores {_accuracy(longer)}."
    if limits := model.get("limits"):
        reward += f" Its stated limits: {' '.join(limits)}"
    return [
        "ρ_sft is the prompter before training, ρ_θ after it, ρ* the exact optimum of the training objective "
        "F(ρ) = E R − λ KL(ρ‖ρ_sft). J is the expected reward alone, R(x, x′) that of one rewrite x′ of "
        "prompt x. π* is the RLHF optimum at β.",
        "Exact: every reward, KL, total variation, gap and bound on this page, to floating-point accuracy. "
        "They are sums over all rewrites and responses, not samples.",
        "The one approximation of the language model: its rewrites and responses are restricted to finite "
        "sets of token sequences (a prefix tree, renormalised token by token); responses are cut after "
        f"{settings['enumeration']['response_tokens']} tokens.",
        "The same prompts serve for training and for measuring: nothing here says how ρ_θ does on other "
        "prompts.",
        "One training seed: there is no uncertainty over seeds here; another seed gives other curves and "
        "another ρ_θ. ρ_sft, ρ* and Theorem 1 do not depend on training.",
        "Sampled are only the open diamonds among the learning curves, drawn from the same ρ_θ as the exact "
        f"value at that step; bars are ± 2 standard errors. Training was rewarded with {rewarded}.",
        reward,
    ]


def _accuracy(a: Json) -> str:
    return f"{interval(a, '.1%')} of {a['pairs']} pairs" if "pairs" in a else interval(a, ".1%")


def _add_figures(page: Page, result: "DemoResult") -> None:
    rewards, policies, rows = result.rewards, result.policies, list(_rows(result))
    gaps = {who: f" (gap {_n(policies[who]['gap'])})" for who in PROMPTERS}
    page.add(
        "Rewards",
        "Expected reward of each prompter, and what the gap is measured from. “Best of all prompters” always "
        "picks the rewrite of highest R: no prompter exceeds it. The axis does not start at 0.",
        figure=Dots(
            f"Training moved the reward from {_n(rewards['sft'])} to {_n(rewards['theta'])}; at ρ* it is "
            f"{_n(rewards['star'])}",
            "expected reward J, reward units (axis does not start at 0)",
            [Dot(name + gaps.get(key, ""), rewards[key]) for key, name in _REWARDS.items()],
            [(rewards["rlhf"], "RLHF optimum")],
        ),
        file="rewards.png",
    )
    theorem = result.bounds["theorem1"]["star"]
    ratio = _ratio(theorem)
    size = f"{_n(1 / ratio, '.1f')} × the gap" if ratio else "beside a gap that is not positive"
    stacks, cells, assumed = [], [], []
    for name, who, b in rows:
        title = f"{name}, {PROMPTERS[who]}"
        terms = {_TERMS.get(term, term): value for term, value in b["terms"].items()}
        stacks.append(Stack(title, terms, b["rhs"], b["gap"], "vacuous" * b["vacuous"]))
        values = (b["gap"], *map(b["terms"].get, _TERMS), b["rhs"], b["slack"])
        said = (*(_n(value, "z.4f") for value in values), _n(_ratio(b), "z.1%"), b["verdict"])
        cells.append((name, PROMPTERS[who], *said, "yes" if b["vacuous"] else "no"))
        met = [f"{'✓' if so else '✗ not met:'} {what}" for what, so in b["assumptions"].items()]
        assumed.append(f"{title}: {', '.join(met) or 'nothing'}")
    page.add(
        "Bounds",
        "Each bound and the true gap below it. Coloured terms add up; the hatched part is then subtracted, "
        "which leaves the right side (thick mark). Total variation is multiplied by r_max = "
        f"{_n(result.r_max)} in Theorem 1 and by each prompt's span of rewards in the other forms. The tight "
        "form subtracts λ times Jeffreys' divergence in the KL's place. The form by laws of rewards has no "
        "total variation: its first two terms are distances between distributions of the reward, not of "
        "texts. The trained form moves one for one "
        "with the gap, so its slack is the same for every prompter. A verdict “holds” means the slack "
        "exceeds a bound on its rounding error.",
        Table(
            "bound | for | gap | model | prompt shift | shortfall | − λ KL | right side | slack "
            "| gap / right side | verdict | vacuous",
            cells,
            "ww" + "n" * 8 + "ww",
        ),
        Stacks(
            f"Theorem 1 {_verdict(theorem)}: its right side is {size}",
            "reward units, r in [0, 1]",
            stacks,
            "right side of the bound",
            "true gap",
            (result.span, f"span {_n(result.span)}: vacuous from here"),
        ),
        file="bound.png",
    )
    page.add("Assumptions", "What each bound assumes, and whether it is so here.", points=assumed)
    page.add(
        "Learning curves",
        "Exact values after each number of optimizer steps, with the exact optima they head for. The sampled "
        "points estimate the line they lie near.",
        figure=_curves(result),
        file="curves.png",
    )
    drawn, every = min(len(result.prompts), MOST_PROMPTS), len(result.prompts)
    bars = Bars("probability (after each rewrite: its R)", [*PROMPTERS.values()], [*_panels(result.prompts)])
    page.add(
        "Policies",
        f"Probability of the rewrites of {drawn}{f' of {every}' * (drawn < every)} prompts, best R(x, x′) "
        f"first; that reward stands after the text. Rewrites below {_n(_FOLD, '.0%')} under all three "
        "prompters, and any beyond eight, are summed in one row.",
        figure=bars,
        file="policies.png",
    )


def _curves(result: "DemoResult") -> Curves:
    curve, star, rewards = result.curve, result.policies["star"], result.rewards
    exact = {key: [line["exact"][key] for line in curve] for key in curve[0]["exact"]}

    def sampled(key: str) -> list[float | None]:
        return [(line.get("sampled") or {}).get(key) for line in curve]

    def points(name: str, key: str, errors: Sequence[float | None] = ()) -> list[Curve]:
        values = sampled(key)
        return [] if all(v is None for v in values) else [Curve(name, values, errors, points=True)]

    errors = [None if e is None else 2 * e for e in sampled("ppo/objective_stderr")]
    f, kl, closed = exact["objective"], exact["kl_to_star"], [100 * c for c in exact["closed"]]
    return Curves(
        [line["step"] for line in curve],
        "optimizer steps",
        [
            Panel(
                "reward units",
                [
                    Curve("J(ρ_θ), exact", exact["reward"]),
                    Curve("F(ρ_θ), exact", f),
                    *points("F(ρ_θ), sampled ± 2 standard errors", "ppo/objective", errors),
                ],
                [
                    (star["reward"], f"J(ρ*) {_n(star['reward'])}"),
                    (star["objective"], f"F(ρ*) {_n(star['objective'])}"),
                    (rewards["no_prompter"], f"no prompter {_n(rewards['no_prompter'])}"),
                    (rewards["ceiling"], f"ceiling {_n(rewards['ceiling'])}"),
                ],
                f"Objective F: {_n(f[0])} → {_n(f[-1])}; the optimum is {_n(star['objective'])}",
            ),
            Panel(
                "nats",
                [
                    Curve("KL(ρ_θ ‖ ρ*)", kl),
                    Curve("KL(ρ_θ ‖ ρ_sft)", exact["kl_to_sft"]),
                    *points("KL(ρ_θ ‖ ρ_sft), sampled (k1)", "ppo/kl_k1"),
                ],
                [(star["kl_to_sft"], f"KL(ρ* ‖ ρ_sft) {_n(star['kl_to_sft'], 'z.2f')}")],
                f"Distance to the optimum, KL(ρ_θ ‖ ρ*): {_n(kl[0], 'z.2f')} → {_n(kl[-1], 'z.2f')}",
            ),
            Panel(
                "share closed, %",
                [Curve("share closed", closed)],
                [(50, "50%"), (90, "90%")],
                f"Share of F(ρ*) − F(ρ_sft) closed: {_n(closed[-1], 'z.1f')}% at the end",
            ),
        ],
    )


def folded(rewrites: Sequence[Json]) -> tuple[list[Json], list[Json]]:
    """Rewrites to draw one by one, by R, best first; and those too improbable under every prompter."""
    by_weight = sorted(rewrites, key=lambda r: -max(r[who] for who in PROMPTERS))
    kept = [r for r in by_weight[:_MOST_REWRITES] if max(r[who] for who in PROMPTERS) >= _FOLD]
    rest = [r for r in rewrites if not any(r is k for k in kept)]
    return sorted(kept, key=lambda r: -r["reward"]), rest


def _panels(prompts: Sequence[Json]) -> Iterator[BarPanel]:
    for p in prompts[:MOST_PROMPTS]:
        kept, rest = folded(p["rewrites"])
        rows = [(r["text"], f"{r['reward']:.2f}", [r[who] for who in PROMPTERS]) for r in kept]
        if rest:
            rows.append((f"{len(rest)} more, summed", "", [sum(r[who] for r in rest) for who in PROMPTERS]))
        yield BarPanel(p["prompt"], rows)


def _best_rewrites(prompt: Json) -> list[Json]:
    """The most probable under each prompter and the best by R, some of each, best R first."""
    chosen: list[Json] = []
    for key in ("reward", *PROMPTERS):
        for rewrite in sorted(prompt["rewrites"], key=lambda r: -r[key])[:_BEST]:
            if not any(rewrite is c for c in chosen):
                chosen.append(rewrite)
    return sorted(chosen, key=lambda r: -r["reward"])


def answers_of(prompt: Json) -> dict[str, Sequence[Json]]:
    """The most probable answers to the prompt, by what they come from."""
    a = prompt["answers"]
    return {"no_prompter": a["no_prompter"], "theta": a["theta"]["answers"], "rlhf": a["rlhf"]}


def shown(answer: Json) -> str:
    """The text of an answer, with an ellipsis where it was cut."""
    return answer["text"] + "…" * bool(answer["cut"])


def _add_prompts(page: Page, result: "DemoResult") -> None:
    page.add(
        "Prompts, rewrites and responses",
        "The most probable and the highest-reward rewrites of each prompt; the highest number of a column is "
        "marked. Text is shown as the models wrote it, with invisible characters spelled out; it can be "
        "wrong or odd. Each response is the most probable one; an ellipsis marks where it was cut. Also in "
        f"{EXAMPLES}.",
    )
    names = {"no_prompter": "no prompter", **PROMPTERS, "rlhf": "π*"}
    columns = (*PROMPTERS, "reward")
    for i, p in enumerate(result.prompts, 1):
        best = _best_rewrites(p)
        top = {key: max((r[key] for r in p["rewrites"]), default=None) for key in columns}
        rewrites = Table(
            [f"rewrite ({len(best)} of {len(p['rewrites'])})", *PROMPTERS.values(), "R"],
            [(r["text"], *(_n(r[who], "z.1%") for who in PROMPTERS), _n(r["reward"])) for r in best],
            "tnnnn",
            {(i, j) for i, r in enumerate(best) for j, key in enumerate(columns, 1) if r[key] == top[key]},
        )
        asked = dict.fromkeys(_ANSWERS, str(p["prompt"])) | {"theta": p["answers"]["theta"]["rewrite"]}
        said = [
            (asked[who], _ANSWERS[who], shown(a), _n(a["reward"]), _n(a["probability"], "z.1%"))
            for who, answers in answers_of(p).items()
            for a in answers[:1]
        ]
        answers = Table("asked | by | response | reward | probability", said, "twtnn")
        means = ", ".join(f"{name} {_n(p['rewards'][key])}" for key, name in names.items())
        sentence = f"Expected reward: {means}. Gap of ρ_θ: {_n(p['gap'])}."
        page.add(f"{i}.", sentence, [rewrites, answers], quoted=p["prompt"], folded=True)
