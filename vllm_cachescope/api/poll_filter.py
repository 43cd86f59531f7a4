"""The filter of access logs: an open page asks every two seconds, which nobody wants to read."""

import logging

ACCESS_LOG = "uvicorn.access"


class PollFilter(logging.Filter):
    """Leaves lines of uvicorn's access log out that tell of one path, and of nothing wrong.

    Args:
        path: how the path ends, without its query.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is wanted."""
        match record.args:
            case (_, "GET", str(path), _, 200):
                return not path.partition("?")[0].endswith(self._path)
        return True


def leave_out(path: str) -> None:
    """Leave a path that is asked for over and over out of the access log."""
    log = logging.getLogger(ACCESS_LOG)
    if not any(isinstance(one, PollFilter) for one in log.filters):
        log.addFilter(PollFilter(path))
