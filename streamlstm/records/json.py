"""
JSON: one message is one observation, or holds an array of them.

Where every path is made of names only, a struct type is made from the paths: msgspec fills in the fields that are
needed and skips the rest. A message that does not fit the type is read once more without one, so that an
unusual value is still taken and a bad one gets its reason. A number too large for a float counts as infinite.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np

from streamlstm.records.batch import Messages
from streamlstm.records.columns import Dead, Fault, Rows, spread
from streamlstm.records.mapping import Path, Plan
from streamlstm.records.values import Raw, Unfit, kind, numbers

DEEPEST = 256
"""
Levels of nesting that are read. The parser has a limit too, but it depends on how deep the caller's stack is, and what
becomes of a message must depend on the message alone.
"""

_NumberOrText = float | str | None
_Scalar = int | float | str | bool | None
_Document = Any
"""Whatever JSON holds."""


class JsonReader:
    """Finds the plan's values in JSON messages."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._any = msgspec.json.Decoder[_Document](float_hook=float)
        self._typed = _typed(plan)

    def read(self, messages: Messages) -> Rows:
        """The rows of these messages. Nothing that a message may hold makes it raise."""
        dead = list(_unreadable(messages, self._plan))
        gone = {one.message for one in dead}
        readable = [(m, value) for m, value in enumerate(messages.value) if value is not None and m not in gone]
        if self._typed is None:
            return self._walk(readable, dead)
        return self._fill(readable, self._typed, dead)

    def _fill(self, readable: Sequence[tuple[int, bytes]], typed: "_Typed", dead: list[Dead]) -> Rows:
        """One observation a message, through the struct type."""
        decode = typed.decoder.decode
        kept: list[int] = []
        filled: list[Any] = []
        untyped: dict[int, _Document] = {}
        for m, value in readable:
            try:
                filled.append(decode(value))
            except (msgspec.DecodeError, UnicodeDecodeError):
                document = self._parse(value)
                if isinstance(document, Fault):
                    dead.append(Dead(m, 0, document))
                    continue
                untyped[len(filled)] = document
                filled.append(typed.blank)
            kept.append(m)
        columns: list[list[Raw]] = [list(map(get, filled)) for get in typed.getters]
        for o, document in untyped.items():
            for column, path in zip(columns, typed.paths, strict=True):
                column[o] = path.scalar(document)
        parts, times = len(self._plan.fields), len(self._plan.times)
        targets = [
            (target.field, target.path, numbers(column))
            for target, column in zip(self._plan.targets, columns[parts + times :], strict=True)
        ]
        return spread(np.array(kept, np.int64), columns[:parts], columns[parts : parts + times], targets, dead)

    def _walk(self, readable: Sequence[tuple[int, bytes]], dead: list[Dead]) -> Rows:
        """Any number of observations a message, each path followed by hand."""
        found = _Found(self._plan, dead)
        for m, value in readable:
            document = self._parse(value)
            if isinstance(document, Fault):
                dead.append(Dead(m, 0, document))
            else:
                found.take(m, document)
        return found.rows()

    def _parse(self, value: bytes) -> _Document | Fault:
        try:
            return self._any.decode(value)
        except UnicodeDecodeError:
            return Fault("decode", "", "not UTF-8")
        except msgspec.DecodeError as why:
            return Fault("decode", "", str(why))


def depth(value: bytes) -> int:
    r"""
    Levels of nesting, counted before parsing; brackets inside text do not count.

    >>> depth(b'{"a": [1, {"b": "]\\"["}]}')
    3
    """
    code = np.frombuffer(value, np.uint8)
    quote = code == ord('"')
    if b"\\" in value:
        quote &= ~_escaped(code)
    outside = np.cumsum(quote) % 2 == 0
    level = ((code == ord("{")) | (code == ord("["))).astype(np.int64) - ((code == ord("}")) | (code == ord("]")))
    return int(np.cumsum(np.where(outside, level, 0)).max(initial=0))


