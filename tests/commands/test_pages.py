"""Every verb's page: written by the verb, well-formed, self-contained, with the numbers of its JSON."""

import base64
import collections
import getpass
import html.parser
import io
import itertools
import json
import re
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from paper_grid import page as grid_page

from alignpro.commands import main
from alignpro.estimation.simulate import Size, simulated_rows
from alignpro.report import figures as report_figures
from alignpro.report import keep, numbers, render, text
from alignpro.report.page import Curve, Curves, Dot, Dots, Page, Table
from alignpro.theory.families import draw

HOSTILE = "<script>alert(1)</script></style></td><img src=x onerror=y>&amp;{{ 98765 * 43211 }}"
HIDDEN = "\u202egnp.exe\u2066\u200b"


class Strict(html.parser.HTMLParser):
    """Refuses what a lenient parser would repair: tags that do not close in order, stray ends."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.tables, self.words = [], [], [], [], []
        assert text.startswith("<!DOCTYPE html>\n<html lang=")
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        assert len(dict(attributes)) == len(attributes), attributes
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            assert tag == "td" or dict(attributes)["scope"] in ("row", "col")
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            assert "<" not in data
        else:
            self.words.append(data)
            if self.tables and self.open[-1:] and {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data.replace("\xa0", " ")  # within intervals

    def of(self, tag, name):
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    def rows(self):
        """Every row of every table by its first cell."""
        return {row[0]: row for table in self.tables for row in table if row}


def shown(value):
    """A number as pages show it, by another route than theirs."""
    return "–" if value is None else f"{float(f'{value:.4g}'):.4g}".replace("-", "−")


def limits(e):
    return f"{shown(e['value'])} [{shown(e['lo'])}, {shown(e['hi'])}]"


def shares(prompts, responses):
    """How much of each answer is one character: in [0, 1]."""
    return [y.count("e") / max(1, len(y)) for y in responses]


# --- one small run of every verb ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Instances, rollouts and, where torch is, a tiny model."""
    folder = tmp_path_factory.mktemp("home")
    for i, instance in enumerate(draw("signed", 0, (2, 3, 4), 2)):
        instance.save(folder / f"{i}.npz")
    rng = np.random.default_rng(0)
    prior, frozen = rng.dirichlet(np.ones(6), 8), rng.dirichlet(np.ones(12), 6)
    small = SimpleNamespace(
        p=np.full(8, 1 / 8),
        prior=prior,
        frozen=frozen,
        own=rng.integers(6, size=8),
        reward=rng.uniform(size=(8, 12)),
    )
    tilted = prior * np.exp(3 * small.reward @ frozen.T)
    trained = tilted / tilted.sum(1, keepdims=True)
    rows = simulated_rows(
        small, rng, Size(12, 8, 6, 2), prompters={"trained": trained}, reward_range=(0.0, 1.0)
    )
    (folder / "rollouts.jsonl").write_text("".join(row.line() for row in rows))
    (folder / "prompts.txt").write_text("\n".join(["abc", "def", "gab", "hhc", "e"]))
    texts = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]
    (folder / "many.txt").write_text("\n".join(texts))
    for name, rows in (
        ("rewrites", [{"prompt": x, "rewrite": x[::-1]} for x in texts]),
        ("pairs", [{"prompt": x, "chosen": "aab", "rejected": "dcdc"} for x in texts]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(home):
    pytest.importorskip("torch", reason="needs torch: pip install 'alignpro[llm]'")
    import torch

    from alignpro.llm.models.configure import tiny_model

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tiny, tokenizer = tiny_model(seed=1)
    tiny.config.max_position_embeddings = 4096  # what a judge reads is long
    tiny.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    yield str(home / "model")
    torch.set_num_threads(before)


WORLD = f"--target MODEL --prompter MODEL --prompts-file HOME/prompts.txt --reward {__name__}:shares@0,1"
WORLD += " --dtype float32 --answer-tokens 4 --out OUT"
FIT = "--epochs 1 --pairs-per-step 4 --seed 5 --out OUT"
COMMANDS = {
    "verify": "verify --instances 90 --family signed --bounds theorem1 signed_max_abs --certify 1 --out OUT",
    "hunt": "hunt theorem1 signed_max_abs --restarts 8 --steps 40 --tries 40 --out OUT",
    "solve": "solve HOME/0.npz HOME/1.npz --beta 0.5 --lam 0.25 --bounds all --json --out OUT",
    "estimate": "estimate HOME/rollouts.jsonl --beta 0.5 --lam 0.3 --out OUT",
    "headroom": "headroom HOME/rollouts.jsonl --lam 0.1 0.3 --json --out OUT",
    "compare": "compare HOME/rollouts.jsonl --arms none sft trained --out OUT",
    "judge": "judge HOME/rollouts.jsonl --arms trained none --judge MODEL --forced --prompts 6 --out OUT",
    "train": f"train {WORLD.replace('prompts.txt', 'many.txt')} --iterations 2 --prompts-per-round 2"
    " --draws 4 --epochs 1 --rewrite-tokens 4 --eval-every 1 --eval-proposals 3 --template append --seed 5",
    "rollout": f"rollout {WORLD} --rewrite-tokens 4 --draws 2 --answers 2 --seed 5",
    "sft": f"sft --prompter MODEL --pairs HOME/rewrites.jsonl {FIT}",
    "reward-model": f"reward-model --base MODEL --pairs HOME/pairs.jsonl {FIT}",
    "resample": f"resample {WORLD} --rewrite-tokens 4 --proposals 4 --lam 0.05 2 --seed 5",
    "instruct": "instruct "
    + WORLD.replace(" --prompter MODEL", "").replace("prompts.txt", "many.txt")
    + " --instructions-file HOME/prompts.txt --budget 60 --seed 5",
    "route": "route "
    + WORLD.replace(" --prompter MODEL", "").replace("prompts.txt", "many.txt")
    + " --instructions-file HOME/prompts.txt --train-prompts 12 --seed 5",
}
WITH_MODEL = ("judge", "train", "rollout", "sft", "reward-model", "resample", "instruct", "route")


@pytest.fixture(scope="module")
def ran(home, tmp_path_factory, request):
    """verb -> (folder, its page's text and parse, what it printed), each run once."""
    done = {}

    def run(verb):
        if verb not in done:
            tiny = request.getfixturevalue("model") if verb in WITH_MODEL else ""
            out = tmp_path_factory.mktemp(verb) / "deep"
            names = {"HOME": str(home), "MODEL": tiny, "OUT": str(out)}
            words = [re.sub("HOME|MODEL|OUT", lambda m: names[m[0]], w) for w in COMMANDS[verb].split()]
            with redirect_stdout(io.StringIO()) as told, redirect_stderr(io.StringIO()) as noted:
                status = main.main(words)
            said = SimpleNamespace(out=told.getvalue(), err=noted.getvalue())
            assert status == (verb in ("verify", "hunt")), said.err
            text = (out / "report.html").read_text(encoding="utf-8")
            done[verb] = SimpleNamespace(out=out, text=text, page=Strict(text), said=said, command=words)
        return done[verb]

    return run


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_writes_a_page_that_stands_alone(verb, ran, home):
    run = ran(verb)
    page = run.page
    assert f"wrote {run.out / 'report.html'}\n" in run.said.err
    assert "report.html" not in run.said.out
    # Nothing comes from outside, and nothing runs.
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "srcset", "style", "action", "data")
        assert name != "src" or re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", value)
    assert not re.search(r"@import|url\(", run.text)
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    assert policy in page.of("meta", "content")
    # Figures say their numbers.
    alts = page.of("img", "alt")
    assert len(alts) == len(page.of("img", "src")) > 0
    assert all(len(alt) > 30 and re.search(r"\d", alt) for alt in alts)
    for source in page.of("img", "src"):
        assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
    # What was run, when, and with what.
    assert f"alignpro {verb} " in page.text
    assert re.search(r"Made 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", page.text)
    rows = page.rows()
    assert rows["python"][1] == ".".join(map(str, sys.version_info[:3]))
    assert rows["numpy"][1] == np.__version__
    assert any("seed" in name for name in rows)
    if verb in ("train", "rollout", "sft", "reward-model", "resample", "instruct", "route"):
        assert "--seed 5" in page.text
    # And not by whom, where.
    for name in (str(home), str(run.out), str(Path.home()) + "/", f"/{getpass.getuser()}/", "/tmp/"):
        assert name not in run.text
    assert socket.gethostname() not in page.text.split()


WIDTHS = (390, 768, 989, 1300, 1920, "print")
"""Of windows in pixels: a telephone, a tablet, half a screen, a laptop, a large screen; and A4 paper."""
CUT_OFF = """() => [...document.querySelectorAll("details")].forEach(d => d.open = true) ||
  [...document.querySelectorAll("table, pre, dl")].filter(e => {
    const box = e.parentElement, scrolls = getComputedStyle(box).overflowX !== "visible";
    return e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 ||
      scrolls && box.scrollWidth > box.clientWidth + 1;
  }).map(e => e.innerText.slice(0, 60))"""


@pytest.mark.parametrize("verb", COMMANDS)
def test_no_table_is_cut_off(verb, ran, chromium):
    path = ran(verb).out / "report.html"

    def cut(address, width):
        paper = width == "print"
        context = chromium.new_context(viewport={"width": 718 if paper else width, "height": 900})
        page = context.new_page()
        if paper:
            page.emulate_media(media="print")
        page.goto(address)
        found = page.evaluate(CUT_OFF)
        context.close()
        return found

    assert {width: cut(path.as_uri(), width) for width in WIDTHS} == {width: [] for width in WIDTHS}
    if verb == "compare":  # the check sees a table that is too wide
        wide = path.with_name("wide.html")
        wide.write_text(
            path.read_text(encoding="utf-8").replace("</style>", "td { min-width: 40rem; }</style>")
        )
        assert all(cut(wide.as_uri(), width) for width in (989, 1300, "print"))


def test_numbers_of_estimate_and_what_is_drawn(ran):
    run = ran("estimate")
    found, rows = json.loads((run.out / "estimate.json").read_text()), run.page.rows()
    for table, part in zip(run.page.tables[2:4], ("quantities", "gaps"), strict=True):
        assert [row[:2] for row in table[1:]] == [[name, limits(e)] for name, e in found[part].items()]
    bounds = run.page.tables[0][1:]
    assert len(bounds) == len(found["bounds"])
    for row, b in zip(bounds, found["bounds"], strict=True):
        assert row[:2] == [b["name"], b["prompter"]]
        assert row[2:5] == [limits(b[key]) for key in ("gap", "rhs", "slack")]
        assert row[5] == b["verdict"] + ", vacuous" * b["vacuous"]
    alt = run.page.of("img", "alt")[0]
    for b in found["bounds"]:
        assert f"{b['name']}, {b['prompter']}, right side: {limits(b['rhs'])}" in alt
    assert [rows["beta"][1], rows["lam"][1], rows["level"][1]] == ["0.5", "0.3", "0.95"]


def test_numbers_of_headroom_compare_and_judge(ran):
    run = ran("headroom")
    found, rows = json.loads((run.out / "headroom.json").read_text()), run.page.rows()
    assert json.loads(run.said.out) == found
    assert text.typographic(found["answer"]) in run.page.text
    for at in found["at"]:
        cells = [limits(at[key]) for key in ("over_reference", "net", "over_none")]
        assert rows[f"λ = {at['lam']:g}"][1:] == cells
    for n, e in found["best_of"].items():
        assert rows[f"best of {n}"][1] == limits(e)

    run = ran("compare")
    found, rows = json.loads((run.out / "compare.json").read_text()), run.page.rows()
    for name, e in found["mean"].items():
        against = found["against"].get(name)
        differences = (
            [limits(against[key]) for key in ("mean", "variance", "win_rate")] if against else ["–"] * 3
        )
        assert run.page.tables[0][1 + list(found["mean"]).index(name)] == [
            name,
            limits(e),
            limits(found["variance"][name]),
            *differences,
        ]

    run = ran("judge")
    found, rows = json.loads((run.out / "winrate.json").read_text()), run.page.rows()
    for name, key in (("win rate, ties a half", "win_rate"), ("orders agree", "agreement")):
        assert rows[name][1] == limits(found[key])
    for key in ("pairs", "wins", "ties", "losses", "failed"):
        assert rows[key][1] == str(found[key])
    assert rows["temperature"][1] == "0"  # of settings.json


def test_numbers_of_the_theory(ran):
    run = ran("verify")
    found, rows = json.loads((run.out / "verify.json").read_text()), run.page.rows()
    table = {row[0]: row for row in run.page.tables[0][1:]}
    for result in found["results"]:
        row = table[result["statement"]]
        assert row[2:5] == [str(result[key]) for key in ("checked", "violations", "inconclusive")]
        assert row[6] == f"{result['lhs_over_rhs_quantiles'][2]:.2g}".replace("-", "−")
    assert [table[name][1] for name in ("theorem1", "signed_max_abs")] == ["no violation", "REFUTED"]
    assert rows["signed_max_abs"][0] in found["refuted"]
    assert "Known to be false, and so a test of the tester: signed_max_abs." in run.page.text
    assert "refuted-signed_max_abs.npz" in run.page.text
    assert "In ball arithmetic, the 1 most doubtful" in run.page.text

    run = ran("hunt")
    found, rows = json.loads((run.out / "hunt.json").read_text()), run.page.rows()
    finds = 0
    for name, of in found["statements"].items():
        table = {row[0]: row for row in run.page.tables[0]}
        assert table[name][2:4] == [shown(of["start_ratio"]), shown(of["tightest"]["ratio"])]
        assert table[name][1] == ("REFUTED" if of["refuted"] else "no counterexample")
        for role in ("smallest", "worst", "tightest"):
            if role in of:
                finds += 1
                row = rows[of[role]["instance"]]
                assert row[2] == of[role]["verdict"]
                assert [float(row[i].replace("−", "-").replace(",", "")) for i in (5, 6)] == pytest.approx(
                    [of[role]["beta"], of[role]["lam"]], rel=1e-5
                )
    assert finds == len(run.page.tables[1]) - 1 > 2

    run = ran("solve")
    found = [json.loads(line) for line in run.said.out.splitlines()]
    for i, one in enumerate(found):
        assert run.page.tables[0][1 + i][1:4] == [shown(one[key]) for key in ("j_star", "j_rho", "gap")]
        for row, (name, b) in zip(run.page.tables[1 + i][1:], one["bounds"].items(), strict=True):
            assert row[0] == name
            assert row[2:5] == [shown(b["rhs"]), shown(b["slack"]), b["verdict"] + ", vacuous" * b["vacuous"]]
        assert f"gap {shown(one['gap'])}" in run.page.of("img", "alt")[i]


def test_numbers_of_fine_tuning_and_of_a_learned_reward(ran):
    run = ran("sft")
    held = json.loads((run.out / "prompter" / "prompter.json").read_text())["facts"]["sft"]
    rows = run.page.rows()
    for part, e in held["nats_per_token"].items():
        assert rows[part][1:] == [str(held["pairs"][part]), f"{e['before']:.4f}", f"{e['after']:.4f}"]
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    went = f"went from {shown(lines[0]['loss'])} to {shown(lines[-1]['loss'])}"
    assert went in run.page.text

    run = ran("reward-model")
    found, rows = json.loads((run.out / "reward.json").read_text()), run.page.rows()
    for part in ("train", "validation", "test"):
        e = found[f"{part}_accuracy"]
        three = "{value:.3f} [{lo:.3f}, {hi:.3f}]".format(**e)
        assert rows[part][1:] == [three, str(e["prompts"]), f"{found[f'{part}_loss']:.4f}"]
    assert found["bounds"] in run.page.text


def test_numbers_of_the_language_models(ran):
    run = ran("train")
    metrics = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    for row, line in zip(run.page.tables[0][1:], metrics, strict=True):
        assert row[0] == str(line["step"])
        by_name = dict(zip(run.page.tables[0][0], row, strict=True))
        assert by_name["reward"] == shown(line["score"])
        assert by_name["KL to ρ_sft, nats"] == shown(line["ppo/kl_k1"])
        assert by_name["explained variance"] == shown(line["ppo/explained_variance"])
    assert run.page.rows()["settings.seed"][1] == "5"
    assert "explained variance, critic: " in run.page.of("img", "alt")[0]
    evaluations = [json.loads(line) for line in (run.out / "evaluations.jsonl").read_text().splitlines()]
    held = next(table for table in run.page.tables if "gain over the best before" in table[0])
    for row, line in zip(held[1:-1], evaluations, strict=True):
        assert [cell.split(" ± ")[0] for cell in row[1:4]] == [
            shown(line[name]) for name in ("objective", "reward", "kl")
        ]
    assert held[-1][0] == "ρ* by resampling 3 draws"
    drawn = [json.loads(line) for line in (run.out / "rewrites.jsonl").read_text().splitlines()]
    added = next(table for table in run.page.tables if table[0][0] == "what is added")
    common = collections.Counter(line["rewrite"].removeprefix(line["prompt"]) for line in drawn)
    assert added[1][2] == f"{common.most_common(1)[0][1] / len(drawn):.1%}"
    examples = next(table for table in run.page.tables if table[0][:3] == ["round", "prompt", "rewrite"])
    assert evaluations[0]["examples"][0]["rewrite"] == examples[1][2]

    run = ran("rollout")
    rows = [json.loads(line) for line in (run.out / "rollouts.jsonl").read_text().splitlines()]
    means = {row[0]: row for row in run.page.tables[0][1:]}
    for arm in ("none", "sft"):
        rewards = [row["reward"] for row in rows if row["arm"] == arm]
        assert means[arm][1].split(" [")[0] == shown(np.mean(rewards))
        assert means[arm][2] == str(len(rewards))
    texts = [(row[0], row[1], row[3]) for row in run.page.tables[1][1:]]
    first = [row for row in rows if row["draw"] == row["answer"] == 0]
    assert len(texts) == len(first) == 10
    for row in first:
        assert (row["x"], row["arm"], text.visible(row["response"])) in texts

    run = ran("resample")
    proposals = [json.loads(line) for line in (run.out / "proposals.jsonl").read_text().splitlines()]
    rewards = np.array([p["rewards"] for p in proposals])
    w = np.exp(rewards / 2) / np.exp(rewards / 2).sum(1, keepdims=True)
    table = {row[0]: row for row in run.page.tables[0][1:]}
    assert table["λ = 2"][1].split(" [")[0] == shown(((w - 1 / 4) * rewards).sum(1).mean())
    assert table["best of 4"][1].split(" [")[0] == shown((rewards.max(1) - rewards.mean(1)).mean())
    assert list(table) == ["λ = 0.05", "λ = 2", "best of 2", "best of 4"]

    run = ran("instruct")
    found, tables = json.loads((run.out / "instruct.json").read_text()), run.page.tables
    best = next(table for table in tables if table[0][0] == "instruction")[1:]
    assert len(best) == len(found["candidates"]) == 6
    for row, candidate in zip(best, found["candidates"], strict=True):
        assert row[0] == (candidate["instruction"] or "(no instruction)")
        mean, behind = candidate["mean"], candidate["behind"]
        assert row[1:4] == [limits(mean), shown(behind), str(mean["n_clusters"])]
    if (held := found["held_out"]) is not None:
        rows = run.page.rows()
        assert rows["gain"][1] == limits(held["gain"])
        assert [rows[name][1] for name in ("with the instruction", "without")] == [
            limits(held["mean"]),
            limits(held["base"]),
        ]
    still = [len(means) for _, means in found["track"]]
    assert f"candidates, in the race: {still[0]} → {still[-1]}" in " ".join(run.page.of("img", "alt"))

    run = ran("route")
    found = json.loads((run.out / "route.json").read_text())
    rows = run.page.rows()
    means = {
        "the router": "over_none",
        "no instruction": "over_none",
        f"for all: {found['single']}": "single_over_none",
    }
    for name, of in means.items():
        if (gain := found[of]) is not None and name in rows:
            assert rows[name][1] == limits(gain["base" if name == "no instruction" else "mean"])
    for name, of in (
        ("the router over one for all", "over_single"),
        ("the router over none", "over_none"),
        ("one for all over none", "single_over_none"),
    ):
        assert (name in rows) == (found[of] is not None)
        if name in rows:
            assert rows[name][1] == limits(found[of]["gain"])
    (picks,) = (table[1:] for table in run.page.tables if table[0] == ["instruction", "prompts"])
    assert picks == [[text or "(no instruction)", str(n)] for text, n in found["picks"]]


# --- the grid ---


def e(value, width=0.1):
    return {"value": value, "lo": value - width, "hi": value + width, "prompts": 9}


@pytest.fixture
def grid():
    names = {"prompter": "P", "frozen": "F", "dataset": "one"}
    cell = {**names, "positive": [e(0.31), e(0.32)], "verdict": "reproduced"}
    bound = {"name": "trained", "about": "trained", "gap": e(0.41), "rhs": e(0.42), "slack": e(0.43)}
    rates = {key: e(0.51) for key in ("win_rate", "length_controlled", "agreement")} | {"first_shown": None}
    said = {"rewrite": "a rewrite", "response": f"{HOSTILE}{HIDDEN}", "reward": 0.61}
    moved = {"trained - none": e(0.71), "trained - sft": e(0.72)}
    return {
        "preset": {"name": "small", "seeds": [0, 1]},
        "environment": {"python": "3.11", "packages": {"numpy": "2.4"}},
        "level": 0.95,
        "combinations": [
            {
                **names,
                "mean": {"none": e(0.11), "trained": e(0.12), "rlhf": e(0.13)},
                "variance": {"none": e(0.21), "trained": e(0.22), "rlhf": e(0.23)},
                "win_rate": {
                    "judge": "J",
                    "pairs": 9,
                    "wins": 4,
                    "ties": 3,
                    "losses": 1,
                    "failed": 1,
                    **rates,
                },
                "wins_by_reward": e(0.52),
                "theorem1": [{**bound, "verdict": "holds", "vacuous": True, "why": ""}],
                "baselines": {"sft": e(0.81), "star": e(0.82)},
                "transfer": {"U": moved},
                "examples": [{"why": "the first prompt", "x": "x", "gain": 0.1, "arms": {"trained": said}}],
            }
        ],
        "claims": [
            {
                "name": "c",
                "claim": "it is above",
                "where": "Figure 2",
                "verdict": "reproduced",
                "cells": [cell],
            }
        ],
        "calls": {"align-pro": {"jobs": 2, "answers": 63, "prompt_tokens": 124, "tokens": 263}},
        "missing": ["one, two: not rolled out yet"],
    }


def test_the_grid_has_a_page_too(grid, tmp_path):
    assert keep.keep(grid_page.report_of_grid(grid), tmp_path / "results.html") == tmp_path / "results.html"
    page = Strict((tmp_path / "results.html").read_text(encoding="utf-8"))
    every = [cell for table in page.tables for row in table for cell in row]
    for value in (0.41, 0.42, 0.43, 0.51, 0.52, 0.71, 0.72, 0.81, 0.82):
        assert limits(e(value)) in every, value
    for value in (0.11, 0.12, 0.13, 0.21, 0.22, 0.23):
        assert numbers.interval(e(value), ".3f") in every, value
    assert "0.310 [0.210, 0.410]; 0.320 [0.220, 0.420]" in every
    assert "4 : 1 : 3" in every
    assert "script" not in page.tags
    assert any(HOSTILE in cell and "⟨U+202E⟩gnp.exe⟨U+2066⟩⟨U+200B⟩" in cell for cell in every)
    grid["combinations"], grid["claims"][0]["cells"] = [], []
    Strict(render.page(grid_page.report_of_grid(grid), keep.facts()).html)


# --- strangers' text ---


def a_page(text, **changes):
    page = Page("compare", text, text, {"setting": text, text: [text, None, 0.5]})
    page.key(text, text, text)
    dots = Dots(text, text, [Dot(text, 0.5, 0.25, 1e308, text), Dot("b", 0.75)], [(0.5, text)])
    page.add(text, text, Table([text, "n", text], [(text, text, text), ("a", "1", "b")], "wnt"), dots)
    page.add(
        "Curves", text, None, Curves([0, 1], "steps", [("reward", [Curve(text, [0.1, None], [0.1, None])])])
    )
    return page


def rendered(page):
    return render.page(page, {**keep.facts(), "command": f"alignpro {HOSTILE}{HIDDEN}"}).html


def test_text_from_outside_stays_text():
    said = rendered(a_page(HOSTILE + HIDDEN))
    page = Strict(said)
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not [value for value in page.of("img", "src") if not value.startswith("data:image/png")]
    assert page.text.count(" ".join(HOSTILE.split())) > 12
    assert not set(HIDDEN) & set(said) - set("gnp.exe")
    assert "⟨U+202E⟩" in page.of("img", "alt")[0]
    assert str(98765 * 43211) not in page.text  # a template in a text is not run


def test_without_escaping_it_would_not(monkeypatch):
    """The mutant."""
    whole = render.jinja2.Environment
    monkeypatch.setattr(render.jinja2, "Environment", lambda **said: whole(**{**said, "autoescape": False}))
    said = render.page(a_page("<script>alert(1)</script>"), keep.facts()).html
    assert "script" in Strict(said).tags
    with pytest.raises(AssertionError):
        Strict(rendered(a_page(HOSTILE)))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("/home/joe/run/x.jsonl", "…/x.jsonl"),
        ("mine=/home/joe/one", "mine=…/one"),
        ("~joe/secret/x and ~/y", "…/x and …/y"),
        ("forced choice of /home/joe/model, /srv/b", "forced choice of …/model, …/b"),
        ("file:///home/joe/x", "…/x"),
        ("//home/joe/x", "…/x"),
        ("runs/a/b.npz, ../c", "runs/a/b.npz, ../c"),
        ("and/or 1 / 2, |a|/b, (x)/y", "and/or 1 / 2, |a|/b, (x)/y"),
        ("http://127.0.0.1:8000/v1/x", "http://127.0.0.1:8000/v1/x"),
        ("https://joe:pw@host/score?key=sk-1@0,1", "https://host/score?…"),
        ("owner/name@squash:0,2", "owner/name@squash:0,2"),
    ],
)
def test_no_folder_and_no_key_is_told(said, expected):
    assert numbers.unplaced(said) == expected


