"""A Python function of the user's own as reward."""

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from alignpro.errors import AlignProError
from alignpro.llm.models import libraries, packages
from alignpro.llm.rewards import own
from alignpro.llm.rewards.bounds import Bounded, Bounds, parse_bounds
from alignpro.llm.rewards.columns import Columns, columns_read_by
from alignpro.llm.rewards.reward import Array, at_least, batches, check_texts, sample_shown, shown
from alignpro.llm.targets import http


@dataclass
class CallableReward:
    """A reward that a Python function gives.

    Args:
        function: takes (prompts, responses), lists of strings, and gives one number per sample; or, with
            `each`, takes one prompt and one response, and gives a number. Further parameters get the columns
            of that name that the prompts come with (see `Prompt`), as lists or, with `each`, as one value:
            one without default must be there, one with it may be, and `**` takes all.
        bounds: see `parse_bounds`.
        each: whether the function takes one sample.
        is_async: whether calls are awaited; None finds out whether the function is `async def`. Every `score`
            runs its calls in an event loop of its own, so nothing that belongs to a loop may outlive a call.
        concurrency: how many asynchronous calls are under way at once.
        batch_size: samples per call, without `each`.
        context: further keyword arguments of every call, which no column replaces.
        name: shown by `describe`; the function's own if empty.
    """

    function: Callable[..., Any]
    bounds: Bounds | str
    each: bool = False
    is_async: bool | None = None
    concurrency: int = 8
    batch_size: int = 64
    context: Mapping[str, Any] = field(default_factory=dict, repr=False)
    name: str = ""
    bounded: Bounded = field(init=False, repr=False)
    low: float = field(init=False)
    high: float = field(init=False)
    reads: Columns = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise AlignProError(f"function: {type(self.function).__name__} cannot be called; give a function")
        at_least(1, concurrency=self.concurrency, batch_size=self.batch_size)
        self.bounds = parse_bounds(self.bounds)
        self.bounded = Bounded(self.bounds)
        self.low, self.high = self.bounds.low, self.bounds.high
        self.name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        if self.is_async is None:
            called = getattr(self.function, "__call__", None)  # noqa: B004 - of an object, it may be async
            self.is_async = any(map(inspect.iscoroutinefunction, (self.function, called)))
        self.reads = columns_read_by(self.function, self.context)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that come without a column which the function needs."""
        self.reads.check(prompts, self.name)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Call the function and bound what it returns: [n] float64 in [low, high].

        Raises:
            AlignProError: a column is missing; the function raised (its exception is the cause), or returned
                something else than one finite number per sample; the sample is shown.
        """
        check_texts(prompts, responses)
        self.check_prompts(prompts)
        parts = batches(len(prompts), 1 if self.each else self.batch_size)
        if self.is_async:
            raw = http.finish(self._score_all(prompts, responses, parts))
        else:
            raw = []
            for part in parts:
                with self._blamed(prompts, responses, part):
                    result = self._call(prompts, responses, part)
                if inspect.isawaitable(result):
                    if inspect.iscoroutine(result):
                        result.close()
                    raise AlignProError(f"function {self.name}: it is asynchronous; set is_async=True")
                raw.append(self._checked(prompts, responses, part, result))
        return self.bounded.apply(np.concatenate([np.zeros(0), *raw]))

    def describe(self) -> dict[str, Any]:
        """Name the function, and the bounds with what they did."""
        return {"name": self.name, "kind": "Python function", "bounds": self.bounded.describe()}

    async def _score_all(
        self, prompts: Sequence[str], responses: Sequence[str], parts: Sequence[range]
    ) -> list[Array]:
        gate = asyncio.Semaphore(self.concurrency)

        async def one(part: range) -> Array:
            async with gate:
                with self._blamed(prompts, responses, part):
                    result = self._call(prompts, responses, part)
                    awaited = inspect.isawaitable(result)
                    result = await result if awaited else result
                if not awaited:
                    raise AlignProError(f"function {self.name}: it is not asynchronous; set is_async=False")
                return self._checked(prompts, responses, part, result)

        # The first failure ends the loop, which cancels the other calls.
        return list(await asyncio.gather(*map(one, parts)))

    def _call(self, prompts: Sequence[str], responses: Sequence[str], part: range) -> Any:
        xs, ys = [prompts[i] for i in part], [responses[i] for i in part]
        values: dict[str, Any] = self.reads.of(xs)
        if not self.each:
            return self.function(xs, ys, **(values | dict(self.context)))
        single = {name: value for name, (value,) in values.items()}
        return self.function(xs[0], ys[0], **(single | dict(self.context)))

    def _checked(self, prompts: Sequence[str], responses: Sequence[str], part: range, result: Any) -> Array:
        if self.each:
            result = [result.item() if isinstance(result, torch.Tensor | np.ndarray) else result]
        some = [prompts[i] for i in part], [responses[i] for i in part]
        return self.bounded.check(*some, result, start=part[0])

    @contextlib.contextmanager
    def _blamed(self, prompts: Sequence[str], responses: Sequence[str], part: range) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            sample = sample_shown(part[0], prompts[part[0]], responses[part[0]])
            if len(part) > 1:
                sample = f"samples {part[0]} to {part[-1]}, the first being {sample}"
            said = packages.scrub(libraries.one_line(error))
            raise AlignProError(
                f"function {self.name} raised {type(error).__name__} ({shown(said, 200)}){own.where(error)} "
                f"on {sample}"
            ) from error
