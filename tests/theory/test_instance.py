import io
import zipfile

import jax
import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.theory import npz
from alignpro.theory.families import FAMILIES, draw
from alignpro.theory.instance import KEYS, Instance, Names, _check_headers, load

GOOD = {
    "p": np.array([0.25, 0.75]),
    "prior": np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]),
    "frozen": np.array([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]),
    "own": np.array([0, 2]),
    "reward": np.array([[0.0, 1.0], [2.0, -3.0]]),
}


def put(key, index, value):
    array = GOOD[key].astype(float)
    array[index] = value
    return {key: array}


BAD = {
    "negative": (put("prior", (1, 0), -0.25), r"prior\[1, 0\] = -0.25 is negative"),
    "nan": (put("reward", (0, 1), np.nan), r"reward\[0, 1\] = nan is not finite"),
    "infinite": (put("frozen", (2, 0), np.inf), r"frozen\[2, 0\] = inf is not finite"),
    "row sum": (put("frozen", (2, 0), 0.26), r"frozen\[2\] sums to 1.01, not 1 \(tolerance 1e-09\)"),
    "just off": (put("p", 0, 0.25 + 3e-9), r"p sums to 1.000000003, not 1"),
    "own high": ({"own": np.array([0, 3])}, r"own\[1\] = 3 is no row of frozen; give 0 to 2"),
    "own low": ({"own": np.array([-1, 0])}, r"own\[0\] = -1 is no row of frozen"),
    "own float": ({"own": np.array([0.0, 1.0])}, r"own: has dtype float64; save it as integers"),
    "own bool": ({"own": np.array([True, False])}, r"own: has dtype bool"),
    "complex": ({"reward": GOOD["reward"] + 0j}, r"reward: has dtype complex128; save it as real"),
    "text": ({"reward": np.array([["a", "b"]] * 2)}, r"reward: has dtype <U1"),
    "object": ({"reward": np.array([[None, 1]] * 2)}, r"reward: has dtype object"),
    "half": ({"p": GOOD["p"].astype(np.float16)}, r"p: has dtype float16, too coarse"),
    "axes": ({"prior": GOOD["prior"][0]}, r"prior: has shape \(3,\); give \[X, K\], 2 axes"),
    "scalar": ({"p": np.array(1.0)}, r"p: has shape \(\); give \[X\], 1 axis"),
    "mismatch": ({"prior": np.full((2, 2), 0.5)}, r"frozen: has 3 rewrites \(axis 0 .* but prior has 2"),
    "transposed": ({"reward": np.zeros((3, 2))}, r"reward: has 3 prompts .* but p has 2"),
    "empty": ({"p": np.zeros(0)}, r"p: has shape \(0,\), so no prompts"),
    "ragged": ({"reward": [[1.0], [1.0, 2.0]]}, r"reward: rows of unequal length"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_named_in_one_line(case):
    fields, message = BAD[case]
    with pytest.raises(AlignProError, match=f"^{message}") as caught:
        Instance(**{**GOOD, **fields})
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # the remedy


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_is_bit_exact(family, tmp_path):
    for i, instance in enumerate(draw(family, 1, (3, 4, 5), 3)):
        instance.save(tmp_path / f"{i}.npz")
        again = load(tmp_path / f"{i}.npz")
        for key in KEYS:
            assert (getattr(again, key) == getattr(instance, key)).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.npz", "1.npz", "2.npz"]
    with np.load(tmp_path / "0.npz", allow_pickle=False) as archive:
        assert set(archive.files) == set(KEYS)


def test_names_survive(tmp_path):
    names = Names(("a", "b"), (), ("yes", "nö"))
    Instance(**GOOD, names=names).save(tmp_path / "named.npz")
    assert load(tmp_path / "named.npz").names == names
    with pytest.raises(AlignProError, match=r"^names: 1 prompts named but there are 2"):
        Instance(**GOOD, names=Names(("a",)))


def test_rows_are_divided_by_their_sum_once():
    off = Instance(**{**GOOD, "p": np.array([0.25, 0.75 + 5e-10])})
    assert abs(off.p.sum() - 1) < 1e-15
    assert off.p[0] < 0.25
    single = Instance(**{**GOOD, "p": np.array([1 / 3, 2 / 3], dtype=np.float32) * np.float32(1 + 3e-6)})
    assert abs(single.p.sum() - 1) < 1e-15
    kept = Instance(**GOOD)
    assert (kept.prior == GOOD["prior"]).all()
    tiny = Instance(**{**GOOD, "p": np.array([1e-310, 1.0])})
    assert tiny.p[0] == 0


def test_arrays_cannot_be_changed_in_place():
    instance = Instance(**GOOD)
    with pytest.raises(ValueError, match="read-only"):
        instance.p[0] = 1
    GOOD["p"][0] = 0.25  # the caller's own array stays writable


def test_is_a_pytree():
    instance = Instance(**GOOD, names=Names(("a", "b")))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, instance)  # no valid instance, and none of its business
    assert isinstance(doubled, Instance)
    assert doubled.names == instance.names
    assert instance.shape == (2, 3, 2)
    assert jax.jit(lambda i: i.p.sum())(instance) == 1


def write(path, **content):
    np.savez(path, **content)
    return path


def broken(tmp_path, case):
    path = tmp_path / "bad.npz"
    if case == "missing":
        return path
    if case == "folder":
        return tmp_path
    if case == "text":
        path.write_text("p = 1")
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "cut":
        content = write(path, **GOOD).read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif case == "flipped":
        content = bytearray(write(path, **GOOD).read_bytes())
        content[200] ^= 0xFF
        path.write_bytes(bytes(content))
    elif case == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif case == "pickle":
        write(path, **{**GOOD, "reward": np.array([[{}, 1.0]] * 2, dtype=object)})
    elif case == "no frozen":
        write(path, **{k: v for k, v in GOOD.items() if k != "frozen"})
    elif case == "extra":
        write(path, **GOOD, beta=np.array(1.0))
    elif case == "not an array":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key in KEYS:
                archive.writestr(f"{key}.npy", b"nonsense")
        path.write_bytes(buffer.getvalue())
    elif case == "bad names":
        write(path, **GOOD, names=np.array("[1"))
    elif case == "names of numbers":
        write(path, **GOOD, names=np.array('{"prompts": [1, 2]}'))
    elif case == "nested names":
        write(path, **GOOD, names=np.array('{"prompts": ' + "[" * 100_000))
    elif case in HEADERS:
        header, content = HEADERS[case]
        write(path, **{k: v for k, v in GOOD.items() if k != "reward"})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("reward.npy", npy(header, content))
    elif case == "bad row":
        write(path, **{**GOOD, "p": np.array([0.5, 0.6])})
    return path


def npy(header, content):
    """A member of an archive, with any header."""
    padded = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + content


HEADERS = {
    "unfinished header": ("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2", bytes(32)),
    "header of a call": ("{'descr': '<f8', 'fortran_order': False, 'shape': (exit(),)}", bytes(32)),
    "nested header": ("(" * 9000, bytes(32)),
    "negative shape": ("{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -2)}", bytes(32)),
    "huge shape": (f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**16}, 1)}}", bytes(32)),
    "shape beyond its content": ("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3)}", bytes(32)),
}

