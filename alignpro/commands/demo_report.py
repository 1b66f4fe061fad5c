"""The demo's report."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import atomic_write, writable_folder, write_text

try:
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install 'alignpro[report]'") from error

from alignpro.report.figures import (
    _INK,
    _MUTED,
    _STYLE,
    _VERMILLION,
    Plot,
    _drawable,
    _figure,
    _label,
    _png,
    _source,
    shorten,
    visible,
)
from alignpro.report.render import _number, _template

FIGURES = ("bound.png", "rewards.png", "curves.png", "policies.png")
PROMPTERS = ("sft", "theta", "star")
BOUND_NAMES = {"theorem1": "Theorem 1", "span": "Span form", "tight": "Tight form", "trained": "Trained form"}

_REWARDS = ("no_prompter", *PROMPTERS, "ceiling", "rlhf")
_REQUIRED = (
    ["beta", "lam", "r_max", "span", "sizes.prompts", "sizes.rewrites", "sizes.responses"]
    + [f"rewards.{name}" for name in _REWARDS]
    + [f"policies.{p}.{k}" for p in PROMPTERS for k in ("reward", "objective", "gap", "closed")]
    + [f"policies.{p}.{k}" for p in PROMPTERS for k in ("kl_to_star", "kl_to_sft")]
)
_BOUND_KEYS = ("gap", "rhs", "slack", "terms", "assumptions", "verdict", "vacuous")
_PROMPT_KEYS = (
    "prompt",
    "gap",
    "rewrites",
    *(f"rewards.{name}" for name in _REWARDS if name != "ceiling"),
    "answers.no_prompter",
    "answers.theta.rewrite",
    "answers.theta.answers",
    "answers.rlhf",
)

# Okabe–Ito: told apart with every common colour blindness.
_COLOUR = {"sft": "#E69F00", "theta": "#0072B2", "star": "#009E73"}
_TERMS = {"model": "#56B4E9", "prompt_shift": "#CC79A7", "shortfall": "#D55E00"}
_MATH = {"sft": r"$\rho_{\mathrm{sft}}$", "theta": r"$\rho_\theta$", "star": r"$\rho^*$"}


def render(content: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write the page, its figures and `examples.csv` into `folder`; the path of `report.html`.

    The same content gives the same bytes. Rewards are in reward units, KLs in nats, times in seconds.

    Args:
        content: what `alignpro.commands.demo.analyse` returns, and optionally `title`, `command`, `created`,
            `environment`, `settings`, `reward_model`, `curve` and `seconds`; what is absent is said to be.

    Raises:
        AlignProError: a required key is missing (named), or `folder` cannot be written to.
    """
    _check(content)
    folder = writable_folder(folder, "folder")
    rows = _bound_rows(content)
    with style.context(["default", _STYLE]):  # whatever the user's matplotlibrc says
        plots = [_bound(content, rows), _rewards(content), _curves(content), _policies(content)]
    drawn = {plot.name: plot for plot in plots if plot}
    for name in FIGURES:
        if name in drawn:
            with atomic_write(folder / name) as file:
                file.write(drawn[name].png)
        else:
            (folder / name).unlink(missing_ok=True)  # an earlier run's figure would pass for this one's
    write_text(folder / "examples.csv", _csv(content["prompts"]))
    write_text(folder / "report.html", _html(content, rows, drawn))
    return folder / "report.html"


def _find(value: Any, path: str, where: str = "") -> Any:
    for i, key in enumerate(parts := path.split(".")):
        if not isinstance(value, Mapping) or key not in value:
            missing = where + ".".join(parts[: i + 1])
            raise AlignProError(f"report content: {missing} is missing; run the analysis again")
        value = value[key]
    return value


