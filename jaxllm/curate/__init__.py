"""Raw documents to a clean corpus: what is no text, what repeats itself, and what is there already is dropped."""

from jaxllm.curate.cleaning import clean
from jaxllm.curate.limits import HELP, PRESETS, Limits
from jaxllm.curate.report import numbers, said, table

__all__ = ["HELP", "PRESETS", "Limits", "clean", "numbers", "said", "table"]
