"""Figures 2 and 3, Table 1 and the rest, from results.json alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignpro.files import atomic_write, write_text
from alignpro.report import theme
from alignpro.report.text import visible
from paper_grid.summary import PAPER_DATASETS, PAPER_TABLE_1, interval

# A marker each: told apart in print, too.
STYLE = {
    "none": ("no fine-tuning", theme.MUTED, "s"),
    "sft": ("untrained prompter", theme.ORANGE, "v"),
    "trained": ("Align-Pro", theme.BLUE, "o"),
    "rlhf": ("RLHF", theme.VERMILION, "D"),
}
Results = Mapping[str, Any]


def write(results: Results, out: Path) -> list[Path]:
    """figure2.png, figure3.png and results.md in `out`."""
    made = []
    if results["combinations"]:
        for name, key, label in (
            ("figure2.png", "mean", "mean reward"),
            ("figure3.png", "variance", "variance of the reward"),
        ):
            _figure(results, key, label, out / name)
            made.append(out / name)
    write_text(out / "results.md", page(results))
    return [*made, out / "results.md"]


def architectures(results: Results) -> list[tuple[str, str]]:
    """(prompter, frozen model), in order."""
    return list(dict.fromkeys((each["prompter"], each["frozen"]) for each in results["combinations"]))


def _of(results: Results, architecture: tuple[str, str]) -> list[Results]:
    return [e for e in results["combinations"] if (e["prompter"], e["frozen"]) == architecture]


def _figure(results: Results, key: str, label: str, path: Path) -> None:
    """One panel for each architecture, one group for each data set, as the paper has them."""
    panels = architectures(results)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns + 1.2, 2.7 * rows + 0.7), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, architecture in zip(grid.flat, panels, strict=False):
        each = _of(results, architecture)
        for j, (arm, (name, colour, marker)) in enumerate(STYLE.items()):
            shown = [(i, e[key][arm]) for i, e in enumerate(each) if arm in e[key]]
            if not shown:
                continue
            at = [i + 0.16 * (j - 1.5) for i, _ in shown]
            values = [e["value"] for _, e in shown]
            errors = [[e["value"] - e["lo"] for _, e in shown], [e["hi"] - e["value"] for _, e in shown]]
            handles[name] = axes.errorbar(
                at, values, errors, fmt=marker, color=colour, markersize=5, capsize=2, linewidth=1.2
            )
        axes.set_xticks(range(len(each)), [e["dataset"] for e in each], fontfamily=theme.FONT)
        axes.set_xlim(-0.5, len(each) - 0.5)
        axes.set_title(
            f"{architecture[0]} → {architecture[1]}", loc="left", fontsize=9.5, fontfamily=theme.FONT
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=theme.GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in grid[:, 0]:
        axes.set_ylabel(label, fontfamily=theme.FONT)
    columns = 4 if columns > 1 else 2
    figure.legend(
        handles.values(), handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9
    )
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


# --- the page ----------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _name(each: Results) -> str:
    return f"{each['prompter']} → {each['frozen']}, {each['dataset']}"


def page(results: Results) -> str:
    """results.md."""
    e, preset = results["environment"], results["preset"]
    git = f", commit {e['git'][:12]}" if e["git"] else ""
    lines = [
        f"# The paper's experiments, preset {preset['name']}",
        "",
        f"{e['system']}, {e['cores']} cores, {e['device']}; Python {e['python']}, "
        + ", ".join(f"{name} {version}" for name, version in e["packages"].items())
        + f"{git}; seeds {', '.join(map(str, preset['seeds']))}. "
        f"{results['level']:.0%} intervals over held-out prompts, with all seeds of a prompt together.",
        "",
        "## The paper's claims",
        "",
        "*reproduced*: in every combination the whole interval is on the claim's side. *not reproduced*: in "
        "some combination it is on the other side, at a level right for all of them at once. *undecided*: "
        "neither.",
        "",
        *_table(
            ("claim", "paper", "verdict here"),
            [(c["claim"], c["where"], f"**{c['verdict']}**{_but(c, results)}") for c in results["claims"]],
        ),
    ]
    if not results["combinations"]:
        return "\n".join([*lines, "Nothing is finished yet.", ""])
    lines += ["What each claim says is positive, by combination:", ""]
    head = ["", *(c["claim"] for c in results["claims"])]
    rows = []
    for i, each in enumerate(results["combinations"]):
        cells = []
        for claim in results["claims"]:
            cell = claim["cells"][i]
            cells.append("; ".join(map(interval, cell["positive"])) + f" *{cell['verdict']}*")
        rows.append((_name(each), *cells))
    lines += _table(head, rows)
    lines += [
        "## Figure 2: mean reward",
        "",
        "![Mean reward by data set and configuration; the numbers are below](figure2.png)",
        "",
        *_arms(results, "mean"),
        "## Figure 3: variance of the reward",
        "",
        "![Variance of the reward by data set and configuration; the numbers are below](figure3.png)",
        "",
        *_arms(results, "variance"),
        *_wins(results),
        *_theorem(results),
        *_baselines(results),
        *_transfer(results),
        *_cost(results),
        *_examples(results),
    ]
    if results["missing"]:
        lines += ["## Missing", "", *(f"- {what}" for what in results["missing"]), ""]
    return "\n".join(lines)


def _but(claim: Results, results: Results) -> str:
    """That Theorem 1 holds says little where its right side exceeds the reward's width."""
    of = [b for e in results["combinations"] for b in e["theorem1"] if b["name"] == "trained"]
    vacuous = claim["name"] == "theorem1" and of and all(b["vacuous"] for b in of)
    return ", vacuously: its right side exceeds the reward's width everywhere" if vacuous else ""


