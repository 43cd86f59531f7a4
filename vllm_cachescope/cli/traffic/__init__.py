"""Reads recorded traffic: one file for each kind of log, all of which become calls.

- Request bodies of Messages, Chat, Responses, Completions or Bedrock's Converse, by themselves or
  in an envelope: ``body`` or ``request``, with ``timestamp``, ``session_id``, ``headers``, ``path``
  (or ``url``, as OpenAI's batch files have it), ``response_id``, ``response`` and ``usage`` as far
  as they are known. One a line, an array of them, or documents printed over several lines.
- Logs of LiteLLM and OpenRouter, HTTP archives (HAR), flows of mitmproxy, OpenTelemetry spans.
- Session files of Claude Code and Codex.
- Text traces: ``input`` (the whole prompt as text), ``timestamp``, ``session_id``.
- Block traces, as Mooncake publishes them: ``hash_ids`` (one per 512 tokens, equal for equal
  prefixes), ``input_length`` and ``timestamp`` in milliseconds.

A file is unpacked if its name ends in ``.gz``; ``-`` is standard input.
"""

from vllm_cachescope.cli.traffic.call import (
    BLOCK_TOKENS,
    BlockCall,
    Call,
    LeftOut,
    TrafficError,
    Usage,
)
from vllm_cachescope.cli.traffic.protocols import protocol_of
from vllm_cachescope.cli.traffic.reading import EXPECTED, read_traffic, stream_traffic
from vllm_cachescope.cli.traffic.records import STANDARD_INPUT
from vllm_cachescope.cli.traffic.texts import text_request

__all__ = [
    "BLOCK_TOKENS",
    "EXPECTED",
    "STANDARD_INPUT",
    "BlockCall",
    "Call",
    "LeftOut",
    "TrafficError",
    "Usage",
    "protocol_of",
    "read_traffic",
    "stream_traffic",
    "text_request",
]