def _escaped(code: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which characters stand behind an odd run of backslashes."""
    at = np.arange(len(code))
    last_other = np.maximum.accumulate(np.where(code != ord("\\"), at, -1))
    before = np.concatenate([[0], (at - last_other)[:-1]])
    return before % 2 == 1


def _unreadable(messages: Messages, plan: Plan) -> Iterator[Dead]:
    """The messages that should be parsed and cannot be."""
    max_bytes = plan.max_bytes
    look_closer = min(max_bytes, DEEPEST)
    for m, value in enumerate(messages.value):
        if value is None:
            if (unread := messages.unread.get(m)) is not None:
                what = f"offsets {unread.first} to {unread.last} ({unread.records} records)"
                yield Dead(m, 0, Fault("codec", "", f"{what}: {unread.why}"))
            elif plan.tombstone == "dead_letter":
                yield Dead(m, 0, Fault("decode", "", "null value"))
        elif len(value) > look_closer:
            if len(value) > max_bytes:
                yield Dead(m, 0, Fault("oversize", "", f"longer than {max_bytes} bytes"))
            elif value.count(b"{") + value.count(b"[") > DEEPEST and depth(value) > DEEPEST:
                yield Dead(m, 0, Fault("decode", "", f"nested deeper than {DEEPEST} levels"))


class _Typed(NamedTuple):
    """A struct type made from the plan's paths (parts, times, targets), and how to get each path's value from it."""

    decoder: msgspec.json.Decoder[Any]
    blank: Any
    paths: tuple[Path, ...]
    getters: tuple[Callable[[Any], Raw], ...]


def _typed(plan: Plan) -> _Typed | None:
    """The struct type, or ``None`` where paths need more than names."""
    paths = (*plan.fields, *plan.times, *(target.path for target in plan.targets))
    if plan.explode or plan.wildcard or any(not p.steps or not all(isinstance(s, str) for s in p.steps) for p in paths):
        return None
    numeric = {target.path.steps for target in plan.targets} - {path.steps for path in (*plan.fields, *plan.times)}
    leaves = {path.steps for path in paths}
    if any(leaf[:i] in leaves for leaf in leaves for i in range(1, len(leaf))):
        return None  # one path ends where another goes on
    if any(not str(step).isprintable() or '"' in str(step) or "\\" in str(step) for leaf in leaves for step in leaf):
        return None  # msgspec takes no field names that JSON would escape
    names: dict[tuple[str | int, ...], str] = {}
    struct = _struct((), leaves, numeric, names)
    getters = tuple(attrgetter(".".join(names[path.steps[: i + 1]] for i in range(len(path.steps)))) for path in paths)
    return _Typed(msgspec.json.Decoder(struct), struct(), paths, getters)


def _struct(
    at: tuple[str | int, ...],
    leaves: set[tuple[str | int, ...]],
    numeric: set[tuple[str | int, ...]],
    names: dict[tuple[str | int, ...], str],
) -> type[msgspec.Struct]:
    """
    The type of the object at ``at``. An absent object inside is one whose fields are all absent.

    ``names`` gets the attribute each field stands under: a field may be called anything.
    """
    fields: list[tuple[str, Any, Any]] = []
    for step in dict.fromkeys(leaf[len(at)] for leaf in sorted(leaves, key=str) if leaf[: len(at)] == at):
        here = (*at, step)
        names[here] = f"f{len(names)}"
        if here in leaves:
            wanted = _NumberOrText if here in numeric else _Scalar
            fields.append((names[here], wanted, msgspec.field(default=None, name=str(step))))
        else:
            inner = _struct(here, leaves, numeric, names)
            fields.append((names[here], inner, msgspec.field(default_factory=inner, name=str(step))))
    return msgspec.defstruct("Message", fields, gc=False)


class _Found:
    """The rows of messages read without a type, gathered one message at a time."""

    def __init__(self, plan: Plan, dead: list[Dead]) -> None:
        self._plan = plan
        self._dead = dead
        self._message: list[int] = []
        self._parts: tuple[list[Raw], ...] = tuple([] for _ in plan.fields)
        self._times: tuple[list[Raw], ...] = tuple([] for _ in plan.times)
        self._observation: list[int] = []
        self._row: list[int] = []
        self._name: list[int] = []
        self._names: dict[str, int] = {}
        self._target: list[Raw] = []

    def take(self, message: int, document: _Document) -> None:
        """Every row of one message, numbered over its observations."""
        found = self._found(document)
        if isinstance(found, Fault):
            self._dead.append(Dead(message, 0, found))
            return
        row = 0
        for node, targets in found:
            if isinstance(targets, Fault):
                self._dead.append(Dead(message, row, targets))
                row += 1
                continue
            for name, raw in targets:
                self._observation.append(len(self._message))
                self._row.append(row)
                self._name.append(self._names.setdefault(name, len(self._names)))
                self._target.append(raw)
                row += 1
            if targets:
                self._message.append(message)
                for paths, columns in ((self._plan.fields, self._parts), (self._plan.times, self._times)):
                    for path, column in zip(paths, columns, strict=True):
                        column.append(path.scalar(node if path.relative else document))
        if row == 0 and self._plan.explode and not found:
            self._dead.append(Dead(message, 0, Fault("mapping", self._plan.explode.text, "no observation")))
        elif row == 0 and self._plan.wildcard:
            self._dead.append(Dead(message, 0, Fault("mapping", self._plan.wildcard.text, "no number")))

    def rows(self) -> Rows:
        """All of them, as columns."""
        faults: dict[int, Fault] = {}
        column = numbers(self._target)
        names = list(self._names)
        for r, why in column.unfit.items():
            faults[r] = Fault(why.reason, self._path_of(names[self._name[r]]), why.message)
        return Rows(
            message_O=np.array(self._message, np.int64),
            parts=self._parts,
            times=self._times,
            observation_R=np.array(self._observation, np.int64),
            row_R=np.array(self._row, np.int32),
            name_R=np.array(self._name, np.int64),
            names=names,
            target_R=column.values,
            faults=faults,
            dead=self._dead,
        )

    def _observations(self, document: _Document) -> list[_Document] | Fault:
        explode = self._plan.explode
        if explode is None:
            return [document]
        nodes = explode.find(document)
        if nodes is None:
            return []
        if isinstance(nodes, Unfit):
            return Fault("schema", explode.text, nodes.message)
        return (
            nodes if type(nodes) is list else Fault("schema", explode.text, f"expected an array, found {kind(nodes)}")
        )

    def _found(self, document: _Document) -> list[tuple[_Document, list[tuple[str, Raw]] | Fault]] | Fault:
        """Each observation and its targets, or the fault of a message that has none, or too many."""
        nodes = self._observations(document)
        if isinstance(nodes, Fault):
            return nodes
        found: list[tuple[_Document, list[tuple[str, Raw]] | Fault]] = []
        count = 0
        for node in nodes:
            targets = self._targets(document, node)
            found.append((node, targets))
            count += 1 if isinstance(targets, Fault) else len(targets)
            if count > self._plan.max_rows:
                path = (self._plan.explode or self._plan.wildcard or self._plan.targets[0].path).text
                return Fault("oversize", path, f"more than {self._plan.max_rows} rows")
        return found

    def _targets(self, document: _Document, node: _Document) -> list[tuple[str, Raw]] | Fault:
        wildcard = self._plan.wildcard
        if wildcard is None:
            return [(t.field, t.path.scalar(node if t.path.relative else document)) for t in self._plan.targets]
        held = wildcard.path.find(node if wildcard.path.relative else document)
        if held is None:
            return []
        if type(held) is not dict:
            why = held.message if isinstance(held, Unfit) else f"expected an object, found {kind(held)}"
            return Fault("schema", wildcard.path.text, why)
        return [
            (name, raw)
            for name, raw in held.items()
            if name not in wildcard.excluded and (raw is None or type(raw) in (int, float))
        ]

    def _path_of(self, name: str) -> str:
        wildcard = self._plan.wildcard
        if wildcard is None:
            return next(target.path.text for target in self._plan.targets if target.field == name)
        return f"{wildcard.path.text}.{name}"
