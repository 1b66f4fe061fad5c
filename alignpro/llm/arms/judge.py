"""Judging a rollout file: pairs of answers from two arms, asked in both orders, kept as they are judged.

What a judge is asked and how its reply is read is `alignpro.llm.arms.question`; what the judgements say is
`alignpro.estimation.winrate`. Needs no torch, unless the judge runs in this process.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import rollouts
from alignpro.errors import AlignProError
from alignpro.files import write_text
from alignpro.llm.arms.forced import ForcedChoice
from alignpro.llm.arms.question import Reading, question, read_verdict
from alignpro.llm.arms.settings import JudgeSettings
from alignpro.llm.models.chat import parse_options
from alignpro.llm.models.prompt import Prompt, transcript
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.targets.quoting import control_tokens
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Answer, Target
from alignpro.runs import SETTINGS_FILE as SETTINGS_FILE
from alignpro.runs import here, owning

FILE = "judgements.jsonl"
"""A line for each pair judged."""
_COUNTED = 32  # replies after which it is seen whether too many are refused
Row = tuple[int, int, int]
"""Seed, draw and answer of a rollout."""


@dataclass(frozen=True)
class Pair:
    """One answer of each arm to one prompt."""

    prompt_id: str
    x: str
    """The prompt, with what was said before it."""
    answers: tuple[str | None, str | None]
    """Texts of the two answers, the arm of interest's first; None of one that was refused."""
    rows: tuple[Row, Row] = ((0, 0, 0), (0, 0, 0))
    """Which rollouts they are."""

    @property
    def missing(self) -> bool:
        """Whether there is nothing to judge: an answer was refused."""
        return None in self.answers

    @property
    def identical(self) -> bool:
        """Whether both answers are one text."""
        return not self.missing and self.answers[0] == self.answers[1]


@dataclass(frozen=True)
class Judgement:
    """A pair and what the judge said of it in both orders."""

    pair: Pair
    verdicts: tuple[Reading, Reading] | None
    """With the pair's first answer shown first, then second, both failed where one was refused; None where
    the answers are one text, which no judge can tell apart."""

    def said(self) -> tuple[str | None, str | None]:
        """Say win, tie or loss of the pair's first answer for each order; None where the order failed."""
        if self.verdicts is None:
            return "tie", "tie"
        names = {None: None, "TIE": "tie", "A": "win", "B": "loss"}
        swapped = {**names, "A": "loss", "B": "win"}
        return names[self.verdicts[0].choice], swapped[self.verdicts[1].choice]

    def row(self, arms: tuple[str, str], judge: str) -> dict[str, Any]:
        """The line of `judgements.jsonl`, as JSON values."""
        names = ("seed", "draw", "answer")
        return {
            "prompt_id": self.pair.prompt_id,
            "arms": list(arms),
            "rollouts": [dict(zip(names, row, strict=True)) for row in self.pair.rows],
            "lengths": [None if answer is None else len(answer) for answer in self.pair.answers],
            "judge": judge,
            "identical": self.verdicts is None,
            "verdicts": list(self.said()),
            "failures": [v.failure for v in self.verdicts or ()],
            "replies": [v.text for v in self.verdicts or ()],
        }


