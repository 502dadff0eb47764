"""From messages to tokens: the chat template of the base, or a plain one where it has none."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jinja2
from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Used for bases without a chat template; an answer ends with the end-of-sequence token."""

_MARK = "\u2063answer\u2063"
_ASIDE = re.compile("\ue000([0-9]+)\ue001")
"""Stands for a piece of a message while the template is applied: characters that no template alters."""


class PromptTemplates(Protocol):
    """What `ml_assets.spec.PromptSpec` has: templates whose `{column}` stands for a column of the row."""

    @property
    def system(self) -> str | None: ...
    @property
    def user(self) -> str: ...
    @property
    def target(self) -> str: ...


def render_messages(
    prompt: PromptTemplates | Mapping[str, Any], row: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Chat messages (system, if there is one, and user) of one row. Raises KeyError on a missing column."""
    system, user = _field(prompt, "system"), _field(prompt, "user")
    messages = [{"role": "system", "content": system.format_map(row)}] if system else []
    return [*messages, {"role": "user", "content": user.format_map(row)}]


def render_target(prompt: PromptTemplates | Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The answer that one row expects."""
    return _field(prompt, "target").format_map(row)


def _field(prompt: Any, name: str) -> Any:
    return prompt.get(name) if isinstance(prompt, Mapping) else getattr(prompt, name)


class ChatFormat:
    """Tokenizes conversations the way the base was trained to read them.

    `template` is the Jinja text in use; `stop_ids` end an answer. Raises ValueError when the tokenizer has no
    token that could end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.plain = not tokenizer.chat_template
        self.template: str = PLAIN_TEMPLATE if self.plain else str(tokenizer.chat_template)
        eos = tokenizer.eos_token_id
        self.end_of_turn = self._end_of_turn(eos if isinstance(eos, int) else None)
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._spelled = re.compile("|".join([_ASIDE.pattern, *map(re.escape, longest_first)]))
        stops = {self.end_of_turn, *eos_token_ids, *([eos] if isinstance(eos, int) else [])}
        self.stop_ids: frozenset[int] = frozenset(stops)

    def prompt_text(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = True) -> str:
        """The conversation as the model sees it, up to where it answers."""
        try:
            return self._render(messages, generation_prompt)
        except jinja2.TemplateError:
            # some templates refuse a system message: say it at the start of the first user message instead
            if not messages or messages[0]["role"] != "system" or len(messages) < 2:
                raise
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self._render([first, *messages[2:]], generation_prompt)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the conversation, ending where the answer begins.

        A special token that a message spells out ("<|im_end|>") is read as plain text: what a user writes
        can't end a turn or begin another one.
        """
        spelled: list[str] = []

        def set_aside(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return f"\ue000{len(spelled) - 1}\ue001"

        messages = [{**m, "content": self._spelled.sub(set_aside, m["content"])} for m in messages]
        pieces = _ASIDE.split(self.prompt_text(messages))
        ids = list(self.tokenizer(pieces[0], add_special_tokens=self.plain)["input_ids"])
        if self.plain and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]  # a tokenizer that closes every text: the answer is still to come
        for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += self._plain_text_ids(spelled[int(number)])
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def target_ids(self, text: str) -> list[int]:
        """Token ids of an answer and the token that ends it."""
        return [*self._plain_text_ids(text), self.end_of_turn]

    def invocation_ids(self) -> list[int]:
        """Tokens that open an answer, the end of every prompt: from here on an activated LoRA works.

        Raises ValueError when the chat template does not mark where an answer begins.
        """
        question = [{"role": "user", "content": "?"}]
        whole, without = self.prompt_text(question), self.prompt_text(question, generation_prompt=False)
        header = whole[len(without) :] if whole.startswith(without) else ""
        ids = list(self.tokenizer(header, add_special_tokens=False)["input_ids"]) if header else []
        if not ids or self.prompt_ids(question)[-len(ids) :] != ids:
            raise ValueError(
                "the chat template does not mark where an answer begins (add_generation_prompt), which an "
                "activated LoRA needs; expected adapter.kind: lora for this base"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer tokens, without special tokens and outer white space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _plain_text_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return list(ids)

    def _render(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        )

    def _end_of_turn(self, eos: int | None) -> int:
        if not self.plain:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
            after = self.prompt_text(turns, generation_prompt=False).rpartition(_MARK)[2].lstrip()
            ids = self.tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
            if ids and ids[0] in self.tokenizer.all_special_ids + list(self.tokenizer.added_tokens_decoder):
                return int(ids[0])
        if eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token, so an answer could never end")
        return eos
