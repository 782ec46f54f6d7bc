"""One self-contained HTML page about a run: tables, figures and sentences, readable offline.

A package rather than one file: `page` knows how a page looks and nothing of runs, `sections` knows what a run's page
says and nothing of HTML.
"""

from steerlab.report.page import Comparison, Report, Section, Side, Table
from steerlab.report.sections import from_run

__all__ = ["Comparison", "Report", "Section", "Side", "Table", "from_run"]
