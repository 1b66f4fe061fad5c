"""`Instance`: everything the theory is about, on finite spaces, with one-line errors for bad input."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from alignpro.errors import AlignProError
from alignpro.files import atomic_write
from alignpro.shown import brief
from alignpro.theory import npz
from alignpro.theory.divergences import TINY

ROW_SUM_TOLERANCE = 1e-9
"""How far from 1 a row of float64 probabilities may sum; it is then divided by its sum, once."""
ROW_SUM_TOLERANCE_SINGLE = 1e-5
"""How far from 1 a row of float32 probabilities may sum."""

MOST_SHOWN = 200
"""Instances of at most so many numbers are written out; larger ones are named by their shapes."""

KEYS = ("p", "prior", "frozen", "own", "reward")
AXES = {"p": "X", "prior": "XK", "frozen": "KY", "own": "X", "reward": "XY"}
_BAD_NAMES = "names: is not JSON text with the lists prompts, rewrites, responses; drop the key or save it so"
_AXIS_NAMES = {"X": "prompts", "K": "rewrites", "Y": "responses"}


class Names(NamedTuple):
    """Optional labels of the three axes; an empty tuple where an axis has none."""

    prompts: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
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
        arrays, sizes = _validated({key: getattr(self, key) for key in KEYS})
        for name, value in {**arrays, "names": _checked_names(self.names, sizes)}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        arrays = {key: getattr(self, key) for key in KEYS}
        if sum(np.size(array) for array in arrays.values()) > MOST_SHOWN:
            return brief(self)
        said = ", ".join(f"{key}={value!r}" for key, value in (*arrays.items(), ("names", self.names)))
        return f"Instance({said})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, K, Y), without any leading batch axes."""
        return (*self.prior.shape[-2:], self.frozen.shape[-1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` as .npz with the keys p, prior, frozen, own, reward (and names, as JSON text).

        Atomic; nothing is pickled. Raises AlignProError if it cannot be written.
        """
        with atomic_write(path) as file:
            self.write(file)

    def write(self, file: IO[bytes]) -> None:
        """Write what `save` writes to an open file."""
        content: dict[str, Any] = {key: np.asarray(getattr(self, key)) for key in KEYS}
        if self.names is not None:
            content["names"] = np.asarray(json.dumps(self.names._asdict(), ensure_ascii=False))
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
    sizes = dict(zip("XKY", shape, strict=True))

    def pad(key: str) -> np.ndarray:
        array = np.asarray(getattr(instance, key))
        wide = tuple(sizes[axis] for axis in AXES[key])
        if wide == array.shape:
            return array
        # `np.pad` takes 20 times as long, which a search that evaluates thousands of instances would feel.
        out = np.zeros(wide, array.dtype)
        out[tuple(map(slice, array.shape))] = array
        if array.ndim == 2:
            out[len(array) :, : array.shape[1]] = array[-1]
            if key == "reward":
                out[:, array.shape[1] :] = out[:, array.shape[1] - 1, None]
        elif key == "own":
            out[len(array) :] = array[-1]
        return out

    return unchecked(*map(pad, KEYS))


def load(path: str | os.PathLike[str], content: bytes | None = None, most: int | None = None) -> Instance:
    """Read an instance that `Instance.save` (or `numpy.savez`) wrote.

    Args:
        path: the file.
        content: the file's bytes, where it is not on this disk; `path` only names it then.
        most: bytes that its arrays may take together once inflated; any number when None.

    Raises:
        AlignProError: no such file, a damaged, pickled or too large one, bad keys, or no valid instance;
            one line that begins with the path.
    """
    arrays = npz.read(path, KEYS, ("names",), _check_headers, content, most)
    try:
        names = _names_of(arrays.pop("names")) if "names" in arrays else None
        return Instance(**arrays, names=names)
    except AlignProError as error:
        raise AlignProError(f"{path}: {error}") from error


def _names_of(stored: np.ndarray) -> Names:
    try:
        raw = json.loads(str(stored[()]))
        return Names(
            **{axis: tuple(labels) if isinstance(labels, list) else labels for axis, labels in raw.items()}
        )
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise AlignProError(_BAD_NAMES) from error


def _number(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float | np.floating) else str(value)


class _Layout(Protocol):
    """Whatever has a shape and a dtype: an array, or the header of one in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


def _check_headers(headers: Mapping[str, _Layout]) -> None:
    """Check a file's headers, so that arrays of bad shapes are not even inflated."""
    if "names" in headers and (headers["names"].shape or headers["names"].dtype.kind != "U"):
        raise AlignProError(_BAD_NAMES)
    _sizes({key: headers[key] for key in KEYS})


def _sizes(arrays: Mapping[str, _Layout]) -> dict[str, int]:
    """How many prompts (X), rewrites (K) and responses (Y) there are; an AlignProError for bad layouts."""
    for key, array in arrays.items():
        axes = AXES[key]
        if len(array.shape) != len(axes):
            raise AlignProError(
                f"{key}: has shape {array.shape}; give [{', '.join(axes)}], {len(axes)} "
                f"{'axis' if len(axes) == 1 else 'axes'}"
            )
        if key != "own" and array.dtype.name in ("bfloat16", "float16"):
            raise AlignProError(f"{key}: has dtype {array.dtype}, too coarse; save it as float64 or float32")
        if array.dtype.kind not in ("iu" if key == "own" else "fiu") or array.dtype.itemsize > 8:
            kind = "integers (rows of frozen)" if key == "own" else "real numbers"
            raise AlignProError(f"{key}: has dtype {array.dtype}; save it as {kind}")
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
    return {axis: size for axis, (_, size) in sizes.items()}


def rectangular(name: str, value: Any) -> np.ndarray:
    """`value` as an array; an AlignProError where its rows differ in length."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise AlignProError(f"{name}: rows of unequal length; give a rectangular array") from error


def _validated(fields: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    given = {key: rectangular(key, value) for key, value in fields.items()}
    sizes = _sizes(given)
    arrays = {key: array.astype(np.int64 if key == "own" else np.float64) for key, array in given.items()}
    for key in ("p", "prior", "frozen"):
        arrays[key] = _normalised(key, arrays[key], _tolerance(given[key]))
    _finite("reward", arrays["reward"])
    count, own = sizes["K"], arrays["own"]
    _refuse("own", own, (own < 0) | (own >= count), f"is no row of frozen; give 0 to {count - 1}")
    for array in arrays.values():
        array.setflags(write=False)
    return arrays, sizes


def _checked_names(names: Any, sizes: Mapping[str, int]) -> Names | None:
    """Labels as tuples of text, which JAX can hash, one for each or none."""
    if names is None:
        return None
    if not isinstance(names, Names):
        raise AlignProError(
            f"names: is of type {type(names).__name__}; give Names(prompts=…), of the axes named"
        )
    checked = {}
    for letter, axis in _AXIS_NAMES.items():
        labels = getattr(names, axis)
        if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
            raise AlignProError(f"names: {axis} are not all text; give a tuple of strings")
        if labels and len(labels) != sizes[letter]:
            raise AlignProError(
                f"names: {len(labels)} {axis} named but there are {sizes[letter]}; name each or none"
            )
        checked[axis] = tuple(labels)
    return Names(**checked)


def _refuse(key: str, array: np.ndarray, bad: np.ndarray, why: str) -> None:
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AlignProError(f"{key}[{', '.join(map(str, index))}] = {_number(array[index])} {why}")


def probabilities(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as float64 rows of probabilities of this shape, under `Instance`'s rules."""
    array = rectangular(name, value)
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