def _arms(results: Results, key: str) -> list[str]:
    names = [arm for arm in STYLE if any(arm in e[key] for e in results["combinations"])]
    return _table(
        ["", *(STYLE[arm][0] for arm in names)],
        [
            (_name(e), *(interval(e[key].get(arm), sign=False) for arm in names))
            for e in results["combinations"]
        ],
    )


def _wins(results: Results) -> list[str]:
    judged = [e for e in results["combinations"] if e["win_rate"]]
    lines = ["## Table 1: win rates against no fine-tuning", ""]
    if judged:
        judge = judged[0]["win_rate"]["judge"]
        lines += [
            f"Judge: {judge}, both orders of every pair. A : B is the percentage of judged pairs that "
            "Align-Pro won and lost; ties make the rest. The win rate counts a tie half. *By reward* takes "
            "the reward for a judge.",
            "",
        ]
        rows = []
        for e in judged:
            w = e["win_rate"]
            n = w["pairs"] - w["failed"]
            ours = f"{100 * w['wins'] / n:.0f} : {100 * w['losses'] / n:.0f}" if n else "–"
            rows.append(
                (
                    _name(e),
                    ours,
                    _paper_says(e),
                    *(
                        interval(w[k], 2, False)
                        for k in ("win_rate", "length_controlled", "agreement", "first_shown")
                    ),
                    f"{w['failed']} of {w['pairs']}",
                    interval(e["wins_by_reward"], 2, False),
                )
            )
        head = (
            "",
            "A : B",
            "in the paper",
            "win rate",
            "at equal lengths",
            "orders agree",
            "first shown wins",
            "failed",
            "by reward",
        )
        lines += _table(head, rows)
    else:
        lines += ["No judge was named.", ""]
    lines += ["The paper's, judged by GPT-4, 100 samples each:", ""]
    lines += _table(
        ("prompter → frozen model", *PAPER_DATASETS),
        [(f"{p} → {f}", *(f"{a} : {b}" for a, b in row)) for (p, f), row in PAPER_TABLE_1.items()],
    )
    return lines


def _paper_says(each: Results) -> str:
    row = PAPER_TABLE_1.get((each["prompter"], each["frozen"]))
    if row is None or each["dataset"] not in PAPER_DATASETS:
        return "–"
    ours, theirs = row[PAPER_DATASETS.index(each["dataset"])]
    return f"{ours} : {theirs}"


def _theorem(results: Results) -> list[str]:
    rows = []
    for e in results["combinations"]:
        for b in e["theorem1"]:
            said = b["verdict"] + (", vacuous" if b["vacuous"] else "")
            rows.append(
                (
                    _name(e),
                    f"{b['name']}, {b['about']}",
                    *(interval(b[k]) for k in ("gap", "rhs", "slack")),
                    said,
                )
            )
    return [
        "## Theorem 1",
        "",
        "gap ≤ right side, estimated from the rollouts (docs/estimation.md): `theorem1` for ρ\\*, `trained` "
        "for the trained prompter. *Vacuous*: the right side is at least the reward's width.",
        "",
        *_table(("", "bound, about", "gap", "right side", "slack", "verdict"), rows),
    ]


def _baselines(results: Results) -> list[str]:
    names = {"sft": "ρ_sft", "star": "ρ\\*, training-free", "best_of_n": "best of n", "rloo": "RLOO"}
    head = ("Align-Pro minus", *names.values())
    rows = [
        (_name(e), *(interval(e["baselines"].get(arm)) for arm in names)) for e in results["combinations"]
    ]
    return [
        "## Baselines at equal calls of the frozen model",
        "",
        "Differences of mean reward. ρ\\* by resampling and best-of-n draw as many rewrites of the held-out "
        "prompts, one answer each, as one training asked for; what they choose is valued on fresh answers.",
        "",
        *_table(head, rows),
    ]


def _transfer(results: Results) -> list[str]:
    rows = [
        (_name(e), target, interval(t["trained - none"]), interval(t["trained - sft"]))
        for e in results["combinations"]
        for target, t in e["transfer"].items()
    ]
    if not rows:
        return []
    return [
        "## Transfer to a frozen model that training never saw",
        "",
        *_table(("trained on", "in front of", "minus no fine-tuning", "minus ρ_sft"), rows),
    ]


def _cost(results: Results) -> list[str]:
    rows = [
        (kind, *(f"{row[k]:,}" for k in ("jobs", "answers", "prompt_tokens", "tokens")))
        for kind, row in results["calls"].items()
    ]
    return [
        "## What it took",
        "",
        "Answers of frozen models, tuned policies and judges (rlhf: what it was trained on). "
        "Clocks are in times.json.",
        "",
        *_table(("", "jobs", "answers", "prompt tokens", "answer tokens"), rows),
    ]


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _quoted(text: str) -> str:
    """Generated text in a block that it cannot close."""
    body = "\n".join("    " + visible(line) for line in text.split("\n"))
    return body if body.strip() else "    (empty)"


def _examples(results: Results) -> list[str]:
    lines = ["## Examples", "", "Chosen by rule, with the first draws of the first seed.", ""]
    for each in results["combinations"]:
        lines += [f"### {_name(each)}", ""]
        for example in each["examples"]:
            lines += [f"{_capital(example['why'])} ({example['gain']:+.3f} on average):", ""]
            lines += [_quoted(example["x"]), ""]
            for arm, said in example["arms"].items():
                if arm == "trained":
                    lines += ["Align-Pro asks:", "", _quoted(said["rewrite"]), ""]
                lines += [
                    f"{_capital(STYLE[arm][0])} (reward {said['reward']:.3f}):",
                    "",
                ]
                lines += [_quoted(said["response"]), ""]
    return lines
