"""The demo's page shows the result's numbers, and shows strangers' text as text."""

import base64
import copy
import csv
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("torch", reason="needs torch: pip install 'alignpro[llm]'")

from matplotlib.image import imread

from alignpro.commands.demo import examples
from alignpro.commands.demo_page import folded, page
from alignpro.llm.arms.demo import DemoResult
from alignpro.report import figures, keep, render
from alignpro.report.text import shorten, visible

FIGURES = ("rewards.png", "bound.png", "curves.png", "policies.png")
MADE = keep.facts()

# Every number is different, so that a swapped column cannot pass.
BOUND = {"assumptions": {"prompter is optimal": True}, "verdict": "holds", "vacuous": False, "error": 1e-12}


def bound(gap, model, shift, kl, shortfall=None, **changes):
    terms = {"model": model, "prompt_shift": shift, "prompter_kl": -kl}
    if shortfall is not None:
        terms["shortfall"] = shortfall
    rhs = sum(terms.values())
    return {**BOUND, "gap": gap, "rhs": rhs, "slack": rhs - gap, "terms": terms, **changes}


def answers(text, reward, probability, cut=False):
    return [{"text": text, "reward": reward, "probability": probability, "cut": cut}]


def a_prompt(name="How do tides work?", rewrites=("Explain tides.", "Why do seas rise?", "Tide facts")):
    return {
        "prompt": name,
        "gap": 0.1234,
        "rewards": {"no_prompter": 0.511, "sft": 0.522, "theta": 0.633, "star": 0.644, "rlhf": 0.755},
        "rewrites": [
            {"text": rewrites[0], "reward": 0.711, "sft": 0.203, "theta": 0.604, "star": 0.705},
            {"text": rewrites[1], "reward": 0.512, "sft": 0.506, "theta": 0.307, "star": 0.208},
            {"text": rewrites[2], "reward": 0.413, "sft": 0.291, "theta": 0.089, "star": 0.087},
        ],
        "answers": {
            "no_prompter": answers("The moon pulls", 0.501, 0.405, cut=True),
            "theta": {"rewrite": rewrites[0], "answers": answers("Gravity.", 0.702, 0.606)},
            "rlhf": answers("The moon and the sun.", 0.803, 0.807),
        },
    }


def exact(reward, objective, star, sft, closed, gap):
    return {
        "reward": reward,
        "objective": objective,
        "kl_to_star": star,
        "kl_to_sft": sft,
        "closed": closed,
        "gap": gap,
    }


@pytest.fixture
def content():
    curve = [
        {"step": s, "exact": exact(0.52 + 0.03 * i, 0.52 + 0.02 * i, 0.9 - 0.2 * i, 0.1 * i, 0.3 * i, 0.2)}
        for i, s in enumerate((0, 4, 8))
    ]
    for i, line in enumerate(curve[:-1]):
        line["sampled"] = {
            "ppo/objective": 0.51 + 0.02 * i,
            "ppo/objective_stderr": 0.01,
            "ppo/kl_k1": 0.1 * i,
        }
    return {
        "title": "Tides",
        "command": "alignpro demo --out tides",
        "beta": 0.1,
        "lam": 0.05,
        "r_max": 0.987,
        "span": 0.876,
        "sizes": {"prompts": 2, "rewrites": [3, 3], "responses": [5, 4]},
        "rewards": {
            "no_prompter": 0.5101,
            "sft": 0.5202,
            "theta": 0.6303,
            "star": 0.6404,
            "ceiling": 0.6905,
            "rlhf": 0.7506,
        },
        "policies": {
            "sft": exact(0.5202, 0.5202, 0.91, 0.0, 0.0, 0.2304),
            "theta": exact(0.6303, 0.5808, 0.31, 0.21, 0.8217, 0.1203),
            "star": exact(0.6404, 0.5939, 0.0, 0.41, 1.0, 0.1102),
        },
        "bounds": {
            "theorem1": {"star": bound(0.1102, 0.4011, 0.3022, 0.0205)},
            "tight": {"star": bound(0.1102, 0.3511, 0.2522, 0.0602)},
            "trained": {
                "star": bound(0.1102, 0.3511, 0.2522, 0.0205, 0.0),
                "sft": bound(0.2304, 0.3511, 0.2522, 0.0, 0.0455),
                "theta": bound(0.1203, 0.3511, 0.2522, 0.0105, 0.0155),
            },
        },
        "prompts": [a_prompt(), a_prompt("Name a metal", ("Which metal?", "A metal, please", "Iron?"))],
        "curve": curve,
        "created": "2026-11-29T00:00:00+00:00",
        "settings": {
            "model": "toy-model",
            "reward": "toy-reward",
            "seed": 3,
            "exact_rewards": True,
            "enumeration": {"response_tokens": 24},
            "training": {"algorithm": "ppo", "iterations": 2, "epochs": 4},
        },
        "reward_model": {
            "test_accuracy": {"value": 0.6768, "lo": 0.5747, "hi": 0.7646, "pairs": 203},
            "limits": ["Weak: use it to study optimization."],
        },
        "environment": {"python": "3.11", "packages": {"numpy": "2.4"}},
        "seconds": {"train": 300.2},
    }


