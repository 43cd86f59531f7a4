"""The diagnosis of one request, while the request runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.api.diagnostics import (
    anthropic_diagnostics,
    openai_diagnostics,
    with_repairs,
)
from vllm_cachescope.api.peers import Peers
from vllm_cachescope.cache.report import Report
from vllm_cachescope.diagnosis.attribution import EngineReport
from vllm_cachescope.diagnosis.diagnosis import measure
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.diagnosis.placement import LineagePlacement
from vllm_cachescope.diagnosis.repaired import Unrepaired
from vllm_cachescope.prompt.request import PromptRequest, Protocol
from vllm_cachescope.repair.repair import Repair
from vllm_cachescope.tenancy.scope import Caller


@dataclass(slots=True)
class PendingDiagnosis:
    """The diagnosis of one request, between `Diagnoser.open` and `Diagnoser.close`.

    Attributes:
        caller: whose request it is.
        request: the request.
        placement: where the request belongs among its session's requests.
        named: the earlier request that the client named in this one; None if it named none, or
            none that is known of its organisation.
        compared: how the request differs from ``named``, with estimates of tokens.
        diagnosis: what the client changed; after `Diagnoser.close` also what the cache lost.
        block_tokens: tokens per block of the engine.
        reports: the engine's report on each of the request's prompts, by the prompt's nonce.
            Filled in while the request runs.
        peers: the API processes of the server, any of which may have had the earlier request.
        unrepaired: the request as the client sent it; None if it is not to be repaired.
        tools_behind_system: whether the chat template renders tools behind the system prompt.
    """

    caller: Caller
    request: PromptRequest
    placement: LineagePlacement
    named: LineageNode | None
    compared: Diagnosis | None
    diagnosis: Diagnosis
    block_tokens: int
    reports: Mapping[str, Report]
    peers: Peers
    unrepaired: Unrepaired | None = None
    tools_behind_system: bool = False

    def repairs(self, read_tokens: int | None = None) -> tuple[Repair, ...]:
        """Return what was put right in the request, with what it saved if that is known.

        Args:
            read_tokens: tokens read from the cache; None if that is not known yet.
        """
        if self.unrepaired is None:
            return ()
        prompt = sum(report.prompt_tokens for report in self.reports.values())
        if read_tokens is None or not prompt:
            return self.unrepaired.repairs
        return self.unrepaired.saved(
            self.placement, prompt, read_tokens, self.block_tokens, self.tools_behind_system
        )

    def answer(self, read_tokens: int | None = None) -> dict[str, Any] | None:
        """Return the diagnostics for the response, in the protocol's own shape; None for none.

        Args:
            read_tokens: tokens read from the cache; None if that is not known yet.
        """
        compared = self.compared
        if compared is not None and read_tokens is not None:
            prompt = sum(report.prompt_tokens for report in self.reports.values())
            compared = measure(
                compared, EngineReport(prompt, read_tokens, self.block_tokens), self.named
            )
        alone = self.peers.count == 1
        if self.request.protocol is Protocol.MESSAGES:
            answer = anthropic_diagnostics(self.request, compared, is_known_here=alone)
        else:
            answer = openai_diagnostics(
                self.request, compared, read_tokens=read_tokens, is_known_here=alone
            )
        return with_repairs(self.request, answer, self.repairs(read_tokens))
