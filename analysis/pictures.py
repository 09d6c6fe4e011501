"""Pictures of thoughts: a heat map by distance, and a thought on the graph of one item."""

from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np

from analysis.graphs import Graph
from training.curves import COLORS as LINES
from training.curves import GRAY, MARKERS, drawing, new_figure
from training.evaluation import wilson
from utils import replacing

COLORS = "Blues"
PARTS = [LINES[i] for i in (0, 5, 1, 4, 2, 3)]  # of draw_stacks


@contextmanager
def save_figure(path: Path, figsize: tuple[float, float]):
    """A new matplotlib Figure to draw on, written to `path` afterwards. Raises UserError without matplotlib."""
    with drawing(path):
        figure = new_figure(figsize)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150)


def draw_accuracies(panel, lines: dict[str, dict[int, float]], stages: dict[int, int], chance: float) -> None:
    """Accuracy by epoch, one line for each {name: {epoch: accuracy}}; stages: {epoch: stage} to write below epochs."""
    for (name, points), color, marker in zip(lines.items(), cycle(LINES), cycle(MARKERS), strict=False):
        panel.plot(list(points), list(points.values()), label=name, color=color, marker=marker, clip_on=False, zorder=3)
    panel.axhline(chance, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    panel.annotate("chance", (1, chance), (6, 0), color=GRAY, fontsize=9, **beside)
    panel.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    epochs = sorted({epoch for points in lines.values() for epoch in points})
    panel.set_xticks(epochs, [f"{e}\nstage {stages[e]}" if e in stages else str(e) for e in epochs], fontsize=9)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False, fontsize=9)


def draw_bars(panel, bars: dict[str, tuple[int, int]], label: str) -> None:
    """A bar with its 95 % interval for each {name: (right answers, items)}."""
    shares = [count / n for count, n in bars.values()]
    intervals = [wilson(count, n) for count, n in bars.values()]
    errors = np.array([[s - low, high - s] for s, (low, high) in zip(shares, intervals, strict=True)]).clip(0)
    panel.bar(range(len(bars)), shares, yerr=errors.T, capsize=3, color=LINES[0], ecolor=GRAY)
    panel.set_xticks(range(len(bars)), list(bars), fontsize=9)
    panel.set(ylim=(0, 1), ylabel="accuracy", xlabel=label)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def draw_stacks(panel, stacks: dict[str, dict[str, int]], label: str) -> None:
    """A bar for each {name: {part: items}}, its six parts on top of one another."""
    bottom = np.zeros(len(stacks))
    for part, color in zip(next(iter(stacks.values())), PARTS, strict=True):
        counts = np.array([own[part] for own in stacks.values()])
        panel.bar(range(len(stacks)), counts, bottom=bottom, label=part, color=color)
        bottom += counts
    panel.set_xticks(range(len(stacks)), list(stacks), fontsize=9)
    panel.set(ylabel="items", xlabel=label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, frameon=False, fontsize=9)


def draw_shares(panel, curves: dict[str, np.ndarray]) -> None:
    """Areas below sorted curves [n], over percentiles; the last curve is the highest."""
    for (name, values), color in zip(reversed(curves.items()), LINES, strict=False):
        panel.fill_between(np.linspace(0, 1, len(values)), values, label=name, color=color, linewidth=0)
    panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="percentile of the items", ylabel="value")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, loc="lower right", framealpha=1)


def draw_points(panel, points: dict[str, dict[str, tuple[float, float, float]]], label: str) -> None:
    """Shares with their intervals, one below the other: {series: {name: (share, low, high)}}.

    The first series has all names.
    """
    names = list(next(iter(points.values())))
    for number, ((series, values), color, marker) in enumerate(
        zip(points.items(), cycle(LINES), cycle(MARKERS), strict=False)
    ):
        rows = [names.index(name) + 0.3 * number for name in values]
        middle, low, high = np.array(list(values.values())).T
        errors = np.clip([middle - low, high - middle], 0, None)
        style = {"color": color, "marker": marker, "markersize": 4, "linestyle": "none", "capsize": 2}
        panel.errorbar(middle, rows, xerr=errors, label=series, clip_on=False, **style)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlim=(0, 1), xlabel=label)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if len(points) > 1:
        panel.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))


