"""Rollouts drawn from an enumerated instance, where every estimated quantity is known exactly."""

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


def _draw(
    instance: Any,
    rng: np.random.Generator,
    size: Size,
    prompters: Mapping[str, np.ndarray] | None = None,
    policies: Mapping[str, np.ndarray] | None = None,
    reward_range: tuple[float, float] | None = None,
) -> tuple[dict[str, np.ndarray], list[str], tuple[float, float]]:
    """Columns [N] by name (rewrite −1 and log-probabilities NaN where there are none), arms, reward range."""
    p, prior, frozen, own, reward = (
        np.asarray(getattr(instance, key)) for key in ("p", "prior", "frozen", "own", "reward")
    )
    low, high = (float(reward.min()), float(reward.max())) if reward_range is None else reward_range
    if not (low < high and low <= reward.min() and reward.max() <= high):
        raise AlignProError(
            f"reward_range ({low:g}, {high:g}): must enclose rewards {reward.min():g} to {reward.max():g}"
        )
    policies = policies or {}
    xs = _pick(rng, p, size.prompts)
    x = xs[:, None, None]
    arms = {"none": None, "sft": prior, **(prompters or {}), **policies}
    parts = []
    for number, (arm, probs) in enumerate(arms.items()):
        logps = dict.fromkeys(LOGPS, np.array(np.nan))
        if arm == "none" or arm in policies:
            draws, answers = size.answers, 1
            k = own[x] if arm == "none" else np.array(-1)
            response = _pick(rng, frozen[own[xs]] if arm == "none" else np.asarray(probs)[xs], draws)[
                ..., None
            ]
        else:
            draws, answers = size.draws, size.answers_per_draw
            rewrite = _pick(rng, np.asarray(probs)[xs], draws)
            response = _pick(rng, frozen[rewrite], answers)
            k = rewrite[..., None]
            logps["logp_prompter"], logps["logp_reference"] = _log(np.asarray(probs)[x, k]), _log(prior[x, k])
        logps["logp_frozen_x"] = _log(frozen[own[x], response])
        if arm in policies:
            logps["logp_policy"] = _log(np.asarray(probs)[x, response])
        else:
            logps["logp_frozen_rewrite"] = _log(frozen[k, response])
        columns = {
            "prompt": np.arange(size.prompts)[:, None, None],
            "x": x,
            "arm": np.array(number),
            "draw": np.arange(draws)[:, None],
            "answer": np.arange(answers),
            "rewrite": k,
            "response": response,
            "reward": reward[x, response],
            **logps,
        }
        shape = (size.prompts, draws, answers)
        parts.append({name: np.broadcast_to(values, shape).ravel() for name, values in columns.items()})
    return (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        list(arms),
        (low, high),
    )


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

    `instance` is an `alignpro.theory.Instance`, or anything with its five arrays; `reward_range`, as
    declared, must enclose its rewards. Left out: their extremes.
    """
    columns, arms, (low, high) = _draw(instance, rng, size, prompters, policies, reward_range)
    order = np.lexsort([columns[name] for name in ("answer", "draw", "arm", "prompt")])
    sorted_: Any = {name: columns[name][order] for name in ("prompt", "arm", "draw", "answer", "reward")}
    return Rollouts(
        prompt_ids=tuple(map(str, range(size.prompts))),
        arms=tuple(arms),
        **sorted_,
        seed=np.zeros(len(order), np.int64),
        refused=np.zeros(len(order), bool),
        logps={name: columns[name][order] for name in LOGPS},
        prompters={(arm, 0): arm for arm in arms},
        direct=frozenset(policies or ()),
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
    **options: Any,
) -> Iterator[Rollout]:
    """Draw what `simulate` draws, with its options, as rows: texts are "x3", "rewrite 5", "y8"."""
    own = np.asarray(instance.own)
    columns, arms, (low, high) = _draw(instance, rng, size, **options)
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        row = dict(zip(columns, values, strict=True))
        arm, x, k = arms[row["arm"]], row["x"], row["rewrite"]
        yield Rollout(
            prompt_id=str(row["prompt"]),
            x=f"x{x}",
            arm=arm,
            seed=0,
            draw=row["draw"],
            answer=row["answer"],
            rewrite=None if k < 0 else f"x{x}" if k == own[x] else f"rewrite {k}",
            response=f"y{row['response']}",
            reward=float(row["reward"]),
            **{name: None if np.isnan(row[name]) else row[name] for name in LOGPS},
            frozen="frozen",
            prompter=arm,
            reward_model="reward",
            sampling="enumerated",
            reward_low=low,
            reward_high=high,
        )
