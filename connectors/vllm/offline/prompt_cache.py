"""The prompt cache of an `LLM`: prompts with breakpoints go in, outputs with reports come out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vllm import LLM, PoolingParams, PoolingRequestOutput, RequestOutput, SamplingParams
from vllm.outputs import EmbeddingRequestOutput

from vllm_cachescope.connectors.vllm import engine_rpc
from vllm_cachescope.connectors.vllm.offline.cached_output import CachedOutput, Output, with_report
from vllm_cachescope.connectors.vllm.offline.conversations import ConversationRendering
from vllm_cachescope.connectors.vllm.offline.planner import OfflinePlanner
from vllm_cachescope.connectors.vllm.offline.tokenization import Tokenization
from vllm_cachescope.connectors.vllm.plan_transport import take_report
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.marked_prompt import Conversation, Prompt
from vllm_cachescope.prompt.plan import Plan
from vllm_cachescope.wire import strip

logger = logger_of(__name__)

_Params = TypeVar("_Params", SamplingParams, PoolingParams)


class PromptCache:
    """Runs prompts on an `LLM` with the scopes, lifetimes and callers that they name.

    The `LLM` stays as it is: what is put to it directly is cached with the operator's defaults,
    for the organisation of requests without an API key.

    Args:
        llm: vLLM's `LLM`, with CacheScope's connector in its ``kv_transfer_config``.

    Raises:
        ConfigError: if it runs without the connector.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._engine: Any = llm.llm_engine
        self._planner = OfflinePlanner(self._engine.vllm_config)
        self._tokenization = Tokenization(llm.renderer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[CachedOutput[RequestOutput]]:
        """Do what `LLM.generate` does.

        Args:
            prompts: the prompts.
            sampling_params: one for all of them, or one each; None for the model's default.
            options: further arguments of `LLM.generate`.

        Returns:
            The outputs, in the order of the prompts.

        Raises:
            BadRequest: if something is wrong with a prompt; none of them runs then.
        """
        if sampling_params is None:
            sampling_params = self._llm.get_default_sampling_params()
        return self._run(
            prompts,
            sampling_params,
            lambda inputs, params: self._llm.generate(inputs, params, **options),
        )

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[CachedOutput[RequestOutput]]:
        """Do what `LLM.chat` does.

        Args:
            conversations: the conversations.
            sampling_params: as of `generate`.
            tools: the tools of all conversations, on which markers may stand, too.
            options: further arguments of `LLM.chat`.

        Returns:
            The outputs, in the order of the conversations.

        Raises:
            BadRequest: if something is wrong with a marker; no conversation runs then.
        """
        if isinstance(conversations, Conversation):
            conversations = [conversations]
        if sampling_params is None:
            sampling_params = self._llm.get_default_sampling_params()
        checked = self._planner.check_conversations(conversations, tools)
        rendering = ConversationRendering(self._llm, options)
        plans = [self._planner.plan_conversation(one, rendering.ends(one)) for one in checked]
        messages: list[Any] = [one.body["messages"] for one in checked]
        params = self._sealed(sampling_params, plans)
        bare = strip({"tools": list(tools)})["tools"] if tools else None
        return self._reported(
            plans, lambda: self._llm.chat(messages, params, tools=bare, **options)
        )

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **options: Any,
    ) -> list[CachedOutput[PoolingRequestOutput]]:
        """Do what `LLM.encode` does; see `generate`."""
        return self._run(
            prompts,
            pooling_params or PoolingParams(),
            lambda inputs, params: self._llm.encode(inputs, params, **options),
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        **options: Any,
    ) -> list[CachedOutput[EmbeddingRequestOutput]]:
        """Do what `LLM.embed` does; see `generate`."""
        return self._run(
            prompts,
            pooling_params or PoolingParams(),
            lambda inputs, params: self._llm.embed(inputs, pooling_params=params, **options),
        )

    def _run(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: _Params | Sequence[_Params],
        run: Callable[[list[Any], list[_Params]], list[Output]],
    ) -> list[CachedOutput[Output]]:
        checked = self._planner.check([prompts] if isinstance(prompts, Prompt) else prompts)
        planned = [
            self._planner.plan(prompt, self._tokenization.tokens(prompt.texts, prompt.caller.org))
            for prompt in checked
        ]
        plans = [prompt.plan for prompt in planned]
        sealed = self._sealed(params, plans)
        return self._reported(plans, lambda: run([prompt.tokens for prompt in planned], sealed))

    def _sealed(self, params: _Params | Sequence[_Params], plans: Sequence[Plan]) -> list[_Params]:
        """Return parameters for each plan, with the plan in them."""
        each = list(params) if isinstance(params, Sequence) else [params] * len(plans)
        if len(each) != len(plans):
            raise ValueError(f"there are {len(plans)} prompts and parameters for {len(each)}")
        return [self._planner.seal(one, plan) for one, plan in zip(each, plans, strict=True)]

    def _reported(
        self, plans: Sequence[Plan], run: Callable[[], list[Output]]
    ) -> list[CachedOutput[Output]]:
        if not plans:
            return []
        if self._engine.get_num_unfinished_requests():
            # `LLM` would return their outputs among these.
            raise RuntimeError("prompts are enqueued; call the LLM's wait_for_completion first")
        return [
            with_report(output, plan, self._report(output, plan), self._planner.block_size)
            for output, plan in zip(run(), plans, strict=True)
        ]

    def _report(self, output: Any, plan: Plan) -> dict[str, Any] | None:
        if (data := take_report(output)) is not None:
            return data
        # Outputs of pooling have no place for it. And `LLM` ends a request at a stop string
        # itself; the engine's last output then goes nowhere.
        try:
            answers = engine_rpc.call_offline(self._engine, "report", plan.nonce)
        except Exception:
            logger.warning("The engine's report could not be fetched", exc_info=True)
            return None
        return next((answer for answer in answers if answer is not None), None)
