"""Results show themselves: `print` is the verb's table, `repr` one line, pandas, matplotlib and notebooks."""

import dataclasses
import pickle
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from mutants import kills, mutated

from alignpro import Instance, check, shown, solution
from alignpro.commands import compare as compare_verb
from alignpro.commands import estimate as estimate_verb
from alignpro.commands import headroom as headroom_verb
from alignpro.commands import solve
from alignpro.errors import AlignProError
from alignpro.estimation import compare, estimate, headroom
from alignpro.estimation.simulate import Size, simulate
from alignpro.report import excerpt
from alignpro.report.page import Page, Table
from alignpro.theory import results
from alignpro.theory.scale.instances import solve_files


def drawn(prompts: int) -> Instance:
    rng = np.random.default_rng(0)
    return Instance(
        p=np.full(prompts, 1 / prompts),
        prior=rng.dirichlet(np.ones(4), size=prompts),
        frozen=rng.dirichlet(np.ones(6), size=4),
        own=np.zeros(prompts, int),
        reward=rng.uniform(size=(prompts, 6)),
    )


@pytest.fixture(scope="module")
def instance():
    return drawn(3)


@pytest.fixture(scope="module")
def found(instance, tmp_path_factory):
    """A result of each kind that needs no language model."""
    path = tmp_path_factory.mktemp("instances") / "a.npz"
    instance.save(path)
    size = Size(prompts=12, answers=12, draws=6, answers_per_draw=3)
    rollouts = simulate(instance, np.random.default_rng(0), size)
    report = estimate(rollouts, beta=0.3, lam=0.3)
    return {
        "estimate": report,
        "headroom": headroom(rollouts, lams=(0.3, 0.5)),
        "compare": compare(rollouts, ["none", "sft"]),
        "solve": solve_files([path], 0.3, 0.2, ("theorem1", "ceiling")),
        "bound": check(instance, 0.3, 0.2, "tight"),
        "number": report.quantities["J(none)"],
    }


KINDS = ("estimate", "headroom", "compare", "solve", "bound", "number")


def test_print_is_what_the_verb_prints(found):
    verbs = {"estimate": estimate_verb, "headroom": headroom_verb, "compare": compare_verb, "solve": solve}
    for kind, verb in verbs.items():
        assert str(found[kind]) == verb.text(found[kind])
        assert f"{found[kind]}" == str(found[kind])
    number = found["number"]
    assert str(number) == f"{number.value:.4g} [{number.lo:.4g}, {number.hi:.4g}]"
    assert "tight" in str(found["bound"])
    assert "prompt_shift 0.26" in str(found["bound"])


@pytest.mark.parametrize("kind", KINDS)
def test_repr_is_one_short_line(found, kind):
    def check_one(module) -> None:
        said = module.brief(found[kind])
        assert said.startswith(f"{type(found[kind]).__name__}(")
        assert "\n" not in said
        assert len(said) <= 240
        if kind == "estimate":
            assert f"quantities=<{len(found[kind].quantities)}>" in said

    check_one(shown)
    assert repr(found[kind]) == shown.brief(found[kind])
    if kind == "estimate":
        kills(check_one, mutated(shown, 'return f"<{len(value)}>"', "return repr(value)"))
        kills(check_one, mutated(shown, "_WIDEST = 240", "_WIDEST = 10_000"))


def test_large_instances_and_solutions_have_short_reprs(instance):
    assert repr(instance).startswith("Instance(p=")
    assert "array(" in repr(instance)  # small: written out, for counterexamples
    large = drawn(300)
    assert len(repr(large)) < 240
    assert "float64[300, 4]" in repr(large)
    assert len(repr(solution(instance, 0.3, 0.2))) <= 240


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_records_all_the_same(found, kind):
    result = found[kind]
    again = pickle.loads(pickle.dumps(result)) if kind != "solve" else result  # noqa: S301 - made here
    assert dataclasses.asdict(again) == dataclasses.asdict(result)


def test_frames_hold_the_numbers(found):
    frame = found["estimate"].to_frame()
    report = found["estimate"]
    (row,) = frame[(frame["what"] == "slack") & (frame["name"] == "theorem1")].to_dict("records")
    slack = report.theorem1.slack
    assert (row["value"], row["value_lo"], row["value_hi"]) == (slack.value, slack.lo, slack.hi)
    assert row["verdict"] == report.theorem1.verdict
    terms = frame[(frame["name"] == "theorem1") & ~frame["what"].isin(["rhs", "slack"])]
    assert terms["value"].sum() == pytest.approx(report.theorem1.rhs.value)
    sweep = found["headroom"].to_frame()
    assert sweep["lam"].tolist() == [0.3, 0.5]
    assert sweep["net_lo"].tolist() == [at.net.lo for at in found["headroom"].at]
    arms = found["compare"].to_frame().set_index("arm")
    assert arms.loc["sft", "gain"] == found["compare"].against["sft"].mean.value
    assert np.isnan(arms.loc["none", "gain"])
    bounds = found["solve"].to_frame()
    assert bounds["bound"].tolist() == ["theorem1", "ceiling"]
    one = found["bound"].to_frame()
    assert one["slack"].item() == found["bound"].slack
    assert len(found["number"].to_frame()) == 1


def test_figures(found, instance):
    """The first of the verb's page, or the one whose heading is named; each is matplotlib's."""
    for kind in ("estimate", "headroom", "compare", "solve", "bound"):
        assert found[kind].plot().get_axes(), kind
    first, named = found["estimate"].plot(), found["estimate"].plot("Quantities")
    assert first.get_axes()[0].get_title("left") == "Each bound beside the gap"
    assert named.get_axes()[0].get_title("left") == "Expected rewards"
    with pytest.raises(AlignProError, match=r"plot 'Nothing': is no figure; choose from Bounds on the gap"):
        found["estimate"].plot("Nothing")
    with pytest.raises(AlignProError, match="Estimate has no figure"):
        found["number"].plot()
    frontier = results.frontier(instance, np.array([0.1, 1.0]))
    assert frontier.plot().get_axes()
    assert frontier.to_frame()["mean_kl"].tolist() == frontier.mean_kl.tolist()


def test_missing_libraries_are_named(found, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(AlignProError, match="pandas is missing; run pip install pandas"):
            found["estimate"].to_frame()
        assert str(found["estimate"])  # which needs neither
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(AlignProError, match="matplotlib is missing"):
        found["estimate"].plot()


class Cells(HTMLParser):
    """The text of each cell, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        assert not attrs  # no style and no script
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.mark.parametrize("kind", KINDS)
def test_notebooks_show_tables(found, kind):
    html = Cells(found[kind]._repr_html_())
    assert html.names <= {"p", "strong", "table", "tr", "th", "td", "pre"}
    assert ("table" in html.names) == (kind not in ("bound", "number"))


def test_strangers_text_is_no_markup():
    wrong = "<img src=x onerror=alert(1)>"

    def check_one(module) -> None:
        page = Page("x", wrong, wrong, {})
        page.key(wrong, wrong, wrong)
        page.add(wrong, "", Table(wrong, [(wrong, f"{wrong}\u202e")], "wt"))
        html = module.excerpt(page)
        assert "<img" not in html + module.preformatted(wrong)
        assert "\u202e" not in html

    page = excerpt
    check_one(page)
    kills(check_one, mutated(page, "escape(visible(cell))", "visible(cell)"))
    kills(check_one, mutated(page, "return escape(typographic(text))", "return typographic(text)"))
    kills(check_one, mutated(page, "escape(visible(cell))", "escape(cell)"))
