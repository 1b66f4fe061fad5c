"""Rollouts drawn from an enumerated instance, where every estimated quantity is known exactly.

They show what intervals are worth, and help to plan how many prompts, draws and answers a question needs.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from alignpro.errors import AlignProError
from alignpro.rollouts import LOGPS, Rollout, Rollouts


class Size(NamedTuple):
    """How much is drawn."""

    prompts: int = 100
    """Prompts, drawn from P with replacement."""
    answers: int = 32
    """Answers to each prompt itself (arm none and policies)."""
    draws: int = 16
    """Rewrites of each prompt, in each arm that rewrites."""
    answers_per_draw: int = 4
    """Answers to each rewrite."""


class _Columns(NamedTuple):
    prompt: np.ndarray
    x: np.ndarray
    arm: np.ndarray
    draw: np.ndarray
    answer: np.ndarray
    rewrite: np.ndarray
    response: np.ndarray
    reward: np.ndarray
    logps: np.ndarray
    """[5, N], the log-probabilities in the order of `LOGPS`."""


_FLAT = _Columns._fields[:-1]


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(values)


def _pick(rng: np.random.Generator, probs: np.ndarray, size: int) -> np.ndarray:
    """Draw [..., size] from the rows of `probs` [..., k]; never an outcome of probability 0."""
    below = np.cumsum(probs, -1)
    below /= below[..., -1:]
    u = rng.random((*probs.shape[:-1], size))
    flat, rows = below.reshape(-1, below.shape[-1]), u.reshape(-1, size)
    # One search for all rows: row i occupies (i, i + 1].
    shifted = (flat + np.arange(len(flat))[:, None]).ravel()
    at = np.searchsorted(shifted, (rows + np.arange(len(flat))[:, None]).ravel(), "right")
    at = at.reshape(rows.shape) - flat.shape[-1] * np.arange(len(flat))[:, None]
    at = np.minimum(at, flat.shape[-1] - 1).reshape(u.shape)
    # Rounding of the shifted cumulative sums could reach an outcome of probability 0.
    zero = np.take_along_axis(probs, at, -1) <= 0
    return np.where(zero, probs.argmax(-1)[..., None], at)


def _draw(instance: Any, rng: np.random.Generator, size: Size, prompters, policies) -> tuple[_Columns, list]:
    p, prior, frozen, own, reward = (
        np.asarray(getattr(instance, key)) for key in ("p", "prior", "frozen", "own", "reward")
    )
    xs = _pick(rng, p, size.prompts)
    arms = {"none": None, "sft": prior, **prompters, **policies}
    parts = []
    for number, (arm, probs) in enumerate(arms.items()):
        direct = arm == "none" or arm in policies
        draws, answers = (size.answers, 1) if direct else (size.draws, size.answers_per_draw)
        shape = (size.prompts, draws, answers)
        if direct:
            rewrite = (
                np.full(shape[:2], -1) if arm != "none" else np.broadcast_to(own[xs][:, None], shape[:2])
            )
            given = frozen[own[xs]] if arm == "none" else np.asarray(probs)[xs]
            response = _pick(rng, given, draws)[..., None]
        else:
            rewrite = _pick(rng, np.asarray(probs)[xs], draws)
            response = _pick(rng, frozen[rewrite], answers)
        x = np.broadcast_to(xs[:, None, None], shape)
        k = np.broadcast_to(rewrite[..., None], shape)
        logps = dict.fromkeys(LOGPS, np.full(shape, np.nan))
        logps["logp_frozen_x"] = _log(frozen[own[x], response])
        if arm in policies:
            logps["logp_policy"] = _log(np.asarray(probs)[x, response])
        else:
            logps["logp_frozen_rewrite"] = _log(frozen[k, response])
        if not direct:
            logps["logp_prompter"], logps["logp_reference"] = _log(np.asarray(probs)[x, k]), _log(prior[x, k])
        columns = _Columns(
            np.broadcast_to(np.arange(size.prompts)[:, None, None], shape),
            x,
            np.full(shape, number),
            np.broadcast_to(np.arange(draws)[None, :, None], shape),
            np.broadcast_to(np.arange(answers), shape),
            k,
            response,
            reward[x, response],
            np.stack([logps[name].ravel() for name in LOGPS]),
        )
        parts.append(columns)
    flat = [part._replace(**{name: getattr(part, name).ravel() for name in _FLAT}) for part in parts]
    return _Columns(*(np.concatenate(of, -1) for of in zip(*flat, strict=True))), list(arms)


def _range(instance: Any, reward_range: tuple[float, float] | None) -> tuple[float, float]:
    reward = np.asarray(instance.reward)
    low, high = (float(reward.min()), float(reward.max())) if reward_range is None else reward_range
    if not (low < high and low <= reward.min() and reward.max() <= high):
        raise AlignProError(
            f"reward_range ({low:g}, {high:g}): must enclose rewards {reward.min():g} to {reward.max():g}"
        )
    return low, high


def simulate(
    instance: Any,
    rng: np.random.Generator,
    size: Size = Size(),  # noqa: B008 - immutable
    *,
    prompters: Mapping[str, np.ndarray] | None = None,
    policies: Mapping[str, np.ndarray] | None = None,
    reward_range: tuple[float, float] | None = None,
) -> Rollouts:
    """Draw rollouts of arms none and sft, and of any `prompters` [X, K] and `policies` [X, Y] by name.

    Args:
        instance: an `alignpro.theory.Instance`, or anything with its five arrays.
        rng: determines every draw.
        size: how much is drawn.
        prompters: ρ(x′|x), rows of probabilities.
        policies: π(y|x), rows of probabilities; their answers have no rewrite.
        reward_range: declared range of the reward. Left out: the extremes of `instance.reward`.

    Raises:
        AlignProError: the range does not enclose the rewards.
    """
    low, high = _range(instance, reward_range)
    policies = policies or {}
    columns, arms = _draw(instance, rng, size, prompters or {}, policies)
    order = np.lexsort((columns.answer, columns.draw, columns.arm, columns.prompt))
    return Rollouts(
        prompt_ids=tuple(map(str, range(size.prompts))),
        arms=tuple(arms),
        prompt=columns.prompt[order],
        arm=columns.arm[order],
        seed=np.zeros(len(order), np.int64),
        draw=columns.draw[order],
        answer=columns.answer[order],
        reward=columns.reward[order],
        logps={name: values[order] for name, values in zip(LOGPS, columns.logps, strict=True)},
        prompters={(arm, 0): arm for arm in arms},
        direct=frozenset(policies),
        frozen="frozen",
        reward_model="reward",
        sampling="enumerated",
        low=low,
        high=high,
    )


def simulated_rows(
    instance: Any,
    rng: np.random.Generator,
    size: Size = Size(),  # noqa: B008 - immutable
    *,
    prompters: Mapping[str, np.ndarray] | None = None,
    policies: Mapping[str, np.ndarray] | None = None,
    reward_range: tuple[float, float] | None = None,
) -> Iterator[Rollout]:
    """Draw what `simulate` draws, one row at a time, to be written: texts are "x3", "rewrite 5", "y8"."""
    low, high = _range(instance, reward_range)
    own = np.asarray(instance.own)
    columns, arms = _draw(instance, rng, size, prompters or {}, policies or {})
    for i in range(len(columns.reward)):
        arm, x, k = arms[columns.arm[i]], int(columns.x[i]), int(columns.rewrite[i])
        logps = {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(LOGPS, columns.logps[:, i], strict=True)
        }
        yield Rollout(
            prompt_id=str(columns.prompt[i]),
            x=f"x{x}",
            arm=arm,
            seed=0,
            draw=int(columns.draw[i]),
            answer=int(columns.answer[i]),
            rewrite=None if k < 0 else f"x{x}" if k == own[x] else f"rewrite {k}",
            response=f"y{columns.response[i]}",
            reward=float(columns.reward[i]),
            **logps,
            frozen="frozen",
            prompter=arm,
            reward_model="reward",
            sampling="enumerated",
            reward_low=low,
            reward_high=high,
        )
