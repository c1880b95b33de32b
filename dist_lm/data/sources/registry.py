"""All formats, by name and by suffix; others, written outside, by `module:Class`."""

from __future__ import annotations

from dist_lm.data.sources.columnar import Arrow, Parquet
from dist_lm.data.sources.conll import Conll
from dist_lm.data.sources.delimited import Csv, Tsv
from dist_lm.data.sources.format import TEXT_DOCUMENTS, Format, ReadSettings
from dist_lm.data.sources.json_file import JsonFile
from dist_lm.data.sources.json_lines import JsonLines
from dist_lm.data.sources.tar_samples import TarSamples
from dist_lm.data.sources.text import Text
from dist_lm.errors import ConfigError
from dist_lm.named_class import named_class

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (Text(), JsonLines(), Csv(), Tsv(), Parquet(), Arrow(), Conll(), JsonFile(), TarSamples())
}
BY_SUFFIX = {suffix: format for format in FORMATS.values() for suffix in format.suffixes}


def format_named(name: str) -> Format:
    """Raises ConfigError where there is none of that name."""
    if ":" in name:
        return named_class(name, Format, where="--format")()  # type: ignore[type-abstract]
    if name not in FORMATS:
        raise ConfigError(
            f"format `{name}` is unknown",
            where="--format",
            do=f"Write one of {', '.join(FORMATS)}, or module:Class for your own.",
        )
    return FORMATS[name]


def check_settings(settings: ReadSettings) -> None:
    """ConfigError for a format or a kind of documents that there is none of."""
    if settings.format is not None:
        format_named(settings.format)
    if settings.text_documents not in TEXT_DOCUMENTS:
        raise ConfigError(
            f"documents `{settings.text_documents}` are unknown",
            where="--documents",
            do=f"Write one of {', '.join(TEXT_DOCUMENTS)}.",
        )
