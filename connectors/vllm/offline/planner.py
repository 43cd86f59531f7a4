"""The planner of offline prompts: what Python code has marked becomes sealed plans."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm_cachescope.config import CONNECTOR, ConfigError
from vllm_cachescope.connectors.vllm import config_check
from vllm_cachescope.connectors.vllm.plan_transport import with_plan
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.prompt.marked_prompt import Conversation, Prompt
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.prompt.plan_maker import PlanMaker
from vllm_cachescope.prompt.request import PromptRequest, Protocol, Region
from vllm_cachescope.prompt.segments import Segment, segments
from vllm_cachescope.tenancy.caller import organisation
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire import READERS, marked_prompt, strip
from vllm_cachescope.wire.fields import read_text

_Params = TypeVar("_Params")


@dataclass(frozen=True, slots=True)
class CheckedPrompt:
    """A prompt whose breakpoints are in order.

    Attributes:
        content: the text, or the token ids.
        cut: its segments.
        ends: where each segment ends, in characters of the text or in tokens.
        caller: on whose behalf it runs.
    """

    content: str | Sequence[int]
    cut: tuple[Segment, ...]
    ends: tuple[int, ...]
    caller: Caller

    @property
    def texts(self) -> list[str]:
        """The beginnings of the text up to the end of each segment; none of token ids."""
        if not isinstance(self.content, str):
            return []
        return [self.content[:end] for end in self.ends]


@dataclass(frozen=True, slots=True)
class CheckedConversation:
    """A conversation whose markers are in order.

    Attributes:
        body: its messages and tools as those of a Chat Completions request, without markers.
        cut: its segments.
        caller: on whose behalf it runs.
    """

    body: dict[str, Any]
    cut: tuple[Segment, ...]
    caller: Caller


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """A prompt with its plan.

    Attributes:
        tokens: the prompt as vLLM takes it: token ids, with their text if there is one.
        plan: the plan.
    """

    tokens: dict[str, Any]
    plan: Plan


class OfflinePlanner:
    """Plans the prompts of one engine.

    Args:
        vllm_config: vLLM's configuration of the engine.

    Attributes:
        block_size: tokens per block.

    Raises:
        ConfigError: if the engine runs without CacheScope's connector.
    """

    def __init__(self, vllm_config: Any) -> None:
        own = config_check.own_transfer(vllm_config.kv_transfer_config)
        if own is None:
            raise ConfigError(
                "this engine runs without it; give it kv_transfer_config="
                f'{{"kv_connector": "{CONNECTOR}", "kv_role": "kv_both"}}'
            )
        config = config_check.read(own)
        self.block_size = int(vllm_config.cache_config.block_size)
        self._config = config
        self._names: Collection[str] = config.tenant_names().values()
        self._defaults = {region: config.regions.of(region) for region in Region}
        self._default_ttl_s = self._defaults[Region.MESSAGES].ttl_s
        self._secret = config.secret_bytes()
        self._plans = PlanMaker(self._secret)

    def check(self, prompts: Sequence[Prompt]) -> list[CheckedPrompt]:
        """Return ``prompts``, all of which are in order.

        Raises:
            BadRequest: if one is not; it names its path, as in ``prompts[2].breakpoints[0].ttl``.
        """
        return [
            self._check_prompt(prompt, f"prompts[{number}]")
            for number, prompt in enumerate(prompts)
        ]

    def check_conversations(
        self, conversations: Sequence[Conversation], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[CheckedConversation]:
        """Return ``conversations``, all of which are in order.

        Args:
            conversations: the conversations.
            tools: the tools of all of them.

        Raises:
            BadRequest: if one is not; see `check`.
        """
        return [
            self._check_conversation(conversation, tools, f"conversations[{number}]")
            for number, conversation in enumerate(conversations)
        ]

    def plan(self, prompt: CheckedPrompt, tokens_of: Mapping[str, list[int]]) -> PlannedPrompt:
        """Return a prompt with its plan.

        Args:
            prompt: the prompt.
            tokens_of: the tokens of each of its `CheckedPrompt.texts`, by the text.
        """
        content = prompt.content
        if not isinstance(content, str):
            tokens, ends = list(content), list(prompt.ends)
            return PlannedPrompt(
                {"prompt_token_ids": tokens}, self._plans.plan(prompt.cut, ends, prompt.caller)
            )
        tokens = tokens_of[content]
        ends = shared_ends([tokens_of[text] for text in prompt.texts], tokens)
        plan = self._plans.plan(prompt.cut, ends, prompt.caller)
        return PlannedPrompt({"prompt_token_ids": tokens, "prompt": content}, plan)

    def plan_conversation(self, conversation: CheckedConversation, ends: Sequence[int]) -> Plan:
        """Return the plan of a conversation whose segments end at ``ends``, in tokens."""
        return self._plans.plan(conversation.cut, ends, conversation.caller)

    def seal(self, params: _Params, plan: Plan) -> _Params:
        """Return a copy of a prompt's parameters with ``plan`` in it."""
        return with_plan(params, plan, self._secret)

    def _check_prompt(self, prompt: Prompt, path: str) -> CheckedPrompt:
        with _paths_below(path):
            caller = self._caller(prompt.org, prompt.session)
            request = marked_prompt.read(prompt, self._config.allowed_ttls, self._default_ttl_s)
        cut = segments(request, self._defaults)
        positions = {
            part.path: point.end
            for part, point in zip(request.parts, prompt.breakpoints, strict=False)
        }
        ends = [
            len(prompt.content) if segment.after is None else positions[segment.after.path]
            for segment in cut
        ]
        return CheckedPrompt(prompt.content, cut, tuple(ends), caller)

    def _check_conversation(
        self, conversation: Conversation, tools: Sequence[Mapping[str, Any]] | None, path: str
    ) -> CheckedConversation:
        body: dict[str, Any] = {"messages": list(conversation.messages)}
        if tools:
            body["tools"] = list(tools)
        with _paths_below(path):
            caller = self._caller(conversation.org, conversation.session)
            request: PromptRequest = READERS[Protocol.CHAT](
                body, self._config.allowed_ttls, self._default_ttl_s, strict=True
            )
        return CheckedConversation(strip(body), segments(request, self._defaults), caller)

    def _caller(self, org: str | None, session: str | None) -> Caller:
        return Caller(
            organisation(org, self._names, self._config.org_header), read_text(session, "session")
        )


def shared_ends(beginnings: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """Return how many of a prompt's ``tokens`` derive from each of its ``beginnings``, which are
    tokenised by themselves and grow; see `boundaries`."""
    ends: list[int] = []
    for beginning in beginnings:
        end = common_prefix(beginning, tokens)
        ends.append(max(end, ends[-1] if ends else 0))
    return ends


@contextmanager
def _paths_below(path: str) -> Iterator[None]:
    try:
        yield
    except BadRequest as error:
        raise BadRequest(f"{path}.{error.path}", error.value, error.allowed) from None
