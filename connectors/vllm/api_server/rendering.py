"""The rendering of requests with vLLM's own code, so that every chat template is right."""

import hashlib
from array import array
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from vllm_cachescope.connectors.vllm.api_server.tokenizing import Tokenizing
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.boundaries import SpecialTokens
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.prompt.token_array import token_array
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.shared_memo import SharedMemo
from vllm_cachescope.tenancy.shares import AccountOf, own_account
from vllm_cachescope.wire.billing_header import drop_billing_blocks
from vllm_cachescope.wire.body import encode

logger = logger_of(__name__)

REMEMBERED_BYTES = 32 * 2**20
"""Memory for the tokens of rendered tools and system prompts, of all organisations, in bytes."""

ENTRY_BYTES = 600
"""Memory that the tokens of one rendering take besides 4 bytes each, in bytes."""

_NOT_RENDERED = frozenset(
    {"max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature", "top_p",
     "top_k", "metadata", "stop", "stop_sequences", "seed", "user", "n", "session_id",
     "prompt_cache_key", "request_id", "kv_transfer_params"}
)  # fmt: skip
"""Fields of a body that change no prompt, and so must not tell two equal prompts apart."""

_FOR_NO_ENGINE = {"skip_mm_cache": True}
"""vLLM's cache of pictures takes what was rendered as sent to the engine, and then only names it; a
request fails that names a picture which the engine does not have."""

_conversion_options: ContextVar[Mapping[str, Any]] = ContextVar(
    "cachescope_conversion_options", default=MappingProxyType({})
)
"""Options with which the Messages endpoint converted the task's request to Chat Completions. They
differ from one release of vLLM to the next."""

_text_only: ContextVar[bool] = ContextVar("cachescope_text_only", default=False)

_is_ours: ContextVar[bool] = ContextVar("cachescope_is_ours", default=False)
"""Whether what is rendered is the beginning of a prompt, and not for the engine."""


_Key = tuple[str | None, bytes]  # a session, and a hash of what is rendered


class _Rendered(BaseException):
    """Carries a rendered text from where vLLM would tokenise it, past vLLM's error handling."""

    def __init__(self, text: str) -> None:
        self.text = text


class CannotRender(Exception):
    """The chat template does not take a request that ends where this one was cut off."""


