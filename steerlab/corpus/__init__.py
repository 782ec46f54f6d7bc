"""Running text: a file that the user names, WikiText-2 where the shared data has it, the package's own prose."""

from steerlab.corpus.prose import DATA_VARIABLE, OWN, Prose

__all__ = ["DATA_VARIABLE", "OWN", "Prose"]
