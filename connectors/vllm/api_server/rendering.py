"""Renders parts of a request with vLLM's own code, so that every chat template is right."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from vllm_cachescope.prompt.boundaries import Landmark, SpecialTokens, common_prefix, last_within
from vllm_cachescope.prompt.request import Part, PromptRequest, Protocol, Region
from vllm_cachescope.prompt.segments import Segment
from vllm_cachescope.wire.billing_header import drop_billing_blocks
from vllm_cachescope.wire.body import encode
from vllm_cachescope.wire.truncate import truncate

logger = logging.getLogger(__name__)

REMEMBERED_TOKENS = 4_000_000
"""How many tokens of rendered tools and system prompts are kept, some 32 MB."""

_NOT_RENDERED = frozenset(
    {"max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature", "top_p",
     "top_k", "metadata", "stop", "stop_sequences", "seed", "user", "n", "session_id",
     "prompt_cache_key", "request_id", "kv_transfer_params"}
)  # fmt: skip
"""Fields of a body that change no prompt, and so must not tell two equal prompts apart."""

_text_only: ContextVar[bool] = ContextVar("cachescope_text_only", default=False)


class _Rendered(BaseException):
    """Carries a rendered text past vLLM's error handling, out of the way to its tokenizer."""

    def __init__(self, text: str) -> None:
        self.text = text


class CannotRender(Exception):
    """The chat template does not take a request that ends where it was cut."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A request up to the end of one of its parts, rendered.

    Attributes:
        path: of that part.
        body: the request's body without what comes after the part.
        text: the text of its prompt; None if its tokens are known.
        tokens: the tokens of its prompt; None if they can be found by the text. Where it cannot
            be rendered there are none, which it then has in common with any prompt.
    """

    path: str
    body: dict[str, Any]
    text: str | None = None
    tokens: list[int] | None = None