class Rendering:
    """Renders a request's body as vLLM's endpoints do.

    Args:
        state: the API server's state, with its renderer and endpoint handlers.
        on_tokenizing: called when the server is about to tokenise a prompt; returns who may find
            what is kept of its tokens, None for nobody.
        account_of: returns who answers for an organisation, by its id.
        token_bytes: memory for the tokens of recent prompts, in bytes; 0 to keep none.

    Attributes:
        special: the special tokens of the model's tokenizer.
    """

    def __init__(
        self,
        state: Any,
        on_tokenizing: Callable[[], Caller | None],
        account_of: AccountOf = own_account,
        token_bytes: int = 0,
    ) -> None:
        self._state = state
        self._renderer = state.online_renderer.renderer
        self._tokens: SharedMemo[_Key, array[int]] = SharedMemo(
            REMEMBERED_BYTES, _nbytes, account_of
        )
        try:
            self.special = SpecialTokens(self._renderer.get_tokenizer().get_added_vocab())
        except (AttributeError, NotImplementedError):
            self.special = SpecialTokens({})
        self._tokenize = self._renderer.tokenize_prompts_async
        self._tokenizing = Tokenizing(self._renderer, token_bytes, account_of)

        async def tokenize_prompts_async(prompts: Any, params: Any) -> Any:
            if _text_only.get() and len(prompts) == 1 and "prompt" in prompts[0]:
                raise _Rendered(prompts[0]["prompt"])
            if _is_ours.get():
                return await self._tokenize(prompts, params)
            return await self._tokenizing(prompts, params, on_tokenizing())

        self._renderer.tokenize_prompts_async = tokenize_prompts_async
        _follow_conversions(getattr(state, "anthropic_serving_messages", None))

    def purge(self, org: str | None = None, session: str | None = None) -> None:
        """Drop the tokens that are kept of ``org``, or of one session of ``org``; with None, of
        everyone."""
        self._tokens.purge(org, lambda key, _: session in (None, key[0]))
        self._tokenizing.purge(org, session)

    async def tokens(
        self, body: dict[str, Any], protocol: Protocol, readers: Caller | None
    ) -> "array[int]":
        """Return the tokens of a body's prompt, and keep them for the next body like it.

        Args:
            body: the body.
            protocol: its wire format.
            readers: whose bodies may find the tokens: nobody else can tell by the time that this
                takes whether such a body was here before. None to keep nothing.

        Raises:
            CannotRender: if the chat template does not take the body.
        """
        if readers is None:
            return token_array(await self._render(body, protocol))
        key = readers.session, _content_key(body, protocol)
        if (known := self._tokens.get(readers.org, key)) is not None:
            return known
        tokens = token_array(await self._render(body, protocol))
        self._tokens.put(readers.org, key, tokens)
        return tokens

    async def text(self, body: dict[str, Any], protocol: Protocol) -> str | None:
        """Return the text of a body's prompt; None if vLLM makes tokens without one.

        Raises:
            CannotRender: if the chat template does not take the body.
        """
        mode = _text_only.set(True)
        try:
            await self._render(body, protocol)
        except _Rendered as rendered:
            return rendered.text
        finally:
            _text_only.reset(mode)
        return None

    async def tokenize(self, text: str) -> "array[int]":
        """Return the tokens of ``text``, as a part of a prompt."""
        params = self._renderer.default_chat_tok_params
        (prompt,) = await self._tokenize([{"prompt": text}], params)
        return token_array(prompt["prompt_token_ids"])

    async def _render(self, body: dict[str, Any], protocol: Protocol) -> list[int]:
        """Return the tokens of a body's prompt. Where a template insists on a user message, an
        empty one is added: its tokens derive from nothing the client sent."""
        key = "input" if protocol is Protocol.RESPONSES else "messages"
        attempts = [body]
        if isinstance(body.get(key, []), list):
            attempts.append({**body, key: [*body.get(key, []), {"role": "user", "content": ""}]})
        problem: Exception | None = None
        was_ours = _is_ours.set(True)
        try:
            for attempt in attempts:
                try:
                    return await self._render_exactly(attempt, protocol)
                except Exception as error:
                    # Templates raise what they like.
                    problem = error
        finally:
            _is_ours.reset(was_ours)
        raise CannotRender(str(problem))

    async def _render_exactly(self, body: dict[str, Any], protocol: Protocol) -> list[int]:
        renderer = self._state.online_renderer
        if protocol is Protocol.RESPONSES:
            request = ResponsesRequest.model_validate(body)
            result = await renderer.render_responses(request, **_FOR_NO_ENGINE)
            prompt = getattr(result, "engine_input", None)
        else:
            if protocol is Protocol.MESSAGES:
                chat = self._as_chat(AnthropicMessagesRequest.model_validate(body))
            else:
                chat = ChatCompletionRequest.model_validate(body)
            # The opening of an answer is no part of the body, and may not come next in the prompt.
            chat.add_generation_prompt = False
            result = await renderer.render_chat(chat, **_FOR_NO_ENGINE)
            prompt = result[1][0] if isinstance(result, tuple) else None
        if prompt is None:
            raise CannotRender(str(result))
        return list(prompt["prompt_token_ids"])

    def _as_chat(self, request: AnthropicMessagesRequest) -> ChatCompletionRequest:
        """Return the Chat Completions request that the Messages endpoint makes of ``request``."""
        convert = self._state.anthropic_serving_messages.to_chat_completion_request
        chat: ChatCompletionRequest = convert(request, **_conversion_options.get())
        return chat


def _follow_conversions(serving: Any) -> None:
    """Have each task know with which options its Messages request was converted.

    Args:
        serving: vLLM's handler of the Messages endpoint; None if the server has none.
    """
    convert = getattr(serving, "to_chat_completion_request", None)
    if convert is None:
        if serving is not None:
            logger.warning(
                "CacheScope does not know how this vLLM converts Messages requests: breakpoints "
                "inside their prompts will not be found"
            )
        return

    def to_chat_completion_request(request: Any, *args: Any, **options: Any) -> Any:
        _conversion_options.set(options)
        return convert(request, *args, **options)

    serving.to_chat_completion_request = to_chat_completion_request


def _nbytes(tokens: "array[int]") -> int:
    return ENTRY_BYTES + tokens.itemsize * len(tokens)


def _content_key(cut: Mapping[str, Any], protocol: Protocol) -> bytes:
    rendered = {key: value for key, value in cut.items() if key not in _NOT_RENDERED}
    system = rendered.get("system")
    if protocol is Protocol.MESSAGES and isinstance(system, list):
        # A block that changes with each request would make each prefix a new one.
        rendered["system"] = drop_billing_blocks(system)
    return hashlib.sha256(encode([protocol, rendered])).digest()
