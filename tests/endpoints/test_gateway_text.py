"""Streamed text is the whole text: no broken characters, no lost ones, no stop string."""

from hypothesis import given
from hypothesis import strategies as st
from tiny_models import _tokenizer

from ml_assets.endpoints.gateway.text import Detokenizer, StopStrings

TOKENIZER = _tokenizer()
IDS = st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=60)


def decode(ids: object) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)  # type: ignore[call-overload]


def streamed(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


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
