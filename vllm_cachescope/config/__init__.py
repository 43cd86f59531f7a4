"""The one configuration model, read by the engine, by the API side and by the command line."""

from vllm_cachescope.config.config import Config
from vllm_cachescope.config.diffs import DiffSettings
from vllm_cachescope.config.error import ConfigError
from vllm_cachescope.config.ledger import LedgerSettings
from vllm_cachescope.config.loading import load
from vllm_cachescope.config.quotas import OrgQuota, TierQuotas
from vllm_cachescope.config.secret import SECRET_VARIABLE, make_up_secret
from vllm_cachescope.config.tiers import DiskTier, LMCacheTier, RedisTier, Tier

CONNECTOR = "CacheScopeConnector"
"""The connector's name in vLLM's ``--kv-transfer-config``."""

__all__ = [
    "CONNECTOR",
    "SECRET_VARIABLE",
    "Config",
    "ConfigError",
    "DiffSettings",
    "DiskTier",
    "LMCacheTier",
    "LedgerSettings",
    "OrgQuota",
    "RedisTier",
    "Tier",
    "TierQuotas",
    "load",
    "make_up_secret",
]
