"""A route's edges as a table: one row for each edge, strongest reveal first.

| column | holds |
|---|---|
| source, target | names of the nodes, as in `Route.node_ids` |
| kind, layer | attention, residual, mlp or opaque; layer of the target |
| source_position, target_position | 0 to T - 1 |
| source_token, target_token | text of the tokens there |
| weight, reveal | share of the target; on the route at every threshold below |
| heads | kept heads of an attention edge, strongest first: "3:0.102 7:0.021" |
"""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from lmtt.errors import LmttError
from lmtt.graph.export import edge_heads

if TYPE_CHECKING:
    from lmtt.graph.routes import Route


def edge_columns(route: Route) -> dict[str, list[Any]]:
    """The table of this module, by columns of plain Python values."""
    edges, ids, tokens = route.edges, route.node_ids, route.trace.tokens
    values = {
        name: edges[name].tolist()
        for name in ("source", "target", "kind", "layer", "source_position", "target_position")
    }
    return {
        "source": [ids[n] for n in values.pop("source")],
        "target": [ids[n] for n in values.pop("target")],
        **values,
        "source_token": [tokens[p] for p in values["source_position"]],
        "target_token": [tokens[p] for p in values["target_position"]],
        "weight": edges["weight"].tolist(),
        "reveal": edges["reveal"].tolist(),
        "heads": [
            " ".join(f"{head}:{weight:.6g}" for head, weight in edge_heads(route, row))
            for row in range(len(edges))
        ],
    }


def route_pandas(route: Route) -> Any:
    """The table as a `pandas.DataFrame`; LmttError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise _missing("pandas") from None
    return pandas.DataFrame(edge_columns(route))


def route_polars(route: Route) -> Any:
    """The table as a `polars.DataFrame`; LmttError if polars is not installed."""
    try:
        import polars
    except ImportError:
        raise _missing("polars") from None
    return polars.DataFrame(edge_columns(route))


def route_csv(route: Route) -> str:
    """The table as CSV with a header (RFC 4180: quoted where needed, lines end in CR LF)."""
    columns = edge_columns(route)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _missing(library: str) -> LmttError:
    return LmttError(f"to_{library} needs {library}, which is not installed", remedy=f"pip install {library}")
