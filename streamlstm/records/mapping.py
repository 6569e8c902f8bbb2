"""
Field paths, compiled once: which bytes of a message are a series id, a time and a target.

========================== ==========================================================================
``$.a.b[0].c``             a field of the message; ``$`` alone is the whole of it
``$['odd key']``           a field whose name has dots, spaces, brackets, quotes or a star
``@.x``, ``@[0]``          a field of the exploded observation; ``@`` alone is the whole of it
``$.a.*``                  targets only: every number directly under ``$.a``
``@key @topic @partition`` of the message; ``@header.NAME`` too (of several, the last)
``@field``                 the target's name
========================== ==========================================================================

A CSV row has columns and no depth: there ``$.`` is followed by the column's name as the header has it.
A path that cannot be used is a :class:`~streamlstm.errors.ConfigError` here, before the first record.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from streamlstm.config.model import Decode
from streamlstm.errors import ConfigError
from streamlstm.records.values import Raw, Unfit, kind

_T = TypeVar("_T")

_STEP = re.compile(
    r"""\.(?P<name>[^.\[\]'"*\s]+) | \[(?P<index>[0-9]{1,9})\] | \[(?P<quote>['"])(?P<key>.*?)(?P=quote)\]""",
    re.VERBOSE | re.DOTALL,
)
_COLUMN = re.compile(r"""\$(?: \.(?P<name>.+) | \[(?P<quote>['"])(?P<key>.+)(?P=quote)\] )""", re.VERBOSE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Path:
    """One field path. ``relative`` starts at the exploded observation instead of the message."""

    text: str
    relative: bool
    steps: tuple[str | int, ...]

    @property
    def name(self) -> str:
        """
        What the field is called.

        >>> parse_path("$.tags['cpu total']").name
        'cpu total'
        """
        return str(self.steps[-1]) if self.steps else self.text

    def find(self, node: Any) -> Any:  # noqa: ANN401, because JSON holds anything
        """
        Whatever stands at the end of the path, or ``None`` where nothing does, or :class:`Unfit`.

        >>> parse_path("$.a[1].b").find({"a": [{}, {"b": 5}]})
        5
        >>> parse_path("$.a[1].b").find({"a": [{}]}) is None
        True
        >>> parse_path("$.a.b").find({"a": 7})
        Unfit(message='expected an object, found a number', reason='schema')
        """
        for step in self.steps:
            if node is None:
                return None
            if isinstance(step, str):
                if type(node) is not dict:
                    return Unfit(f"expected an object, found {kind(node)}")
                node = node.get(step)
            else:
                if type(node) is not list:
                    return Unfit(f"expected an array, found {kind(node)}")
                node = node[step] if step < len(node) else None
        return node

    def scalar(self, node: Any) -> Raw:  # noqa: ANN401, because JSON holds anything
        """As :meth:`find`, but an object or array is :class:`Unfit` too."""
        found = self.find(node)
        if type(found) in (dict, list):
            return Unfit(f"expected a value, found {kind(found)}")
        return found


class Meta(NamedTuple):
    """A series id part that stands beside the message, not in it. ``name`` is the header's."""

    source: Literal["key", "field", "topic", "partition", "header"]
    name: str = ""

    @property
    def text(self) -> str:
        """As it is written in the configuration."""
        return f"@header.{self.name}" if self.source == "header" else f"@{self.source}"


FIELD = Meta("field")
_METAS = {m.text: m for m in (Meta("key"), Meta("topic"), Meta("partition"), FIELD)}


class Target(NamedTuple):
    """One value to forecast, and the name of its series' last part."""

    field: str
    path: Path


class Wildcard(NamedTuple):
    """Every number directly under ``path``, but the time and the fields of the series id."""

    text: str
    path: Path
    excluded: frozenset[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to take from each message. Several ``targets``, or a ``wildcard``, are several series."""

    explode: Path | None
    parts: tuple[Path | Meta, ...]
    times: tuple[Path, ...]
    unit: str
    fallback: Literal["broker", "none"]
    targets: tuple[Target, ...]
    wildcard: Wildcard | None
    max_bytes: int
    max_key_bytes: int
    max_rows: int
    tombstone: Literal["ignore", "reset", "dead_letter"]

    @property
    def fields(self) -> tuple[Path, ...]:
        """The parts of the series id that stand in the message."""
        return tuple(part for part in self.parts if isinstance(part, Path))

    @property
    def series_text(self) -> str:
        """The parts of the series id as one."""
        return "|".join(part.text for part in self.parts)

    @property
    def time_text(self) -> str:
        """The time's paths as one."""
        return " ".join(path.text for path in self.times)


def parse_path(text: str) -> Path:
    """
    One field path from its text.

    >>> parse_path("$.a['odd key'][2]").steps
    ('a', 'odd key', 2)

    Raises ValueError with the reason and the fix.
    """
    if text[:1] not in ("$", "@") or (text[0] == "@" and text[1:2] not in ("", ".", "[")):
        raise ValueError("a field path starts with $ (the message) or @. (the exploded observation), as in $.value")
    steps: list[str | int] = []
    at = 1
    while at < len(text):
        m = _STEP.match(text, at)
        if m is None:
            raise ValueError(
                f"cannot be read from {text[at:]!r} on; write .name, [0] for an item, or ['odd name'] for a name "
                "with dots, spaces, brackets or quotes"
            )
        steps.append(int(m["index"]) if m["index"] else m["name"] or m["key"])
        at = m.end()
    return Path(text, relative=text[0] == "@", steps=tuple(steps))


def parse_column(text: str) -> Path:
    """
    The path of a CSV column: what follows ``$.`` is its name, dots and all.

    >>> parse_column("$.PT08.S1(CO)").steps
    ('PT08.S1(CO)',)

    Raises ValueError with the reason and the fix.
    """
    if (m := _COLUMN.fullmatch(text)) is None:
        raise ValueError("a CSV row has columns only: write $.<column>, with the name as the header has it")
    return Path(text, relative=False, steps=((m["name"] or m["key"]),))


def compile_plan(decode: Decode, columns: Sequence[str] | None = None) -> Plan:
    """
    The plan of a ``decode`` section; ``columns`` are the header's, for CSV.

    >>> timestamp = {"path": "$.time"}
    >>> section = {"series_id": ["$.host"], "timestamp": timestamp, "target": {"cpu": "$.cpu", "mem": "$.mem"}}
    >>> plan = compile_plan(Decode.model_validate(section))
    >>> [part.text for part in plan.parts]
    ['$.host', '@field']

    Raises :class:`~streamlstm.errors.ConfigError` with every problem, one a line.
    """
    return _Compiler(decode, columns).plan()


class _Compiler:
    """Reads the section key by key and gathers what is wrong."""

    def __init__(self, decode: Decode, columns: Sequence[str] | None) -> None:
        self.decode = decode
        self.columns = columns if decode.format == "csv" else None
        self.problems: list[str] = []

    def plan(self) -> Plan:
        decode = self.decode
        if decode.format == "csv" and self.columns is None:
            raise ConfigError("decode.format: csv is for files, whose header names the columns; set json for messages")
        explode = self._explode(decode.explode)
        parts = tuple(self._parts(decode.series_id))
        time = decode.timestamp.path
        times = tuple(self._paths("decode.timestamp.path", [time] if isinstance(time, str) else time))
        if len(times) > 1 and decode.timestamp.unit in ("s", "ms", "us", "ns"):
            self.problems.append(
                f"decode.timestamp.unit: {decode.timestamp.unit} is one number, but decode.timestamp.path names "
                f"{len(times)}; write a strptime pattern for their text joined by spaces"
            )
        targets, wildcard = self._targets(decode.target, (*parts, *times))
        if self.problems:
            raise ConfigError("\n".join(self.problems))
        if (len(targets) > 1 or wildcard) and FIELD not in parts:
            parts = (*parts, FIELD)
        return Plan(
            explode=explode,
            parts=parts,
            times=times,
            unit=decode.timestamp.unit,
            fallback=decode.timestamp.fallback,
            targets=targets,
            wildcard=wildcard,
            max_bytes=decode.max_bytes,
            max_key_bytes=decode.max_key_bytes,
            max_rows=decode.max_rows,
            tombstone="dead_letter" if self.columns is not None else decode.tombstone,  # a row always has a value
        )

    def _explode(self, text: str | None) -> Path | None:
        if text is None:
            return None
        if self.columns is not None:
            self.problems.append("decode.explode: a CSV row has no array in it; remove it")
            return None
        path = self._try("decode.explode", parse_path, text)
        if path is not None and path.relative:
            self.problems.append(f"decode.explode: {text!r} starts at the observation it should find; start it with $")
        return path

    def _parts(self, texts: Sequence[str]) -> Iterator[Path | Meta]:
        for i, text in enumerate(texts):
            where = f"decode.series_id[{i}]"
            meta = _METAS.get(text)
            if text.startswith("@header.") and len(text) > len("@header."):
                meta = Meta("header", text.removeprefix("@header."))
            if meta is None and text.startswith("@") and text[1:2] not in (".", "["):
                known = ", ".join(_METAS)
                self.problems.append(f"{where}: {text!r} is not known; there are {known}, @header.NAME and @.field")
            elif meta is None:
                yield from self._paths("decode.series_id", [text], first=i)
            elif self.columns is not None and meta.source in ("key", "header"):
                self.problems.append(f"{where}: a CSV row has no {meta.source}; name a column: $.<column>")
            else:
                yield meta

    def _targets(
        self, target: str | dict[str, str], others: tuple[Path | Meta, ...]
    ) -> tuple[tuple[Target, ...], Wildcard | None]:
        if isinstance(target, str) and target.endswith(".*"):
            text = target[:-2]
            if self.columns is None:
                path = next(self._paths("decode.target", [text]), None)
            elif text == "$":
                path = Path("$", relative=False, steps=())
            else:
                self.problems.append(f"decode.target: {target!r}: of a CSV row, $.* is every number")
                return (), None
            if path is None:
                return (), None
            excluded = frozenset(
                other.name
                for other in others
                if isinstance(other, Path) and other.relative == path.relative and other.steps[:-1] == path.steps
            )
            found = set(self.columns or ()) - excluded - {""}
            if len(found) > self.decode.max_rows:
                self.problems.append(f"decode.max_rows: $.* is {len(found)} columns; write at least {len(found)}")
            if self.columns is not None and not found:
                self.problems.append("decode.target: $.*: no column is left besides the time's and the series id's")
            return (), Wildcard(target, path, excluded)
        if isinstance(target, str):
            return tuple(Target(path.name, path) for path in self._paths("decode.target", [target])), None
        if not target:
            self.problems.append("decode.target: the map is empty; name at least one target: {cpu: $.cpu}")
        named: list[Target] = []
        for field, text in target.items():
            named.extend(Target(field, path) for path in self._paths("decode.target", [text], key=field))
        return tuple(named), None

    def _paths(self, where: str, texts: Sequence[str], *, first: int | None = None, key: str = "") -> Iterator[Path]:
        """The paths among ``texts`` that can be used; what is wrong with the others is noted."""
        for i, text in enumerate(texts, first or 0):
            at = where + (f".{key}" if key else f"[{i}]" if first is not None or len(texts) > 1 else "")
            path = self._try(at, parse_column if self.columns is not None else parse_path, text)
            if path is None:
                continue
            if path.relative and self.decode.explode is None:
                self.problems.append(f"{at}: {text!r} needs decode.explode, the array whose items @ stands for")
            elif self.columns is not None and path.name not in self.columns:
                have = ", ".join(self.columns)
                self.problems.append(f"{at}: there is no column {path.name!r}; the header has {have}")
            else:
                yield path

    def _try(self, where: str, read: Callable[[str], _T], text: str) -> _T | None:
        try:
            return read(text)
        except ValueError as why:
            self.problems.append(f"{where}: {text!r}: {why}")
            return None
