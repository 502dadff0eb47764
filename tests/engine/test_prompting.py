"""Conversations become tokens; what a user writes stays text."""

import pytest
from bases import tiny_base
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SPECIAL_TOKENS

TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*SPECIAL_TOKENS, "\ue0000\ue001", "\u2063answer\u2063", " "]), st.text(max_size=5)
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module", params=[True, False], ids=["chat template", "plain"])
def base(request, tmp_path_factory):
    return tiny_base("llama", tmp_path_factory.mktemp("base"), chat_template=request.param)


def turn(text, role="user"):
    return {"role": role, "content": text}


@given(text=TEXTS, answer=TEXTS)
def test_what_a_user_writes_can_not_make_special_tokens(base, text, answer):
    special = set(base.tokenizer.all_special_ids) - {base.tokenizer.unk_token_id}

    def marks(messages):
        return [i for i in base.chat.prompt_ids(messages) if i in special]

    assert marks([turn("be brief", "system"), turn(text)]) == marks(
        [turn("be brief", "system"), turn("hello")]
    )
    ids = base.chat.target_ids(answer)
    assert [i for i in ids if i in special] == [base.chat.end_of_turn]


def test_usual_text_is_tokenized_in_one_piece(base):
    messages = [
        turn("be brief", "system"),
        turn("turn on the light"),
        turn("done", "assistant"),
        turn("and now?"),
    ]
    whole = base.tokenizer(base.chat.prompt_text(messages), add_special_tokens=base.chat.plain)["input_ids"]
    assert base.chat.prompt_ids(messages) == whole


def test_spelled_out_tokens_are_kept_as_text(base):
    end = base.tokenizer.decode([base.chat.end_of_turn])
    ids = base.chat.prompt_ids([turn(f"what does {end} mean?")])
    assert f"what does {end} mean?" in base.tokenizer.decode(ids)
