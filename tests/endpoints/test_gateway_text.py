"""Streamed text is the whole text: no broken characters, no lost ones, no stop string."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import _tokenizer

from ml_assets.endpoints.gateway.engine import Generation
from ml_assets.endpoints.gateway.text import Detokenizer, StopStrings, TrailingSpace

TOKENIZER = _tokenizer()
IDS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=60)


def decode(ids: object) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)  # type: ignore[call-overload]


def streamed(ids: list[int]) -> list[str]:
    detokenizer, trailing = Detokenizer(decode), TrailingSpace()
    pieces = [*(detokenizer.push(token) for token in ids), detokenizer.finish()]
    return [trailing.push(piece) for piece in pieces]


@given(st.text())
def test_any_text_comes_out_whole_and_in_whole_characters(text: str) -> None:
    pieces = streamed(TOKENIZER.encode(text).ids)
    assert "".join(pieces) == decode(TOKENIZER.encode(text).ids).strip()
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(IDS)
def test_any_tokens_give_the_text_of_all(ids: list[int]) -> None:
    assert "".join(streamed(ids)) == decode(ids).strip()


def test_a_character_of_several_tokens_comes_when_it_is_whole() -> None:
    ids = TOKENIZER.encode("a\N{FIRE}b").ids
    assert len(ids) >= 5
    assert [piece for piece in streamed(ids) if piece] == ["a", "\N{FIRE}", "b"]


@given(
    st.lists(st.text(alphabet="ab<>", max_size=5)),
    st.lists(st.text(alphabet="ab<>", min_size=1, max_size=4), max_size=4),
)
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    filter_ = StopStrings(stops)
    out = "".join([*map(filter_.push, pieces), filter_.finish()])
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert filter_.found == bool(ends)
    assert out == (text[: min(ends)[1]] if ends else text)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    filter_ = StopStrings(["</s>"])
    pieces = ["x<", "/s", "y", "<", "/s>z", "w"]
    assert [filter_.push(piece) for piece in pieces] == ["x", "", "</sy", "", "", ""]
    assert filter_.found


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "reason", "computed"),
    [
        ("\n", ["foo", "\n", "\n", "\n"], "foo", "stop", 2),
        ("\n\n", ["foo", "\n", "\n", " ", " "], "foo", "stop", 3),
        ("\n", ["\n", "foo", "bar"], "foobar", "length", 3),
        ("\n", ["foo", "\n", "bar", "bar"], "foo", "stop", 2),
        ("bar", ["foo", " ", "\n", "bar", "bar"], "foo", "stop", 4),
        ("\n", ["foo", " ", " "], "foo", "length", 3),
    ],
)
def test_a_stop_string_may_be_white_space(
    stop: str, tokens: list[str], text: str, reason: str, computed: int
) -> None:
    async def answered() -> list[Any]:
        tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(tokens[i] for i in ids))
        version: Any = SimpleNamespace(hosted=False, text=SimpleNamespace(tokenizer=tokenizer))
        engine: Any = SimpleNamespace(cancel=lambda _: None)
        request = Generation(engine, version, [1], len(tokens), 0.0, 1.0, 0, [stop])
        for i in range(len(tokens)):
            request.feed(i, "length" if i == len(tokens) - 1 else None)
            if request.finished:
                break
        return [piece async for piece in request]

    pieces = asyncio.run(answered())
    assert "".join(piece.text for piece in pieces) == text
    assert (pieces[-1].finish_reason, pieces[-1].tokens) == (reason, computed)