class Boundaries:
    """Finds where the segments of a prompt end, in tokens.

    Args:
        state: the API server's state, with its renderer and endpoint handlers.
        on_tokenizing: called when the server is about to tokenise a prompt.
    """

    def __init__(self, state: Any, on_tokenizing: Callable[[], None] = lambda: None) -> None:
        self._state = state
        self._renderer = state.online_renderer.renderer
        self._tokens: LRUCache[bytes, list[int]] = LRUCache(REMEMBERED_TOKENS, len)
        try:
            self._special = SpecialTokens(self._renderer.get_tokenizer().get_added_vocab())
        except (AttributeError, NotImplementedError):
            self._special = SpecialTokens({})
        tokenize = self._renderer.tokenize_prompts_async

        async def tokenize_prompts_async(prompts: Any, params: Any) -> Any:
            if _text_only.get() and len(prompts) == 1 and "prompt" in prompts[0]:
                raise _Rendered(prompts[0]["prompt"])
            on_tokenizing()
            return await tokenize(prompts, params)

        self._renderer.tokenize_prompts_async = tokenize_prompts_async

    def forget(self) -> None:
        """Forget what was rendered: the tools and system prompts of all organisations."""
        self._tokens.clear()

    async def cuts(
        self, request: PromptRequest, body: Mapping[str, Any], segments: tuple[Segment, ...]
    ) -> list[Cut | None]:
        """Render the request as far as each segment goes; None for one that goes to its end.

        Takes no tokens of the prompt: it can be done while the server is still making them.

        Args:
            request: the request.
            body: its body, without markers.
            segments: its segments.
        """
        return [
            None
            if segment.after is None
            else await self._cut(request.protocol, body, segment.after)
            for segment in segments
        ]

    async def ends(
        self,
        cuts: Sequence[Cut | None],
        protocol: Protocol,
        tokens: list[int],
        text: str | None,
    ) -> list[int]:
        """Return where each segment ends, in tokens from the start of the prompt.

        A segment whose end cannot be found is empty: what it would have held is treated as part
        of the next, narrower one.

        Args:
            cuts: what `cuts` made of the segments.
            protocol: the request's wire format.
            tokens: the prompt's token ids.
            text: the prompt's rendered text, if known.
        """
        by_text = text is not None and any(cut is not None and cut.text is not None for cut in cuts)
        landmarks = self._special.landmarks(text or "", tokens) if by_text else []
        ends: list[int] = []
        for cut in cuts:
            if cut is None:
                ends.append(len(tokens))
                continue
            try:
                end = await self._end(cut, protocol, tokens, text, landmarks)
            except Exception as error:
                _warn(cut.path, error)
                end = 0
            ends.append(max(end, ends[-1] if ends else 0))
        return ends

    async def _cut(self, protocol: Protocol, body: Mapping[str, Any], after: Part) -> Cut:
        try:
            cut = truncate(body, protocol, after)
            if after.region is Region.MESSAGES:
                # Histories are long and never the same: find the end without tokenising one.
                text = await self._render_text(cut, protocol)
                if text is not None:
                    return Cut(after.path, cut, text=text)
            return Cut(after.path, cut, tokens=await self._tokens_of(cut, protocol))
        except Exception as error:
            _warn(after.path, error)
            return Cut(after.path, {}, tokens=[])

    async def _end(
        self,
        cut: Cut,
        protocol: Protocol,
        tokens: list[int],
        text: str | None,
        landmarks: Sequence[Landmark],
    ) -> int:
        if cut.text is not None and text is not None:
            last = last_within(landmarks, common_prefix(cut.text, text))
            if last is not None:
                params = self._renderer.default_chat_tok_params
                (rest,) = await self._renderer.tokenize_prompts_async(
                    [{"prompt": cut.text[last.start :]}], params
                )
                return last.token + common_prefix(rest["prompt_token_ids"], tokens[last.token :])
        rendered = cut.tokens
        if rendered is None:
            rendered = await self._tokens_of(cut.body, protocol)
        return common_prefix(rendered, tokens)

    async def _tokens_of(self, cut: dict[str, Any], protocol: Protocol) -> list[int]:
        key = _content_key(cut, protocol)
        try:
            return self._tokens[key]
        except KeyError:
            tokens = await self._render(cut, protocol)
        with suppress(ValueError):  # Longer than all that may be kept.
            self._tokens[key] = tokens
        return tokens

    async def _render_text(self, cut: dict[str, Any], protocol: Protocol) -> str | None:
        mode = _text_only.set(True)
        try:
            await self._render(cut, protocol)
        except _Rendered as rendered:
            return rendered.text
        finally:
            _text_only.reset(mode)
        return None

    async def _render(self, cut: dict[str, Any], protocol: Protocol) -> list[int]:
        """Return the tokens of a cut request. Where a template insists on a user message, an
        empty one is added: its tokens derive from nothing the client sent."""
        key = "input" if protocol is Protocol.RESPONSES else "messages"
        attempts = [cut]
        if isinstance(cut.get(key, []), list):
            attempts.append({**cut, key: [*cut.get(key, []), {"role": "user", "content": ""}]})
        problem: Exception | None = None
        for attempt in attempts:
            try:
                return await self._render_exactly(attempt, protocol)
            except Exception as error:
                # Templates raise what they like.
                problem = error
        raise CannotRender(str(problem))

    async def _render_exactly(self, body: dict[str, Any], protocol: Protocol) -> list[int]:
        renderer = self._state.online_renderer
        if protocol is Protocol.RESPONSES:
            result = await renderer.render_responses(ResponsesRequest.model_validate(body))
            prompt = getattr(result, "engine_input", None)
        else:
            if protocol is Protocol.MESSAGES:
                chat = await self._as_chat(AnthropicMessagesRequest.model_validate(body))
            else:
                chat = ChatCompletionRequest.model_validate(body)
            # What opens the answer is not part of the cut, nor is it what comes next in the prompt.
            chat.add_generation_prompt = False
            result = await renderer.render_chat(chat)
            prompt = result[1][0] if isinstance(result, tuple) else None
        if prompt is None:
            raise CannotRender(str(result))
        return list(prompt["prompt_token_ids"])

    async def _as_chat(self, request: AnthropicMessagesRequest) -> ChatCompletionRequest:
        """Convert as the endpoint does."""
        serving = self._state.anthropic_serving_messages
        options: dict[str, Any] = {}
        if hasattr(serving, "_merge_inline_system"):
            options["merge_inline_system"] = serving._merge_inline_system
        if hasattr(serving, "_get_disabled_thinking_effort"):
            options["disabled_thinking_effort"] = await serving._get_disabled_thinking_effort()
        return serving.to_chat_completion_request(request, **options)


def _warn(path: str, error: Exception) -> None:
    if isinstance(error, CannotRender):
        logger.debug("No boundary after %s: %s", path, error)
    else:
        # A mistake of ours costs hits, never the request.
        logger.error("No boundary after %s", path, exc_info=error)


def _content_key(cut: Mapping[str, Any], protocol: Protocol) -> bytes:
    rendered = {key: value for key, value in cut.items() if key not in _NOT_RENDERED}
    system = rendered.get("system")
    if protocol is Protocol.MESSAGES and isinstance(system, list):
        # A block that changes with each request would make each cut a new one.
        rendered["system"] = drop_billing_blocks(system)
    return hashlib.sha256(encode([protocol, rendered])).digest()
