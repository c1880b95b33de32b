"""dist_lm: from raw text and machines to a Hugging Face language model."""

__version__ = "0.1.0"
