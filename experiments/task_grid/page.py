"""The results as Markdown and as a figure, from results.json alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from paper_grid.summary import interval

from alignpro.files import atomic_write, write_text
from alignpro.report import theme
from alignpro.report.text import visible
from task_grid.plan import FIXED, ROUTER, TOLD
from task_grid.results import tally

Results = Mapping[str, Any]
NAMES = {
    "none": "no prompter",
    "sft": "ρ_sft",
    FIXED: "best fixed instruction",
    ROUTER: "router",
    TOLD: "best of each kind, told",
    "star": "ρ\\* by resampling",
    "best_of_n": "best of n",
    "rloo": "RLOO",
    "trained": "PPO",
    "rlhf": "RLHF",
}

_TOLD = (
    f"{NAMES[TOLD].capitalize()}: it is told of which kind a prompt is, and adds the instruction that earns "
    "most for that kind on the router's table. No other arm is told."
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def means(results: Results) -> str:
    """Mean rewards of every arm, a row for each task."""
    arms = [arm for arm in NAMES if any(arm in task["mean"] for task in results["tasks"].values())]
    rows = [
        [name, *(f"{task['mean'][arm]['value']:.3f}" if arm in task["mean"] else "–" for arm in arms)]
        for name, task in results["tasks"].items()
    ]
    return _table(["task", *(NAMES[arm] for arm in arms)], rows)


def calls(results: Results) -> str:
    """How many answers each arm rests on, in a sentence."""
    asked, tasks = results["answers"], results["tasks"].values()
    races = [task["race"]["calls"] for task in tasks]
    raced = " to ".join(f"{n:,}" for n in sorted({min(races), max(races)}))
    tables = max(task["reading"]["router"]["calls"] for task in tasks)
    return (
        f"Answers that they rest on: each training of PPO {asked['training']:,}; ρ\\* by resampling and best "
        f"of n {asked['proposals']} to each held-out prompt; the race for the best fixed instruction "
        f"{raced}; the router {tables:,}, a table that tasks with the same prompts share."
    )


def gains(results: Results) -> str:
    """What PPO gains over its rivals, a row for each task."""
    rivals = ("none", FIXED, ROUTER, "star", "rlhf")
    rows = [
        [
            name,
            interval(task["trained and none"]["mean"]),
            *(interval(task["trained over"].get(arm)) for arm in rivals[1:]),
            interval(task["trained and none"]["variance"]),
            interval(task["trained and none"]["win rate"], sign=False),
        ]
        for name, task in results["tasks"].items()
    ]
    head = ["task", *(f"over {NAMES[arm]}" for arm in rivals), "variance, over no prompter's", "win rate"]
    return _table(head, rows)


def verdicts(results: Results) -> str:
    """What `headroom` said before training, and the instruction that `instruct` found."""
    rows = [
        [
            name,
            f"`{task['reward']}`",
            task["foreseen"],
            repr(task["instruction"]) if task["instruction"] else "none beats no instruction",
        ]
        for name, task in results["tasks"].items()
    ]
    return _table(["task", "reward", "`headroom`, before training", "best fixed instruction"], rows)


def numbers(results: Results) -> str:
    """What one instruction, reading the prompt and fine-tuning each add, foreseen and realised."""
    parts = list(next(iter(results["tasks"].values()))["numbers"]) if results["tasks"] else []
    both = [(part, when) for part in parts for when in ("foreseen", "realised")]
    head = ["task", *(f"{part}, {when}" for part, when in both)]
    rows = [
        [name, *(interval(task["numbers"][part][when]) for part, when in both)]
        for name, task in results["tasks"].items()
    ]
    if readers := _readers(results):
        head.append("reading the prompt, realised by one that was taught")
        for row in rows:
            row.append(interval(readers.get(row[0])))
    return _table(head, rows)


def _readers(results: Results) -> dict[str, Any]:
    """What PPO from a taught prompter earns over the best fixed instruction, by tasks where there is one."""
    return {name: of["gain"]["trained"] for name, of in results["taught"].items() if of["over"] == FIXED}


def reading(results: Results) -> str:
    """What the router learned, and what it, PPO and the best of each kind earn over the best fixed
    instruction."""
    rows = []
    for name, task in results["tasks"].items():
        found = task["reading"]
        over = found["over the best fixed instruction"]
        most = ", ".join(f"{text or '(none)'} ({n})" for text, n in found["router"]["picks"][:3])
        rows.append(
            [
                name,
                interval(found["router over one instruction, on the table"]),
                *(interval(over.get(arm)) for arm in (TOLD, ROUTER, "trained")),
                *(interval(found["over half of reading"][arm]) for arm in (ROUTER, "trained")),
                _cell(most),
            ]
        )
    head = ["task", "router over one instruction, on the table"]
    ends = [f"{NAMES[arm]} over the best fixed instruction" for arm in (TOLD, ROUTER, "trained")]
    halves = [f"{NAMES[arm]} over half of the first of these" for arm in (ROUTER, "trained")]
    return _table([*head, *ends, *halves, "the router picks (of held-out prompts)"], rows)


def taught(results: Results) -> str:
    """What a prompter that a router taught earns, and PPO from there."""
    rows = [
        [
            name,
            *(f"{of['mean'][arm]['value']:.3f}" for arm in (of["over"], ROUTER, "sft", "trained")),
            *(interval(of["gain"].get(arm)) for arm in (ROUTER, "sft", "trained", TOLD)),
            *(interval(of["over half of reading"][arm]) for arm in ("sft", "trained")),
            "; ".join(f"{e['value']:+.3f}" for e in of["by seed"]),
        ]
        for name, of in results["taught"].items()
    ]
    arms = ["router", "taught prompter", "PPO from there"]
    head = ["task", "best fixed instruction (none, where none won)", *arms]
    gains = [f"{arm}, over the first" for arm in (*arms, NAMES[TOLD])]
    halves = [f"{arm}, over half of that" for arm in arms[1:]]
    return _table([*head, *gains, *halves, "PPO, by seed"], rows)


def bounds(results: Results) -> str:
    """Theorem 1 and its relatives on each task."""
    rows = [
        [name, b["prompter"].replace("*", "\\*"), b["name"], interval(b["gap"]),
         interval(b["rhs"], sign=False), interval(b["slack"]), b["finding"]]
        for name, task in results["tasks"].items()
        for b in task["bounds"]
    ]  # fmt: skip
    return _table(["task", "prompter", "bound", "gap", "right side", "slack", "verdict"], rows)


def calibration(results: Results) -> str:
    """How often foresight was right."""
    kinds = {
        "ρ\\* by resampling": [p for p in results["foresight"] if p["by"] == "resampling"],
        "PPO": [p for p in results["foresight"] if p["by"] != "resampling"],
    }
    counts = {name: tally(points) for name, points in kinds.items() if points}
    rows = []
    for name, c in counts.items():
        rows.append(
            [name, str(c["points"]), str(c["covers"]), str(c["apart"]), f"{c['width']:.2f}"]
            + [
                " / ".join(str(c[f"{decision}, {gained}"]) for gained in ("yes", "open", "no"))
                for decision in ("yes", "undecided", "no")
            ]
        )
    head = ["realised by", "points", "in the foreseen interval", "intervals apart", "its width (median)"]
    said = [f"said {d}: gained / open / not" for d in ("yes", "undecided", "no")]
    return _table([*head, *said], rows)


def points(results: Results) -> str:
    """Every point of the calibration."""
    rows = [
        [p["prompter"], p["task"], f"{p['lam']:g}", p["by"], p["decision"], interval(p["foreseen"]),
         interval(p["pooled"]), interval(p["realised"])]
        for p in results["foresight"]
    ]  # fmt: skip
    head = [
        "prompter",
        "task",
        "λ",
        "realised by",
        "said",
        "foreseen for ρ\\*",
        "foreseen, pooled",
        "realised",
    ]
    return _table(head, rows)


def examples(results: Results) -> str:
    """The first three held-out prompts of each task, before and after."""
    parts = []
    for name, task in results["tasks"].items():
        rows = [
            [
                _cell(e["x"]),
                *(f"{_cell(e['none']['response'])} ({e['none']['reward']:.2f})",),
                _cell(e["trained"]["rewrite"].removeprefix(e["x"]).strip() or "(nothing)"),
                *(f"{_cell(e['trained']['response'])} ({e['trained']['reward']:.2f})",),
            ]
            for e in task["examples"]
        ]
        head = ["prompt", "answer (reward)", "PPO's prompter adds", "answer (reward)"]
        parts.append(f"**{name}**\n\n{_table(head, rows)}")
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    """Text that models wrote, for a cell of a table."""
    return visible(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def markdown(results: Results) -> str:
    """The whole page."""
    size = results["size"]
    held = f"{size['held_out']} held-out prompts, {size['draws']} draws of {size['answers']} answers each"
    trained = f"{size['iterations']} rounds of {size['prompts']} × {size['samples']}"
    again = size["keeping"].get("iterations", size["iterations"])
    noise = ""
    if "bfloat16" in results["dtypes"]:
        noise = ", which leaves tenths of a nat of noise in its log-probabilities"
    said = [
        f"# {len(results['tasks'])} tasks",
        f"Frozen model {size['target']}, in {' and '.join(results['dtypes'])}{noise}; "
        f"{trained}, λ = {size['lam']:g} of the reward's width, {len(size['seeds'])} seeds; "
        f"{held}. Intervals are at {results['level']:.0%} over prompts.",
        "## Mean rewards",
        means(results),
        *([_TOLD] if any(TOLD in task["mean"] for task in results["tasks"].values()) else []),
        *([calls(results), "![Mean rewards, with intervals](means.png)"] if results["tasks"] else []),
        "## What PPO gains",
        "Over no prompter by itself; over the others jointly.",
        gains(results),
        "## What was foreseen",
        verdicts(results),
        "One instruction: the pooled prompter over none; the best fixed instruction over none. Reading the "
        "prompt: the price of not reading it, net of KL and were effects normal; PPO over the best fixed "
        "instruction"
        + (", and PPO over it from a prompter that was taught (below)" if _readers(results) else "")
        + ". Fine-tuning: the gap of Theorem 1 at β = λ; RLHF over PPO.",
        numbers(results),
        "## Reading the prompt",
        "A router (`alignpro route`) picks an instruction by the frozen model's states. It learned from a "
        "table of training prompts, each with every one of some instructions; what it earns there over one "
        "instruction for all is on prompts left out.",
        reading(results),
        *(
            [
                "A prompter that was fine-tuned on what the router picks for prompts that are not held out, "
                f"and PPO from there for {again} rounds; a rollout of its own.",
                taught(results),
            ]
            if results["taught"]
            else []
        ),
        "![Foreseen and realised gains](foresight.png)",
        calibration(results),
        "## Theorem 1",
        bounds(results),
        "## Before and after",
        examples(results),
        "## Every point of the calibration",
        points(results),
        *(f"Missing: {what}." for what in results["missing"]),
    ]
    return "\n\n".join(said) + "\n"


def figure(results: Results, path: Path) -> None:
    """Foreseen and realised gains over no prompter, one panel for each way of realising them."""
    kinds = {"ρ* by resampling": "resampling", "PPO": "PPO"}
    found = {
        title: [p for p in results["foresight"] if p["by"].startswith(by)] for title, by in kinds.items()
    }
    shown = {title: some for title, some in found.items() if some} or found
    drawn = Figure(figsize=(4.2 * len(shown), 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(drawn)
    for axes, (title, some) in zip(
        drawn.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for decision, colour, marker in (
            ("yes", theme.BLUE, "o"),
            ("undecided", theme.MUTED, "s"),
            ("no", theme.VERMILION, "D"),
        ):
            at = [p for p in some if p["decision"] == decision]
            if not at:
                continue
            (x, across), (y, along) = (_bars([p[key] for p in at]) for key in ("foreseen", "realised"))
            axes.errorbar(x, y, xerr=across, yerr=along, fmt=marker, color=colour, ms=4, lw=0.6,
                          label=f"said {decision}")  # fmt: skip
        axes.axline((0, 0), slope=1, color=theme.MUTED, lw=0.8, ls="--")
        axes.axhline(0, color=theme.MUTED, lw=0.5)
        axes.axvline(0, color=theme.MUTED, lw=0.5)
        axes.set(title=title, xlabel="foreseen gain of ρ* over no prompter", ylabel="realised gain")
        if some:
            axes.legend(frameon=False, fontsize=8)
    _save(drawn, path)


def _bars(estimates: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach below and above, as matplotlib's error bars want them."""
    ends = [[abs(e[end] - e["value"]) for e in estimates] for end in ("lo", "hi")]
    return [e["value"] for e in estimates], ends


