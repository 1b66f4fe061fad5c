"""Shapes and types of the exact theory are checked at run time, in tests only."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

# A shell's background jobs ignore Ctrl-C, and so would every program that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Several test processes share the cores: one thread each, or they crawl. Before anything reads it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Compiling is most of what the theory's tests do, and workers, tests and the programs they start compile
# much the same: what one has compiled, the others take from a folder that lasts as long as this run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="alignpro-compiled-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from jaxtyping import install_import_hook

# `Instance` is left out: it takes anything array-like, and its own validation is what is tested.
_ROOT = Path(__file__).parents[1]
_CHECKED = [
    ".".join(path.relative_to(_ROOT).with_suffix("").parts)
    for path in (_ROOT / "alignpro" / "theory").rglob("*.py")
    if path.stem not in ("__init__", "instance", "testing")
]
if "alignpro.theory" not in sys.modules:
    install_import_hook(_CHECKED, "beartype.beartype")

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="session")
def _strict_shapes():
    """Arrays of different rank must be lined up in writing, so that a batch axis cannot slip in."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture(autouse=True, scope="module")
def _small_heap():
    """What stays for good is not searched for garbage again and again: training collects often, and that
    takes half of a short run's time once torch, JAX and the modules tested before are there."""
    gc.collect()
    gc.freeze()


CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="module")
def chromium():
    """A real browser, where there is one. It ends with its module: while it is there, Playwright has an event
    loop running in this thread, and no other test could start one."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip("needs a browser: apt install chromium")
    arguments = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments.split())
        yield browser
        browser.close()