def _check(content: Mapping[str, Any]) -> None:
    for path in _REQUIRED:
        _find(content, path)
    _find(content, "bounds.theorem1.star")
    for name, by_prompter in content["bounds"].items():
        for who in by_prompter:
            for key in _BOUND_KEYS:
                _find(by_prompter[who], key, f"bounds.{name}.{who}.")
    for x, prompt in enumerate(_find(content, "prompts")):
        for path in _PROMPT_KEYS:
            _find(prompt, path, f"prompts[{x}].")
        for k, rewrite in enumerate(prompt["rewrites"]):
            for key in ("text", "reward", *PROMPTERS):
                _find(rewrite, key, f"prompts[{x}].rewrites[{k}].")
    for i, line in enumerate(content.get("curve") or []):
        for key in ("step", *(f"exact.{k}" for k in ("reward", "objective", "closed"))):
            _find(line, key, f"curve[{i}].")
        for key in ("kl_to_star", "kl_to_sft"):
            _find(line, f"exact.{key}", f"curve[{i}].")


def _bound_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per bound and prompter, with gap/rhs where both are positive (else None)."""
    rows = []
    for name, by_prompter in content["bounds"].items():
        for who in sorted(by_prompter, key=lambda w: PROMPTERS.index(w) if w in PROMPTERS else 9):
            b = by_prompter[who]
            tightness = b["gap"] / b["rhs"] if b["rhs"] > 0 and b["gap"] > 0 else None
            rows.append({**b, "label": BOUND_NAMES.get(name, name), "who": who, "tightness": tightness})
    return rows


def _guard(text: str) -> str:
    """Safe in a spreadsheet: what would be read as a formula starts with a quote."""
    text = visible(text)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@＝＋－＠") or text[:1] in ("\t", "\n") else text


def _favourite(rewrites: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any] | None:
    return max(rewrites, key=lambda r: r[key], default=None)


def _csv(prompts: Sequence[Mapping[str, Any]]) -> str:
    """One row per prompt: rewards, each policy's favourite rewrite, and most probable responses."""
    rows = []
    for p in prompts:
        row = {"prompt": _guard(p["prompt"]), "gap": p["gap"]}
        row |= {f"reward_{name}": value for name, value in p["rewards"].items()}
        for who in (*PROMPTERS, "reward"):
            best = _favourite(p["rewrites"], who)
            column = "best_rewrite" if who == "reward" else f"rewrite_{who}"
            row[column] = _guard(best["text"]) if best else ""
            row[f"{column}_R"] = best["reward"] if best else ""
            if who != "reward":
                row[f"{column}_probability"] = best[who] if best else ""
        for name, answers in _answers(p):
            first = answers[0] if answers else None
            text = first["text"] + ("…" if first.get("cut") else "") if first else ""
            row[f"response_{name}"] = _guard(text)
            row[f"response_{name}_reward"] = first["reward"] if first else ""
        rows.append(row)
    file = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file.getvalue()