@pytest.fixture
def unpainted(monkeypatch):
    """Figures are laid out but not painted: what is tested is text."""
    monkeypatch.setattr(figures, "png", lambda drawing: b"painted elsewhere")


def rendered(content):
    return render.page(page(DemoResult(**content)), MADE)


class Read(HTMLParser):
    """Tags, attributes, text and table cells, as a browser's parser would find them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        self.words.append(data)
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data

    def row(self, *start):
        [found] = [row for row in self.rows if [c.strip() for c in row[: len(start)]] == list(start)]
        return [cell.strip() for cell in found]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(content):
    return Read(rendered(content).html)


def test_the_summary_states_the_contents_numbers(content, unpainted):
    text = read(content).text
    assert "82.2%" in text
    assert "0.520 → 0.630" in text
    assert "0.230 → 0.120" in text
    assert "0.110 ≤ 0.683: 6.2 × the gap" in text  # 0.4011 + 0.3022 − 0.0205, and over 0.1102
    assert "cannot exceed 0.691 on these rewrites, so a gap of 0.060 to the RLHF optimum (0.751)" in text
    assert "holds 5, vacuous 0" in text
    assert "PPO training of 8 optimizer steps" in text
    assert "67.7% [57.5%, 76.5%] of 203 pairs" in text
    assert "Weak: use it to study optimization." in text
    assert "One training seed" in text
    assert "4–5 responses" in text


def test_columns_of_the_bounds_are_not_swapped(content, unpainted):
    found = read(content)
    assert found.row("Trained form", "ρ_θ") == [
        *("Trained form", "ρ_θ", "0.1203", "0.3511", "0.2522", "0.0155", "−0.0105", "0.6083", "0.4880"),
        *("19.8%", "holds", "no"),
    ]
    assert found.row("Theorem 1")[5:8] == ["–", "−0.0205", "0.6828"]
    assert found.row("Trained form", "ρ_sft")[2] == "0.2304"
    assert found.row("Tight form", "ρ*")[6] == "−0.0602"


def test_columns_of_the_rewrites_are_not_swapped(content, unpainted):
    found = read(content)
    assert found.row("Explain tides.", "20.3%") == ["Explain tides.", "20.3%", "60.4%", "70.5%", "0.711"]
    assert "ρ_sft 0.522, ρ_θ 0.633, ρ* 0.644" in found.text
    # Only a response that was cut ends in an ellipsis.
    assert found.row("How do tides work?", "the frozen model")[2:] == ["The moon pulls…", "0.501", "40.5%"]
    [asked] = [
        row for row in found.rows if row[:1] == ["Explain tides."] and len(row) == 5 and "ρ_θ" in row[1]
    ]
    assert asked[2:] == ["Gravity.", "0.702", "60.6%"]


@pytest.mark.parametrize(
    ("verdict", "vacuous", "said"),
    [
        ("holds", True, "It is vacuous"),
        ("inconclusive", False, "is inconclusive"),
        ("violated", False, "is violated"),
        ("inapplicable", False, "does not apply"),
    ],
)
def test_a_bad_verdict_is_said(content, unpainted, verdict, vacuous, said):
    content["bounds"]["theorem1"]["star"] |= {"verdict": verdict, "vacuous": vacuous}
    text = read(content).text
    assert said in text
    assert ("vacuous 1" in text) == vacuous


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=http://evil.example/x onerror=alert(1)>",
    '"><iframe src="https://evil.example"></iframe>',
    "{{ 7 * 7 }} {% raw %}",
    "price $x_{$ of \\frac{",  # two dollars: matplotlib would read mathematics, and fail
    "&lt;b&gt; 漢字 🙂 " + "x" * 400,
]


def test_text_of_strangers_stays_text(content):
    clean = read(content)
    attacked = copy.deepcopy(content)
    attacked["title"] = attacked["command"] = attacked["settings"]["model"] = ATTACKS[0]
    attacked["reward_model"]["limits"] = [ATTACKS[1]]
    attacked["seconds"][ATTACKS[2]] = ATTACKS[0]
    attacked["bounds"]["theorem1"]["star"]["assumptions"] = {ATTACKS[0]: False}
    p = attacked["prompts"][0]
    p["prompt"] = ATTACKS[4]
    for rewrite, attack in zip(p["rewrites"], (ATTACKS[2], ATTACKS[4], ATTACKS[5]), strict=True):
        rewrite["text"] = attack
    p["answers"]["theta"]["rewrite"] = ATTACKS[0]
    p["answers"]["no_prompter"][0]["text"] = ATTACKS[3]
    p["answers"]["rlhf"][0]["text"] = ATTACKS[1]
    found = read(attacked)
    assert set(found.tags) == set(clean.tags)
    assert not {"script", "iframe", "object", "form", "link", "base"} & set(found.tags)
    assert {name for _, name, _ in found.attributes} == {name for _, name, _ in clean.attributes}
    for attack in ATTACKS[:4]:  # shown, whole
        assert " ".join(attack.split()) in found.text


def test_hidden_and_bidirectional_characters_are_spelled_out(content, unpainted):
    hidden = "\u202egnp.exe\u2066 \u200b \x00 \x1b[31m \ufeff \u2028 \ud800 \u061c"
    content["prompts"][0]["prompt"] = hidden
    content["prompts"][0]["rewrites"][0]["text"] = hidden
    content["prompts"][0]["answers"]["rlhf"][0]["text"] = hidden
    raw, table = rendered(content).html, examples(content["prompts"])
    for text in (raw, html.unescape(raw), table):
        assert not set(hidden) & set(text) - set("gnp.exe[31m ")
        assert "⟨U+202E⟩gnp.exe⟨U+2066⟩" in text
    assert visible("tab\tline\nnaïve 漢字 e\u0301 a\u00a0b") == "tab\tline\nnaïve 漢字 e\u0301 a\u00a0b"


def test_the_page_needs_nothing_from_outside(content):
    text, pictures = rendered(content)
    found = Read(text)
    sources = [value for _, name, value in found.attributes if name in ("src", "href", "srcset", "data")]
    assert list(pictures) == list(FIGURES)
    for name, source in zip(FIGURES, sources, strict=True):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == pictures[name]
    assert not re.search(r"https?:|@import|url\(", text)
    assert "script" not in found.tags
    alts = [value for tag, name, value in found.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == len(FIGURES)
    assert all(len(alt) > 30 for alt in alts)
    assert "Trained form, ρ_θ: right side of the bound 0.608, true gap 0.120" in alts[1]


def test_figures_are_pictures_of_something(content):
    for name, png in rendered(content).pictures.items():
        pixels = imread(io.BytesIO(png))
        assert pixels.shape[1] > 1000
        ink = (pixels[..., :3] < 0.9).any(-1)
        assert 0.01 < ink.mean() < 0.6, name
        colours = np.unique((pixels[..., :3] * 255).astype(int) @ np.array([65536, 256, 1]))
        assert len(colours) > 50, name


def test_figures_follow_the_content(content):
    """The same content gives the same bytes; a figure that ignored a quantity would not change with it."""
    before = rendered(content)
    assert rendered(copy.deepcopy(content)) == before
    changes = {
        "bound.png": ("bounds", "trained", "sft", "gap"),
        "rewards.png": ("rewards", "rlhf"),
        "policies.png": ("prompts", 0, "rewrites", 0, "theta"),
        "curves.png": ("curve", 1, "sampled", "ppo/objective_stderr"),
    }
    for name, path in changes.items():
        changed = copy.deepcopy(content)
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] *= 0.7
        after = rendered(changed).pictures
        assert [figure for figure in FIGURES if after[figure] != before.pictures[figure]] == [name]


@pytest.fixture
def drawn(content):
    """The figures themselves, by file name."""
    sections = page(DemoResult(**content)).sections
    return {s.file: figures.draw(s.figure).canvas for s in sections if s.file}


def test_bars_are_as_long_as_the_terms(content, drawn):
    [axes] = drawn["bound.png"].axes
    bars = [(bar, bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in axes.patches]
    marks = [
        line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 3 and len(line.get_xdata())
    ]
    names = {"Theorem 1": "theorem1", "Tight form": "tight", "Trained form": "trained"}
    who = {"ρ_sft": "sft", "ρ_θ": "theta", "ρ*": "star"}
    ticks = [tick.get_text().split(", ") for tick in axes.get_yticklabels()]
    assert len(ticks) == 5
    for i, (label, symbol) in enumerate(ticks):
        expected = content["bounds"][names[label]][who[symbol]]
        here = [(bar, w) for bar, w, y in bars if abs(y - i) < 0.5]
        taken = [v for v in expected["terms"].values() if v < 0]
        assert [w for bar, w in here if bar.get_hatch()] == pytest.approx(taken)
        added = [v for v in expected["terms"].values() if v > 0]
        solid = sorted(w for bar, w in here if not bar.get_hatch())
        assert solid == pytest.approx(sorted([*added, expected["gap"]]))
        assert marks[i] == pytest.approx(expected["rhs"])


def test_points_of_the_curves_are_the_contents(content, drawn):
    top, middle, bottom = drawn["curves.png"].axes
    lines = {line.get_label(): line for axes in (top, middle) for line in axes.lines}
    expected = {
        "J(ρ_θ), exact": "reward",
        "F(ρ_θ), exact": "objective",
        "KL(ρ_θ ‖ ρ*)": "kl_to_star",
        "KL(ρ_θ ‖ ρ_sft)": "kl_to_sft",
    }
    for label, key in expected.items():
        assert list(lines[label].get_ydata()) == [line["exact"][key] for line in content["curve"]]
        assert list(lines[label].get_xdata()) == [0, 4, 8]
    assert list(bottom.lines[0].get_ydata()) == pytest.approx([0, 30, 60])
    [bars] = top.containers
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.lines[2][0].get_segments()]
    assert lengths == pytest.approx([0.04, 0.04])  # ± 2 standard errors of 0.01
    assert list(bars.lines[0].get_xdata()) == [0, 4]
    heights = {round(line.get_ydata()[0], 4) for line in top.lines if list(line.get_xdata()) == [0, 1]}
    assert heights == {0.6404, 0.5939, 0.5101, 0.6905}
    said = {text.get_text() for text in top.texts}
    assert {"F(ρ*) 0.594", "J(ρ*) 0.640", "no prompter 0.510", "ceiling 0.691"} <= said


def test_bars_of_the_policies_are_the_contents(content, drawn):
    axes = drawn["policies.png"].axes[0]
    rewrites = sorted(content["prompts"][0]["rewrites"], key=lambda r: -r["reward"])
    assert [t.get_text() for t in axes.get_yticklabels()] == [r["text"] for r in rewrites]
    for who, bars in zip(("sft", "theta", "star"), axes.containers, strict=True):
        assert [bar.get_width() for bar in bars] == [r[who] for r in rewrites]
        assert [round(bar.get_y() + bar.get_height() / 2) for bar in bars] == [0, 1, 2]
    assert {"0.71", "0.51", "0.41"} <= {text.get_text() for text in axes.texts}


def test_dots_of_the_rewards_are_the_contents(content, drawn):
    [axes] = drawn["rewards.png"].axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == list(content["rewards"].values())
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels[1:4] == [
        "ρ_sft, untrained (gap 0.230)",
        "ρ_θ, trained (gap 0.120)",
        "ρ*, optimal (gap 0.110)",
    ]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [0.7506]


def test_the_table_of_examples(content):
    p = content["prompts"][0]
    p["prompt"] = "=1+1"
    p["rewrites"][0]["text"] = " +cmd|' /C calc'!A0"
    p["rewrites"][1]["text"] = "@SUM(A1)"
    p["answers"]["rlhf"][0]["text"] = "-2+3"
    p["answers"]["no_prompter"][0]["text"] = '\tsaid "so",\nthen left'
    p["gap"] = -0.25
    text = examples(content["prompts"])
    first, second = csv.DictReader(io.StringIO(text, newline=""))
    assert first["prompt"] == "'=1+1"
    assert first["rewrite_theta"] == first["best_rewrite"] == "' +cmd|' /C calc'!A0"
    assert first["rewrite_sft"] == "'@SUM(A1)"
    assert first["response_rlhf"] == "'-2+3"
    assert first["response_no_prompter"] == '\'\tsaid "so",\nthen left…'
    assert float(first["gap"]) == -0.25
    numbers = ("rewrite_sft_R", "rewrite_sft_probability", "rewrite_theta_probability", "reward_star")
    assert [float(first[n]) for n in numbers] == [0.512, 0.506, 0.604, 0.644]
    assert (second["prompt"], second["response_theta"]) == ("Name a metal", "Gravity.")


def test_a_curve_without_ppos_own_keys(content):
    before = rendered(content).pictures["curves.png"]
    for line in content["curve"]:
        line["sampled"] = {"reward": 0.5, "kl": 0.1}
    content["curve"][-1].pop("sampled")
    content["settings"]["training"]["algorithm"] = "rloo"
    after = rendered(content)
    assert "RLOO training" in Read(after.html).text
    assert after.pictures["curves.png"] != before


def test_no_stale_figure_stays(content, tmp_path, unpainted):
    content["command"] = None
    keep.keep(page(DemoResult(**content)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["report.html", *FIGURES])
    content["prompts"] = []
    keep.keep(page(DemoResult(**content)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["report.html", *set(FIGURES) - {"policies.png"}]
    )


def test_a_reward_that_states_no_accuracy(content, unpainted):
    content["reward_model"] = {"name": "letters"}
    assert "It states no accuracy." in read(content).text


def test_many_prompts_and_odd_sizes(content, unpainted):
    content["prompts"] = [a_prompt(f"Prompt {i}") for i in range(10)]
    content["prompts"][1]["rewrites"] = content["prompts"][1]["rewrites"][:1]
    content["prompts"][2]["answers"] = {
        "no_prompter": [],
        "theta": {"rewrite": "r", "answers": []},
        "rlhf": [],
    }
    content["curve"] = content["curve"][:1]
    text = read(content).text
    assert "8 of 10 prompts" in text
    assert "10. Prompt 9" in text
    assert text.count("None.") == 1


def test_rewrites_no_prompter_uses_are_folded_not_dropped():
    rewrites = [
        {"text": str(i), "reward": i / 20, "sft": w, "theta": w, "star": w}
        for i, w in enumerate([0.5, 0.001, 0.2, 0.019, *[0.028] * 10])
    ]
    kept, rest = folded(rewrites)
    assert len(kept) == 8
    assert [r["reward"] for r in kept] == sorted((r["reward"] for r in kept), reverse=True)
    assert {"0", "2"} <= {r["text"] for r in kept}
    assert {"1", "3"} <= {r["text"] for r in rest}
    assert sum(r["sft"] for r in [*kept, *rest]) == pytest.approx(sum(r["sft"] for r in rewrites))


def test_shortened_text_keeps_both_ends():
    text = "What is the origin of the phrase and how did it become a popular thing?"
    short = shorten(text, 40)
    assert len(short) <= 40
    assert short.startswith("What is the")
    assert short.endswith("thing?")
    assert shorten("a\n b", 40) == "a b"
    assert len(shorten("x" * 100, 40)) == 40
