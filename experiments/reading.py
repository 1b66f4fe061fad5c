"""What is reading x worth to a prompter, exactly, on a real language model; and does PPO collect it?

    python experiments/reading.py --out runs/reading --no-train   # the exact numbers: minutes
    python experiments/reading.py --out runs/reading              # and a training for each seed

Strategies are the same for every prompt: x alone, or x and one of 20 instructions of the bank. Prompts are of
two kinds, told apart by their first word: requests to make something, whose answers are rewarded by reading
ease, and all others, by brevity. So no instruction suits all, and the best prompter that ignores x, q*, falls
short of ρ*. Models are restricted to what was sampled, as in `alignpro demo`; from there on all is exact.
Interrupt at any time; the same command goes on. Writes results.json and reading.png into `out`.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from paper_grid import launch
from scipy.special import rel_entr
from task_grid.kinds import MAKING, plain_or_brief

from alignpro.errors import AlignProError
from alignpro.files import write_json
from alignpro.llm.arms.demo import DemoSettings, Measures, enumerated, fit, made
from alignpro.llm.arms.enumerate import Enumeration
from alignpro.llm.arms.settings import EnumerationSettings
from alignpro.llm.data.bank import BANK
from alignpro.llm.data.packaged import instructions
from alignpro.llm.models.forward import token_seconds
from alignpro.llm.models.load import load_model
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.policies.prompter import Prompter, has_template
from alignpro.llm.training.settings import TreeSettings
from alignpro.report import theme
from alignpro.runs import environment, own
from alignpro.theory import Instance, solution
from alignpro.theory.instance import KEYS
from alignpro.theory.proof.certify import certify
from alignpro.theory.proof.shared import certified_price
from alignpro.theory.results import strategy_table, universal

Json = dict[str, Any]
KINDS = ("make", "tell")
GAPS = ("theorem1", "law")
"""Bounds of J(π*) − J(ρ*) that are certified, prompt by prompt."""
SHARED = ("instance.npz", "texts.json", "results.json", "ppo-*")
"""Names that are made in the folder."""


@dataclass(frozen=True)
class Experiment:
    out: Path
    model: str = "smollm2-135m-instruct"
    """The frozen model."""
    prompter: str = "instructions-sft"
    """ρ_sft; a model that was not trained as a prompter stands behind the template that appends."""
    prompts: int = 16
    """As many of each kind."""
    prompt_words: int = 12
    """Longest prompt, in words."""
    instructions: int = 20
    """From the bank's groups by turns, "Answer in one word." the 20th. With x alone, the strategies."""
    responses: int = 32
    """Distinct responses to each prompt, drawn evenly under all strategies."""
    response_tokens: int = 40
    """Longest response; where all are cut short, brevity tells none from another."""
    seed: int = 0
    """Of prompts and responses."""
    beta: float = 0.1
    lams: tuple[float, ...] = (0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5)
    """λ of the exact numbers; training has its own."""
    prior: Literal["prompter", "uniform"] = "prompter"
    """ρ_sft of the printed table and of the figure's lines over λ; results.json has both."""
    training: TreeSettings = field(default_factory=lambda: TreeSettings(lam=0.02, iterations=32))
    """How PPO is trained, from the prompter's ρ_sft and with it as the reference."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the training; the enumeration is the same for all."""
    train: bool = True
    threads: int | None = None
    """Of torch; as many as it likes when left out."""

    def __post_init__(self) -> None:
        if self.prompts < 2 or self.prompts % len(KINDS):
            raise AlignProError(f"prompts {self.prompts}: give an even number, half of each kind")
        most = sum(map(len, BANK.values()))
        if not 1 <= self.instructions <= most:
            raise AlignProError(f"instructions {self.instructions}: give 1 to the bank's {most}")

    def sampled(self) -> Json:
        """The settings that determine the enumeration."""
        names = ("model", "prompter", "prompts", "prompt_words", "instructions")
        return {n: getattr(self, n) for n in (*names, "responses", "response_tokens", "seed")}


