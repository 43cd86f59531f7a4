"""Suggestions: what to do about each cause of a break, in a line of a table."""

from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.diagnosis.outcome import DiagnosisKind

SUGGESTIONS: dict[DiagnosisKind | MissCause, str] = {
    DiagnosisKind.CONTEXT_COMPACTED: "Expected: the client summarised its history",
    DiagnosisKind.MODEL_CHANGED: "Stay with one model in a conversation",
    DiagnosisKind.PARAMS_CHANGED: "Decide on parameters at the first request, and keep them",
    DiagnosisKind.TOOLS_CHANGED: "Send all tools from the first request on, sorted by name",
    DiagnosisKind.SYSTEM_CHANGED: "Move dates, paths and counters into the latest message",
    DiagnosisKind.MESSAGES_CHANGED: "Leave history as it was first sent; append corrections",
    DiagnosisKind.MARKERS_CHANGED: "Keep the breakpoints and scopes of a region for good",
    MissCause.EXPIRED: "Mark it with a longer TTL: 1h",
    MissCause.EVICTED: "Give the tier more memory, or the organisation a larger quota",
    MissCause.NEVER_STORED: "Set a breakpoint at the end of what is reused; name the session",
    MissCause.CUT_OFF: "None: the client gave an earlier request up",
    MissCause.SCOPE_CHANGED: "Mark the same content with the same scope in every request",
    MissCause.TIER_UNAVAILABLE: "Bring the tier back",
    MissCause.TIMED_OUT: "Raise the tier's deadline, or relieve the tier",
    MissCause.ENGINE_RESTARTED: "Use a tier that outlives the engine",
    MissCause.OTHER_REPLICA: "Route a session to one replica, or share a tier",
    MissCause.HASH_SETTINGS_DIFFER: "Give all engines one secret and one PYTHONHASHSEED",
    MissCause.RENDERED_DIFFERENTLY: "Use a chat template that renders history as before",
    MissCause.NOT_LOOKED_UP: "None: the client asked for the prompt's log probabilities",
    MissCause.PARTIAL_BLOCK: "None: only whole blocks are cached",
    MissCause.NO_CHECKPOINT: "Set a breakpoint at the end of what is shared",
    MissCause.UNKNOWN: "Report it: a tier lost tokens without saying why",
}
"""By the label ``cause``. docs/diagnostics.md says more about each."""
