"""Compiled code that is kept: found again, never damaged, and only where the user wants it."""

import os
import threading
import time

import jax
import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.theory import compiled

lanes = pytest.importorskip("alignpro.theory.scale.lanes", reason="pip install 'alignpro[native]'")
vectors = pytest.importorskip("alignpro.theory.scale.vectors")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of its own, with JAX told of none."""
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "cache" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def test_it_is_on_unless_the_user_says_otherwise(folder, tmp_path, monkeypatch):
    assert compiled.folder() is None
    compiled.keep()
    assert compiled.folder() == compiled.own_folder()
    assert compiled.own_folder().parent == folder
    assert compiled.own_folder().stat().st_mode & 0o777 == 0o700
    # Another processor, another folder: code for one may be none for the other.
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    assert compiled.own_folder() != compiled.folder()

    def leaves_alone(module):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
        module.keep()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_enable_compilation_cache", False)
        module.keep()
        assert jax.config.jax_compilation_cache_dir is None
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
        assert module.folder() is None  # nor is machine code kept
        jax.config.update("jax_enable_compilation_cache", True)

    leaves_alone(compiled)
    user = "config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache"
    kills(leaves_alone, mutated(compiled, user, "False"))


def test_a_folder_that_cannot_be_written_is_not_used(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "file"))
    compiled.keep()
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
    compiled.store("name", b"content")
    assert compiled.load("name") is None


def test_what_is_damaged_is_not_run(folder):
    compiled.keep()
    content = bytes(range(256)) * 50
    file = compiled.own_folder() / "name-machine"

    def sound(module):
        module.store("name", content)
        assert module.load("name") == content
        stored = file.read_bytes()
        for damaged in (b"", stored[:10], stored[:-1], stored + b"\0", stored[:99] + b"\1" + stored[100:]):
            file.write_bytes(damaged)
            assert module.load("name") is None

    sound(compiled)
    kills(
        sound, mutated(compiled, "content if hashlib.sha256(content).digest() == digest else None", "content")
    )


def test_processes_that_write_at_once(folder):
    """Every reader finds all of it or nothing."""
    compiled.keep()
    content, seen = os.urandom(2**20), set()

    def write_and_read():
        for _ in range(10):
            compiled.store("name", content)
            seen.add(compiled.load("name") == content)

    threads = [threading.Thread(target=write_and_read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {True}
    assert [path.name for path in compiled.own_folder().iterdir()] == ["name-machine"]


def test_the_oldest_make_room(folder):
    compiled.keep()
    where, now = compiled.own_folder(), time.time()
    for i in range(5):
        (where / str(i)).write_bytes(bytes(100 if i != 3 else 0))
        os.utime(where / str(i), (now - i, now - i))

    def kept(module):
        module._prune(where, 250)
        assert sorted(path.name for path in where.iterdir()) == ["0", "1"]

    kept(compiled)
    (where / "2").write_bytes(bytes(100))
    os.utime(where / "2", (now, now))
    kills(kept, mutated(compiled, "size == 0 or total > most", "size == 0"))


def test_machine_code_is_written_once(folder, monkeypatch):
    """Equal functions of equal shapes share their code; another constant, shape or dtype has its own."""
    compiled.keep()
    written = []
    write = vectors.machine_code

    def counted(function, quick=False):
        written.append(quick)
        return write(function, quick)

    monkeypatch.setattr(vectors, "machine_code", counted)
    data = np.random.default_rng(0).uniform(size=(20, 3))

    def runs(scale, given, quick=True):
        run = lanes.in_lanes(
            lambda x: x * scale + 1.0, jax.ShapeDtypeStruct(given.shape[1:], given.dtype), quick=quick
        )
        np.testing.assert_allclose(run(given), given * scale + 1.0, rtol=1e-6)

    def apart(parts):
        monkeypatch.setattr(lanes, "_parts", parts)
        for path in compiled.own_folder().iterdir():
            path.unlink()
        written.clear()
        cases = [(2.0, data), (3.0, data), (2.0, data[:, :2]), (2.0, data.astype(np.float32))]
        for _ in range(2):
            for scale, given in cases:
                runs(scale, given)
        runs(2.0, data, quick=False)
        assert len(written) == 5

    parts = lanes._parts
    apart(parts)
    kills(apart, lambda flat: [name for name, *_ in parts(flat)[1]])
    kills(apart, lambda flat: [*parts(flat), len(written)])
