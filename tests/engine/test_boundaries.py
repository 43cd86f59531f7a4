"""Where breakpoints end in tokens, on three chat templates, with vLLM's own renderer.

The tokenizer is trained on the interpreter's library, so golden positions are given as the text
before them, special tokens and all.
"""

import asyncio
import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer

from demo.model import MODELS, TINY, build
from demo.session import agent_session, to_chat
from vllm_cachescope.boundaries import common_prefix
from vllm_cachescope.breakpoints import Segment
from vllm_cachescope.connectors.vllm.rendering import Boundaries
from vllm_cachescope.prompt import Part, Protocol, Region
from vllm_cachescope.scopes import Scope
from vllm_cachescope.wire import READERS

TEMPLATES = ("chatml", "inst", "headers")


class Renderer:
    """vLLM's renderer for one template, without an engine behind it, and the boundaries found
    with it. Counts the characters that are tokenised."""

    def __init__(self, template: str) -> None:
        path = build(MODELS / f"tiny-{template}", TINY, template)
        config = EngineArgs(model=str(path), max_model_len=32768).create_engine_config()
        self.renderer = renderer_from_config(config)
        self.online = OnlineRenderer(
            config.model_config,
            self.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=True,
            tool_parser="hermes",
        )
        serving = AnthropicServingMessages
        messages = SimpleNamespace(
            to_chat_completion_request=serving.to_chat_completion_request,
            _merge_inline_system=serving._should_merge_inline_system(self.online),
        )
        self.state = SimpleNamespace(
            online_renderer=self.online, anthropic_serving_messages=messages
        )
        # vLLM's tokenizer threads belong to the loop that first used them.
        self.run = asyncio.new_event_loop().run_until_complete
        self.tokenised = 0
        tokenize = self.renderer.tokenize_prompts_async

        async def counting(prompts: Any, params: Any) -> Any:
            self.tokenised += sum(len(prompt["prompt"]) for prompt in prompts)
            return await tokenize(prompts, params)

        self.renderer.tokenize_prompts_async = counting
        self.boundaries = Boundaries(self.state)

    def prompt(self, body: dict[str, Any], protocol: Protocol) -> tuple[list[int], str]:
        """Render ``body`` as the endpoint would; return tokens and text."""
        if protocol is Protocol.MESSAGES:
            messages = AnthropicMessagesRequest.model_validate(body)
            serving = self.state.anthropic_serving_messages
            chat = serving.to_chat_completion_request(
                messages, merge_inline_system=serving._merge_inline_system
            )
        else:
            chat = ChatCompletionRequest.model_validate(body)
        _, (engine_input,) = self.run(self.online.render_chat(chat))
        return list(engine_input["prompt_token_ids"]), engine_input["prompt"]

    def end(self, body: dict[str, Any], path: str, protocol: Protocol = Protocol.MESSAGES) -> int:
        """Return the end, in tokens, of a breakpoint on the part at ``path``."""
        tokens, text = self.prompt(body, protocol)
        request = READERS[protocol](body, (300, 3600))
        after = next(part for part in request.parts if part.path == path)
        cuts = (Segment(after, Scope.GLOBAL, 300, True), Segment(None, Scope.ORG, 300, True))
        end, whole = self.run(self.boundaries.ends(request, body, cuts, tokens, text))
        assert whole == len(tokens)
        return end

    def before(
        self, body: dict[str, Any], path: str, protocol: Protocol = Protocol.MESSAGES
    ) -> str:
        """Return the text before that end."""
        tokens, _ = self.prompt(body, protocol)
        tokenizer = self.renderer.get_tokenizer()
        return tokenizer.decode(tokens[: self.end(body, path, protocol)])


@pytest.fixture(scope="module", params=TEMPLATES)
def renderer(request: pytest.FixtureRequest) -> Renderer:
    return Renderer(request.param)


@pytest.fixture(scope="module")
def renderers() -> dict[str, Renderer]:
    return {template: Renderer(template) for template in TEMPLATES}


