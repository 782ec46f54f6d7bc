"""What commands say: lines on standard output, and the console that results and progress are drawn on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerlab.command_line.arguments import two_columns

if TYPE_CHECKING:
    from rich.console import Console


def tell(text: str) -> None:
    """One line (or page) on stdout, as it is."""
    print(text)  # noqa: T201 - the only place that prints


def tell_names(rows: Sequence[tuple[str, str]]) -> None:
    """Names and what they are, wrapped to the terminal."""
    tell(two_columns(rows, shutil.get_terminal_size((120, 24)).columns))


def console() -> Console:
    """Where results and progress go: standard output, plain where it is no terminal."""
    from rich.console import Console

    return Console()
