"""The viewer of an operation or of the page: the operator, or one organisation."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_cachescope.api.answers import Refused
from vllm_cachescope.tenancy.caller import CallerDirectory, api_key


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks.

    Attributes:
        org: the organisation whose requests may be shown; None for all of them.
    """

    org: str | None

    @property
    def is_operator(self) -> bool:
        """Whether it is the operator, who sees everyone's."""
        return self.org is None


def viewer_of(
    headers: Mapping[str, str], is_known: bool, directory: CallerDirectory, token: bytes | None
) -> Viewer:
    """Return who presents the ``headers`` of a request.

    Args:
        headers: names in lower case, each character of a value a byte.
        is_known: whether the server itself would let them in.
        directory: the organisations and what their clients present.
        token: the operator's token; None if there is none.

    Raises:
        Refused: if it is neither the operator nor anyone whom the server lets in.
    """
    if presents(token, headers):
        return Viewer(None)
    if not is_known:
        raise Refused(
            401, "authentication_error", "this server does not know the API key presented"
        )
    return Viewer(directory.caller(headers, None).org)


def presents(token: bytes | None, headers: Mapping[str, str]) -> bool:
    """Tell whether ``headers`` present the operator's ``token``, in constant time."""
    presented = api_key(headers)
    if token is None or presented is None:
        return False
    # A header's characters are the bytes that came.
    return hmac.compare_digest(token, presented.encode("latin-1"))
