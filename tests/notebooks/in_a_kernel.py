"""`in_a_kernel.py NOTEBOOK OUT`: runs a notebook from a clean kernel of this Python and writes it with its outputs.

In a process of its own, because a kernel's client runs an event loop and its threads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(notebook: str, out: str) -> None:
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=240, kernel_name="python3").execute(cwd=str(Path(out).parent))
    nbformat.write(content, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
