"""What one does with the page in a browser: read values, go back, save, send a file, start again."""

import json
import re
import time
from urllib.parse import parse_qs
from xml.etree import ElementTree

import pytest
from exploring import HOSTILE, SHAPE, family, opened, shown
from mutants import kills

from alignpro.commands import main
from alignpro.theory import check
from alignpro.theory.families import draw
from alignpro.theory.instance import load


def until(page, condition, seconds=60):
    """Wait until an expression of the page is true."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.03)


def state(page):
    return {name: value[0] for name, value in parse_qs(page.evaluate("location.hash").lstrip("#")).items()}


def settled(page, **wanted):
    """Wait until the address says these things, and nothing is being computed."""
    end = time.monotonic() + 40
    want = {name: str(value) for name, value in wanted.items()}
    while not want.items() <= state(page).items() or page.is_visible("#stale"):
        assert time.monotonic() < end, (want, state(page), page.inner_text("#stale"))
        time.sleep(0.03)
    shown(page)


def ask_for(page, **sizes):
    page.select_option("#source", "signed")
    for name, value in {**dict(zip("xky", SHAPE, strict=True)), "seed": 3, **sizes}.items():
        page.fill(f"#{name}", str(value))
    page.click("button[type=submit]")


def test_old_numbers_are_marked_until_the_new_are_there(chromium, server):
    def marked(slip):
        with opened(chromium, server) as (page, _):
            page.evaluate(slip)
            settled(page, source="file")
            page.select_option("#source", "signed")
            assert page.inner_text("#stale") == "Changed: press Show. The numbers are of named.npz"
            asked = {name: str(value) for name, value in family("signed").items()}
            with server.app._of(asked):  # computing, until the block ends
                before = page.inner_text("#key-gap")
                ask_for(page)
                until(page, "document.getElementById('controls').getAttribute('aria-busy') === 'true'", 10)
                said = page.inner_text("#stale")
                assert said.startswith("Computing signed 3 × 4 × 5, seed 3")
                assert said.endswith("Old numbers: of named.npz")
                assert page.locator("#stale").bounding_box()["y"] < 900
                assert float(page.locator("#bounds .plot").evaluate("e => getComputedStyle(e).opacity")) < 0.5
                assert page.inner_text("#key-gap") == before
            settled(page, source="signed")
            assert page.locator(".old").count() == 0
            page.fill("#lam", "0")
            page.wait_for_selector("#error:not([hidden])")
            assert page.inner_text("#stale").startswith("Not computed; the numbers are of signed 3 × 4 × 5")
            assert page.locator("#results.old").count() == 1

    marked("1")
    kills(marked, "mark = () => {}")


def test_the_address_holds_what_is_shown(chromium, server):
    with opened(chromium, server) as (page, _):
        settled(page, source="file", prompt=0)
        first = page.input_value("#lam")
        page.focus("#lam-slider")
        for _ in range(4):
            page.keyboard.press("ArrowRight")
            shown(page)
        second = page.input_value("#lam")
        settled(page, lam=second)
        page.select_option("#prompt", "2")
        settled(page, prompt=2)
        ask_for(page, seed=4)
        settled(page, source="signed", seed=4, prompt=0, lam=second)
        page.fill("#beta", "1000")
        settled(page, beta=1000)
        page.wait_for_selector("#arms .card")
        page.click("#next")
        settled(page, at=1)
        gap, address = page.inner_text("#key-gap"), page.url
        page.go_back()
        settled(page, beta=1000)
        assert "at" not in state(page)
        until(page, "$('place').textContent === '1 of 3'")
        page.go_back()
        page.go_back()
        settled(page, source="file", prompt=2, lam=second)
        page.go_back()
        settled(page, source="file", prompt=0, lam=second)
        page.go_back()
        settled(page, source="file", lam=first)  # one step for four notches
        page.go_forward()
        settled(page, lam=second)
        page.goto("about:blank")
        page.goto(address)  # in another tab, or tomorrow
        settled(page, source="signed", seed=4, beta=1000, at=1)
        assert page.inner_text("#key-gap") == gap
        assert page.inner_text("#place") == "2 of 3"
        assert page.input_value("#beta") == page.get_attribute("#beta-slider", "aria-valuetext") == "1000"
        assert not re.search(r"\de\+?\d", page.inner_text("main"))
        assert page.evaluate("unit = 1e7, num(1000)") == "1000"
        page.click("#reset")
        settled(page, source="file", prompt=0, lam=first)
        assert page.inner_text("#key-gap") != gap
        page.goto(address.replace("source=signed", "source=upload-000000000000"))
        page.reload()
        page.wait_for_selector("#error:not([hidden])")
        assert "is not here; upload it again" in page.inner_text("#error")


def test_values_by_pointer_and_by_keyboard(chromium, server):
    with opened(chromium, server, color_scheme="dark") as (page, _):
        until(page, "swept && swept.next === about.parts")
        for name in ("rewards", "frontier", "sweep", "bounds", "rewrites", "responses"):
            values = page.evaluate(f"values.{name}.map(v => v.text)")
            page.locator(f"#{name} .plot").scroll_into_view_if_needed()
            page.hover(f"#{name} .plot svg", position={"x": 120, "y": 60})
            said = page.inner_text(f"#{name} .tip")
            assert said in values
            page.mouse.move(0, 0)
            assert page.locator(".tip").count() == 0
            page.focus(f"#{name} .read")
            for key, at in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowUp", 0), ("End", -1)):
                page.keyboard.press(key)
                assert page.inner_text(f"#{name} .tip") == values[at]
                assert page.get_attribute(f"#{name} .read", "aria-valuetext") == values[at]
            box = page.locator(f"#{name} .tip").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 1280
            page.keyboard.press("Escape")
            assert page.locator(".tip").count() == 0
        row = page.evaluate("swept.rows[7]")
        said = check(load_of(server), page.evaluate("now.beta"), row["lam"])
        assert row["theorem1"] == pytest.approx(said.rhs, rel=1e-12)
        assert f"gap {said.gap:.4f}".replace("-", "−") in page.evaluate("values.sweep[7].text")
        page.fill("#beta", "3")
        until(page, "$('sweep').classList.contains('old')")  # until it rests, the curves are another β's
        assert "Old curves" in page.inner_text("#about-sweep")
        until(page, "!$('sweep').classList.contains('old') && swept.beta === 3")


def load_of(server):
    return server.app.files["file"][1]


def saved(page, tmp_path, selector):
    with page.expect_download() as download:
        page.click(selector)
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_what_is_shown_can_be_taken_away(chromium, server, tmp_path):
    with opened(chromium, server, accept_downloads=True, color_scheme="dark") as (page, _):
        ask_for(page)
        settled(page, source="signed")
        until(page, "swept && swept.next === about.parts")
        page.click("#keep summary")
        instance = draw("signed", 3, SHAPE)[0]
        beta, lam = (float(page.input_value(f"#{name}")) for name in ("beta", "lam"))
        found = json.loads(saved(page, tmp_path, "#save-data").read_text())
        assert found["gap"] == pytest.approx(check(instance, beta, lam).gap, rel=1e-14)
        assert len(found["sweep"]["rows"]) == 40
        npz = saved(page, tmp_path, "#save-npz")
        assert (load(npz).reward == instance.reward).all()
        script = saved(page, tmp_path, "#save-command").read_text()
        assert script.rstrip() == page.inner_text("#command")
        explore, _, solve = script.splitlines()
        verb = main._parse(explore.split()[1:])
        assert (verb.family, verb.shape, verb.seed, verb.beta, verb.lam) == ("signed", SHAPE, 3, beta, lam)
        verb = main._parse(solve.split()[1:])
        assert (verb.files, verb.beta, verb.lam) == ((npz.name,), beta, lam)
        page.click("#rewrites summary")
        rows = saved(page, tmp_path, "#rewrites .save button:text('CSV')").read_text().splitlines()
        assert float(rows[1].split(",")[3]) == page.evaluate("now.rewrites.rows[0].tilted")
        figure = saved(page, tmp_path, "#rewrites .save button:text('SVG')").read_text()
        drawn = ElementTree.fromstring(figure)
        assert "class=" not in figure
        assert "var(" not in figure
        assert not re.search(r"href|script|style=", figure)
        words = "".join(drawn.itertext())
        assert "signed 3 × 4 × 5, seed 3" in words
        assert "ρ* at this λ" in words
        picture = saved(page, tmp_path, "#rewrites .save button:text('PNG')").read_bytes()
        size = tuple(int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
        assert size == tuple(int(2 * float(drawn.get(name))) for name in ("width", "height"))
        light = page.evaluate("getComputedStyle(document.querySelector('body')).backgroundColor")
        assert drawn.find("{http://www.w3.org/2000/svg}rect").get("fill") not in (light, "#17181a")
        quoting = {"=1+1": '"\'=1+1"', "-x": '"\'-x"', 'a"b': '"a""b"', "x": '"x"'}
        quoting |= {"a;=1+1": '"a;\'=1+1"', "a, +b\n@c": "\"a, '+b\n'@c\"", "a=1-2": '"a=1-2"'}
        for text, cell in quoting.items():
            assert page.evaluate("t => cell(t)", text) == cell
        quoting = {"a b.npz": "'a b.npz'", "it's": "'it'\\''s'", "-x": "./-x", "$(x)": "'$(x)'"}
        for name, quoted in quoting.items():
            assert page.evaluate("n => quoted(n)", name) == quoted


def test_a_file_of_ones_own(chromium, server, tmp_path):
    instance = draw("lm_like", 11, SHAPE)[0]
    instance.save(tmp_path / "mine.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with opened(chromium, server) as (page, _):
        page.set_input_files("#upload", tmp_path / "bad.npz")
        page.wait_for_selector("#error:not([hidden])")
        assert page.inner_text("#error").startswith("bad.npz: is not an .npz file")
        assert page.input_value("#source") == "file"
        page.set_input_files("#upload", tmp_path / "mine.npz")
        until(page, "isUpload(source.source)")
        settled(page)
        assert page.is_hidden("#error")
        beta, lam = (float(page.input_value(f"#{name}")) for name in ("beta", "lam"))
        assert page.evaluate("now.gap") == pytest.approx(check(instance, beta, lam).gap, rel=1e-14)
        assert page.evaluate("commands()[1]").startswith("alignpro solve mine.npz ")
        page.evaluate("start.files[source.source] = " + json.dumps(HOSTILE[0]))
        page.evaluate("sources(), mark(), draw()")
        assert page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_sliders_stay_in_sight_on_a_phone(chromium, server, scheme):
    def in_sight(slip):
        with opened(chromium, server, 390, 844, color_scheme=scheme, has_touch=True) as (page, _):
            page.evaluate(slip)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            for where in ("sweep", "bounds", "responses"):
                page.evaluate(f"scrollTo(0, $('{where}').getBoundingClientRect().bottom + scrollY - 500)")
                for control in ("#beta-slider", "#lam-slider", "#lam", "#glance"):
                    box = page.locator(control).bounding_box()
                    assert 0 <= box["y"] <= 200, (where, control)
                    middle = [box["x"] + 5, box["y"] + box["height"] / 2]
                    front = page.evaluate("([x, y]) => document.elementFromPoint(x, y).id", middle)
                    assert front == control[1:]
            gap = page.locator("#key-gap").evaluate("e => e.firstChild.textContent")
            assert page.inner_text("#glance").startswith(f"gap {gap}; Theorem 1: ≤ ")
            page.tap("#responses .plot svg", position={"x": 100, "y": 80})
            assert page.inner_text("#responses .tip") == page.evaluate("values.responses[1].text")

    in_sight("1")
    kills(in_sight, "document.querySelector('.temps').style.position = 'static'")