BROKEN = {
    **dict.fromkeys(HEADERS, "is not an .npz file, or is cut short or damaged"),
    "names of numbers": "names: prompts are not all text",
    "nested names": "names: is not JSON text",
    "missing": "no such file",
    "folder": "is a folder",
    "text": "is not an .npz file",
    "empty": "is not an .npz file",
    "cut": "is not an .npz file, or is cut short or damaged",
    "flipped": "is not an .npz file, or is cut short or damaged",
    "npy": "is a single .npy array",
    "pickle": "reward holds pickled Python objects",
    "no frozen": "lacks the key 'frozen'",
    "extra": "has the unknown key 'beta'",
    "not an array": "",
    "bad names": "names: is not JSON text",
    "bad row": r"p sums to 1.1, not 1",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_in_one_line(case, tmp_path):
    path = broken(tmp_path, case)
    with pytest.raises(AlignProError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {BROKEN[case]}")
    assert "\n" not in message


def test_shapes_are_checked_before_anything_is_inflated(monkeypatch, tmp_path):
    """Zeros compress a thousandfold: what is not wanted is refused by its header."""
    bad = {
        "axes": ({"reward": np.zeros((2, 2, 9))}, "reward: has shape (2, 2, 9); give [X, Y], 2 axes"),
        "prompts": ({"p": np.full(4, 0.25)}, "prior: has 2 prompts"),
        "kind": ({"own": np.zeros(2)}, "own: has dtype float64"),
        "names": ({"names": np.zeros((9, 9))}, "names: is not JSON text"),
    }
    path = tmp_path / "large.npz"

    def refused(module):
        for change, message in bad.values():
            np.savez_compressed(path, **{**GOOD, **change})
            said = ""
            try:
                module.read(path, KEYS, ("names",), _check_headers)
            except AlignProError as error:
                said = str(error)
            assert said.startswith(f"{path}: {message}")

    def unread(archive, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(npz, "_array", unread)
    refused(npz)
    late = mutated(npz, "                check(headers)\n", "                pass\n")
    kills(refused, late)
    monkeypatch.undo()
    beyond = mutated(npz, "!= content", "== -1")
    write(path, **{k: v for k, v in GOOD.items() if k != "reward"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("reward.npy", npy(*HEADERS["huge shape"]))
    with pytest.raises(AlignProError, match="is too large for this machine's memory"):
        beyond.read(path, KEYS, ("names",), lambda headers: None)
