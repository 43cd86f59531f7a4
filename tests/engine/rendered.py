"""vLLM's renderer as the API server has it, with no engine behind it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

from vllm import EngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer

from demo.model import TEMPLATES
from vllm_cachescope.connectors.vllm.api_server.boundaries import Boundaries, RenderedPrefix
from vllm_cachescope.prompt.request import Protocol, Region
from vllm_cachescope.prompt.segments import RegionDefault, Segment, segments
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.wire import READERS, strip

DEFAULTS = {region: RegionDefault(Scope.ORG, 300) for region in Region}
TTLS = (300, 3600)
ACME = Caller("acme", "s")


class Rendering:
    """A chat template in vLLM's own hands, and the boundaries that are found with it.

    Args:
        model: directory of a model, for its tokenizer.
        template: name of one of the demo's chat templates.

    Attributes:
        renderer: vLLM's renderer.
        tokenized: the texts that went to the tokenizer, in order.
        last_sent: the latest prompt that `sent` has rendered.
        readers: who may find what is kept of the tokens of prompts; None for nobody.
        meanwhile: makes what the tokenizer waits for; None for nothing. Called as the server
            begins to tokenise.
    """

    def __init__(self, model: str, template: str) -> None:
        config = EngineArgs(model=model, enforce_eager=True).create_engine_config()
        renderer = renderer_from_config(config)
        self.tokenizer = renderer.get_tokenizer()
        self.tokenized: list[str] = []
        self.renderer = renderer
        self.last_sent: Any = None
        self.readers: Caller | None = None
        self.meanwhile: Callable[[], Awaitable[object]] | None = None
        self._begun: Awaitable[object] | None = None
        tokenize = renderer.tokenize_prompts_async

        async def tokenize_prompts_async(prompts: Any, params: Any) -> Any:
            self.tokenized += [prompt["prompt"] for prompt in prompts if "prompt" in prompt]
            if self._begun is not None:
                await self._begun
            return await tokenize(prompts, params)

        renderer.tokenize_prompts_async = tokenize_prompts_async
        self._online = OnlineRenderer(
            model_config=config.model_config,
            renderer=renderer,
            request_logger=None,
            chat_template=(TEMPLATES / f"{template}.jinja").read_text(),
            chat_template_content_format="auto",
            enable_auto_tools=True,
            tool_parser="hermes",
        )
        # As vLLM's own constructor does, which wants an engine.
        merging = AnthropicServingMessages._should_merge_inline_system(self._online)  # noqa: SLF001
        self._merging = merging
        serving = SimpleNamespace(
            to_chat_completion_request=AnthropicServingMessages.to_chat_completion_request,
            _merge_inline_system=merging,
        )
        self._serving = serving
        self.boundaries = Boundaries(
            SimpleNamespace(online_renderer=self._online, anthropic_serving_messages=serving),
            self._tokenizing,
            token_bytes=2**20,
        )

    def _tokenizing(self) -> Caller | None:
        if self.meanwhile is not None and self._begun is None:
            self._begun = asyncio.ensure_future(self.meanwhile())
        return self.readers

    async def prompt(self, protocol: Protocol, body: Mapping[str, Any]) -> tuple[list[int], str]:
        """Return the tokens and the text of the prompt that the server makes of ``body``."""
        body = strip(dict(body))
        if protocol is Protocol.RESPONSES:
            result = await self._online.render_responses(ResponsesRequest.model_validate(body))
            prompt = result.engine_input
        else:
            if protocol is Protocol.MESSAGES:
                chat = self._serving.to_chat_completion_request(
                    AnthropicMessagesRequest.model_validate(body),
                    merge_inline_system=self._merging,
                )
            else:
                chat = ChatCompletionRequest.model_validate(body)
            _, (prompt,) = await self._online.render_chat(chat)
        return list(prompt["prompt_token_ids"]), prompt["prompt"]

    async def sent(self, body: Mapping[str, Any]) -> list[bool]:
        """Tell of each picture in a Chat Completions body whether the server, when it renders the
        body, sends it to the engine; what it has sent before it only names."""
        chat = ChatCompletionRequest.model_validate(strip(dict(body)))
        _, (prompt,) = await self._online.render_chat(chat)
        self.last_sent = prompt
        return [item is not None for item in prompt["mm_kwargs"]["image"]]

    async def cut(
        self, protocol: Protocol, body: Mapping[str, Any], caller: Caller = ACME
    ) -> tuple[list[int], str, tuple[Segment, ...], list[int]]:
        """Return the prompt's tokens and text, its segments, and where they end."""
        tokens, text = await self.prompt(protocol, body)
        planned, prefixes = await self.rendered(protocol, body, caller)
        return tokens, text, planned, await self.boundaries.ends(prefixes, protocol, tokens, text)

    async def rendered(
        self, protocol: Protocol, body: Mapping[str, Any], caller: Caller = ACME
    ) -> tuple[tuple[Segment, ...], list[RenderedPrefix | None]]:
        """Return the segments of ``body``, and it rendered as far as each goes."""
        request = READERS[protocol](body, TTLS, 300)
        planned = segments(request, DEFAULTS)
        return planned, await self.boundaries.prefixes(request, strip(dict(body)), planned, caller)
