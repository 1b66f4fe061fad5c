"""What is released: one version, a wheel and an sdist with what they must hold, and verbs without torch."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import alignpro

ROOT = Path(__file__).parents[1]
EXTRAS = {"certify", "dev", "docs", "http", "llm", "native", "report", "rewards", "testing"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the sdist, built by the project's own backend, without a network."""
    pytest.importorskip("hatchling", reason="pip install hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_one_version(archives):
    version = alignpro.__version__
    assert [path.name for path in archives] == [
        f"alignpro-{version}-py3-none-any.whl",
        f"alignpro-{version}.tar.gz",
    ]
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    (latest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited == latest == version


def test_the_wheel(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        said = message_from_bytes(wheel.read(metadata))
    assert {name.split("/")[0] for name in names} == {"alignpro", metadata.split("/")[0]}
    tracked = subprocess.run(["git", "ls-files", "alignpro"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # templates and py.typed too
        assert set(tracked.stdout.split()) <= names
    assert "alignpro/py.typed" in names
    assert set(said.get_all("Provides-Extra")) == EXTRAS
    # What is no extra must not bring torch, nor a server or a browser.
    plain = [text for text in said.get_all("Requires-Dist") if "extra" not in text]
    assert sorted(re.match(r"[\w-]+", text)[0] for text in plain) == [
        "jax",
        "jaxtyping",
        "numpy",
        "scipy",
        "tqdm",
        "tyro",
    ]


def test_the_sdist(archives):
    with tarfile.open(archives[1]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "pyproject.toml"}
    assert wanted <= names
    assert any(name.startswith("tests/") for name in names)
    assert not [name for name in names if name.startswith(("runs/", ".venv/", "build/"))]


def test_the_wheel_works_where_it_is_installed(archives, tmp_path):
    """Away from the tree: its code and its templates come from the wheel alone."""
    with zipfile.ZipFile(archives[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = "import alignpro, sys; from alignpro.commands.main import main; print(alignpro.__file__)\n"
    code += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "solve", "--help"]
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))


@pytest.mark.parametrize(
    "verb",
    [
        ["verify", "--bounds", "theorem1", "--instances", "100"],
        ["--version"],
        ["doctor", "--help"],
        ["train", "--help"],
    ],
)
def test_no_torch_before_it_is_needed(verb):
    code = "import sys; from alignpro.commands.main import main; status = main(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules; sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, *verb], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_mutant_that_imports_torch_is_noticed():
    code = "import sys, torch; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1
