"""The page says what the theory says, keeps to itself, and shows strangers' text as text."""

import base64
import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlencode

import jax
import numpy as np
import pytest
from exploring import HOSTILE, SHAPE, api, ask, family, opened, rollout, shown

from alignpro import rollouts
from alignpro.commands import explore_server, main
from alignpro.commands.explore import App, Reader
from alignpro.errors import AlignProError
from alignpro.report.numbers import plain
from alignpro.theory import BOUNDS, FAMILIES, LOWER_BOUNDS, STATEMENTS, check, solution
from alignpro.theory.families import draw
from alignpro.theory.instance import load
from alignpro.theory.results import cost, reach
from alignpro.theory.search import exploring as engine

# --- the numbers


def agree(found, instance, beta, lam, prompt):
    """To the last digits: XLA adds in another order in another program, and nothing else differs."""
    s = jax.jit(solution)(instance, beta, lam)

    def mean(value):
        return float(s.average(value))

    def near(value):
        if isinstance(value, dict):
            return {name: near(one) for name, one in value.items()}
        return value and pytest.approx(value, rel=1e-14, abs=1e-15 * float(np.max(s.span)))

    assert (found["beta"], found["lam"], found["prompt"]) == (beta, lam, prompt)
    assert found["rewards"] == near(
        {
            "none": mean(s.original),
            "sft": mean(s.reference),
            "star": float(s.j_rho),
            "best": mean(s.optimum - s.ceiling),
            "rlhf": float(s.j_star),
        }
    )
    assert found["gap"] == near(check(instance, beta, lam).gap)
    assert (found["delta1"], found["delta2"]) == near((mean(s.delta1), mean(s.delta2)))
    assert found["kl"] == near(float(cost.kl_budget(s).mean_spent))
    ceiling = reach.prompting_ceiling(instance, beta)
    assert found["ceiling"]["anywhere"] == pytest.approx(mean(ceiling.anywhere), rel=1e-12, abs=1e-15)
    assert found["ceiling"]["supported"] == near(mean(s.ceiling))
    assert [b["name"] for b in found["bounds"]] == [*BOUNDS, *LOWER_BOUNDS]
    for bound in found["bounds"]:
        said = check(instance, beta, lam, bound["name"])
        for key in ("relation", "verdict", "vacuous"):
            assert bound[key] == plain(getattr(said, key)), (bound["name"], key)
        for key in ("rhs", "slack", "terms"):
            assert bound[key] == near(plain(getattr(said, key))), (bound["name"], key)
    for bars, base, tilted, reward in (
        (found["rewrites"], instance.prior[prompt], s.rho_star[prompt], s.rewrite_reward[prompt]),
        (
            found["responses"],
            instance.frozen[instance.own[prompt]],
            s.pi_star[prompt],
            instance.reward[prompt],
        ),
    ):
        rows = engine.chosen(np.asarray(base), np.asarray(reward))
        for key, values in (("base", base), ("tilted", tilted), ("reward", reward)):
            assert [row[key] for row in bars["rows"]] == near([float(values[k]) for k in rows])
        for key, values in (("base", base), ("tilted", tilted)):
            assert sum(row[key] for row in bars["rows"]) + bars["more"][key] == pytest.approx(sum(values))


@pytest.mark.parametrize("name", ["lm_like", "signed", "sparse"])
def test_the_api_says_what_the_theory_says(server, name):
    instance = draw(name, 3, SHAPE)[0]
    for beta, lam, prompt in ((0.2, 0.07, 0), (1e-3, 3.0, 2)):
        found = api(server, "solve", **family(name), beta=beta, lam=lam, prompt=prompt)
        agree(found, instance, beta, lam, prompt)
        # Mutants: β and λ swapped, and another prompt's policies, are noticed.
        swapped = api(server, "solve", **family(name), beta=lam, lam=beta, prompt=prompt)
        with pytest.raises(AssertionError):
            agree({**swapped, "beta": beta, "lam": lam}, instance, beta, lam, prompt)
        other = api(server, "solve", **family(name), beta=beta, lam=lam, prompt=1)
        with pytest.raises(AssertionError):
            agree({**other, "prompt": prompt}, instance, beta, lam, prompt)


