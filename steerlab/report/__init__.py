"""One self-contained HTML page about a run: tables, figures and sentences, readable offline.

A package rather than one file: `page` knows how a page looks and nothing of runs, `sections` knows what a run's page
says and nothing of HTML.
"""

from steerlab.report.page import Comparison, Passage, Report, Section, Side, Table
from steerlab.report.sections import from_run
from steerlab.report.tokens import coloured

__all__ = ["Comparison", "Passage", "Report", "Section", "Side", "Table", "coloured", "from_run"]
