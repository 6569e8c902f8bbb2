"""What ``checkpoint.url`` may be when it is no local directory."""

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

_OPTIONS = {"s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme")}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_PREFIX = re.compile(r"[A-Za-z0-9_=~-][A-Za-z0-9._=~-]*(/[A-Za-z0-9_=~-][A-Za-z0-9._=~-]*)*")
_USERINFO = re.compile(r"(?<=://)[^/?#\s\"']*@")


class ObjectUrl(NamedTuple):
    """A prefix in a bucket. ``anonymous``: without credentials, which only ``gs://anonymous@bucket`` asks for."""

    scheme: str
    bucket: str
    prefix: str
    anonymous: bool
    options: Mapping[str, str]


def split_object_url(url: str) -> ObjectUrl | None:
    """
    The parts of an object store's URL, ``None`` for a local path. Raises :class:`ValueError` with what to write.

    >>> split_object_url("s3://models/load/eu?region=eu-west-1")
    ObjectUrl(scheme='s3', bucket='models', prefix='load/eu', anonymous=False, options={'region': 'eu-west-1'})
    >>> split_object_url("./state") is None
    True
    """
    if "://" not in url:
        return None
    parts = urlsplit(url)
    known = _OPTIONS.get(parts.scheme)
    if known is None:
        raise ValueError("write a local directory, s3://bucket/prefix or gs://bucket/prefix")
    user, at, bucket = parts.netloc.rpartition("@")
    if at and (parts.scheme, user) != ("gs", "anonymous"):
        raise ValueError("take the credentials out: they come from the environment or the files the SDK reads")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"write the bucket's name as it is: {parts.scheme}://bucket/prefix")
    prefix = parts.path.strip("/")
    if (prefix and not _PREFIX.fullmatch(prefix)) or parts.fragment:
        raise ValueError(f"write a prefix of plain names, none of which begins with a dot: {parts.scheme}://bucket/a/b")
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs) or not set(options) <= set(known) or not all(options.values()):
        raise ValueError(f"after the ?, write at most {', '.join(known)}, each once: ?scheme=https")
    if options.get("scheme", "https") not in ("http", "https"):
        raise ValueError("write scheme=https or scheme=http")
    return ObjectUrl(parts.scheme, bucket, prefix, bool(at), options)


def mask_credentials(text: str) -> str:
    """
    A text in which no URL tells a user or password.

    >>> mask_credentials('"s3://key:secret@bucket/prefix"')
    '"s3://***@bucket/prefix"'
    """
    return _USERINFO.sub("***@", text)
