"""
``MANIFEST.json``: length and SHA-256 of every other file of a generation, and of itself.

It is written last: a generation without one does not exist, and no byte of one that is read goes unchecked. What is
parsed must have our shape to the last type, however right its hash.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, cast

import msgspec

from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError
from streamlstm.recovery.progress import Value
from streamlstm.recovery.snapshot import canonical_json
from streamlstm.series.table import Rows

MANIFEST = "MANIFEST.json"
MANIFEST_LIMIT = 64 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_FileName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._~%-]*\Z", max_length=255)]


@dataclass(frozen=True, slots=True)
class Migration:
    """
    From one schema to the next: what becomes of ``meta.json``, and of the state once it was read by the old one.

    ``state`` is given what was in memory; ``rows`` those of the series beyond it, piece by piece as they are read.
    """

    meta: Callable[[dict[str, Any]], dict[str, Any]]
    state: Callable[[EngineState], EngineState]
    rows: Callable[[Rows], Rows]


class Layout(NamedTuple):
    """
    The schema that is written, and how each older one is brought up to it: ``migrations[n]`` leads from n to n + 1.

    For ever, so that any version can say what it found: the manifest's own shape, and in ``meta.json`` the ``columns``
    and the number of ``series``, by which the state files are read.
    """

    schema: int
    migrations: Mapping[int, Migration]


LAYOUT = Layout(1, {})


class NewerSchema(CheckpointError):
    """Written by a newer version: to be refused, not to be called bad."""


class Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the manifest says of a file."""

    bytes: Count
    sha256: _Sha256


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``MANIFEST.json``. ``attempt`` is the subdirectory that the files stand in, empty where they stand beside it."""

    schema: int
    step: Count
    attempt: Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{16})?\Z")] = ""
    config: str
    fingerprint: dict[str, str]
    files: dict[_FileName, Listed]
    sha256: _Sha256


def seal(
    step: int,
    config_hash: str,
    fingerprint: Mapping[str, str],
    listed: Mapping[str, Listed],
    attempt: str = "",
    layout: Layout = LAYOUT,
) -> bytes:
    """The manifest. It holds its own SHA-256 too, so that no byte of a generation goes unchecked."""
    content: dict[str, Value] = {
        "schema": layout.schema,
        "step": step,
        "config": config_hash,
        "fingerprint": dict(fingerprint),
        "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in listed.items()},
    }
    if attempt:
        content["attempt"] = attempt
    return canonical_json({**content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def parse_manifest(data: bytes, layout: Layout = LAYOUT) -> Manifest:
    """Check and decode a manifest. Raises :class:`~streamlstm.errors.CheckpointError`."""
    if len(data) > MANIFEST_LIMIT:
        raise CheckpointError(f"{MANIFEST} is longer than {MANIFEST_LIMIT} bytes")
    try:
        decoded: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {error}") from error
    if not isinstance(decoded, dict):
        raise CheckpointError(f"{MANIFEST} is damaged")
    sealed = cast("dict[str, Any]", decoded)
    content = {name: value for name, value in sealed.items() if name != "sha256"}
    with well_formed():
        right = hashlib.sha256(canonical_json(content)).hexdigest()
        # The same value spelled otherwise is damage too.
        if sealed.get("sha256") != right or canonical_json(sealed) != data:
            raise CheckpointError(f"{MANIFEST} is damaged: its SHA-256 is not what it says")
    schema = sealed.get("schema")
    if type(schema) is int and schema > layout.schema:
        raise NewerSchema(
            f"the checkpoint has layout {schema}, and this version reads up to {layout.schema}: run the version that "
            "wrote it, or a newer one"
        )
    if type(schema) is not int or not (schema == layout.schema or schema in layout.migrations):
        raise CheckpointError(f"{MANIFEST} speaks of layout {schema!r}, which there never was")
    return convert(sealed, Manifest, MANIFEST)


def reseal(sealed: bytes, attempt: str) -> bytes:
    """
    A manifest for the same files in another place.

    >>> made = seal(0, "h", {}, {}, "0123456789abcdef")
    >>> digest_manifest(reseal(made, "")) == digest_manifest(made)
    True
    """
    content = {name: value for name, value in json.loads(sealed).items() if name not in ("sha256", "attempt")}
    if attempt:
        content["attempt"] = attempt
    return canonical_json({**content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def digest_manifest(sealed: bytes) -> str:
    """What a generation is known by, wherever it lies: the SHA-256 (hex) of its manifest without ``attempt``."""
    return hashlib.sha256(reseal(sealed, "")).hexdigest()


def convert(value: dict[str, Any], kind: type[_Struct], name: str) -> _Struct:
    """What a file of this name holds, in our shape. Raises :class:`~streamlstm.errors.CheckpointError`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{name} does not have the shape of a checkpoint: {error}") from error


@contextmanager
def well_formed() -> Generator[None]:
    """Whatever else is odd about bytes whose hashes are right makes a bad generation, and is no defect of ours."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"it does not have the shape of a checkpoint: {error!r}") from error
