"""What a person did wrong, said in one line with the remedy; and a run that failed by itself.

The command line prints `UsageError` and `RunFailed` as one line and leaves with exit code 2 or 1.
Everything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input. The message is one line: what is wrong, then what to do about it."""


class RunFailed(RuntimeError):
    """A run that cannot go on (non-finite loss, full disk). The message says what was kept and how to resume."""


def unknown(kind: str, name: str, options: Iterable[str]) -> UsageError:
    """Error for a name that is not in a register; offers the nearest names.

    `unknown("recipe", "rlo", RECIPES)` → "unknown recipe 'rlo'; did you mean rloo? (all: rloo, …)"
    """
    known = sorted(set(options))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "none of the known names is near"
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return UsageError(f"unknown {kind} {name!r}; {hint} (known: {shown})")