def test_the_command_is_as_typed_but_for_folders():
    typed = [
        "estimate",
        "runs/a b.jsonl",
        "--out",
        "/home/joe smith/my run",
        "--lam=0.1",
        "--x=/a/b",
        "~/c d/e",
    ]
    token = keep.TYPED.set(typed)
    try:
        said = keep.facts()["command"]
    finally:
        keep.TYPED.reset(token)
    assert said == "alignpro estimate 'runs/a b.jsonl' --out '…/my run' --lam=0.1 --x=…/b …/e"
    assert keep.facts()["command"] is None


# --- what is drawn ---


def test_dots_are_where_the_numbers_are():
    dots = [
        Dot("$a$", 0.25, 0.125, 0.5, "x"),
        Dot("$a$", 0.75, None, None, "y"),
        Dot("b", -0.5, -1.7e308, 0.0, "x"),
    ]
    dots += [Dot("none", None), Dot("nan", float("nan"))]
    drawing = report_figures.draw(Dots("T", "units", dots, [(1.0, "here")]))
    [axes] = drawing.canvas.axes
    drawn = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    assert [line.get_xdata()[0] for line in drawn] == [0.25, 0.75, -0.5]
    assert [line.get_marker() for line in drawn] == ["o", "s", "o"]  # never colour alone
    bars = [list(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2]
    assert bars == [[0.125, 0.5], [axes.get_xlim()[0], 0.0]]  # one without an end leaves the axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["$a$", "b"]
    assert drawing.alt == (
        "T, units. $a$, x: 0.25 [0.125, 0.5]; $a$, y: 0.75; b, x: −0.5 [−∞, 0]; here at 1."
    )
    assert report_figures.draw(Dots("T", "units", [Dot("a", None)])) is None


def test_one_far_number_does_not_crush_the_others():
    for far, scale in ((2.0, "linear"), (1e6, "symlog")):
        near = (Dot(str(i), 0.1 * i) for i in range(1, 9))
        drawing = report_figures.draw(Dots("T", "units", [*near, Dot("far", far)]))
        assert drawing.canvas.axes[0].get_xscale() == scale


def test_curves_are_the_numbers():
    curves = [Curve("a", [0.1, None, 0.4], [0.05, None, 0.05]), Curve("b", [1.0, 2.0, 3.0])]
    drawing = report_figures.draw(Curves([1, 2, 3], "steps", [("u", curves)]))
    [axes] = drawing.canvas.axes
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_ydata(), [0.1, np.nan, 0.4])
    np.testing.assert_array_equal(second.get_ydata(), [1, 2, 3])
    assert (first.get_marker(), first.get_linestyle()) != (second.get_marker(), second.get_linestyle())
    assert (
        drawing.alt
        == "Curves over 1 to 3 steps. u, a: 0.1 → 0.4, between 0.1 and 0.4; u, b: 1 → 3, between 1 and 3."
    )
    # What rounding leaves of a 0 is told as 0; what is small beside the rest, but no rounding, is not.
    for first, shown in ((-5e-7, "0"), (2e-5, "2e−05")):
        drawing = report_figures.draw(Curves([1, 2], "steps", [("nats", [Curve("a", [first, 4.0])])]))
        assert f"a: {shown} → 4, between {shown} and 4" in drawing.alt


