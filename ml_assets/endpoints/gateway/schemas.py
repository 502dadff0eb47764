"""What the gateway accepts: the part of OpenAI's chat completions that it does, and its own admin requests.

An argument that would change the answer and is not supported is an error, never ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

MAX_MESSAGES = 1000
MAX_STOPS = 4
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Body(BaseModel):
    """A request body: unknown fields are errors, and a string is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn. `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """{"role", "content"} as chat templates know it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


def _default(*accepted: Any) -> Any:
    """The type of an OpenAI argument that only its neutral values are supported for."""

    def check(value: Any) -> Any:
        if not any(value == one and type(value) is type(one) for one in accepted):
            shown = " or ".join(repr(one) for one in accepted if one is not None)
            raise ValueError(f"not supported by this endpoint, expected {shown or 'null'} or no value")
        return value

    return Annotated[Any, BeforeValidator(check)]


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
    # neutral values only
    n: _default(1, None) = None
    frequency_penalty: _default(0, 0.0, None) = None
    presence_penalty: _default(0, 0.0, None) = None
    logprobs: _default(False, None) = None
    top_logprobs: _default(None) = None
    logit_bias: _default({}, None) = None
    response_format: _default({"type": "text"}, None) = None
    modalities: _default(["text"], None) = None
    tools: _default([], None) = None
    tool_choice: _default("none", "auto", None) = None
    parallel_tool_calls: _default(True, False, None) = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"expected at most {MAX_STOPS} strings, found {len(stop)}")
        if stop is not None and "" in ([stop] if isinstance(stop, str) else stop):
            raise ValueError("expected strings that are not empty")
        return stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError('stream_options: only allowed with "stream": true')
        return self

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class StageRequest(Body):
    """POST /admin/stage: load this version beside what serves."""

    customization: str
    base_revision: str
    base_digest: Digest
    adapter_digest: Digest
    max_new_tokens: int = Field(default=256, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)


class ActivateRequest(Body):
    """POST /admin/activate: follow the ledger. `adapter_digest` is what the caller thinks it says now; null
    when the customization was withdrawn."""

    customization: str
    adapter_digest: Digest | None


class CustomizationRequest(Body):
    """POST /admin/discard and /admin/probe."""

    customization: str