def _save(drawn: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        drawn.savefig(file, format="png", metadata={"Software": None})


def rewards(results: Results, path: Path) -> None:
    """Mean reward of each arm, a panel for each task, the best fixed instruction dashed."""
    again = {"sft": "taught prompter", "trained": "PPO from there"}
    found = {}
    for name, task in results["tasks"].items():
        found[name] = {NAMES[arm]: e for arm, e in task["mean"].items()}
        if name in results["taught"]:
            mean = results["taught"][name]["mean"]
            found[name] |= {called: mean[arm] for arm, called in again.items()}
    names = [name for name in (*NAMES.values(), *again.values()) if any(name in of for of in found.values())]
    drawn = Figure(figsize=(2.2 + 2.3 * len(found), 0.6 + 0.26 * len(names)), dpi=160, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (title, of) in zip(panels, found.items(), strict=True):
        at = [i for i, name in enumerate(names) if name in of]
        x, across = _bars([of[names[i]] for i in at])
        axes.errorbar(x, at, xerr=across, fmt="o", color=theme.BLUE, ms=4, lw=0.8)
        if NAMES[FIXED] in of:
            axes.axvline(of[NAMES[FIXED]]["value"], color=theme.MUTED, lw=0.8, ls="--")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("mean reward")
    panels[0].set_yticks(range(len(names)), [name.replace("\\", "") for name in names])
    panels[0].invert_yaxis()
    _save(drawn, path)


def write(results: Results, out: Path) -> list[Path]:
    """Write results.md and its figures into `out`."""
    write_text(out / "results.md", markdown(results))
    figure(results, out / "foresight.png")
    files = [out / "results.md", out / "foresight.png"]
    if results["tasks"]:
        rewards(results, out / "means.png")
        files.append(out / "means.png")
    return files
