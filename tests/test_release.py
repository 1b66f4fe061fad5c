"""What is released: one version, a wheel and an sdist with what they must hold, and verbs without torch."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from mutants import kills

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
    if tracked.returncode == 0:  # templates and py.typed too, and nothing else
        assert set(tracked.stdout.split()) == {name for name in names if name.startswith("alignpro/")}
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


LOCKED = re.compile(
    r"^([\w.-]+)==([^ ;]+)(?: ; (.+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def test_what_make_installs_is_locked_with_hashes():
    """Each requirement of the extras but torch: within its range, and once for each Python."""
    from packaging.markers import Marker, default_environment
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [
        default_environment() | {"python_version": v, "python_full_version": f"{v}.1"}
        for v in ("3.11", "3.13")
    ]

    def locked(text, environment):
        found = {}
        for name, version, marker, _ in LOCKED.findall(text):
            if not marker or Marker(marker).evaluate(environment):
                assert canonicalize_name(name) not in found
                found[canonicalize_name(name)] = version
        return found

    def needed(extra):
        for text in [*extras["dependencies"], *extras["optional-dependencies"][extra]]:
            wanted = Requirement(text)
            if wanted.name == "alignpro":
                for inner in wanted.extras:
                    yield from needed(inner)
            else:
                yield wanted

    def check(text, extra):
        assert LOCKED.sub("", text).strip() == ""  # nothing without a hash
        for environment in pythons:
            found = locked(text, environment)
            assert not {name for name in found if name == "torch" or name.startswith("nvidia-")}
            for wanted in needed(extra):
                if wanted.name != "torch":
                    assert found[canonicalize_name(wanted.name)] in wanted.specifier

    for extra in ("llm", "dev"):
        text = (ROOT / "requirements" / f"{extra}.lock").read_text()
        check(text, extra)
        kills(lambda text, extra=extra: check(text, extra), text + "six==1.17.0\n")
        kills(
            lambda text, extra=extra: check(text, extra),
            re.sub(r"^(trl==)[\d.]+", r"\g<1>1.12.0", text, flags=re.M),
        )


def test_untracked_files_are_in_no_archive(tmp_path):
    """Mutant: a build without the hook."""
    pytest.importorskip("hatchling", reason="pip install hatchling")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    hook = "[tool.hatch.build.hooks.custom]\n"
    head = '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    head += '[project]\nname = "pack"\nversion = "1"\n'
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "hatch_build.py").write_text((ROOT / "hatch_build.py").read_text())
    (tmp_path / "pyproject.toml").write_text(head + hook)
    for command in (["git", "init", "-q"], ["git", "add", "."]):
        subprocess.run(command, cwd=tmp_path, check=True)
    for name in ("key.py", "no[t]es #1 .txt", "!x"):
        (tmp_path / "pack" / name).touch()

    def check(text):
        (tmp_path / "pyproject.toml").write_text(head + text)
        out = str(tmp_path / "dist")
        wheel = next(WheelBuilder(str(tmp_path)).build(directory=out, versions=["standard"]))
        sdist = next(SdistBuilder(str(tmp_path)).build(directory=out))
        with zipfile.ZipFile(wheel) as one, tarfile.open(sdist) as other:
            names = [name.split("/", 1)[-1] for name in (*one.namelist(), *other.getnames())]
        assert not {"key.py", "no[t]es #1 .txt", "!x"} & {name.split("/")[-1] for name in names}
        assert names.count("pack/__init__.py") == 1  # the sdist's: the wheel's has no folder before it
        assert "__init__.py" in names

    check(hook)
    kills(check, "")


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