def kind_of(x: str) -> int:
    """The kind of a prompt, a position in `KINDS`, by its first word."""
    return 1 - int(MAKING.of([x])[0])


def chosen_prompts(count: int, seed: int, words: int) -> list[str]:
    """As many prompts of each kind, those of a kind together, in the order that `seed` gives the data."""
    every = instructions(seed=seed, max_words=words)
    of_kind = [[x for x in every if kind_of(x) == kind] for kind in range(len(KINDS))]
    if (least := min(map(len, of_kind))) * len(KINDS) < count:
        raise AlignProError(f"prompts {count}: a kind has {least}; give at most {len(KINDS) * least}")
    return [x for row in of_kind for x in row[: count // len(KINDS)]]


def strategies(count: int) -> list[str]:
    """What is added to x: nothing, or one of `count` instructions, from the bank's groups by turns."""
    turns = itertools.zip_longest(*BANK.values())
    return ["", *[text for turn in turns for text in turn if text][:count]]


@dataclass(frozen=True)
class Table:
    """Strategies that all prompts share, on one instance.

    Attributes:
        reward: [X, S] R(x, s), expected reward of strategy s on prompt x; strategy 0 leaves x as it is.
        prior: [X, S] ρ_sft(s|x).
        p: [X] P(x).
        kinds: [X] kinds of prompts, whole numbers from 0.
    """

    reward: np.ndarray
    prior: np.ndarray
    p: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, instance: Instance, kinds: Sequence[int]) -> "Table":
        """Read them off an instance that has as many rewrites of each prompt, prompt by prompt."""
        prompts, rewrites, _ = instance.shape
        at = np.arange(rewrites).reshape(prompts, -1)
        reward, prior = strategy_table(instance, at)
        return cls(np.asarray(reward), np.asarray(prior), np.asarray(instance.p), np.asarray(kinds))

    def uniform(self) -> "Table":
        """The same with all strategies as likely."""
        return replace(self, prior=np.full(self.prior.shape, 1 / self.prior.shape[1]))


def priced(table: Table, lam: float) -> Json:
    """Rewards and objectives of the prompters at one λ, and the price of not reading x; reward units.

    `rewards` are E R, `objectives` F(ρ) = E R − λ KL(ρ‖ρ_sft), of: none, fixed (the instruction of largest
    E R), sft, shared (q*), router (the optimum among those that read the kind of x alone), star (ρ*).
    `price` = F(ρ*) − F(q*) = `explained` (what the router has of it) + `rest`, between `lower` and `upper`;
    `alone` is what it would be if all strategies earned alike: where ρ_sft reads x, ignoring x costs KL.
    """
    reward, prior, p, kinds = table.reward, table.prior, table.p, table.kinds
    found = universal(reward, lam, prior, p, labels=kinds)
    share = np.array([p[kinds == kind].sum() for kind in np.unique(kinds)])
    within = [
        universal(reward[kinds == kind], lam, prior[kinds == kind], p[kinds == kind] / weight)
        for kind, weight in zip(np.unique(kinds), share, strict=True)
    ]
    best, value, sft = int(found.best), float(found.value), float(p @ (prior * reward).sum(1))
    price, explained = float(found.price), float(found.explained)
    always = p @ (reward + lam * np.log(prior))  # F of the prompter that always takes this strategy
    return {
        "lam": lam,
        "rewards": {
            "none": float(p @ reward[:, 0]),
            "fixed": float(found.best_reward),
            "sft": sft,
            "shared": float(found.achieved),
            "router": float(share @ [float(w.achieved) for w in within]),
            "star": float(found.achieved_read),
        },
        "objectives": {
            "none": float(always[0]),
            "fixed": float(always[best]),
            "sft": sft,
            "shared": value,
            "router": value + explained,
            "star": float(found.read),
        },
        "price": price,
        "explained": explained,
        "rest": price - explained,
        "alone": float(universal(np.zeros_like(reward), lam, prior, p).price),
        "lower": float(found.lower),
        "upper": float(found.upper),
        "error": float(found.error),
        "kl": price / lam,
        "per_prompt": np.asarray(found.per_prompt).tolist(),
        "fixed": best,
        "router": [int(np.argmax(w.q)) for w in within],
        "q": np.asarray(found.q).tolist(),
        "certificates": [asdict(each) for each in certified_price(reward, lam, prior, p)],
    }


def blocks(enumeration: Enumeration) -> list[Instance]:
    """Each prompt's own part of the instance, with the rewrites and responses that it can reach."""
    _, prior, frozen, _, reward = (np.asarray(getattr(enumeration.instance, key)) for key in KEYS)
    found = []
    for x in range(len(enumeration.prompts)):
        k, y = enumeration.rows(x), enumeration.columns(x)
        found.append(Instance(np.ones(1), prior[[x], k], frozen[k, y], np.zeros(1, int), reward[[x], y]))
    return found


def collected(shortfall: float, price: float) -> float:
    """The share of F(ρ*) − F(q*) = `price` that a prompter short of F(ρ*) by `shortfall` has: 0 at q*."""
    return 1 - shortfall / price


class Collected(Measures):
    """The demo's measures of a prompter, how far it is from q*, and the share of the price it collects."""

    def __init__(self, instance: Instance, beta: float, lam: float, table: Table) -> None:
        found = universal(table.reward, lam, table.prior, table.p)
        self.price, self.p = float(found.price), table.p
        if self.price <= float(found.error):
            raise AlignProError(f"lam {lam:g}: here the best prompter ignores x; there is nothing to collect")
        # q* on every prompt's own rewrites.
        self.shared = np.kron(np.eye(len(table.p)), np.asarray(found.q))
        super().__init__(instance, beta, lam)

    def of(self, rho: np.ndarray) -> dict[str, float]:
        """`Measures.of`, E_x KL(ρ‖q*) in nats, and `collected`."""
        exact = super().of(rho)
        apart = float(self.p @ rel_entr(np.asarray(rho), self.shared).sum(1))
        return exact | {"kl_to_shared": apart, "collected": collected(exact["shortfall"], self.price)}


def run(experiment: Experiment) -> Json:
    """Enumerate, price, train, and write down."""
    if experiment.threads is not None:
        torch.set_num_threads(experiment.threads)
    with own(experiment.out, "reading") as held:
        held.begin({"settings": experiment.sampled()}, names=SHARED)
        return _run(experiment)


def _run(experiment: Experiment) -> Json:
    out = Path(experiment.out)
    prompts = chosen_prompts(experiment.prompts, experiment.seed, experiment.prompt_words)
    added = strategies(experiment.instructions)
    rewrites = [[x, *(with_instruction(x, text) for text in added[1:])] for x in prompts]
    model, tokenizer = load_model(experiment.model)
    prompter = open_prompter(experiment.prompter)
    print(cost(experiment, token_seconds(model)), flush=True)
    sizes = EnumerationSettings(
        responses=experiment.responses, response_tokens=experiment.response_tokens, seed=experiment.seed
    )
    settings = DemoSettings(enumeration=sizes, seed=experiment.seed)
    how: Json = {"prompter": prompter, "rewrites": rewrites}
    enumeration, judged = enumerated(out, settings, prompts, model, tokenizer, plain_or_brief, **how)
    if [list(row) for row in enumeration.rewrites] != rewrites:
        raise AlignProError(f"--out {out}: holds other prompts or instructions; choose another folder")
    parts = blocks(enumeration)
    table = Table.of(enumeration.instance, [kind_of(x) for x in prompts])
    results = {
        "settings": asdict(replace(experiment, out=Path())) | {"out": None},
        "environment": environment(),
        "threads": torch.get_num_threads(),
        "reward": judged,
        "strategies": added,
        "prompts": [{"text": x, "kind": KINDS[kind_of(x)]} for x in prompts],
        "reward_table": table.reward.tolist(),
        "prior_table": table.prior.tolist(),
        "rlhf": float(solution(enumeration.instance, experiment.beta, 1.0).j_star),
        "prices": {
            name: [priced(each, lam) for lam in experiment.lams]
            for name, each in (("prompter", table), ("uniform", table.uniform()))
        },
        "gaps": {
            name: [
                [certify(each, experiment.beta, lam, name).verdict for each in parts]
                for lam in experiment.lams
            ]
            for name in GAPS
        },
        "trained": {},
    }
    print(said(results, experiment.prior), flush=True)
    write_json(out / "results.json", results)
    draw(results, out / "reading.png", experiment.prior)
    for seed in experiment.seeds if experiment.train else ():
        results["trained"][seed] = trained(experiment, enumeration, table, seed)
        write_json(out / "results.json", results)
        draw(results, out / "reading.png", experiment.prior)
        print(said_of(seed, results["trained"][seed]), flush=True)
    return results


def open_prompter(name: str) -> Prompter:
    """ρ_sft, its adapter merged, so that it can be trained on from there."""
    if has_template(name):
        return Prompter.from_pretrained(name, merged=True)
    return Prompter.from_pretrained(name, template="append")


def cost(experiment: Experiment, token: float) -> str:
    """What is to be done, and about how long it takes at so many seconds for a token."""
    e, t, rewrites = experiment, experiment.training, experiment.instructions + 1
    # A decoding step costs about six times a scored token, a training pass about twice a forward one.
    drawn = e.prompts * e.responses * (50 + 6 * e.response_tokens)
    scored = e.prompts * rewrites * (50 + 0.7 * e.responses * e.response_tokens)
    steps = t.iterations * e.prompts * (170 + 5 * rewrites) * (2 * t.epochs + 1)
    minutes = [0 if made(Path(e.out)) else (drawn + scored) * token / 60]
    minutes += [steps * token / 60] * (len(e.seeds) if e.train else 0)
    each = f", then {len(e.seeds)} trainings of {minutes[-1]:.0f} min" if len(minutes) > 1 else ""
    return (
        f"{e.prompts} prompts × {rewrites} strategies × {e.responses} responses: about {minutes[0]:.0f} min"
        f"{each} on this machine ({1 / token:.0f} tokens/s scored, {torch.get_num_threads()} threads)"
    )


def trained(experiment: Experiment, enumeration: Enumeration, table: Table, seed: int) -> Json:
    """Train with one seed, from ρ_sft; a finished training is read."""
    training = replace(experiment.training, seed=seed)
    measures = Collected(enumeration.instance, experiment.beta, training.lam, table)
    prompter = open_prompter(experiment.prompter)  # training wraps the model in place
    folder = Path(experiment.out) / f"{training.algorithm}-lam{training.lam:g}-seed{seed}"
    models, how = (prompter.model, prompter.tokenizer), {"exact_rewards": True, "resume": True}
    curve = fit(enumeration, measures, training, *models, folder, **how).metrics
    return {
        "lam": training.lam,
        "price": measures.price,
        "seconds": curve[-1]["seconds"],
        "last": curve[-1]["exact"],
        "curve": [{"step": line["step"], **line["exact"]} for line in curve],
    }


LINES = {
    "none": ("none", theme.MUTED, ":"),
    "fixed": ("best fixed instruction", theme.ORANGE, "-"),
    "shared": ("q*, ignores x", theme.BLUE, "-"),
    "router": ("reads the kind", theme.GREEN, "-"),
    "star": ("ρ*, reads x", theme.VERMILION, "-"),
}
"""Prompters of the figure and the table: words, colour, style."""


def said(results: Mapping[str, Any], prior: str) -> str:
    """The table of one prior as text."""
    rows = results["prices"][prior]
    lines = [
        f"ρ_sft: {prior}; J(π*) = {results['rlhf']:.4f} at β = {results['settings']['beta']:g}",
        f"{'λ':>6} " + " ".join(f"{'J ' + n:>9}" for n in LINES) + "    price    kind    rest        bounds",
    ]
    for row in rows:
        proved = all(each["verdict"] == "holds" for each in row["certificates"])
        lines.append(
            f"{row['lam']:6g} "
            + " ".join(f"{row['rewards'][n]:9.4f}" for n in LINES)
            + f"  {row['price']:7.4f} {row['explained']:7.4f} {row['rest']:7.4f}  "
            + f"{row['lower']:.4f} {row['upper']:.4f} {'proved' if proved else 'not proved'}"
        )
    text = results["strategies"]
    lines.append(f"best fixed: {text[rows[0]['fixed']] or 'none'!r}; by kind, at the smallest and largest λ:")
    for row in (rows[0], rows[-1]):
        best = (f"{kind}: {text[s] or 'none'!r}" for kind, s in zip(KINDS, row["router"], strict=True))
        lines.append(f"  {row['lam']:g}: " + ", ".join(best))
    verdicts = [v for rows in results["gaps"].values() for row in rows for v in row]
    lines.append(f"J(π*) − J(ρ*) ≤ {', '.join(GAPS)}: {verdicts.count('holds')} of {len(verdicts)} proved")
    return "\n".join(lines)


def said_of(seed: int, training: Mapping[str, Any]) -> str:
    """What one training collected, as text."""
    last = training["last"]
    return (
        f"seed {seed}: collects {last['collected']:.1%} of the price {training['price']:.4f} at λ = "
        f"{training['lam']:g}; KL(ρ_θ‖ρ*) {last['kl_to_star']:.4f}, KL(ρ_θ‖q*) {last['kl_to_shared']:.4f}, "
        f"J {last['reward']:.4f}; {training['seconds'] / 60:.0f} min"
    )


@mpl.rc_context(theme.STYLE)
def draw(results: Mapping[str, Any], path: Path, prior: str) -> None:
    """Reward against λ, the price and what explains it, and, where there was training, both divergences."""
    rows, runs = results["prices"][prior], results["trained"]
    count, lams = 3 if runs else 2, [row["lam"] for row in rows]
    figure = Figure(figsize=(4.6 * count, 4), layout="constrained")
    left, middle, *more = figure.subplots(1, count)
    left.axhline(results["rlhf"], color=theme.INK, linestyle="--", linewidth=1.2, label="π*, RLHF optimum")
    for name, (words, colour, style) in reversed(LINES.items()):
        values = [row["rewards"][name] for row in rows]
        left.plot(lams, values, color=colour, linestyle=style, label=words, linewidth=1.8)
    by_lam = {"xscale": "log", "xlabel": "λ, reward units"}
    left.set(**by_lam, ylabel="expected reward", title="What each earns")
    explained, rest, lower, upper = (
        [row[n] for row in rows] for n in ("explained", "rest", "lower", "upper")
    )
    named = ("what the kind of x explains", "what the rest of x does")
    middle.stackplot(lams, explained, rest, labels=named, colors=(theme.GREEN, theme.SKY), alpha=0.75)
    middle.plot(lams, upper, color=theme.INK, linestyle="--", linewidth=1, label="its bounds")
    middle.plot(lams, lower, color=theme.INK, linestyle="--", linewidth=1)
    middle.set(**by_lam, ylabel="F(ρ*) − F(q*)", title="What reading x is worth")
    for axis in more:
        for seed, training in runs.items():
            steps = [line["step"] for line in training["curve"]]
            words = f"seed {seed}: {training['last']['collected']:.1%} of the price"
            for name, colour, label in (("shared", theme.BLUE, None), ("star", theme.VERMILION, words)):
                values = [line[f"kl_to_{name}"] for line in training["curve"]]
                axis.plot(steps, values, color=colour, linewidth=1.4, alpha=0.8, label=label)
        axis.set(xlabel="optimizer steps", ylabel="nats", yscale="log")
        axis.set_title("PPO: KL(ρ_θ‖ρ*), red, and KL(ρ_θ‖q*), blue")
    for axis in (left, middle, *more):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> int:
    run(tyro.cli(Experiment, config=(tyro.conf.FlagCreatePairsOff,)))
    return 0


if __name__ == "__main__":
    sys.exit(launch.ended("reading.py", main))
