"""The limits of how many names one hour's sums may have: clients make up sessions and keys."""

from collections import defaultdict

from vllm_cachescope.tenancy.shares import AccountOf, own_account

MAX_SESSIONS = 2000
"""How many sessions of one account have sums of their own in one hour."""

MAX_MADE_UP = 1000
"""How many organisations that anyone could have made up have sums of their own in one hour."""

MAX_MODELS = 1000
"""How many models have sums of their own in one hour: adapters are models, too."""

OTHER_MODELS = "(other models)"
"""Name of all further ones together."""

_HOURS = 3  # that are remembered: records come late by seconds, and clocks are set


class NameLimits:
    """Admits names to the sums of an hour, first come, first served.

    What is not admitted is counted all the same: a session's tokens among those of its organisation
    that name no session, and an organisation's under its account.

    Args:
        account_of: returns who answers for an organisation.

    Attributes:
        account_of: the same.
    """

    def __init__(self, account_of: AccountOf = own_account) -> None:
        self.account_of = account_of
        self._sessions: dict[int, defaultdict[str, set[tuple[str, str]]]] = {}
        self._made_up: dict[int, set[str]] = {}
        self._models: dict[int, set[str]] = {}

    def admit(self, hour: int, org: str, session: str, org_id: str) -> tuple[str, str]:
        """Return the organisation and the session that a request counts under.

        Args:
            hour: the hour, by its beginning.
            org: the organisation's name as it is kept.
            session: the session's name as it is kept; empty for none.
            org_id: the organisation's id.
        """
        sessions, made_up = self._of(hour)
        account = self.account_of(org_id)
        if account != org_id:
            if org not in made_up and len(made_up) >= MAX_MADE_UP:
                return account, ""
            made_up.add(org)
        if not session:
            return org, ""
        known, name = sessions[account], (org, session)
        if name not in known and len(known) >= MAX_SESSIONS:
            return org, ""
        known.add(name)
        return org, session

    def admit_model(self, hour: int, model: str) -> str:
        """Return the model that a request counts under, after `admit` for the same ``hour``."""
        models = self._models.get(hour, set())
        if model not in models and len(models) >= MAX_MODELS:
            return OTHER_MODELS
        models.add(model)
        return model

    def _of(self, hour: int) -> tuple[defaultdict[str, set[tuple[str, str]]], set[str]]:
        if hour not in self._sessions:
            self._sessions[hour] = defaultdict(set)
            self._made_up[hour] = set()
            self._models[hour] = set()
            for old in sorted(self._sessions)[:-_HOURS]:
                del self._sessions[old], self._made_up[old], self._models[old]
        # An hour that is older than those remembered is counted anew.
        return self._sessions.get(hour, defaultdict(set)), self._made_up.get(hour, set())