TOOL = {"name": "weigh", "description": "Weigh.", "input_schema": {"type": "object"}}
TOOL_2 = {"name": "lift", "description": "Lift.", "input_schema": {"type": "object"}}
BODY: dict[str, Any] = {
    "model": "m",
    "max_tokens": 1,
    "system": [{"type": "text", "text": "First rule. "}, {"type": "text", "text": "Second."}],
    "messages": [
        {"role": "user", "content": "How heavy?"},
        {"role": "assistant", "content": "Twelve tons."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And this?"}, {"type": "text", "text": "Quick."}],
        },
    ],
}
WITH_TOOLS = {**BODY, "tools": [TOOL, TOOL_2]}


@pytest.mark.parametrize(
    ("template", "path", "golden"),
    [
        ("chatml", "system[0]", "<|im_start|>system\nFirst rule. "),
        ("chatml", "system[1]", "<|im_start|>system\nFirst rule. Second.<|im_end|>\n"),
        (
            "chatml",
            "messages[0].content",
            "<|im_start|>system\nFirst rule. Second.<|im_end|>\n<|im_start|>user\nHow heavy?"
            "<|im_end|>\n",
        ),
        (
            "chatml",
            "messages[1].content",
            "<|im_start|>system\nFirst rule. Second.<|im_end|>\n<|im_start|>user\nHow heavy?"
            "<|im_end|>\n<|im_start|>assistant\nTwelve tons.<|im_end|>\n",
        ),
        # The system text goes into the first user turn and ends with the turn's own words.
        ("inst", "system[0]", "<s>[INST]First rule. "),
        ("inst", "system[1]", "<s>[INST]First rule. Second."),
        (
            "inst",
            "messages[1].content",
            "<s>[INST]First rule. Second.\n\nHow heavy?[/INST]Twelve tons.</s>",
        ),
        (
            "headers",
            "system[0]",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nFirst rule. ",
        ),
        (
            "headers",
            "messages[1].content",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nFirst rule. Second."
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow heavy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nTwelve tons.<|eot_id|>"
            "<|start_header_id|>",
        ),
    ],
)
def test_golden_ends(renderers: dict[str, Renderer], template: str, path: str, golden: str) -> None:
    before = renderers[template].before(BODY, path)
    # The last word's last token may depend on what follows; it is then not part of the prefix.
    assert golden.startswith(before) and len(golden) - len(before) <= 8, before


def test_tools_behind_the_system_text_are_not_shared_before_it(
    renderers: dict[str, Renderer],
) -> None:
    """A breakpoint on a tool covers what precedes it in the request, which is tools alone."""
    # chatml renders the system text first: nothing of it may be in the tools' prefix.
    assert "First" not in renderers["chatml"].before(WITH_TOOLS, "tools[1]")
    # headers renders tools first: they are in the prefix whole, and the system text is not.
    before = renderers["headers"].before(WITH_TOOLS, "tools[1]")
    assert '"name": "lift"' in before and "First" not in before
    # inst renders them before the last user turn, behind everything else.
    assert "weigh" not in renderers["inst"].before(WITH_TOOLS, "tools[1]")
    assert "weigh" not in renderers["inst"].before(WITH_TOOLS, "messages[1].content")


def parts_of(body: dict[str, Any], protocol: Protocol) -> list[Part]:
    return list(READERS[protocol](body, (300, 3600)).parts)


@pytest.mark.parametrize("protocol", [Protocol.MESSAGES, Protocol.CHAT])
def test_what_follows_a_breakpoint_has_no_influence_on_what_precedes_it(
    renderer: Renderer, protocol: Protocol
) -> None:
    """The soundness of sharing: of two requests that differ only after a part, what both would
    share is the same. (An end may lie a token earlier in one of them, where whitespace at the
    start of what follows is one token with what precedes.)"""
    chance = random.Random(5)
    session = agent_session(3, turns=5, tools=3, rules=2)
    body: dict[str, Any] = {"model": "m", "max_tokens": 1, **session.body(4)}
    if protocol is Protocol.CHAT:
        body = {"model": "m", "max_tokens": 1, **to_chat(session.body(4))}
    parts = parts_of(body, protocol)
    found = 0
    for part in chance.sample(parts, 8):
        end = renderer.end(body, part.path, protocol)
        tokens, _ = renderer.prompt(body, protocol)
        for _ in range(2):
            other = copy.deepcopy(body)
            for later in parts[parts.index(part) + 1 :]:
                _scramble(other, later, chance)
            others, _ = renderer.prompt(other, protocol)
            shared = min(end, renderer.end(other, part.path, protocol))
            assert common_prefix(tokens, others) >= shared >= end - 2, part.path
        found += end > 0
    assert found >= 4, "the ends found would prove nothing"


