"""The path of someone who has just installed it: from a file of their own to a page, mistakes included.

Pictures of what they see are kept in build/stranger, to be looked at.
"""

import asyncio
import csv
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from exploring import serving

from alignpro.commands.explore import App
from alignpro.commands.main import main

pytest.importorskip("torch", reason="needs torch: pip install 'alignpro[llm]'")

PICTURES = Path(__file__).parents[2] / "build" / "stranger"
QUESTIONS = [
    f"{word} {thing}?" for word in ("abc", "bad", "cab") for thing in ("fed", "had", "egg", "ace", "bed")
]
REWARD = '''"""How much of an answer is the letter e."""


def score(prompts, responses):
    return [y.count("e") / max(1, len(y)) for y in responses]
'''
SMALL = "--iterations 2 --prompts-per-round 2 --draws 4 --epochs 1 --rewrite-tokens 4"
SMALL += " --answer-tokens 4 --dtype float32"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, a CSV as a spreadsheet writes it, and a reward."""
    from alignpro.llm.models.configure import tiny_model

    tiny, tokenizer = tiny_model(seed=1)
    tiny.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with open(tmp_path / "mine.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "Question"])
        writer.writerows(enumerate(QUESTIONS))
    (tmp_path / "letters.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("letters", None)
    importlib.invalidate_caches()


def picture(chromium, address, name, width, height=900):
    """What a window of that width shows of a page, all the way down; and what it complains of."""
    context = chromium.new_context(viewport={"width": width, "height": height})
    page, complaints = context.new_page(), []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.goto(address)
    page.wait_for_load_state("networkidle")
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}-{width}.png", full_page=True)
    text, wide = page.inner_text("body"), page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert not complaints
    assert wide <= width
    return text


def test_a_strangers_path(here, capfd, chromium):
    def typed(line):
        status, (out, err) = main(line.split()), capfd.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    assert typed("--version")[0] == 0
    assert typed("doctor")[0] == 0
    assert "no violation" in typed("verify --bounds theorem1 --instances 200")[1]

    # A slip in every part, each told in one line that says what helps; the folder stays free.
    start = f"train --out runs/mine --prompter model --target model --template append {SMALL}"
    for slip, remedy in (
        ("--prompts-file mine.csv --reward letters:scroe@0,1", "score"),
        ("--prompts-file mine.csv --reward leters:score@0,1", "leters"),
        ("--prompts-file mine.cvs --reward letters:score@0,1", "mine.cvs"),
        ("--prompts-file mine.csv --prompt-column Questoin --reward letters:score@0,1", "Question"),
        ("--prompts-file mine.csv --prompt-column Question --reward letters:score", "@"),
    ):
        status, out, err = typed(f"{start} {slip}")
        last = [line for line in err.splitlines() if line.startswith("alignpro: error: ")]
        assert (status, out, len(last)) == (2, "", 1), err
        assert remedy in last[0]
        assert not (here / "runs" / "mine" / "settings.json").exists()

    right = f"{start} --prompts-file mine.csv --prompt-column Question --reward letters:score@0,1"
    status, out, err = typed(right)
    assert status == 0, err
    assert f"{len(QUESTIONS)} prompts from column Question of mine.csv" in err
    assert "wrote runs/mine/prompter" in out
    # Again, and it is told how the run goes on; told so, it does, and has nothing to do.
    status, _, err = typed(right)
    assert status == 2
    assert "continue it with alignpro train --out runs/mine --resume" in err
    assert typed(f"{right} --resume")[0] == 0
    for width in (1300, 390):
        said = picture(chromium, (here / "runs/mine/report.html").as_uri(), "train", width)
        assert "Training the prompter" in said
        assert QUESTIONS[0].split()[0] in said

    status, out, _ = typed("rewrite runs/mine abc --draws 2")
    assert (status, len(out.splitlines())) == (0, 2)
    world = "--target model --prompter model --reward letters:score@0,1 --dtype float32"
    world += " --prompts-file mine.csv --prompt-column Question --answer-tokens 4 --rewrite-tokens 4"
    status, _, err = typed(f"rollout --out runs/rolled {world} --trained runs/mine --draws 2 --answers 2")
    assert status == 0, err
    status, out, _ = typed("compare runs/rolled --arms none sft trained --out runs/compared")
    assert status == 0
    assert "trained" in out
    for width in (1300, 390):
        address = (here / "runs/compared/report.html").as_uri()
        assert "Win rates against none" in picture(chromium, address, "compare", width)

    with serving(App(texts="runs/rolled/rollouts.jsonl")) as server:
        for width in (1300, 390):
            assert "Theorem 1" in picture(chromium, server.address, "explore", width)

    # A notebook, where an event loop runs, as Playwright's does here: a few lines, whose result shows itself.
    assert asyncio.get_running_loop()
    import alignpro

    small = {"iterations": 1, "prompts_per_round": 2, "draws": 4, "epochs": 1, "rewrite_tokens": 4}
    world = {"reward": "letters:score@0,1", "prompter": "model", "target": "model"}
    found = alignpro.train(QUESTIONS, **world, out="runs/notebook", **small)
    assert "<table" in found._repr_html_()
    assert "mean reward of a round" in str(found)
    assert json.loads(Path("runs/notebook/settings.json").read_text())["settings"]["iterations"] == 1
    assert os.listdir(PICTURES)
