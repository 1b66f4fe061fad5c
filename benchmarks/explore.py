"""How long a move of a slider takes in `alignpro explore`: until it is answered, and until it is drawn.

    python benchmarks/explore.py [--shape 16 32 64] [--moves 40]

Needs Playwright and Chromium, as the tests in a browser do. Beside both stands what the browser alone takes
to ask for a page of the server that computes nothing.
"""

import argparse
import json
import shutil
import threading
import time
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
from playwright.sync_api import sync_playwright

from alignpro.commands.explore import App
from alignpro.commands.explore_server import Server


def timed(ask) -> float:
    """Milliseconds that `ask()` takes."""
    begun = time.perf_counter()
    ask()
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(16, 32, 64), help="sizes: X, K and Y")
    parser.add_argument("--moves", type=int, default=40)
    options = parser.parse_args()
    server = Server(App())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    about = {"source": "lm_like", **dict(zip("xky", options.shape, strict=True)), "seed": 0}

    def solve(beta: float) -> None:
        query = urlencode({**about, "beta": beta, "lam": 0.05, "prompt": 0, "token": server.token})
        json.load(urlopen(f"{server.origin}api/solve?{query}"))

    for beta in (0.1, 0.11):  # compiles, once for each shape
        solve(beta)
    answered = [timed(lambda i=i: solve(0.2 + 0.001 * i)) for i in range(options.moves)]
    plain = [timed(lambda: urlopen(server.address).read()) for _ in range(options.moves)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or "/usr/bin/chromium",
            args=["--headless", "--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page()
        page.goto(server.address)
        page.wait_for_selector("html[data-shown]")
        page.select_option("#source", "lm_like")
        for name, value in zip("xky", options.shape, strict=True):
            page.fill(f"#{name}", str(value))
        page.click("button[type=submit]")
        while page.locator("#prompt option").count() != options.shape[0]:
            time.sleep(0.05)
        page.focus("#lam-slider")
        drawn = []
        for _ in range(options.moves):
            page.keyboard.press("ArrowRight")
            page.wait_for_timeout(300)
            drawn.append(page.evaluate("performance.getEntriesByName('move')[0].duration"))
        browser.close()
    server.shutdown()
    shape = "×".join(map(str, options.shape))
    for what, ms in (("answered", answered), ("drawn", drawn), ("a page, nothing computed", plain)):
        print(f"{shape}, {what}: median {np.median(ms):.1f} ms, p95 {np.percentile(ms, 95):.1f} ms")


if __name__ == "__main__":
    main()
