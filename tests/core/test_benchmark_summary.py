"""The summary of benchmarks' results."""

import json
from typing import Any

from benchmarks import summary

MACHINE = {"cpu": "a CPU", "cpus": 2, "python": "3.11", "engine": ["vllm 1"], "load_average": 0.5}


def figure(name: str, values: tuple[float, float, float], unit: str, **more: Any) -> dict[str, Any]:
    low, median, high = values
    spread = {"median": median, "low": low, "high": high, "count": 3}
    return {"name": name, "spread": spread, "unit": unit, "target": "", "holds": None, **more}


def test_every_figure_stands_on_the_page(tmp_path):
    figures = [
        figure("first | token", (1.0, 2.0, 4.0), "ms"),
        figure("second token", (3.0, 3.0, 3.0), "ms"),
        figure("ratio", (0.4, 0.5, 0.6), "×", target="at least 0.9", holds=False),
    ]
    result = {"machine": MACHINE, "name": "something", "quick": False, "figures": figures}
    (tmp_path / "something.json").write_text(json.dumps(result))
    page = summary.write(tmp_path).read_text()
    assert "| first \\| token | 2 ms | 1 … 4 | 3 |  |  |" in page
    assert "| ratio | 0.5 × | 0.4 … 0.6 | 3 | at least 0.9 | **missed** |" in page
    assert "2 cores of a CPU" in page
    # One plot for the two of one unit, none for the single one.
    assert [path.name for path in tmp_path.glob("*.png")] == ["something-0.png"]
    assert "(something-0.png)" in page


def test_nothing_measured_makes_an_empty_page(tmp_path):
    assert summary.write(tmp_path).read_text() == "# Results\n"


def test_the_table_of_the_readme_has_what_was_measured_of_it():
    benchmark, name, label = summary.HEADLINES[0]
    measured = figure(name, (0.9, 1.0, 1.1), "×", target="at least 0.99", holds=True)
    result = {"name": benchmark, "figures": [measured, figure("another", (1, 2, 3), "ms")]}
    assert summary.in_short([result]).splitlines()[2:] == [
        f"| {label} (`{benchmark}`) | 1 × | 0.9 to 1.1 (3) | at least 0.99, met |"
    ]
    assert summary.in_short([]) == ""
