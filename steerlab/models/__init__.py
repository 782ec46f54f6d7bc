"""What we look inside: language models, their sites, and the two doors into a forward pass."""

from steerlab.models.handle import LanguageModel
from steerlab.models.origins import load
from steerlab.models.sites import Site

__all__ = ["LanguageModel", "Site", "load"]
