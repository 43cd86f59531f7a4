"""The prompt cache of an `AsyncLLM` that runs in one's own process."""

from collections.abc import AsyncGenerator
from typing import Any

from vllm import RequestOutput, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_cachescope.connectors.vllm import engine_rpc
from vllm_cachescope.connectors.vllm.offline.cached_output import CachedOutput, with_report
from vllm_cachescope.connectors.vllm.offline.planner import OfflinePlanner
from vllm_cachescope.connectors.vllm.offline.tokenization import Tokenization
from vllm_cachescope.connectors.vllm.plan_transport import take_report
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.marked_prompt import Prompt
from vllm_cachescope.prompt.plan import Plan

logger = logger_of(__name__)


class AsyncPromptCache:
    """Runs prompts on an `AsyncLLM`, as `PromptCache` does on an `LLM`.

    Args:
        engine: vLLM's `AsyncLLM`, with CacheScope's connector in its ``kv_transfer_config``.

    Raises:
        ConfigError: if it runs without the connector.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._planner = OfflinePlanner(engine.vllm_config)
        self._tokenization = Tokenization(engine.renderer)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[CachedOutput[RequestOutput], None]:
        """Do what `AsyncLLM.generate` does. The report with the last output is the engine's.

        Args:
            prompt: the prompt.
            sampling_params: its parameters.
            request_id: unique to the request.
            options: further arguments of `AsyncLLM.generate`.

        Raises:
            BadRequest: if something is wrong with the prompt.
        """
        (checked,) = self._planner.check([prompt])
        tokens_of = await self._tokenization.tokens_async(checked.texts, checked.caller.org)
        planned = self._planner.plan(checked, tokens_of)
        params = self._planner.seal(sampling_params, planned.plan)
        inputs: Any = planned.tokens
        data: dict[str, Any] | None = None
        async for output in self._engine.generate(inputs, params, request_id, **options):
            data = take_report(output) or data
            if output.finished and data is None:
                data = await self._report(planned.plan)
            yield with_report(output, planned.plan, data, self._planner.block_size)

    async def _report(self, plan: Plan) -> dict[str, Any] | None:
        # The engine's last output went nowhere: a stop string ended the request on this side.
        try:
            answers = await engine_rpc.call(self._engine, "report", plan.nonce)
        except Exception:
            logger.warning("The engine's report could not be fetched", exc_info=True)
            return None
        return next((answer for answer in answers if answer is not None), None)