def _answers(prompt: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    a = prompt["answers"]
    return [("no_prompter", a["no_prompter"]), ("theta", a["theta"]["answers"]), ("rlhf", a["rlhf"])]


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{1 / row['tightness']:.1f} × the gap" if row["tightness"] else "gap is not positive"


def _bound(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Plot:
    figure = _figure(1.9 + 0.74 * len(rows))
    axes = figure.add_subplot()
    right = max([content["span"], *(sum(map(abs, r["terms"].values())) for r in rows)])
    left = min([0.0, *(min(r["gap"], r["rhs"]) for r in rows)])
    axes.set_xlim(left * 1.05, right * 1.44 or 1.0)
    for i, row in enumerate(rows):
        _bound_row(axes, i, row, right)
    axes.axvline(0, color=_MUTED, lw=0.8)
    axes.axvline(content["span"], color=_INK, lw=1.2, ls=(0, (4, 3)), zorder=0)
    names = [f"{_label(r['label'])}\n{_MATH.get(r['who']) or _label(r['who'])}" for r in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.45, -0.75)
    axes.text(
        content["span"], -0.56, f" span {content['span']:.3f}: vacuous from here", fontsize=9, va="center"
    )
    axes.set_xlabel("reward units, r in [0, 1]")
    theorem = content["bounds"]["theorem1"]["star"]
    first = next(r for r in rows if r["label"] == BOUND_NAMES["theorem1"] and r["who"] == "star")
    axes.set_title(f"Theorem 1 {_verdict(theorem)}: its right side is {_ratio(first)}", pad=12)
    handles = [
        Patch(facecolor=_TERMS["model"], label=r"model: TV($\pi^*$, $\pi_F$)"),
        Patch(facecolor=_TERMS["prompt_shift"], label=r"+ prompt shift: TV($\pi_F(x)$, $\pi_F(x')$)"),
        Patch(facecolor=_TERMS["shortfall"], label=r"+ shortfall: $\lambda$ KL($\rho$ ‖ $\rho^*$)"),
        Patch(facecolor="white", edgecolor=_INK, hatch="//////", label="− prompter KL, subtracted"),
        axes.plot([], [], color=_INK, lw=3, label="right side of the bound")[0],
        Patch(facecolor=_MUTED, label="true gap"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, columnspacing=2)
    alt = "; ".join(
        f"{r['label']} for {r['who']}: right side {r['rhs']:.3f}, gap {r['gap']:.3f}" for r in rows
    )
    return Plot("bound.png", _png(figure), f"Terms of each bound stacked beside the true gap. {alt}.")


def _verdict(bound: Mapping[str, Any]) -> str:
    return {
        "inconclusive": "is inconclusive",
        "inapplicable": "does not apply",
        "violated": "is violated",
    }.get(bound["verdict"], bound["verdict"])


def _bound_row(axes: Axes, i: int, row: Mapping[str, Any], right: float) -> None:
    terms, rhs, gap = row["terms"], row["rhs"], row["gap"]
    top, middle, height = i - 0.12, i + 0.24, 0.4
    taken = -terms.get("prompter_kl", 0.0)
    added = {name: value for name, value in terms.items() if name != "prompter_kl"}
    end = sum(added.values())
    if abs(end - taken - rhs) > 1e-6 * max(1.0, abs(rhs)) or not set(added) <= set(_TERMS):
        added, taken, end = {}, 0.0, rhs  # a form of other terms: the total alone can be drawn truly
        axes.barh(top, rhs, height, color="#d9d9d9")
    start = 0.0
    for name, value in added.items():
        axes.barh(top, value, height, left=start, color=_TERMS[name], edgecolor="white", lw=0.6)
        if value > 0.07 * right and (start + value <= rhs or rhs - start > 0.07 * right):
            axes.text((start + min(start + value, rhs)) / 2, top, f"{value:.3f}", ha="center", va="center")
        start += value
    if taken > 0:
        # Over the lower half only, so that what it takes away stays in sight.
        axes.barh(top + 0.1, -taken, 0.2, left=end, color="white", edgecolor=_INK, hatch="//////", lw=0.8)
    axes.plot([rhs, rhs], [top - 0.27, top + 0.27], color=_INK, lw=3, solid_capstyle="butt")
    note = f"{end:.3f} − {taken:.3f} = {rhs:.3f}" if taken > 0 else f"{rhs:.3f}"
    place, plain = max(end, rhs) + 0.012 * right, {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(place, top, note, va="center", bbox=plain)
    if row["vacuous"]:
        axes.text(place, middle, "vacuous", va="center", fontweight="bold", color="#a84300", bbox=plain)
    axes.barh(middle, gap, 0.2, color=_MUTED)
    axes.text(max(gap, 0) + 0.012 * right, middle, f"gap {_number(gap)}", va="center", fontsize=9.5)


def _rewards(content: Mapping[str, Any]) -> Plot:
    values = content["rewards"]
    names = {
        "no_prompter": "no prompter",
        "sft": f"{_MATH['sft']}, untrained",
        "theta": f"{_MATH['theta']}, trained",
        "star": f"{_MATH['star']}, optimal",
        "ceiling": "best of all prompters",
        "rlhf": r"$\pi^*$, RLHF optimum",
    }
    figure = _figure(3.5)
    axes = figure.add_subplot()
    target = values["rlhf"]
    low, high = min(values.values()), max(values.values())
    width = max(high - low, 1e-3)
    axes.set_xlim(low - 0.16 * width, high + 0.12 * width)
    axes.axvline(target, color=_INK, lw=1, ls=(0, (4, 3)), zorder=0)
    for i, name in enumerate(names):
        value = values[name]
        if name in PROMPTERS:
            axes.plot([value, target], [i, i], color=_COLOUR[name], lw=2.5, alpha=0.45, zorder=1)
            gap = content["policies"][name]["gap"]
            axes.text(
                (value + target) / 2, i - 0.1, f"gap {_number(gap)}", ha="center", va="bottom", fontsize=9.5
            )
        axes.plot(value, i, "o", ms=9, color=_COLOUR.get(name, _INK), zorder=2)
        left = value <= target
        axes.annotate(
            f"{value:.3f}",
            (value, i),
            xytext=(-9 if left else 9, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
        )
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.6)
    axes.set_xlabel("expected reward J, reward units (axis does not start at 0)")
    axes.set_title(
        f"Training moved the reward from {values['sft']:.3f} to {values['theta']:.3f}; "
        f"at {_MATH['star']} it is {values['star']:.3f}"
    )
    alt = ", ".join(f"{name} {values[name]:.3f}" for name in names)
    return Plot("rewards.png", _png(figure), f"Expected rewards: {alt}.")


def _spread(values: Sequence[float], least: float) -> list[float]:
    """Positions at least `least` apart, in the order of `values` and as near to them as one pass allows."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = list(values)
    for before, i in pairwise(order):
        placed[i] = max(placed[i], placed[before] + least)
    shift = sum(p - v for p, v in zip(placed, values, strict=True)) / max(len(values), 1)
    return [p - shift for p in placed]


def _side_labels(axes: Axes, lines: Sequence[tuple[float, str]], points: float = 14) -> None:
    """Labels right of the axes, each at its line's height unless they would overlap."""
    low, high = axes.get_ylim()
    inches = 2.35  # height of one panel's axes
    places = _spread([y for y, _ in lines], points / 72 / inches * (high - low))
    for (y, label), place in zip(lines, places, strict=True):
        axes.annotate(
            label,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(1.03, place),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=9.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _MUTED, "lw": 0.7, "shrinkA": 1, "shrinkB": 0},
        )


def _curves(content: Mapping[str, Any]) -> Plot | None:
    curve = content.get("curve") or []
    if not curve:
        return None
    steps = [line["step"] for line in curve]
    exact = {key: [line["exact"][key] for line in curve] for key in curve[0]["exact"]}
    star, rewards = content["policies"]["star"], content["rewards"]
    figure = _figure(9.3)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)

    line = {"ms": 4.5, "lw": 1.8}
    top.plot(steps, exact["reward"], "o-", color=_COLOUR["theta"], label=r"J($\rho_\theta$), exact", **line)
    top.plot(steps, exact["objective"], "s-", color=_VERMILLION, label=r"F($\rho_\theta$), exact", **line)
    sampled = _sampled(curve, "ppo/objective")
    if sampled:
        errors = [2 * s.get("ppo/objective_stderr", 0.0) for _, _, s in sampled]
        top.errorbar(
            [s for s, _, _ in sampled],
            [v for _, v, _ in sampled],
            yerr=errors,
            fmt="D",
            ms=5,
            mfc="white",
            color=_VERMILLION,
            lw=1,
            capsize=3,
            alpha=0.85,
            label=r"F($\rho_\theta$), sampled ± 2 standard errors",
        )
    marks = [
        (star["reward"], r"J($\rho^*$)", _COLOUR["theta"], (0, (5, 2))),
        (star["objective"], r"F($\rho^*$)", _VERMILLION, (0, (5, 2))),
        (rewards["no_prompter"], "no prompter", _MUTED, (0, (1, 1.5))),
        (rewards["ceiling"], "ceiling", _INK, (0, (5, 2, 1, 2))),
    ]
    for y, _, colour, dashes in marks:
        top.axhline(y, color=colour, lw=1.2, ls=dashes, zorder=0)
    low, high = top.get_ylim()
    top.set_ylim(low, high + 0.28 * (high - low))  # room for the legend
    _side_labels(top, [(y, f"{label} {y:.3f}") for y, label, *_ in marks])
    top.legend(loc="upper left", ncols=2, columnspacing=1.2)
    top.set_ylabel("reward units")
    f = exact["objective"]
    top.set_title(f"Objective F: {f[0]:.3f} → {f[-1]:.3f}; the optimum is {star['objective']:.3f}")

    middle.plot(
        steps, exact["kl_to_star"], "o-", color=_COLOUR["star"], label=r"KL($\rho_\theta$ ‖ $\rho^*$)", **line
    )
    middle.plot(
        steps,
        exact["kl_to_sft"],
        "s-",
        color=_COLOUR["sft"],
        label=r"KL($\rho_\theta$ ‖ $\rho_{\mathrm{sft}}$)",
        **line,
    )
    k1 = _sampled(curve, "ppo/kl_k1")
    if k1:
        middle.plot(
            [s for s, _, _ in k1],
            [v for _, v, _ in k1],
            "D",
            ms=5.5,
            mfc="none",
            mec=_INK,
            label=r"KL($\rho_\theta$ ‖ $\rho_{\mathrm{sft}}$), sampled (k1)",
        )
    middle.axhline(star["kl_to_sft"], color=_COLOUR["sft"], lw=1.2, ls=(0, (5, 2)), zorder=0)
    low, high = 0.0, max(middle.get_ylim()[1], 1e-3)
    middle.set_ylim(min(low, *exact["kl_to_star"]) - 0.03 * high, high * 1.25)
    label = r"KL($\rho^*$ ‖ $\rho_{\mathrm{sft}}$)"
    _side_labels(middle, [(star["kl_to_sft"], f"{label} {star['kl_to_sft']:.2f}")])
    middle.legend(loc="upper left", ncols=3, columnspacing=1.2, handlelength=1.6)
    middle.set_ylabel("nats")
    kl = exact["kl_to_star"]
    middle.set_title(
        f"Distance to the optimum, KL({_MATH['theta']} ‖ {_MATH['star']}): {kl[0]:.2f} → {kl[-1]:.2f}"
    )

    closed = [100 * c for c in exact["closed"]]
    bottom.plot(steps, closed, "o-", color=_COLOUR["theta"], **line)
    for guide in (50, 90):
        bottom.axhline(guide, color=_MUTED, lw=1, ls=(0, (1, 1.5)), zorder=0)
    _side_labels(bottom, [(50, "50%"), (90, "90%")])
    bottom.set_ylim(min(0, *closed) - 4, max(103, *closed))
    bottom.yaxis.set_major_formatter(PercentFormatter())
    bottom.set_ylabel("share closed")
    bottom.set_xlabel("optimizer steps")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_title(f"Share of F({_MATH['star']}) − F({_MATH['sft']}) closed: {closed[-1]:.1f}% at the end")
    alt = (
        f"Learning curves over {steps[-1]} optimizer steps: objective {f[0]:.3f} to {f[-1]:.3f}, "
        f"KL to the optimum {kl[0]:.2f} to {kl[-1]:.2f} nats, {closed[-1]:.1f}% closed at the end."
    )
    return Plot("curves.png", _png(figure), alt)


def _sampled(curve: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float, Mapping[str, float]]]:
    lines = [(line["step"], line.get("sampled") or {}) for line in curve]
    return [(step, values[key], values) for step, values in lines if values.get(key) is not None]


MOST_PROMPTS, MOST_REWRITES, FOLD = 8, 8, 0.02


def folded(rewrites: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Rewrites to draw one by one, by R, best first; and those too improbable under every prompter."""
    by_weight = sorted(rewrites, key=lambda r: -max(r[who] for who in PROMPTERS))
    kept = [r for r in by_weight[:MOST_REWRITES] if max(r[who] for who in PROMPTERS) >= FOLD]
    rest = [r for r in rewrites if not any(r is k for k in kept)]
    return sorted(kept, key=lambda r: -r["reward"]), rest


def _policies(content: Mapping[str, Any]) -> Plot | None:
    prompts = content["prompts"][:MOST_PROMPTS]
    if not prompts:
        return None
    parts = [folded(p["rewrites"]) for p in prompts]
    heights = [len(kept) + bool(rest) + 2.1 for kept, rest in parts]
    figure = _figure(0.265 * sum(heights) + 0.9)
    panels = figure.subplots(len(prompts), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    for axes, prompt, (kept, rest) in zip(panels, prompts, parts, strict=True):
        labels = [shorten(r["text"], 46) for r in kept]
        rows: list[Mapping[str, float]] = [*kept]
        if rest:
            labels.append(f"{len(rest)} more, summed")
            rows.append({who: sum(r[who] for r in rest) for who in PROMPTERS})
        for j, who in enumerate(PROMPTERS):
            places = [i + 0.27 * (j - 1) for i in range(len(rows))]
            axes.barh(places, [row[who] for row in rows], 0.25, color=_COLOUR[who])
        axes.set_yticks(range(len(rows)), [_drawable(label) for label in labels])
        for tick in axes.get_yticklabels():
            tick.set_parse_math(False)  # a dollar sign in a rewrite is a dollar sign
            tick.set_fontsize(9)
        axes.tick_params(axis="y", length=0, pad=31)
        axes.tick_params(axis="x", labelbottom=True)
        for i, rewrite in enumerate(kept):  # beside the label, not in it: a right-to-left text would move it
            axes.annotate(
                f"{rewrite['reward']:.2f}",
                (0, i),
                xycoords=("axes fraction", "data"),
                xytext=(-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
            )
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        axes.annotate(
            _drawable(shorten(prompt["prompt"], 80)),
            (0, 1),
            xycoords=("figure fraction", "axes fraction"),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=10,
            fontweight="bold",
            parse_math=False,
        )
    panels[-1].set_xlabel("probability (after each rewrite: its R)")
    handles = [Patch(facecolor=_COLOUR[who], label=_MATH[who]) for who in PROMPTERS]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    more = len(content["prompts"]) - len(prompts)
    if more:
        figure.supxlabel(f"{more} more prompts are not drawn", fontsize=10)
    best = [shorten((_favourite(p["rewrites"], "theta") or {"text": "none"})["text"], 60) for p in prompts]
    alt = f"Bars of ρ_sft, ρ_θ and ρ* over the rewrites of {len(prompts)} prompts. ρ_θ prefers: " + "; ".join(
        best
    )
    return Plot("policies.png", _png(figure), alt)


def _best_rewrites(prompt: Mapping[str, Any], most: int = 3) -> list[Mapping[str, Any]]:
    """The most probable under each prompter and the best by R, `most` of each, best R first."""
    chosen: list[Mapping[str, Any]] = []
    for key in ("reward", *PROMPTERS):
        for rewrite in sorted(prompt["rewrites"], key=lambda r: -r[key])[:most]:
            if not any(rewrite is c for c in chosen):
                chosen.append(rewrite)
    return sorted(chosen, key=lambda r: -r["reward"])


def _html(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], plots: Mapping[str, Plot]) -> str:
    return _template("report.html.j2").render(
        verb="demo",
        c=content,
        rows=rows,
        theorem=next(r for r in rows if r["label"] == BOUND_NAMES["theorem1"] and r["who"] == "star"),
        verdict=_verdict,
        prompters=PROMPTERS,
        terms=("model", "prompt_shift", "shortfall", "prompter_kl"),
        plots={name: {"src": _source(plot), "alt": plot.alt} for name, plot in plots.items()},
        prompts=[
            {"data": p, "best": _best_rewrites(p), "answers": [a[:1] for _, a in _answers(p)]}
            for p in content["prompts"]
        ],
        drawn_prompts=min(len(content["prompts"]), MOST_PROMPTS),
        fold=FOLD,
    )
