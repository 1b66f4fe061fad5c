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
    added = columns["rewrite"] == np.asarray(instance.own)[columns["x"]]
    strategy, names = _strategies(columns["rewrite"], added, columns["prompt"])
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
        strategy=strategy[order],
        added=added[order],
        strategies=names,
    )


def _strategies(
    rewrite: np.ndarray, own: np.ndarray, prompt: np.ndarray
) -> tuple[np.ndarray, dict[int, str]]:
    """Number what rewrites [N] do, in order of appearance, and name what they do to several prompts.

    The prompt itself (`own`) is one thing for all prompts, and so is every other rewrite.
    """
    does = np.where(own, np.max(rewrite, initial=0) + 1, rewrite)
    known, first, at = np.unique(does, return_index=True, return_inverse=True)
    first = np.where(known < 0, len(does), first)
    number = np.argsort(np.argsort(first))
    number[known < 0] = -1
    pairs = np.unique(np.stack([at, prompt]), axis=1)[0]
    shared = np.flatnonzero((np.bincount(pairs, minlength=len(known)) > 1) & (known >= 0))
    names = {int(number[i]): "" if known[i] > rewrite.max() else f"rewrite {known[i]} …" for i in shared}
    return number[at], names


class Instructions(NamedTuple):
    """A population of prompts to which a reference adds one of a few instructions; rewards are in [0, 1].

    R(x, s) = mean + prompt effect + instruction effect + interaction, each normal with its standard
    deviation, cut to [noise, 1 − noise]; an answer earns R ± noise with even chances.
    """

    instructions: int = 30
    prompts: int = 60
    draws: int = 2
    answers: int = 2
    own_answers: int = 4
    """Answers to each prompt itself."""
    mean: float = 0.45
    own: float = -0.026
    """Reward without an instruction, less `mean` and the prompt's effect."""
    effect: float = 0.1
    best: float | None = None
    """Gain of the best instruction over the mean, to which the effects are scaled. Left out: as drawn."""
    interaction: float = 0.04
    prompt: float = 0.1
    noise: float = 0.2
    concentration: float | None = None
    """Dirichlet parameter of each prompt's own ρ_sft. Left out: all instructions alike."""
    density: bool = True
    """Whether ρ_sft's log-probabilities are known."""


def simulate_instructions(
    rng: np.random.Generator,
    size: Instructions = Instructions(),  # noqa: B008 - immutable
) -> Rollouts:
    """Draw rollouts of arms none and sft from a population with shared instructions."""
    n, count = size.prompts, size.instructions
    effect = size.effect * rng.standard_normal(count)
    effect -= effect.mean()
    if size.best is not None:
        effect *= size.best / effect.max()
    own = size.mean + size.prompt * rng.standard_normal((n, 1))
    table = own + effect + size.interaction * rng.standard_normal((n, count))
    alike = np.full((n, count), 1.0 / count)
    prior = alike if size.concentration is None else rng.dirichlet(size.concentration * count * alike[0], n)
    strategy = _pick(rng, prior, size.draws)
    means = {
        0: np.broadcast_to(own + size.own, (n, size.own_answers))[..., None],
        1: np.repeat(np.take_along_axis(table, strategy, 1)[..., None], size.answers, -1),
    }
    parts = []
    for arm, mean in means.items():
        prompt, draw, answer = np.indices(mean.shape)
        sign = rng.choice([-1.0, 1.0], mean.shape)
        does = (strategy + 1)[..., None] if arm else np.zeros((n, 1, 1), int)
        known = (
            _log(np.take_along_axis(prior, strategy, 1)) if arm and size.density else np.full((n, 1), np.nan)
        )
        columns: dict[str, Any] = {
            "prompt": prompt,
            "arm": np.array(arm),
            "draw": draw,
            "answer": answer,
            "reward": np.clip(mean, size.noise, 1.0 - size.noise) + size.noise * sign,
            "strategy": does,
            "logp": known[..., None],
        }
        parts.append({name: np.broadcast_to(v, mean.shape).ravel() for name, v in columns.items()})
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort([whole[name] for name in ("answer", "draw", "arm", "prompt")])
    sorted_: Any = {name: values[order] for name, values in whole.items()}
    logp = sorted_.pop("logp")
    missing = np.full(len(order), np.nan)
    return Rollouts(
        prompt_ids=tuple(map(str, range(n))),
        arms=("none", "sft"),
        **sorted_,
        seed=np.zeros(len(order), np.int64),
        refused=np.zeros(len(order), bool),
        logps=dict.fromkeys(LOGPS, missing) | {"logp_reference": logp},
        prompters={("none", 0): "none", ("sft", 0): "sft"},
        direct=frozenset(),
        frozen="frozen",
        reward_model="reward",
        sampling="simulated",
        low=0.0,
        high=1.0,
        added=np.ones(len(order), bool),
        strategies={s: f"instruction {s}" if s else "" for s in range(count + 1)},
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
