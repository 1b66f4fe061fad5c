"""`Instance`: everything the theory is about, on finite spaces, with one-line errors for bad input."""

import json
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from alignpro.errors import AlignProError
from alignpro.files import atomic_write
from alignpro.theory.divergences import TINY

ROW_SUM_TOLERANCE = 1e-9
"""How far from 1 a row of float64 probabilities may sum; it is then divided by its sum, once."""
ROW_SUM_TOLERANCE_SINGLE = 1e-5
"""How far from 1 a row of float32 probabilities may sum."""

KEYS = ("p", "prior", "frozen", "own", "reward")
AXES = {"p": "X", "prior": "XK", "frozen": "KY", "own": "X", "reward": "XY"}
_AXIS_NAMES = {"X": "prompts", "K": "rewrites", "Y": "responses"}


class Names(NamedTuple):
    """Optional labels of the three axes; an empty tuple where an axis has none."""

    prompts: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Instance:
    """A prompt-optimization problem on finite spaces: X user prompts, K prompts the frozen model can be
    given, Y responses. K and X are independent. A JAX pytree, so that jit and vmap take it whole.

    Building one validates it, or raises an `AlignProError`; rows within `ROW_SUM_TOLERANCE` of 1
    (`ROW_SUM_TOLERANCE_SINGLE` for float32) are divided by their sum once, and probabilities below 2.2e-308
    count as 0. λ and β are arguments of what is computed from it.
    """

    p: Float[Array, " X"] | Float[np.ndarray, " X"]
    """P(x), the distribution of user prompts (probabilities)."""
    prior: Float[Array, "X K"] | Float[np.ndarray, "X K"]
    """ρ_sft(x′|x), the reference prompter (probabilities)."""
    frozen: Float[Array, "K Y"] | Float[np.ndarray, "K Y"]
    """π_F(y|x′), the frozen model (probabilities)."""
    own: Int[Array, " X"] | Int[np.ndarray, " X"]
    """own[x]: the row of `frozen` that is the frozen model on the original prompt x."""
    reward: Float[Array, "X Y"] | Float[np.ndarray, "X Y"]
    """r*(x,y), the reward of answering the original prompt x with y; any finite values."""
    names: Names | None = None
    """Labels for reports; static under JAX transformations."""

    def __post_init__(self) -> None:
        for name, value in _validated({key: getattr(self, key) for key in KEYS}, self.names).items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, K, Y), without any leading batch axes."""
        return (*self.prior.shape[-2:], self.frozen.shape[-1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` as .npz with the keys p, prior, frozen, own, reward (and names, as JSON text).

        Atomic; nothing is pickled. Raises AlignProError if it cannot be written.
        """
        content: dict[str, Any] = {key: np.asarray(getattr(self, key)) for key in KEYS}
        if self.names is not None:
            content["names"] = np.asarray(json.dumps(self.names._asdict(), ensure_ascii=False))
        with atomic_write(path) as file:
            np.savez(file, **content)


def _flatten_with_keys(instance: Instance) -> tuple[tuple[Any, ...], Names | None]:
    return tuple((jax.tree_util.GetAttrKey(key), getattr(instance, key)) for key in KEYS), instance.names


def _unflatten(names: Names | None, children: Any) -> Instance:
    # Transformations put tracers, batches and placeholders here: no validation.
    instance = object.__new__(Instance)
    for key, child in zip(KEYS, children, strict=True):
        object.__setattr__(instance, key, child)
    object.__setattr__(instance, "names", names)
    return instance


jax.tree_util.register_pytree_with_keys(Instance, _flatten_with_keys, _unflatten)


def unchecked(p: Any, prior: Any, frozen: Any, own: Any, reward: Any) -> Instance:
    """An Instance of arrays known to be valid, or with leading batch axes: no validation."""
    return _unflatten(None, (p, prior, frozen, own, reward))


def bare(instance: Instance) -> Instance:
    """An instance of the same arrays without names, which are static: other names would compile anew."""
    return replaced(instance)


def replaced(instance: Instance, **arrays: Any) -> Instance:
    """The instance with some arrays replaced, without names: no validation."""
    return unchecked(*(arrays.get(key, getattr(instance, key)) for key in KEYS))


def padded(instance: Instance, shape: tuple[int, int, int]) -> Instance:
    """The problem with more prompts, rewrites and responses, copies of probability 0: no quantity changes."""
    more = {axis: (0, n - m) for axis, n, m in zip("XKY", shape, instance.shape, strict=True)}

    def pad(key: str) -> np.ndarray:
        array, wider = np.asarray(getattr(instance, key)), [more[axis] for axis in AXES[key]]
        if key in ("own", "reward"):
            return np.pad(array, wider, mode="edge")
        rows = np.pad(array, [*wider[:-1], (0, 0)], mode="edge")
        return np.pad(rows, [*[(0, 0)] * (array.ndim - 1), wider[-1]])

    return unchecked(*map(pad, KEYS))


