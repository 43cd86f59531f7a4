"""``cachescope report``: what recorded traffic shared, what it cost, and what could be saved."""

from vllm_cachescope.cli.report.command import add_command, run

__all__ = ["add_command", "run"]
