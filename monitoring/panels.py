"""Makers of Grafana panels, so that all panels of a kind look alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
"""The Prometheus that the dashboard's reader has chosen."""

REMEDY = "**What to do:** "
"""What stands in front of a panel's remedy."""

GRAPH_HEIGHT = 8
STAT_HEIGHT = 5

GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"


@dataclass(frozen=True, slots=True)
class Query:
    """What a panel asks Prometheus.

    Attributes:
        expression: PromQL.
        legend: what its series are called, as in ``{{tier}}``.
    """

    expression: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """What a panel says of itself.

    Attributes:
        title: its title.
        description: what it shows.
        remedy: what to do where it looks bad.
        empty: what it shows where there is no data.
    """

    title: str
    description: str
    remedy: str
    empty: str = "No traffic"

    @property
    def help(self) -> str:
        """What Grafana shows when the mouse is over the panel's mark."""
        return f"{self.description}\n\n{REMEDY}{self.remedy}"


def thresholds(*steps: tuple[float, str], base: str = GREEN) -> dashboard.ThresholdsConfig:
    """Return thresholds that begin with the colour ``base``; each step is a value and a colour."""
    levels = [models.Threshold(None, base), *(models.Threshold(*step) for step in steps)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(levels)


def number(
    words: Words,
    expression: str,
    unit: str,
    span: int,
    limits: dashboard.ThresholdsConfig | None = None,
    texts: Mapping[str, tuple[str, str]] | None = None,
    is_graph: bool = True,
) -> stat.Panel:
    """Return a panel with one large number.

    Args:
        words: what the panel says of itself.
        expression: PromQL of the number.
        unit: Grafana's name of its unit.
        span: width, in Grafana's columns, of which there are 24.
        limits: which colour it has from which value on; always blue without.
        texts: what stands there for certain values, and in which colour.
        is_graph: whether its course is drawn behind it; otherwise it is asked for once.
    """
    panel = (
        stat.Panel()
        .title(words.title)
        .description(words.help)
        .datasource(SOURCE)
        .unit(unit)
        .height(STAT_HEIGHT)
        .span(span)
        .thresholds(limits or thresholds(base=BLUE))
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.AREA if is_graph else shapes.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value(words.empty)
        .with_target(_target(Query(expression), 0, is_range=is_graph))
    )
    return panel.mappings([_texts(texts)]) if texts else panel


def bars(words: Words, query: Query, unit: str, span: int) -> bargauge.Panel:
    """Return a panel with a bar for each series, as it stands now."""
    return (
        bargauge.Panel()
        .title(words.title)
        .description(words.help)
        .datasource(SOURCE)
        .unit(unit)
        .height(STAT_HEIGHT)
        .span(span)
        .min(0)
        .thresholds(thresholds(base=ORANGE))
        .orientation(shapes.VizOrientation.HORIZONTAL)
        .display_mode(shapes.BarGaugeDisplayMode.BASIC)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .no_value(words.empty)
        .with_target(_target(query, 0, is_range=False))
    )


def graph(
    words: Words,
    queries: Sequence[Query],
    unit: str,
    span: int = 8,
    stacking: shapes.StackingMode = shapes.StackingMode.NONE,
    top: float | None = None,
    limit: float | None = None,
    is_signed: bool = False,
) -> timeseries.Panel:
    """Return a panel with lines over time.

    Args:
        words: what the panel says of itself.
        queries: what it asks.
        unit: Grafana's name of the unit.
        span: width, in Grafana's columns, of which there are 24.
        stacking: whether series lie on one another, and whether they fill the panel.
        top: the upper end of the scale; as the data is without.
        limit: where a line is drawn that an alert watches.
        is_signed: whether values below 0 are shown.
    """
    is_stacked = stacking is not shapes.StackingMode.NONE
    panel = (
        timeseries.Panel()
        .title(words.title)
        .description(words.help)
        .datasource(SOURCE)
        .unit(unit)
        .height(GRAPH_HEIGHT)
        .span(span)
        .line_width(1)
        .fill_opacity(60 if is_stacked else 10)
        .show_points(shapes.VisibilityMode.AUTO)
        .stacking(common.StackingConfig().mode(stacking).group("A"))
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(shapes.TooltipDisplayMode.MULTI)
            .sort(shapes.SortOrder.DESCENDING)
        )
        .no_value(words.empty)
    )
    for place, query in enumerate(queries):
        panel = panel.with_target(_target(query, place))
    if not is_signed:
        panel = panel.min(0)
    if top is not None:
        panel = panel.max(top)
    if limit is not None:
        style = common.GraphThresholdsStyleConfig().mode(shapes.GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds(thresholds((limit, RED), base="transparent"))
        panel = panel.thresholds_style(style)
    return panel


def states(
    words: Words, query: Query, span: int, texts: Mapping[str, tuple[str, str]]
) -> statetimeline.Panel:
    """Return a panel with a band for each series, coloured by its state over time."""
    return (
        statetimeline.Panel()
        .title(words.title)
        .description(words.help)
        .datasource(SOURCE)
        .height(GRAPH_HEIGHT)
        .span(span)
        .mappings([_texts(texts)])
        .merge_values(True)
        .line_width(0)
        .fill_opacity(70)
        .show_value(shapes.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(False)
            .calcs([])
        )
        .no_value(words.empty)
        .with_target(_target(query, 0))
    )


def listing(
    words: Words,
    queries: Sequence[Query],
    columns: Mapping[str, str],
    texts: Mapping[str, Mapping[str, str]],
    widths: Mapping[str, int],
    sort: str,
    span: int,
) -> table.Panel:
    """Return a panel with a table, a row for each set of labels.

    Args:
        words: what the panel says of itself.
        queries: what it asks; the legend of each is the name of its column.
        columns: titles of the labels that have a column, in this order.
        texts: by a column's title, what stands there for certain values.
        widths: by a column's title, its width in pixels.
        sort: title of the column to sort by, the largest first.
        span: width, in Grafana's columns, of which there are 24.
    """
    values = {f"Value #{chr(ord('A') + n)}": query.legend for n, query in enumerate(queries)}
    titles = {**columns, **values}
    panel = (
        table.Panel()
        .title(words.title)
        .description(words.help)
        .datasource(SOURCE)
        .height(GRAPH_HEIGHT)
        .span(span)
        .decimals(0)
        .no_value(words.empty)
        .sort_by([common.TableSortByFieldState().display_name(sort).desc(True)])
        .with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {name: place for place, name in enumerate(titles)},
                    "renameByName": titles,
                },
            )
        )
    )
    for place, query in enumerate(queries):
        panel = panel.with_target(_target(query, place, is_range=False, is_table=True))
    properties: dict[str, list[models.DynamicConfigValue]] = {}
    for title, width in widths.items():
        properties.setdefault(title, []).append(models.DynamicConfigValue("custom.width", width))
    for title, meant in texts.items():
        mapping: Any = _texts({value: (text, "text") for value, text in meant.items()}).to_json()
        properties.setdefault(title, []).append(models.DynamicConfigValue("mappings", [mapping]))
    for title, values_of in properties.items():
        panel = panel.override_by_name(title, values_of)
    return panel


def _target(
    query: Query, place: int, is_range: bool = True, is_table: bool = False
) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expression).ref_id(chr(ord("A") + place))
    target = target.range() if is_range else target.instant()
    if is_table:
        return target.format(PromQueryFormat.TABLE)
    return target.legend_format(query.legend or "__auto")


def _texts(texts: Mapping[str, tuple[str, str]]) -> models.ValueMap:
    return models.ValueMap(
        options={
            value: models.ValueMappingResult(text=text, color=colour, index=place)
            for place, (value, (text, colour)) in enumerate(texts.items())
        }
    )