def load(path: str | os.PathLike[str]) -> Instance:
    """Read an instance that `Instance.save` (or `numpy.savez`) wrote.

    Raises:
        AlignProError: no such file, a damaged or pickled one, bad keys, or no valid instance;
            one line that begins with the path.
    """
    remedy = "write it with alignpro's Instance.save or numpy.savez"
    try:
        opened = np.load(Path(path), allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise AlignProError(f"{path}: is a single .npy array, not an .npz; {remedy}")
        with opened as archive:
            missing = [key for key in KEYS if key not in archive.files]
            if missing:
                raise AlignProError(
                    f"{path}: lacks the key {missing[0]!r}; an instance has the keys {', '.join(KEYS)}"
                )
            extra = sorted(set(archive.files) - {*KEYS, "names"})
            if extra:
                raise AlignProError(
                    f"{path}: has the unknown key {extra[0]!r}; keep only {', '.join(KEYS)} and names"
                )
            content = {}
            for key in archive.files:
                try:
                    content[key] = archive[key]
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    raise AlignProError(
                        f"{path}: {key} holds pickled Python objects, which are never read; "
                        "save plain numeric arrays"
                    ) from error
    except AlignProError:
        raise
    except IsADirectoryError as error:
        raise AlignProError(f"{path}: is a folder; name an .npz file") from error
    except FileNotFoundError as error:
        raise AlignProError(f"{path}: no such file; name an .npz file that exists") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise AlignProError(f"{path}: is not an .npz file, or is cut short or damaged; {remedy}") from error
    except OSError as error:
        raise AlignProError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
    try:
        names = _names_of(content.pop("names")) if "names" in content else None
        return Instance(**content, names=names)
    except AlignProError as error:
        raise AlignProError(f"{path}: {error}") from error


def _names_of(stored: np.ndarray) -> Names:
    try:
        raw = json.loads(str(stored[()]))
        return Names(**{axis: tuple(labels) for axis, labels in raw.items()})
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise AlignProError(
            "names: is not JSON text with the lists prompts, rewrites, responses; drop the key or save it so"
        ) from error


def _number(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float | np.floating) else str(value)


def _validated(fields: dict[str, Any], names: Names | None) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    tolerance: dict[str, float] = {}
    for key, value in fields.items():
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise AlignProError(f"{key}: rows of unequal length; give a rectangular array") from error
        if array.ndim != len(AXES[key]):
            raise AlignProError(
                f"{key}: has shape {array.shape}; give [{', '.join(AXES[key])}], {len(AXES[key])} "
                f"{'axis' if len(AXES[key]) == 1 else 'axes'}"
            )
        if key != "own" and array.dtype.name in ("bfloat16", "float16"):
            raise AlignProError(f"{key}: has dtype {array.dtype}, too coarse; save it as float64 or float32")
        if array.dtype.kind not in ("iu" if key == "own" else "fiu") or array.dtype.itemsize > 8:
            kind = "integers (rows of frozen)" if key == "own" else "real numbers"
            raise AlignProError(f"{key}: has dtype {array.dtype}; save it as {kind}")
        tolerance[key] = _tolerance(array)
        arrays[key] = array.astype(np.int64 if key == "own" else np.float64)

    sizes: dict[str, tuple[str, int]] = {}
    for key in KEYS:
        for position, axis in enumerate(AXES[key]):
            size = arrays[key].shape[position]
            if size == 0:
                raise AlignProError(
                    f"{key}: has shape {arrays[key].shape}, so no {_AXIS_NAMES[axis]}; give at least one"
                )
            first, known = sizes.setdefault(axis, (key, size))
            if size != known:
                raise AlignProError(
                    f"{key}: has {size} {_AXIS_NAMES[axis]} (axis {position} of shape {arrays[key].shape}) "
                    f"but {first} has {known}; make them equal"
                )
    for key in ("p", "prior", "frozen"):
        arrays[key] = _normalised(key, arrays[key], tolerance[key])
    _finite("reward", arrays["reward"])
    count, own = sizes["K"][1], arrays["own"]
    _refuse("own", own, (own < 0) | (own >= count), f"is no row of frozen; give 0 to {count - 1}")
    if names is not None:
        for letter, axis in _AXIS_NAMES.items():
            labels = getattr(names, axis)
            if labels and len(labels) != sizes[letter][1]:
                raise AlignProError(
                    f"names: {len(labels)} {axis} named but there are {sizes[letter][1]}; name each or none"
                )
    for array in arrays.values():
        array.setflags(write=False)
    return arrays


def _refuse(key: str, array: np.ndarray, bad: np.ndarray, why: str) -> None:
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AlignProError(f"{key}[{', '.join(map(str, index))}] = {_number(array[index])} {why}")


def probabilities(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as float64 rows of probabilities of this shape, under `Instance`'s rules."""
    array = np.asarray(value)
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise AlignProError(
            f"{name}: has shape {array.shape} and dtype {array.dtype}; give real numbers of shape {shape}"
        )
    return _normalised(name, array.astype(np.float64), _tolerance(array))


def _finite(key: str, array: np.ndarray) -> None:
    _refuse(key, array, ~np.isfinite(array), "is not finite; replace it by a finite number")


def _tolerance(given: np.ndarray) -> float:
    return ROW_SUM_TOLERANCE_SINGLE if given.dtype == np.float32 else ROW_SUM_TOLERANCE


def _normalised(key: str, array: np.ndarray, tolerance: float) -> np.ndarray:
    _finite(key, array)
    _refuse(key, array, array < 0, "is negative; probabilities are at least 0")
    totals = array.sum(-1, keepdims=True)
    off = np.abs(totals - 1)
    if (off > tolerance).any():
        row = np.argwhere(off[..., 0] > tolerance)[0]
        where = f"{key}[{int(row[0])}]" if row.size else key
        total = float(totals[tuple(row)][0])
        raise AlignProError(
            f"{where} sums to {_number(total)}, not 1 (tolerance {tolerance:g}); divide it by its sum"
        )
    return normalise(np.where(array < TINY, 0.0, array))


def normalise(array: np.ndarray) -> np.ndarray:
    """Divide rows (last axis) by their sum, except those already at 1 to rounding: so that saving and
    loading is bit-exact."""
    totals = array.sum(-1, keepdims=True)
    rounding = (array.shape[-1] + 1) * np.finfo(float).eps
    return np.where(np.abs(totals - 1) > rounding, array / totals, array)