@pytest.mark.parametrize("name", FAMILIES)
def test_signed_terms_sum_to_the_right_side(name):
    one = engine.Explored(draw(name, 1, SHAPE)[0])
    for beta, lam in ((0.1, 0.05), (2.0, 0.3)):
        beta, lam = beta * one.scale, lam * one.scale
        found = plain(one.solve(beta, lam))
        for bound in found["bounds"]:
            if bound["verdict"] == "inapplicable":  # an infinite KL
                assert bound["name"] == "drift"
                continue
            size = sum(map(abs, bound["terms"].values()))
            rounding = 1e-12 * size + check(one.instance, beta, lam, bound["name"]).error
            assert abs(sum(bound["terms"].values()) - bound["rhs"]) <= rounding, bound
        i = found["identity"]
        parts = (i["model"], i["shift"], -i["prompter"])
        slack = check(one.instance, beta, lam, "exact_gap").error
        assert abs(sum(parts) - found["gap"]) <= slack + 1e-14 * one.span


def test_dropped_bounds_say_nothing_new():
    instance = draw("signed", 2, SHAPE)[0]
    s = jax.jit(solution)(instance, 0.4, 0.2)
    for twin, name in (("trained", "span"), ("trained_tight", "barycentre")):
        a, b = STATEMENTS[twin](s), STATEMENTS[name](s)
        assert abs(float(a.rhs - b.rhs)) <= float(a.error + b.error)
    equality = STATEMENTS["kl_ceiling"](s)
    assert abs(float(equality.lhs - equality.rhs)) <= float(equality.error)


def test_the_frontier_passes_through_rho_star(server):
    about = api(server, "instance", **family("lm_like"))
    instance = draw("lm_like", 3, SHAPE)[0]
    f = jax.jit(cost.frontier)(instance, np.array(about["frontier"]["lam"]))
    assert about["frontier"]["kl"] == np.asarray(f.mean_kl).tolist()
    assert about["frontier"]["reward"] == np.asarray(f.mean_reward).tolist()
    for i in (30, 60, 90):
        there = api(server, "solve", **family("lm_like"), beta=1, lam=about["frontier"]["lam"][i], prompt=0)
        assert about["frontier"]["kl"][i] == pytest.approx(there["kl"], rel=1e-9)
        assert about["frontier"]["reward"][i] == pytest.approx(there["rewards"]["star"], rel=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_reward_stays_on_the_axis(name):
    one = engine.Explored(draw(name, 0, SHAPE)[0])
    low, high = plain(one.about)["axis"]
    for beta, lam in ((1e-3, 100), (100, 1e-3), (1e-3, 1e-3), (100, 100)):
        for value in one.solve(beta * one.scale, lam * one.scale)["rewards"].values():
            assert low - 1e-9 * one.span <= float(value) <= high + 1e-9 * one.span


def test_instances_without_scale():
    one = engine.Explored(draw("independent", 0, (1, 1, 1))[0])
    assert one.scale == 1.0
    assert one.solve(0.1, 0.1)["gap"] == 0


def test_rows_are_chosen_whatever_the_temperature():
    rng = np.random.default_rng(0)
    for _ in range(50):
        base = rng.dirichlet(np.full(40, 0.2)) * (rng.uniform(size=40) < 0.7)
        reward = rng.uniform(size=40).round(1)
        rows = engine.chosen(base, reward)
        assert len(rows) == len(set(rows)) == min(engine.SHOWN, np.count_nonzero(base))
        assert (base[rows] > 0).all()
        assert (np.diff(reward[rows]) <= 0).all()
        assert base[rows].max() == base.max()
        assert reward[rows].max() == reward[base > 0].max()


def test_what_overflows_is_null_in_json():
    value = {"a": np.array([1.0, np.inf]), "b": (np.float64("nan"), True, 3, "x", None)}
    assert plain(value) == {"a": [1.0, None], "b": [None, True, 3, "x", None]}


# --- mistakes

GOOD = {**family("lm_like"), "beta": 0.1, "lam": 0.1, "prompt": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta": "-1"}, "beta -1"),
        ({"beta": "nan"}, "beta nan"),
        ({"beta": "a lot"}, "beta 'a lot'"),
        ({"lam": None}, "lam "),
        ({"lam": "1e300"}, "lam 1e+300"),
        ({"prompt": 3}, "prompt 3"),
        ({"prompt": "-1"}, "prompt -1"),
        ({"x": 0}, "x 0"),
        ({"k": "2.5"}, "k 2.5"),
        ({"y": "٣"}, "y ٣"),
        ({"x": 1000, "k": 1000, "y": 1000}, "shape 1000 1000 1000"),
        ({"seed": "9" * 10_000}, "seed 999"),
        ({"source": "nonsense"}, "nonsense"),
        ({"source": None}, "family"),
        ({"lambda": 1}, "lambda"),
        ({str(i): 1 for i in range(30)}, "more than 20"),
    ],
)
def test_a_bad_parameter_is_one_sentence(server, change, said):
    given = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    status, headers, body = ask(server, "/api/solve?" + urlencode(given))
    assert (status, headers["Content-Type"]) == (400, "application/json")
    sentence = json.loads(body)["error"]
    assert said in sentence
    assert "\n" not in sentence
    assert len(sentence) < 300


