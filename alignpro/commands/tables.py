"""Results for reading: each function gives the text that a verb prints."""

from collections.abc import Sequence

from alignpro.estimation.compare import Comparison
from alignpro.estimation.headroom import Headroom
from alignpro.estimation.intervals import Estimate
from alignpro.estimation.statements import EstimateReport

_MARK = {"none": "", "up": "biased up", "down": "biased down", "unknown": ""}


def _number(value: float) -> str:
    return "-inf" if value < -1e300 else "inf" if value > 1e300 else f"{value:.4g}"


def _interval(e: Estimate) -> str:
    return f"{_number(e.value)} [{_number(e.lo)}, {_number(e.hi)}]"


def _columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        indent + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _remarks(e: Estimate) -> str:
    remarks = ["degenerate weights: bounds" if e.bracket else "", _MARK[e.bias]]
    remarks.append("" if e.ess is None else f"ESS {e.ess:.1f}")
    return ", ".join(r for r in remarks if r)


def of_estimate(report: EstimateReport) -> str:
    """Quantities, gaps, bounds with their verdicts, and where the gap comes from."""
    low, high = report.reward_range
    lines = [
        f"{report.n} rollouts of {report.n_prompts} prompts, beta {report.beta:g}, lambda {report.lam:g}; "
        f"{report.level:.0%} intervals over prompts",
        f"frozen {report.frozen}, reward {report.reward_model} in [{low:g}, {high:g}], {report.sampling}",
        "",
        "quantities",
        *_columns([(name, _interval(e), _remarks(e)) for name, e in report.quantities.items()]),
    ]
    if report.gaps:
        lines += ["", "gap J(pi*) - J(arm), and of a tuned policy's J"]
        lines += _columns([(name, _interval(e), _remarks(e)) for name, e in report.gaps.items()])
    rows: list[tuple[str, ...]] = [("bound", "about", "gap", "rhs", "slack (joint interval)", "verdict")]
    notes = []
    for bound in report.bounds:
        verdict = bound.verdict + (", vacuous" if bound.vacuous else "")
        cells = [("" if e is None else _interval(e)) for e in (bound.gap, bound.rhs, bound.slack)]
        rows.append((bound.name, bound.prompter, *cells, verdict))
        if bound.why:
            notes.append(f"  {bound.name} of {bound.prompter}: {bound.why}")
    lines += ["", "gap <= rhs", *_columns(rows), *dict.fromkeys(notes)]
    if any(bound.vacuous for bound in report.bounds):
        lines.append("  vacuous: rhs is at least the width of the reward, so true of any policies")
    if report.splits:
        head = (
            "the gap of",
            "gap",
            "prompting ceiling",
            "KL regularisation",
            "optimisation",
            "sampling error",
        )
        cells_of = [
            (
                arm,
                _interval(split.gap),
                _interval(split.prompting_ceiling),
                _interval(split.kl_regularisation),
                _interval(split.optimisation),
                f"+-{split.sampling_error:.3g}",
            )
            for arm, split in report.splits.items()
        ]
        lines += ["", "where it comes from", *_columns([head, *cells_of])]
    if report.missing:
        lines += ["", "not to be had from these rollouts"]
        lines += [f"  {name}: {why}" for name, why in report.missing.items()]
    lines += [f"warning: {text}" for text in report.warnings]
    return "\n".join(lines)


def of_headroom(report: Headroom) -> str:
    """The gain at each λ, and the answer."""
    lines = [
        f"{report.n} rollouts of {report.n_prompts} prompts; {report.level:.0%} intervals over prompts",
        *_columns(
            [
                *((f"J({name})", _interval(e)) for name, e in report.means.items()),
                ("variance within rewrites", _interval(report.within)),
                ("variance between rewrites", _interval(report.between)),
                *((f"best of {n} rewrites, over sft", _interval(e)) for n, e in report.best_of.items()),
                *(
                    []
                    if report.ceiling is None
                    else [("best rewrite drawn, over none", _interval(report.ceiling))]
                ),
            ]
        ),
        "",
        "the optimal prompter's gain",
        *_columns(
            [
                ("lambda", "over sft", "net of lambda KL", "over none", ""),
                *(
                    (
                        f"{at.lam:g}",
                        _interval(at.over_reference),
                        _interval(at.net),
                        "" if at.over_none is None else _interval(at.over_none),
                        _remarks(at.over_reference),
                    )
                    for at in report.at
                ),
            ]
        ),
        *(f"warning: {text}" for text in report.warnings),
        "",
        report.answer,
    ]
    return "\n".join(lines)


def of_comparison(report: Comparison) -> str:
    """Each arm, and its differences from the baseline."""
    rows: list[tuple[str, ...]] = [
        ("arm", "mean reward", "variance", f"mean - {report.baseline}", "variance -", "win rate")
    ]
    for name in report.mean:
        against = report.against.get(name)
        cells = ("", "", "") if against is None else (against.mean, against.variance, against.win_rate)
        shown = [cell if isinstance(cell, str) else _interval(cell) for cell in cells]
        rows.append((name, _interval(report.mean[name]), _interval(report.variance[name]), *shown))
    head = f"{report.n_prompts} prompts, paired; {report.level:.0%} intervals over prompts"
    return "\n".join([head, *_columns(rows)])