def _scramble(body: dict[str, Any], part: Part, chance: random.Random) -> None:
    """Replace the text of the part at its path by other text."""
    words = " ".join(chance.choices(["alder", "birch", " ", "\n", "cedar.", "<", "7"], k=9))
    if part.region is Region.TOOLS:
        tool = body["tools"][int(part.path[6:-1])]
        tool.get("function", tool)["description"] = words
        return
    keys = part.path.replace("[", ".").replace("]", "").split(".")
    holder: Any = body
    for key in keys[:-1]:
        holder = holder[int(key)] if key.isdigit() else holder[key]
    last = int(keys[-1]) if keys[-1].isdigit() else keys[-1]
    if not isinstance(holder, dict | list) or (isinstance(holder, dict) and last not in holder):
        return
    if isinstance(holder[last], str):
        holder[last] = words
    elif isinstance(holder[last], dict) and "text" in holder[last]:
        holder[last]["text"] = words


def test_a_long_history_is_not_tokenised_again(renderer: Renderer) -> None:
    session = agent_session(4, turns=16, tools=3, rules=4)
    body = {"model": "m", "max_tokens": 1, **session.body(15)}
    tokens, text = renderer.prompt(body, Protocol.MESSAGES)
    request = READERS[Protocol.MESSAGES](body, (300, 3600))
    parts = [part for part in request.parts if part.region is Region.MESSAGES]
    cuts = (
        *tuple(
            Segment(part, Scope.ORG, ttl, True)
            for part, ttl in ((parts[-4], 3600), (parts[-2], 1800))
        ),
        Segment(None, Scope.ORG, 300, True),
    )
    before = renderer.tokenised
    first, second, whole = renderer.run(renderer.boundaries.ends(request, body, cuts, tokens, text))
    assert whole == len(tokens)
    assert len(tokens) * 0.8 < first < second < whole
    assert renderer.tokenised - before < 0.1 * len(text)


def test_tools_and_system_are_rendered_once(renderer: Renderer) -> None:
    session = agent_session(5, turns=6, tools=3, rules=4)
    ends = set()
    for turn in range(5):
        body = {"model": "m", "max_tokens": 1, **session.body(turn)}
        if turn == 1:
            before = renderer.tokenised
        prompts = sum(len(renderer.prompt(body, Protocol.MESSAGES)[1]) for _ in range(1))
        ends.add(renderer.end(body, "system[0]"))
        # `end` renders the prompt itself, and nothing else after the first turn.
        if turn > 0:
            assert renderer.tokenised - before == 2 * prompts
            before = renderer.tokenised
    assert len(ends) == 1 and ends.pop() > 0


def test_a_nonce_in_claude_codes_header_changes_no_end(renderer: Renderer) -> None:
    ends = set()
    for nonce in ("cch=1f2e3", "cch=99999"):
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; {nonce};"}
        body = {**BODY, "system": [header, *BODY["system"]]}
        ends.add(renderer.end(body, "system[1]"))
    assert len(ends) == 1 and ends.pop() > 0


def test_a_template_that_refuses_the_cut_costs_the_boundary_and_not_the_request(
    renderer: Renderer,
) -> None:
    body = {
        "model": "m",
        "max_tokens": 1,
        "system": "Rule.",
        "messages": [{"role": "user", "content": "Hi."}],
    }
    tokens, text = renderer.prompt(body, Protocol.MESSAGES)
    request = READERS[Protocol.MESSAGES](body, (300, 3600))
    cuts = (
        Segment(request.parts[0], Scope.GLOBAL, 300, True),
        Segment(None, Scope.ORG, 300, True),
    )
    unusable = {**body, "messages": "not a list", "system": 7}
    ends = renderer.run(renderer.boundaries.ends(request, unusable, cuts, tokens, text))
    assert ends == [0, len(tokens)]