def test_other_requests_are_refused(server):
    for path, status in (("/api/nothing", 400), ("/etc/passwd", 404), ("/../alignpro/commands/main.py", 404)):
        assert ask(server, path)[0] == status
    for method in ("POST", "PUT", "HEAD"):
        status, headers, _ = ask(server, "/", method)
        assert status == 501
        assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_without_a_file_or_rollouts_there_are_none():
    app = App()
    with pytest.raises(AlignProError, match="start with one"):
        app.answer("solve", {"source": "file", "beta": "1", "lam": "1", "prompt": "0"})
    for route in ("find", "rollout"):
        with pytest.raises(AlignProError, match="--rollouts"):
            app.answer(route, {})
    assert app.answer("start", {})["rollouts"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.npz", "--family", "lm_like"], "--family lm_like: is for a random instance, and a.npz is given"),
        (["missing.npz"], "missing.npz: no such file"),
        (["--family", "nonsense"], "'nonsense' is unknown"),
        (["--shape", "0", "1", "1"], "shape (0, 1, 1)"),
        (["--shape", "2000", "2000", "2000"], "shape 2000 2000 2000"),
        (["--shape", "1", "5000", "1"], "keep X, K and Y each to 4096"),
        (["--seed", "-1"], "seed -1"),
        (["--beta", "-1"], "--beta -1"),
        (["--lam", "0"], "--lam 0"),
        (["--rollouts", "missing.jsonl"], "missing.jsonl: cannot read it"),
        (["--port", "80"], "--port 80"),
        (["--port", "99999"], "--port 99999"),
    ],
)
def test_the_command_line_refuses_before_serving(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["explore", "--no-browser", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_taken_port_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main.main(["explore", "--no-browser", "--port", port]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


def test_ctrl_c_is_the_normal_end_and_torch_stays_away():
    code = (
        "import sys; from alignpro.commands import main as cli;"
        "status = cli.main(['explore', '--no-browser']); "
        "print(status, sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert re.match(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32} ", process.stdout.readline())
            process.send_signal(signal.SIGINT)
            assert process.stdout.read().split("\n")[-2] == "0 []"
        finally:
            process.kill()


# --- who may ask, and what the page may do


def test_only_this_machine_under_its_own_name(server):
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(server, "/api/start", Host=host)[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"[::1]:{port}",
        "",
    ):
        for path in ("/", "/api/start"):
            status, _, body = ask(server, path, Host=host)
            assert status == 403
            assert b"families" not in body
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:  # no Host at all
        raw.sendall(b"GET /api/start HTTP/1.0\r\n\r\n")
        assert b" 403 " in raw.recv(100)
    for site, status in (("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)):
        assert ask(server, "/api/start", **{"Sec-Fetch-Site": site})[0] == status


def test_the_policy_admits_the_pages_own_script_and_style_only(server):
    _, headers, body = ask(server, "/")
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["X-Content-Type-Options"] == "nosniff"
    page = body.decode()
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        " onclick",
        "style=",
    ):
        assert way not in page


# --- rollouts


def test_rollouts_are_read_side_by_side(server):
    about = api(server, "start")["rollouts"]
    assert (about["prompts"], about["arms"], about["range"]) == (3, ["none", "trained"], [0.0, 1.0])
    one = api(server, "rollout", at=1)
    assert (one["id"], one["x"]) == ("id1", HOSTILE[1])
    none, trained = one["arms"]
    assert (none["answers"], none["mean"], none["draws"][0]["rewrite"]) == (1, 0.25, HOSTILE[1])
    assert [d["rewrite"] for d in trained["draws"]] == [f"rewrite 1{d} of Ärger" for d in range(3)]
    assert [[a["reward"] for a in d["answers"]] for d in trained["draws"]] == [
        [(1 + d + a) / 8 for a in range(2)] for d in range(3)
    ]
    assert trained["mean"] == pytest.approx(2.5 / 8)
    assert api(server, "rollout", at=2)["arms"][1]["mean"] is None
    assert ask(server, "/api/rollout?at=3")[0] == 400


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", [0, 1, 2]),
        ("DROP table", [2]),
        ("äRGER", [0, 1]),
        ("answer 11", [1]),
        ("nowhere", []),
        (".*", []),
    ],
)
def test_the_filter_looks_everywhere(server, text, found):
    assert api(server, "find", text=text)["found"] == found


def test_a_conversation_is_shown_and_a_refused_answer_is_null(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    before = [{"role": "system", "content": "Be brief."}]
    path.write_text(rollout(0, "none", "Hi", response=None, context=before, x="Hi").line())
    one = Reader(str(path)).prompt(0)
    assert one["x"] == "System: Be brief.\n\nUser: Hi"
    assert one["arms"][0]["draws"][0]["answers"] == [{"text": None, "reward": 0.5}]
    # Which the page says, instead of failing at it.
    assert 'a.text === null ? "refused" : visible(a.text)' in explore_server.html()[0].decode()


def test_a_run_that_still_writes_can_be_read(files, tmp_path, monkeypatch):
    path = tmp_path / "growing.jsonl"
    shutil.copy(files / "rollouts.jsonl", path)
    read = rollouts.read

    def read_then_grow(name):
        table = read(name)
        with open(path, "a", encoding="utf-8") as file:
            file.write('\n{"prompt_id": "cut sh')
        return table

    monkeypatch.setattr(rollouts, "read", read_then_grow)
    assert len(Reader(str(path)).rows) == 3


# --- a real browser


def unnamed(snapshot):
    """Lines of an accessibility tree with a control or picture that has no name."""
    roles = "button|combobox|img|searchbox|slider|spinbutton|textbox|region|table"
    return re.findall(rf"^\s*- '?(?:{roles})(?! \")(?=[ :\n]|$).*$", snapshot, re.MULTILINE)


def test_moving_a_slider_by_keyboard(chromium, server, files):
    instance = load(files / "named.npz")
    with opened(chromium, server) as (page, _):
        assert page.title()
        assert page.get_attribute("html", "lang") == "en"
        assert page.locator("h1").count() == 1
        before = page.inner_text("#key-gap")
        times = []
        for slider in ("#lam-slider", "#beta-slider"):
            page.focus(slider)
            for _ in range(10):
                page.keyboard.press("ArrowRight")
                shown(page)
                times.append(page.evaluate("performance.getEntriesByName('move')[0].duration"))
        print(f"move, 3×4×5: median {np.median(times):.1f} ms, p95 {np.percentile(times, 95):.1f} ms")
        beta, lam = (float(page.input_value(f"#{name}")) for name in ("beta", "lam"))
        assert (beta, lam) != (0.1, 0.05)
        assert page.get_attribute("#beta-slider", "aria-valuetext") == page.input_value("#beta")
        expected = check(instance, beta, lam)
        wrong = check(instance, lam, beta)
        assert page.inner_text("#key-gap") != before

        def written(value):
            return f"{value:.3f}".replace("-", "−")

        gap = page.locator("#key-gap").evaluate("e => e.firstChild.textContent")
        assert gap == written(expected.gap) != written(wrong.gap)
        label = page.get_attribute("#bounds .plot svg", "aria-label")
        assert f"Theorem 1: gap at most {written(expected.rhs)}" in label
        assert f"Theorem 1: gap at most {written(wrong.rhs)}" not in label
        page.click("#bounds summary")
        cell = page.inner_text("#bounds tbody tr:first-child td:nth-child(3)")
        assert cell == f"{expected.rhs:.5f}"
        page.wait_for_timeout(900)
        assert f"gap {written(expected.gap)}" in page.inner_text("#said")  # told once, after the last step
        page.select_option("#prompt", "2")
        shown(page)
        s = jax.jit(solution)(instance, beta, lam)
        label = page.get_attribute("#rewrites .plot svg", "aria-label")
        assert f"ρ* {float(np.max(s.rho_star[2])):.3f}" in label


def test_every_control_has_a_name_and_its_turn(chromium, server):
    with opened(chromium, server) as (page, _):
        snapshot = page.locator("body").aria_snapshot()
        assert unnamed(snapshot) == []
        for role in (
            'slider "β',
            'slider "λ',
            'spinbutton "β',
            'combobox "Prompt"',
            'img "Expected rewards:',
        ):
            assert role in snapshot
        assert len(re.findall(r"- '?img \"", snapshot)) == 6
        page.evaluate("$('lam-slider').removeAttribute('aria-label')")  # the check sees a missing name
        assert len(unnamed(page.locator("body").aria_snapshot())) == 1
        order = []
        page.evaluate("document.activeElement.blur()")
        for _ in range(24):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
            style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert style != "none", order
        assert order[:7] == ["beta-slider", "beta", "lam-slider", "lam", "prompt", "source", "BUTTON"]
        assert order[7:10] == ["reset", "upload", "SUMMARY"]
        assert order[10:22] == ["DIV", "SUMMARY"] * 6  # the values of a chart, its numbers
        assert order[22:] == ["filter", "next"]


def test_a_mistake_is_said_aloud_and_forgotten(chromium, server):
    with opened(chromium, server) as (page, _):
        page.fill("#beta", "-1")
        page.wait_for_selector("#error:not([hidden])")
        assert page.inner_text("#error").startswith("beta -1.0: must be a positive finite number")
        assert page.get_attribute("#error", "role") == "alert"
        assert page.get_attribute("#beta", "aria-invalid") == "true"
        page.fill("#beta", "0.3")
        page.wait_for_selector("#error", state="hidden")
        assert page.get_attribute("#beta", "aria-invalid") == "false"
        page.select_option("#source", "signed")
        page.fill("#x", "0")
        page.click("button[type=submit]")
        page.wait_for_selector("#error:not([hidden])")
        page.fill("#x", "2")
        page.click("button[type=submit]")
        page.wait_for_selector("#stale", state="hidden", timeout=60_000)
        assert page.is_hidden("#error")
        assert page.locator("#prompt option").count() == 2


def test_hostile_text_stays_text(chromium, server):
    with opened(chromium, server) as (page, complaints):
        page.wait_for_selector("#arms .card")
        for _ in range(2):
            assert page.evaluate("window.hacked") is None
            assert page.locator("main img, main script").count() == 0
            page.click("#next")
            page.wait_for_timeout(200)
        assert page.inner_text("#place") == "3 of 3"
        assert page.is_disabled("#next")
        page.fill("#filter", "ärger")
        page.wait_for_timeout(600)
        assert page.inner_text("#place") == "1 of 2"
        assert page.inner_text("#rollout-prompt") == HOSTILE[0]
        page.click("#next")
        page.wait_for_timeout(200)
        spelled = HOSTILE[1].replace("\u202e", "⟨U+202E⟩").replace("\0", "⟨U+0000⟩")
        assert page.inner_text("#rollout-prompt") == spelled
        assert HOSTILE[0] in page.inner_text("#arms")
        assert page.locator("#arms .card b").all_inner_texts()[0] == "0.250"
        # Even a slip in the page's own script could not turn text into markup or code.
        for slip in ("document.body.innerHTML = '<i>x</i>'", "eval('1')", "new Function('return 1')()"):
            # Later, from a task of the page's own: what the debugger runs at once is let through.
            error = page.evaluate(
                "() => new Promise(said => setTimeout(() => {"
                f"try {{ {slip}; said('ran'); }} catch (error) {{ said(String(error)); }} }}))"
            )
            assert re.match(
                r"(TypeError|EvalError): .*(TrustedHTML|TrustedScript|unsafe-eval|Content Security)", error
            )
        complaints.clear()  # the browser reports each on the console, as it should


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen_and_paper(chromium, server, tmp_path, scheme):
    for width, height in ((1280, 900), (360, 740)):
        with opened(chromium, server, width, height, color_scheme=scheme, reduced_motion="reduce") as (
            page,
            _,
        ):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.getAnimations().length") == 0
            overflow = page.evaluate(
                """[...document.querySelectorAll('.plot svg text')].filter(t => {
                    const b = t.getBoundingClientRect();
                    return b.left < -1 || b.right > innerWidth + 1 }).map(t => t.textContent)"""
            )
            assert overflow == []
            page.screenshot(path=tmp_path / f"{scheme}{width}.png", full_page=True)
            page.emulate_media(media="print")
            assert not page.is_visible("#beta-slider")
            assert page.is_visible("#beta")
            assert page.is_visible("#bounds .plot svg")


def test_a_move_on_a_larger_instance(chromium, server):
    about = family("lm_like", (16, 32, 64), 0)
    with opened(chromium, server) as (page, _):
        page.select_option("#source", "lm_like")
        for name, value in zip(("x", "k", "y"), (16, 32, 64), strict=True):
            page.fill(f"#{name}", str(value))
        page.click("button[type=submit]")
        while page.locator("#prompt option").count() != 16:
            time.sleep(0.05)
        shown(page)
        page.focus("#lam-slider")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
            shown(page)
        assert page.evaluate("performance.getEntriesByName('move')[0].duration") > 0
        beta, lam = (float(page.input_value(f"#{name}")) for name in ("beta", "lam"))
        gap = page.locator("#key-gap").evaluate("e => e.firstChild.textContent")
    found = api(server, "solve", **about, beta=beta, lam=lam, prompt=0)["gap"]
    assert gap == f"{found:.3f}".replace("-", "−")
