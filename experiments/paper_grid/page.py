"""The page of the paper's experiments."""

from collections.abc import Sequence

from alignpro.report.numbers import interval, number
from alignpro.report.page import Dots, Json, Page, Table, dot, some

_ARMS = {"none": "no fine-tuning", "sft": "untrained prompter", "trained": "Align-Pro", "rlhf": "RLHF"}
_BASELINES = {"sft": "ρ_sft", "star": "ρ*, training-free", "best_of_n": "best of n", "rloo": "RLOO"}


def report_of_grid(results: Json) -> Page:
    """The page of the grid's results.json: verdicts on the paper's claims, and the numbers behind them."""
    every, said = results["combinations"], [claim["verdict"] for claim in results["claims"]]
    level, verdicts = f"{results['level']:.0%} intervals", ("reproduced", "not reproduced", "undecided")
    page = Page(
        "grid",
        f"The paper's experiments, preset {results['preset']['name']}",
        f"Of {len(said)} claims of the paper, {', '.join(f'{said.count(v)} {v}' for v in verdicts)}.",
        some(results, "environment preset"),
    )
    for verdict in verdicts:
        page.key(verdict.capitalize(), number(said.count(verdict)), f"of {len(said)} claims")
    page.key("Combinations", number(len(every)), "of prompter, frozen model and data set")
    page.add(
        "The paper's claims",
        "Reproduced: in every combination the whole interval is on the claim's side. Not reproduced: in some "
        "it is on the other side, at a level right for all of them at once. Undecided: neither.",
        Table(
            "claim | paper | verdict here",
            [(c["claim"], c["where"], c["verdict"]) for c in results["claims"]],
            "www",
        ),
    )
    if every:
        _add_combinations(page, results, level)
    if results["missing"]:
        rows = [(str(i), what) for i, what in enumerate(results["missing"], 1)]
        page.add("Missing", "What is not finished yet.", Table(" | what", rows, "ww"))
    return page


def _add_combinations(page: Page, results: Json, level: str) -> None:
    every = {f"{e['prompter']} → {e['frozen']}, {e['dataset']}": e for e in results["combinations"]}
    rows: list[Sequence[str]] = [
        (
            claim["claim"],
            name,
            "; ".join(interval(part, ".3f") for part in cell["positive"]) or "–",
            cell["verdict"],
        )
        for claim in results["claims"]
        for name, cell in zip(every, claim["cells"], strict=True)
    ]
    page.add(
        "By combination",
        f"What each claim says is positive, with {level} over held-out prompts.",
        Table("claim | combination | what should be positive | verdict", rows, "wwww"),
    )
    for key, heading in (("mean", "Figure 2: mean reward"), ("variance", "Figure 3: variance of the reward")):
        arms = [arm for arm in _ARMS if any(arm in e[key] for e in every.values())]
        rows = [(name, *(interval(e[key].get(arm), ".3f") for arm in arms)) for name, e in every.items()]
        dots = [dot(name, e[key].get(arm), _ARMS[arm]) for name, e in every.items() for arm in arms]
        axis = heading.split(": ")[1]
        page.add(
            heading,
            f"Of each configuration, with {level} over held-out prompts.",
            Table(["combination", *(_ARMS[arm] for arm in arms)], rows, "w" + "n" * len(arms)),
            Dots(axis.capitalize(), f"{axis}, {level}", dots),
        )
    if judged := {name: e for name, e in every.items() if e["win_rate"]}:
        rows, dots = [], []
        for name, e in judged.items():
            w = e["win_rate"]
            counts = " : ".join(number(w[key]) for key in ("wins", "losses", "ties"))
            rates = (
                w["win_rate"],
                w["length_controlled"],
                w["agreement"],
                w["first_shown"],
                e["wins_by_reward"],
            )
            rows.append((name, counts, *map(interval, rates), f"{w['failed']} of {w['pairs']}"))
            dots.append(dot(name, w["win_rate"]))
        head = "combination | won : lost : tied | win rate | at equal lengths | orders agree"
        head += " | first shown wins | by reward | failed"
        page.add(
            "Table 1: win rates against no fine-tuning",
            f"Judge: {e['win_rate']['judge']}, both orders of every pair, ties a half.",
            Table(head, rows, "w" + "n" * 7),
            Dots("Win rates", f"share of pairs, {level}", dots, [(0.5, "even")]),
        )
    rows = []
    for name, e in every.items():
        for b in e["theorem1"]:
            cells = (interval(b[key]) for key in ("gap", "rhs", "slack"))
            said = b["verdict"] + ", vacuous" * bool(b["vacuous"])
            rows.append((name, f"{b['name']}, {b['about']}", *cells, said))
    page.add(
        "Theorem 1",
        "gap ≤ right side, from the rollouts. Vacuous: the right side is at least the reward's width.",
        Table("combination | bound, about | gap | right side | slack | verdict", rows, "wwnnnw"),
    )
    rows = [(name, *(interval(e["baselines"].get(arm)) for arm in _BASELINES)) for name, e in every.items()]
    page.add(
        "Baselines at equal calls of the frozen model",
        "Align-Pro's mean reward minus that of each.",
        Table(["combination", *_BASELINES.values()], rows, "wnnnn"),
    )
    rows = [
        (name, to, interval(moved["trained - none"]), interval(moved["trained - sft"]))
        for name, e in every.items()
        for to, moved in e["transfer"].items()
    ]
    if rows:
        page.add(
            "Transfer to a frozen model that training never saw",
            "Align-Pro's mean reward minus that of each.",
            Table("trained on | in front of | no fine-tuning | ρ_sft", rows, "wwnn"),
        )
    counted = ("jobs", "answers", "prompt_tokens", "tokens")
    page.add(
        "What it took",
        "Answers of frozen models, tuned policies and judges.",
        Table(
            "of | jobs | answers | prompt tokens | answer tokens",
            [(kind, *(number(row[key]) for key in counted)) for kind, row in results["calls"].items()],
            "wnnnn",
        ),
    )
    rows = []
    for name, e in every.items():
        for example in e["examples"]:
            for arm, of in example["arms"].items():
                texts = (of["rewrite"] if arm == "trained" else "–", of["response"], number(of["reward"]))
                rows.append((example["x"], f"{name}: {example['why']}", _ARMS[arm], *texts))
    page.add(
        "Examples",
        "Chosen by rule, with the first draws of the first seed.",
        Table("prompt | combination, and why | by | rewrite | answer | reward", rows, "twwttn"),
    )
