"""The settings of an engine, as far as the scheduler side needs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.block_layout import BlockLayout
from vllm_cachescope.tenancy.org_labels import OrgLabels
from vllm_cachescope.usage.prices import Multipliers


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings of the engine that the scheduler side needs.

    Attributes:
        rank: the engine's number among those behind one API server, from 0.
        layout: how prompts are cut into blocks.
        hash_settings: the settings that block hashes depend on; see `hashing.digest`.
        quotas: what organisations may have of the device and the CPU tier, by the tier's name.
        eviction: which chunks leave the CPU tier first.
        org_labels: the labels of organisations in metrics.
        multipliers: what a token costs that is read or created.
    """

    rank: int
    layout: BlockLayout
    hash_settings: Mapping[str, Any]
    quotas: Mapping[str, Quotas]
    eviction: EvictionSettings
    org_labels: OrgLabels
    multipliers: Multipliers