def draw_cells(panel, values: np.ndarray, texts: list[list[str]], rows: list[str], columns: list[str]) -> None:
    """A cell for each of values [rows, columns], shaded by it (from 0), with a text in it and names at the sides."""
    panel.imshow(values, cmap=COLORS, vmin=0, vmax=max(float(np.max(values)), 1e-9), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = value > 0.6 * np.max(values)
        text = texts[row][column].replace("$", r"\$")  # else matplotlib reads a formula
        panel.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    panel.set_xticks(range(len(columns)), [name.replace("$", r"\$") for name in columns], fontsize=8)
    panel.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in rows], fontsize=8)
    panel.tick_params(length=0)


def draw_lines(panel, lines: dict[str, dict[int, np.ndarray]], label: str) -> None:
    """A line by thought for each {name: {thought: [low, middle, high]}}, with bars from low to high."""
    for number, ((name, points), color, marker) in enumerate(
        zip(lines.items(), cycle(LINES), cycle(MARKERS), strict=False)
    ):
        x = np.array(list(points)) + 0.02 * (number - (len(lines) - 1) / 2)  # bars stand side by side
        low, middle, high = np.array(list(points.values())).T
        errors = np.clip([middle - low, high - middle], 0, None)
        panel.errorbar(x, middle, errors, label=name, color=color, marker=marker, markersize=5, capsize=3)
    panel.set_xticks(sorted({thought for points in lines.values() for thought in points}))
    panel.set(xlabel="thought", ylabel=label)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def draw_heat_map(panel, products: dict[int, dict[int, list[float]]], frontiers: dict[int, int]) -> None:
    """Mean product by thought (rows) and distance from the root (columns); a frame marks each thought's frontier.

    products: {thought: {distance, -1 for nodes that cannot be reached: products}} as analysis.frontier.by_distance;
    frontiers: {thought: the distance of its frontier}.
    """
    distances = sorted({distance for row in products.values() for distance in row})
    means = np.array([[np.mean(row[d]) if row.get(d) else np.nan for d in distances] for row in products.values()])
    panel.imshow(means, cmap=COLORS, vmin=0, aspect="auto")
    for (row, column), mean in np.ndenumerate(means):
        dark = mean > 0.6 * np.nanmax(means)
        panel.text(column, row, f"{mean:.1f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    for row, thought in enumerate(products):
        if frontiers[thought] in distances:
            frame = {"fill": False, "edgecolor": "#D55E00", "linewidth": 2}
            column = distances.index(frontiers[thought])
            panel.add_patch(_rectangle((column - 0.5, row - 0.5), frame))
    names = ["not\nreachable" if d < 0 else "root" if d == 0 else str(d) for d in distances]
    panel.set_xticks(range(len(distances)), names, fontsize=9)
    panel.set_yticks(range(len(products)), [f"thought {thought}" for thought in products], fontsize=9)
    panel.set_xlabel("edges from the root to the node", fontsize=9)
    panel.set_title(
        "mean inner product of thoughts and nodes' embeddings\n(framed: the thought's frontier)", fontsize=10
    )
    panel.tick_params(length=0)


def draw_thought(panel, graph: Graph, held, largest: float) -> None:
    """The item's graph with a node's distance from its root to the right, shaded by one thought."""
    places, path = _places(graph), graph.path_nodes()
    for parent, child in graph.edges:
        on_path = {parent, child} <= path
        style = {"color": "#D55E00" if on_path else "#bbbbbb", "linewidth": 2 if on_path else 1, "zorder": 1}
        panel.plot(*zip(places[parent], places[child], strict=True), **style)
    values = np.clip([held.products[node] for node in places], 0, None) / largest
    panel.scatter(
        *zip(*places.values(), strict=True), c=values, cmap=COLORS, vmin=0, vmax=1, s=230, edgecolors=GRAY, zorder=2
    )
    for (node, place), value in zip(places.items(), values, strict=True):
        panel.annotate(node, place, ha="center", va="center", color="white" if value > 0.6 else "black", fontsize=9)
    panel.set_title(f"thought {held.thought}", fontsize=10)
    panel.margins(0.12)
    panel.set_axis_off()


def draw_tree(panel, graph: Graph, values: dict[str, float], heads: dict[int, str]) -> None:
    """What the root reaches, its depth to the right, with the values of some nodes, and frames for what is right.

    Orange: nodes that lead to the target, and the edges of shortest paths. heads: {depth: text above its column}.
    """
    depths, right, path = graph.distances(graph.root), graph.distances_to_target(), graph.path_nodes()
    places, _ = _layers(depths, 0.0)
    boxes = {node: _box(panel, place, node, values.get(node), node in right) for node, place in places.items()}
    for parent, child in graph.edges:
        if parent in places:
            arrow: dict = {
                "patchA": boxes[parent],
                "patchB": boxes[child],
                "shrinkA": 0,
                "shrinkB": 0,
                "arrowstyle": "-|>",
            }
            arrow["connectionstyle"] = f"arc3,rad={0.35 if depths[parent] == depths[child] else 0}"  # beside its column
            on_path = {parent, child} <= path
            arrow |= {"color": "#D55E00" if on_path else "#bbbbbb", "linewidth": 1.8 if on_path else 0.8}
            panel.annotate("", places[child], places[parent], arrowprops=arrow, zorder=3)  # after the boxes' sizes
    heights = [height for _, height in places.values()]
    for depth, head in heads.items():
        panel.text(depth, max(heights) + 1, head, ha="center", va="center", fontsize=9, color=GRAY)
    panel.set(xlim=(-0.5, max(depths.values()) + 0.5), ylim=(min(heights) - 0.7, max(heights) + 1.5))
    panel.set_axis_off()


def _box(panel, place: tuple[float, float], node: str, value: float | None, is_right: bool):
    """A node's name and value in a frame, shaded by the value; returns the frame."""
    from matplotlib import colormaps

    frame: dict = {"boxstyle": "round,pad=0.25", "facecolor": colormaps[COLORS](value or 0.0)}
    frame |= {"edgecolor": "#D55E00" if is_right else GRAY, "linewidth": 1.6 if is_right else 0.8}
    style = {"color": "white" if (value or 0) > 0.6 else "black", "bbox": frame, "fontsize": 8, "zorder": 2}
    text = panel.text(*place, node if value is None else f"{node} {value:.2f}", ha="center", va="center", **style)
    return text.get_bbox_patch()


def _places(graph: Graph) -> dict[str, tuple[float, float]]:
    """{node: (distance from its root, height)}: the graph of the root above, what it does not reach below."""
    reached = graph.distances(graph.root)
    places, offset = _layers(reached, 0.0)
    others = [node for node in graph.nodes if node not in reached]
    starts = [node for node in others if node not in {child for _, child in graph.edges}]
    for start in starts:
        below, offset = _layers({n: d for n, d in graph.distances(start).items() if n not in places}, offset)
        places |= below
    return places


def _layers(depths: dict[str, int], top: float) -> tuple[dict[str, tuple[float, float]], float]:
    """Nodes in columns by depth, centered below `top`; returns them and the height below them."""
    columns: dict[int, list[str]] = {}
    for node, depth in depths.items():
        columns.setdefault(depth, []).append(node)
    height = max(map(len, columns.values()))
    places = {
        node: (float(depth), top - height / 2 - (row - (len(nodes) - 1) / 2))
        for depth, nodes in columns.items()
        for row, node in enumerate(nodes)
    }
    return places, top - height - 1


def _rectangle(corner: tuple[float, float], style: dict):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, **style)