def pairs(
    path: str | Path, arms: Sequence[str], per_prompt: int = 1, prompts: int | None = None
) -> list[Pair]:
    """Pair the answers of two arms to the same prompts, from a rollout file.

    A prompt's rollouts are taken by answer, then draw, then seed, and paired in turn; prompt number i begins
    at the i-th, so that even one pair a prompt meets every seed. With k pairs no rollout of either arm comes
    up again before all of that arm have; k is at most the number of rollouts of the larger arm.
    """
    if len(arms) != 2 or arms[0] == arms[1]:
        raise AlignProError(f"--arms {' '.join(arms)}: name two different arms, the one of interest first")
    found = rollouts.read(path)
    for arm in arms:
        if arm not in found.arms:
            raise AlignProError(f"--arms {arm}: is no arm here; give two of {', '.join(found.arms)}")
    most = len(found.prompt_ids)
    if prompts is not None and not 1 <= prompts <= most:
        raise AlignProError(f"prompts {prompts}: choose from 1 to the {most} there are")
    order = np.lexsort((found.seed, found.draw, found.answer, found.prompt))
    of: dict[tuple[int, str], list[Row]] = {}
    for i in order:
        key = int(found.prompt[i]), found.arms[found.arm[i]]
        of.setdefault(key, []).append((int(found.seed[i]), int(found.draw[i]), int(found.answer[i])))
    chosen: list[tuple[str, tuple[Row, Row]]] = []
    for p, name in enumerate(found.prompt_ids[:prompts]):
        both = [of.get((p, arm), []) for arm in arms]
        for arm, rows in zip(arms, both, strict=True):
            if not rows:
                raise AlignProError(f"--arms {arm}: has no rollouts of prompt_id {name!r}; roll it out first")
        for k in range(min(per_prompt, max(map(len, both)))):
            first, second = (rows[(p + k) % len(rows)] for rows in both)
            chosen.append((name, (first, second)))
    wanted = {(name, arm, row) for name, both in chosen for arm, row in zip(arms, both, strict=True)}
    texts: dict[tuple[str, str, Row], str] = {}
    asked: dict[str, str] = {}
    with open(path, "rb") as file:
        for row in (json.loads(line) for line in file if not line.isspace()):
            key_ = row["prompt_id"], row["arm"], (row["seed"], row["draw"], row["answer"])
            if key_ in wanted:
                texts[key_] = row["response"]
                asked[row["prompt_id"]] = Prompt(row["x"], row.get("context") or ())
    a, b = arms
    return [
        Pair(name, asked[name], (texts[name, a, rows[0]], texts[name, b, rows[1]]), rows)
        for name, rows in chosen
    ]


def judge(
    target: Target,
    compared: Sequence[Pair],
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    on_reply: Callable[[], Any] = lambda: None,
    refusals: Refusals | None = None,
) -> list[Judgement]:
    """Judge each pair in both orders; nothing is asked where its answers are one text, or one was refused.

    Args:
        target: the judge; a `ledger.Cached` one pays for no reply twice.
        sampling: how the judge decodes. Left out: temperature 0 and at most 256 tokens.
        on_reply: called as each reply arrives.
        refusals: counts the replies, and ends a run in which too many are refused.
    """
    asked = [i for i, pair in enumerate(compared) if not pair.identical and not pair.missing]
    control = control_tokens(target)
    questions = [
        question(transcript(compared[i].x), str(answers[0]), str(answers[1]), control)
        for i in asked
        for answers in (compared[i].answers, compared[i].answers[::-1])
    ]
    sampling = sampling or Sampling(temperature=0.0, max_tokens=256)
    refusals, arrived = refusals or Refusals(most=1.0), list[Answer]()

    def arrive(_position: int, _index: int, reply: Answer) -> None:
        on_reply()
        arrived.append(reply)
        if len(arrived) == _COUNTED:  # not at the end alone: refused replies may have been paid for
            refusals.count(arrived)
            arrived.clear()

    replies = target.respond(questions, sampling, seed=seed, on_answer=arrive)
    refusals.count(arrived)
    read = [read_verdict(reply.text, reply.finish) for (reply,) in replies]
    verdicts = dict(zip(asked, zip(read[::2], read[1::2], strict=True), strict=True))
    missing = Reading(None, "refused", "")
    return [
        Judgement(pair, (missing, missing) if pair.missing else verdicts.get(i))
        for i, pair in enumerate(compared)
    ]


def is_address(name: str) -> bool:
    """Whether `name` is that of an endpoint and not of a model in this process."""
    return name.startswith(("http://", "https://"))


