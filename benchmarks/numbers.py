"""The number of a figure as tables show it."""


def shown(value: float) -> str:
    """Return ``value`` with three digits, or whole where it has more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
