"""Where data lies, as one string: a local path or a URL.

Enters: what a user typed or wrote into a configuration.  Leaves: its parts, names below it, and a
form of it that may be shown.  Promises: nothing that starts a program, and no chain of file systems,
gets through; passwords and query strings, which carry signatures, are in no text that `redact` or
`scrub` has made.  Nothing here touches a file or the network.

    data/train                        a local path; file:///data/train is the same as /data/train
    s3://bucket/train                 http, https, s3, gs (gcs) and az (abfs, abfss), each by its extra
    fsspec+sftp://host/data/train     any other file system of fsspec, if the user names it so
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

from dist_lm.errors import ConfigError

EXTRAS = {
    "http": "",
    "https": "",
    "s3": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
"""Schemes that need no further word, and the extra of dist_lm that brings the library of each."""
BY_NAME = "fsspec+"
HIDDEN = "***"
_HTTP = ("http", "https")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/*)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def is_remote(location: str | Path) -> bool:
    """True for a URL that fsspec opens; ConfigError for what nobody should open."""
    return scheme_of(location) != "file"


def is_http(location: str) -> bool:
    return scheme_of(location) in _HTTP


def scheme_of(location: str | Path) -> str:
    """Scheme of a location that was found good; "file" for local paths."""
    text = str(location)
    if not text or text == "-" or _CONTROL.search(text) or text.startswith("|") or text.endswith("|"):
        raise _refused(text, "Standard input, commands and control characters name no file.")
    match = _SCHEME.match(text)
    if match is None:
        return "file"
    scheme = match["scheme"].lower()
    if "::" in text:
        raise _refused(text, "Chained file systems (`::`) are not opened.")
    if match["slashes"] == "" or scheme == "pipe":
        raise _refused(text, f"`{scheme}:` starts no URL that is known; a local file of this name is ./{text[:40]}")
    if scheme == "file":
        return "file"
    if match["slashes"] == "/":
        raise _refused(text, f"A URL has two slashes: {scheme}://")
    plain = scheme.removeprefix(BY_NAME)
    if plain == scheme and scheme not in EXTRAS:
        known = ", ".join(f"{name}://" for name in EXTRAS)
        raise _refused(
            text, f"Known are {known}.", do=f"Write {BY_NAME}{scheme}:// if fsspec shall open it all the same."
        )
    if not text[match.end() :].strip("/"):
        raise _refused(text, "There is nothing behind the scheme.")
    return plain


def local_path(location: str | Path) -> Path:
    """The path of a location that is not remote."""
    text = str(location)
    return Path(unquote(urlsplit(text).path)) if text.lower().startswith("file:") else Path(location)


def fsspec_url(location: str) -> str:
    """The URL as fsspec knows it."""
    return location.removeprefix(BY_NAME)


def join(location: str | Path, name: str) -> str:
    """The location of `name` below a folder; a query string stays at the end."""
    if not is_remote(location):
        return str(local_path(location) / name)
    parts = urlsplit(str(location))
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def name_of(location: str | Path) -> str:
    """The last part of the path, without a query string."""
    if not is_remote(location):
        return local_path(location).name
    return urlsplit(str(location)).path.rstrip("/").rpartition("/")[2]


def without_secrets(location: str) -> str:
    """A URL without user, password and query: what stays the same while signatures change."""
    parts = urlsplit(location)
    return f"{parts.scheme}://{_owner(parts)}{parts.netloc.rpartition('@')[2]}{parts.path}"


def redact(location: str | Path) -> str:
    """The location without user, password and values of its query; for errors, logs and manifests."""
    text = str(location)
    if "://" not in text or text.lower().startswith("file:"):
        return text
    parts = urlsplit(text)
    host = parts.netloc.rpartition("@")[2]
    user = _owner(parts) or (f"{HIDDEN}@" if "@" in parts.netloc else "")
    query = f"?{HIDDEN}" if parts.query else ""
    return f"{parts.scheme}://{user}{host}{parts.path}{query}"


def _owner(parts: SplitResult) -> str:
    """What stands before the host and is no secret: the container of abfss://container@account, a user of sftp."""
    user, at, _ = parts.netloc.rpartition("@")
    return f"{user}{at}" if at and ":" not in user and parts.scheme not in _HTTP else ""


def scrub(text: str, location: str | Path) -> str:
    """A text of a library, such as an error message, without the secrets of the location."""
    text = text.replace(str(location), redact(location))
    parts = urlsplit(str(location))
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    secrets = [parts.query, password, "" if _owner(parts) else user, *(value for _, value in parse_qsl(parts.query))]
    secrets += [piece.partition("=")[2] for piece in parts.query.split("&")]
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        # A value such as "1" would punch holes into every text, and tells nothing.
        if len(secret) > 3:
            text = text.replace(secret, HIDDEN)
    return text


def _refused(text: str, why: str, do: str = "") -> ConfigError:
    shown = redact(text[:100])
    return ConfigError(f"`{_CONTROL.sub('?', shown)}` is no place to read data from", why=why, do=do)
