"""What the gateway accepts: the part of OpenAI's chat completions that it does, and its own admin requests.

An argument that would change the answer and is not supported is an error, never ignored.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ml_assets.settings import EngineName
from ml_assets.spec import NAME

MAX_MESSAGES = 1000
MAX_STOPS = 4
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
MAX_RIGHT_ANSWER = 32_768
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=NAME)]


class Body(BaseModel):
    """A request body: unknown fields are errors, and a string is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn. `developer` is another word for `system`. What an answer may have besides its text is taken
    where it is empty, as OpenAI's client sends it back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def plain(self) -> dict[str, str]:
        """{"role", "content"} as chat templates know it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
"""Arguments of OpenAI's that are accepted with the values that change nothing (and null)."""


class ChatRequest(Body):
    """POST /v1/chat/completions. `temperature` is 0 unless given: the same question, the same answer."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    timeout: float | None = Field(default=None, gt=0)
    """Seconds: not OpenAI's; the gateway's own limit holds as well."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # names and labels, without a meaning here
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    # see NEUTRAL
    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    logit_bias: Any = None
    response_format: Any = None
    modalities: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None

    @field_validator(*NEUTRAL)
    @classmethod
    def _neutral(cls, value: Any, info: ValidationInfo) -> Any:
        accepted = NEUTRAL[info.field_name or ""]
        if value is not None and not any(value == one and type(value) is type(one) for one in accepted):
            expected = " or ".join(json.dumps(one) for one in (*accepted, None))
            raise ValueError(f"not supported by this endpoint, expected {expected}")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"expected at most {MAX_STOPS} strings, found {len(stop)}")
        if stop is not None and "" in ([stop] if isinstance(stop, str) else stop):
            raise ValueError("expected strings that are not empty")
        return stop

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if metadata is not None and len(metadata) > MAX_METADATA:
            raise ValueError(f"expected at most {MAX_METADATA} pairs, found {len(metadata)}")
        for key, value in (metadata or {}).items():
            if len(key) > MAX_METADATA_KEY:
                raise ValueError(f"expected keys of at most {MAX_METADATA_KEY} characters, found {len(key)}")
            if len(value) > MAX_METADATA_VALUE:
                raise ValueError(
                    f"expected values of at most {MAX_METADATA_VALUE} characters, found {len(value)}"
                )
        return metadata

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError('stream_options: only allowed with "stream": true')
        return self

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class FeedbackRequest(Body):
    """POST /v1/feedback: what a user says about the answer with this id."""

    id: str = Field(min_length=1, max_length=64, pattern=r"^[!-~]*$")  # PostgreSQL takes no NUL
    rating: Literal["up", "down"] | None = None
    right_answer: str | None = Field(default=None, min_length=1, max_length=MAX_RIGHT_ANSWER)

    @model_validator(mode="after")
    def _says_something(self) -> "FeedbackRequest":
        if self.rating is None and self.right_answer is None:
            raise ValueError("expected a rating, a right_answer, or both")
        return self


class StageRequest(Body):
    """POST /admin/stage: load this version beside what serves."""

    customization: Name
    base_revision: str
    base_digest: Digest
    adapter_digest: Digest
    max_new_tokens: int = Field(default=256, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    engine: EngineName | None = None


class ActivateRequest(Body):
    """POST /admin/activate: follow the ledger. `adapter_digest` is what the caller thinks it says now; null
    when the customization was withdrawn."""

    customization: Name
    adapter_digest: Digest | None


class CustomizationRequest(Body):
    """POST /admin/discard and /admin/probe."""

    customization: Name
