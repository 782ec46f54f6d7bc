"""What a reading leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from steerlab.runs import Run


@dataclass(frozen=True)
class Reading:
    """tables, figures, and graphs in JSON for other tools' viewers: by the names under which they are kept."""

    tables: dict[str, pd.DataFrame]
    figures: dict[str, go.Figure]
    graphs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def with_(self, other: Reading) -> Reading:
        """Both, as one."""
        return Reading(self.tables | other.tables, self.figures | other.figures, self.graphs | other.graphs)

    def save(self, run: Run) -> tuple[Path, ...]:
        """Put everything into a run's folder. Returns where."""
        made = [run.save_table(name, table) for name, table in self.tables.items()]
        made += [run.save_figure(name, figure) for name, figure in self.figures.items()]
        return (*made, *(run.save_graph(name, graph) for name, graph in self.graphs.items()))