def test_a_result_without_figures_or_rows_says_so():
    page = Page("compare", "T", "L", {})
    page.add("S", "s.", Table("a | b", [], "ww"), Dots("d", "u", []))
    said = Strict(rendered(page)).text
    assert "The figure is left out: there is no finite number to draw. None." in said


# --- where it goes ---


def test_another_verbs_page_is_not_written_over(tmp_path, capsys):
    one, other = a_page("one"), a_page("two")
    other.verb = "estimate"
    assert keep.keep(one, tmp_path) == keep.keep(one, tmp_path) == tmp_path / "report.html"
    assert keep.keep(other, tmp_path) == tmp_path / "estimate-report.html"
    assert capsys.readouterr().err.splitlines()[-1] == f"wrote {tmp_path / 'estimate-report.html'}"
    assert "<title>one</title>" in (tmp_path / "report.html").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("somebody's")
    assert keep.keep(one, tmp_path / "mine") == tmp_path / "mine" / "compare-report.html"
    assert (tmp_path / "mine" / "report.html").read_text() == "somebody's"


def test_one_process_of_several_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert keep.keep(a_page("a"), tmp_path) is None
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["file/x.html", "file/folder"])
def test_a_folder_that_cannot_be_is_refused_first(name, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "alignpro.theory.scale.instances.solve_files", lambda *_, **__: pytest.fail("computed")
    )
    (tmp_path / "file").write_text("")
    command = ["solve", str(home / "0.npz"), "--beta", "1", "--lam", "1", "--out", str(tmp_path / name)]
    assert main.main(command) == 2
    assert capsys.readouterr().err.startswith(f"alignpro: error: --out {tmp_path / 'file'}")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_a_verb_does_all_the_rest(package, home, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from alignpro.commands import main as cli;"
    code += "sys.exit(cli.main(sys.argv[1:]))"
    command = ["compare", str(home / "rollouts.jsonl"), "--arms", "none", "sft", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        f"alignpro: report.html is not written: {package} is missing: pip install 'alignpro[report]'\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["compare.json"]
    assert "win rate" in done.stdout


def test_importing_it_draws_nothing():
    heavy = "{'matplotlib', 'jinja2', 'numpy', 'jax', 'torch'}"
    code = f"import sys, alignpro.report.page; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