def opening(settings: JudgeSettings, endpoint: EndpointSettings) -> Callable[[], Target]:
    """Check how the judge is named, and return what opens it: a model in this process is loaded only then."""
    given, options = endpoint.given(), parse_options(settings.chat_template_kwargs)
    if is_address(settings.judge):
        if settings.forced:
            raise AlignProError(
                "forced: an endpoint does not score given replies; leave out --forced, or give --judge a "
                "model that runs in this process"
            )
        if endpoint.model is None:
            raise AlignProError(f"judge_model: name the model that {settings.judge} serves")
        from alignpro.llm.targets.endpoint import Endpoint

        opened = Endpoint(settings.judge, endpoint, role="judge")
        return lambda: opened
    if given:
        raise AlignProError(
            f"judge_{given[0]}: is for an endpoint, and {settings.judge!r} is no http(s) address"
        )
    from alignpro.llm.models import catalogue, devices

    catalogue.check_name(settings.judge)
    devices.check_dtype(settings.dtype)

    def load() -> Target:
        from alignpro.llm.targets.local import LocalTarget

        size = settings.batch_size
        target = LocalTarget(
            settings.judge, dtype=settings.dtype, batch_size=size, chat_template_kwargs=options
        )
        return ForcedChoice(target) if settings.forced else target

    return load


@owning("judge")
def judge_file(
    file: str, arms: Sequence[str], settings: JudgeSettings, endpoint: EndpointSettings, out: str
) -> list[dict[str, Any]]:
    """Judge a rollout file into `out`: settings.json, answers/ (replies paid for), judgements.jsonl.

    Everything is checked before the judge is loaded; what is to be asked is estimated before it is asked. The
    same call goes on after an interruption, and further prompts can be added. The rows of judgements.jsonl
    come back, for `alignpro.estimation.winrate.collect`.
    """
    from tqdm import tqdm

    from alignpro.llm.models import contents, packages
    from alignpro.llm.targets.ledger import Cached, Prices

    prices = None if settings.prices is None else Prices(*settings.prices)
    opened = opening(settings, endpoint)
    compared = pairs(file, arms, settings.per_prompt, settings.prompts)
    folder, run = Path(out), here(out, "judge")
    record: dict[str, Any] = {"arms": list(arms), "judge": settings.judge, "judge_model": endpoint.model}
    record |= {name: getattr(settings, name) for name in ("temperature", "reply_tokens", "seed")}
    changes = endpoint.record("judge")
    record |= {"forced": settings.forced or None}  # None, as where an earlier version left them out
    record |= {name: changes[name] or None for name in ("judge_omit", "judge_extra_body")}
    if not is_address(settings.judge):
        from alignpro.llm.models import devices

        kind = devices.dtype_of(settings.dtype)
        record["dtype"] = None if kind == "bfloat16" else kind  # the default of an earlier version
        run.contents["judge"] = lambda: contents.of_model(settings.judge)
    run.begin(record, names=(FILE,))
    identical, missing = (sum(getattr(p, name) for p in compared) for name in ("identical", "missing"))
    same = f" ({identical} identical, not asked)" if identical else ""
    same += f" ({missing} with an answer that was refused, not asked)" if missing else ""
    packages.note(f"{len(compared)} pairs of {arms[0]} and {arms[1]}{same}, both orders")
    target = Cached(opened(), folder / "answers", prices=prices)

    def replied() -> None:
        run.claim()
        bar.update()

    with tqdm(total=2 * (len(compared) - identical - missing), unit="reply", disable=None) as bar:
        judged = judge(
            target,
            compared,
            settings.sampling(),
            seed=settings.seed,
            on_reply=replied,
            refusals=Refusals(most=settings.refused_most),
        )
    packages.note(target.ledger.line())
    rows = [judgement.row((arms[0], arms[1]), target.name) for judgement in judged]
    run.claim()
    # ASCII: a reply may hold what UTF-8 cannot.
    write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows), private=True)
    return rows


def failed_replies(rows: Sequence[dict[str, Any]], most: int = 3) -> list[str]:
    """Show the first `most` replies without a verdict, one a line, cut and escaped for a terminal."""
    found = [
        # The end of a long reply, where the verdict should be.
        f"{kind}, prompt {row['prompt_id']}: {text if len(text) <= 120 else '...' + text[-117:]!a}"
        for row in rows
        for kind, text in zip(row["failures"], row["replies"], strict=True)
        if kind is not None
    ]
    return found[:most]
