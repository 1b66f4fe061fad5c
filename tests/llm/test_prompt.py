"""A prompt with a conversation or columns: a string that is told from others by all that it comes with."""

import copy
import json

import pytest

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import (
    Prompt,
    as_json,
    columns_of,
    context_of,
    from_json,
    messages_of,
    said_in,
    transcript,
)
from alignpro.llm.models.sampling import digest

BEFORE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
CHAT = Prompt("Go on.", BEFORE)


def test_without_more_it_is_its_text():
    plain = Prompt("Go on.")
    for one, other in ((plain, "Go on."), ("Go on.", plain)):
        assert one == other
        assert (one != other) is False
        assert hash(one) == hash(other)
    assert as_json(plain) == "Go on."
    assert digest("a", plain) == digest("a", "Go on.")
    assert messages_of("Go on.") == [{"role": "user", "content": "Go on."}]
    assert said_in("Go on.", "Stop.") == transcript("Stop.") == "Stop."


def test_what_comes_with_it_tells_it_from_others():
    others = [
        "Go on.",
        Prompt("Go on.", BEFORE[:1]),
        Prompt("Go on.", BEFORE, {"a": 1}),
        Prompt("Go.", BEFORE),
    ]
    for other in others:
        for one, two in ((CHAT, other), (other, CHAT)):
            assert one != two
            assert not one == two  # noqa: SIM201
        assert digest(CHAT) != digest(other)
    assert len({CHAT, *others, Prompt("Go on.", BEFORE)}) == len(others) + 1
    assert str(CHAT) == "Go on."
    assert type(str(CHAT)) is str


@pytest.mark.parametrize("x", ["plain", CHAT, Prompt("é\u2028", BEFORE, {"answer": [1, None, "b"]})])
def test_it_survives_files_and_copies(x):
    for again in (
        from_json(json.loads(json.dumps(as_json(x)))),
        copy.deepcopy(x),
        copy.copy(x),
    ):
        assert again == x
        assert (context_of(again), columns_of(again)) == (context_of(x), columns_of(x))


def test_a_frozen_model_is_asked_without_columns():
    asked = said_in(Prompt("Go on.", BEFORE, {"answer": 3}), "Stop.")
    assert asked == Prompt("Stop.", BEFORE)
    assert not columns_of(asked)
    assert messages_of(asked) == [*BEFORE, {"role": "user", "content": "Stop."}]
    assert transcript(asked) == "System: Be brief.\n\nUser: Hi\n\nUser: Stop."


@pytest.mark.parametrize(
    ("context", "columns"),
    [
        (["text"], None),
        ([{"role": "tool", "content": "a"}], None),
        ([{"role": "user"}], None),
        ((), {"a": {1}}),
    ],
)
def test_anything_else_is_refused(context, columns):
    with pytest.raises(AlignProError, match=r"^(context|columns)"):
        Prompt("a", context, columns)
