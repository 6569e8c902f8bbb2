"""
From the raw values of one cut to a :class:`~streamlstm.records.batch.RecordBatch`: names, times, order.

Axes: O observations (a message, or one item of an exploded array), R rows (one target of one observation),
N the rows that became records.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamlstm.records.batch import F64, I32, I64, Messages, Reason, RecordBatch, Rejected, SeriesId
from streamlstm.records.mapping import FIELD, Meta, Path, Plan
from streamlstm.records.times import LIMIT_NS, TimeReader
from streamlstm.records.values import NumberColumn, Raw, Unfit, text_of

LONGEST_PATH = 200
"""Characters of a path in a :class:`Rejected`: a producer names the fields of ``$.*``."""

MOST_NAMES = 1 << 18
"""Names kept between cuts; beyond that they are forgotten and met anew, which changes no result."""

MOST_BYTES = 64 << 20
"""As :data:`MOST_NAMES`, for the bytes of those names: a producer decides how long they are."""

_TOO_LONG = -1
"""Instead of the number of a tuple of parts, which is not remembered then."""


class Fault(NamedTuple):
    """What is wrong with a row: the second half of a :class:`~streamlstm.records.batch.Rejected`."""

    reason: Reason
    path: str
    message: str


class Dead(NamedTuple):
    """A row without an observation: mostly a whole message that could not be read, as its row 0."""

    message: int
    row: int
    fault: Fault


@dataclass(frozen=True, slots=True)
class Rows:
    """
    What a format found in the messages of one cut.

    ``parts[p][o]`` and ``times[t][o]`` are the raw values of observation o, one column for each path in the plan's
    ``fields`` and ``times``. Row r is target ``names[name_R[r]]`` of observation ``observation_R[r]``. Rows
    stand in the order of the messages and, within one, of ``row_R``. ``target_R`` is NaN where missing or at fault.
    """

    message_O: I64
    parts: Sequence[Sequence[Raw]]
    times: Sequence[Sequence[Raw]]
    observation_R: I64
    row_R: I32
    name_R: I64
    names: Sequence[str]
    target_R: F64
    faults: dict[int, Fault] = field(default_factory=dict[int, Fault])
    dead: Sequence[Dead] = ()


def spread(
    message_O: I64,
    parts: Sequence[Sequence[Raw]],
    times: Sequence[Sequence[Raw]],
    targets: Sequence[tuple[str, Path, NumberColumn]],
    dead: Sequence[Dead],
) -> Rows:
    """Rows where every observation has the same targets, in the order listed."""
    count = len(targets)
    faults: dict[int, Fault] = {}
    for t, (_, path, column) in enumerate(targets):
        for o, why in column.unfit.items():
            faults[o * count + t] = Fault(why.reason, path.text, why.message)
    return Rows(
        message_O=message_O,
        parts=parts,
        times=times,
        observation_R=np.repeat(np.arange(len(message_O)), count),
        row_R=np.tile(np.arange(count, dtype=np.int32), len(message_O)),
        name_R=np.tile(np.arange(count), len(message_O)),
        names=[name for name, _, _ in targets],
        target_R=np.stack([column.values for _, _, column in targets], axis=1).ravel(),
        faults=faults,
        dead=dead,
    )


def join_parts(parts: Sequence[str]) -> str:
    r"""
    The key of a series: its parts joined with ``|``, so that different parts never give the same key.

    Inside a part a backslash goes before each ``|`` and backslash; a part that stands alone stays as it is.

    >>> join_parts(["host-1", "cpu"]), join_parts(["a|b", "c"]), join_parts(["a|b"])
    ('host-1|cpu', 'a\\|b|c', 'a|b')
    """
    return parts[0] if len(parts) == 1 else "|".join(map(_escaped, parts))


def _escaped(part: str) -> str:
    return part.replace("\\", "\\\\").replace("|", "\\|")


class Assembler:
    """Gives rows their series and their times. What it remembers between cuts is for speed only."""

    def __init__(self, plan: Plan, *, most_names: int = MOST_NAMES, most_bytes: int = MOST_BYTES) -> None:
        self._plan = plan
        self._most_names = most_names
        self._most_bytes = most_bytes
        self._too_long = Fault("oversize", plan.series_text, f"a key longer than {plan.max_key_bytes} bytes")
        self.times = TimeReader(plan.unit)
        self._bases: dict[tuple[str, ...], int] = {}
        self._base_parts: list[tuple[str, ...]] = []
        self._base_bytes: list[int] = []
        self._series: dict[tuple[tuple[str, int], int, str], SeriesId] = {}
        self._longest_base = 0
        self._held_bytes = 0

    def assemble(self, messages: Messages, rows: Rows) -> RecordBatch:
        """The records of these rows, and what had to be rejected, both in the cut's order."""
        self._forget()
        parts, faults_O = self._parts(messages, rows.message_O, rows.parts)
        base_O = self._number(parts, len(rows.message_O), faults_O)
        faults_R = {**dict.fromkeys(self._long_names(rows, base_O), self._too_long), **rows.faults}
        time_O = self._times(messages, rows, faults_O)
        picked_R = np.ones(len(rows.row_R), np.bool_)
        if faults_O:
            sound_O = np.ones(len(rows.message_O), np.bool_)
            sound_O[list(faults_O)] = False
            picked_R &= sound_O[rows.observation_R]
        picked_R[list(faults_R)] = False
        tombstones = self._tombstones(messages)
        resets, unnamed = self._resets(messages, tombstones)
        dead = [*rows.dead, *_dead_rows(rows, faults_O, faults_R, np.flatnonzero(~picked_R)), *unnamed]
        observation_N = rows.observation_R[picked_R]
        message_N = rows.message_O[observation_N]
        range_N = messages.range_index[message_N]
        series, code = self._code(messages, rows.names, base_O[observation_N], range_N, rows.name_R[picked_R])
        if resets:
            series = tuple(dict.fromkeys((*series, *(one for _, one in resets))))
        code_of = {one: q for q, one in enumerate(series)} if resets else {}
        return RecordBatch(
            cut=messages.cut,
            series=series,
            code=code,
            range_index=range_N,
            offset=messages.offset[message_N],
            row=rows.row_R[picked_R],
            time_ns=time_O[observation_N],
            broker_ns=messages.broker_ns[message_N],
            target=rows.target_R[picked_R],
            rejected=_rejected(messages, dead),
            skipped=len(tombstones) - len(unnamed),
            reset_at=np.searchsorted(message_N, [m for m, _ in resets]).astype(np.int32),
            reset_code=np.array([code_of[one] for _, one in resets], np.int32),
        )

    def _tombstones(self, messages: Messages) -> list[int]:
        """The messages without a value, where that is no fault."""
        if self._plan.tombstone == "dead_letter" or None not in messages.value:
            return []
        return [m for m, value in enumerate(messages.value) if value is None and m not in messages.unread]

    def _resets(self, messages: Messages, tombstones: list[int]) -> tuple[list[tuple[int, SeriesId]], list[Dead]]:
        """Which series these tombstones reset, in their order, and those that name none."""
        if self._plan.tombstone != "reset" or not tombstones:
            return [], []
        message_O = np.array(tombstones, np.int64)
        parts, faults = self._parts(messages, message_O, ())
        bases = self._number(parts, len(tombstones), faults).tolist()
        names = [target.field for target in self._plan.targets] if FIELD in self._plan.parts else [""]
        resets: list[tuple[int, SeriesId]] = []
        for o, m in enumerate(tombstones):
            if o not in faults:
                where = messages.cut[int(messages.range_index[m])]
                resets += [(m, self._series_id((where.topic, where.partition), bases[o], name)) for name in names]
        return resets, [Dead(tombstones[o], 0, fault) for o, fault in faults.items()]

    def _parts(
        self, messages: Messages, message_O: I64, fields: Sequence[Sequence[Raw]]
    ) -> tuple[list[list[str]], dict[int, Fault]]:
        """The parts of each observation's series id as text, ``@field`` left out, and where one is missing."""
        columns: list[list[str]] = []
        faults: dict[int, Fault] = {}
        found = iter(fields)
        for part in self._plan.parts:
            if part == FIELD:
                continue
            raw = next(found) if isinstance(part, Path) else _beside(part, messages, message_O)
            columns.append(_texts(raw, part.text, faults))
        return columns, faults

    def _times(self, messages: Messages, rows: Rows, faults: dict[int, Fault]) -> I64:
        """Every observation's time; those that have none are added to ``faults``, after what is there already."""
        path = self._plan.time_text
        broker_O = messages.broker_ns[rows.message_O]
        if not rows.times:
            ns_O, missing = broker_O.copy(), range(len(broker_O))
        else:
            ns_O, missing, unfit = self.times.read(rows.times[0] if len(rows.times) == 1 else _joined(rows.times))
            for o, why in unfit.items():
                faults.setdefault(o, Fault(why.reason, path, why.message))
        if len(missing):
            absent = np.fromiter(missing, np.int64, len(missing))
            if self._plan.fallback == "none":
                stuck, message = absent, "no time"
            else:
                ns_O[absent] = broker_O[absent]
                usable = (broker_O[absent] >= 0) & (broker_O[absent] <= LIMIT_NS)
                stuck, message = absent[~usable], "no time, and none from the broker"
            for o in stuck.tolist():
                faults.setdefault(o, Fault("mapping", path, message))
        return ns_O

    def _code(
        self, messages: Messages, names: Sequence[str], base_N: I64, range_N: I32, name_N: I64
    ) -> tuple[tuple[SeriesId, ...], I32]:
        """The distinct series in order of first appearance, and which one each record belongs to."""
        if not len(base_N):
            return (), np.empty(0, np.int32)
        places = list(dict.fromkeys((r.topic, r.partition) for r in messages.cut))
        rank = {place: i for i, place in enumerate(places)}
        place_of_range = np.array([rank[r.topic, r.partition] for r in messages.cut], np.int64)
        mixed = (base_N * len(places) + place_of_range[range_N]) * len(names) + name_N
        distinct, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
        order = np.argsort(first)
        code_of = np.empty(len(order), np.int32)
        code_of[order] = np.arange(len(order), dtype=np.int32)
        rest, name = np.divmod(distinct[order], len(names))
        base, place = np.divmod(rest, len(places))
        series = tuple(
            self._series_id(places[p], b, names[int(n)])
            for b, p, n in zip(base.tolist(), place.tolist(), name.tolist(), strict=True)
        )
        return series, code_of[inverse]

    def _forget(self) -> None:
        """Drops what is remembered once it is too much."""
        if max(len(self._bases), len(self._series)) > self._most_names or self._held_bytes > self._most_bytes:
            for held in (self._bases, self._base_parts, self._base_bytes, self._series):
                held.clear()
            self._longest_base = self._held_bytes = 0

    def _number(self, parts: list[list[str]], observations: int, faults: dict[int, Fault]) -> I64:
        """One number for each distinct tuple of parts; observations where they are too long are added to ``faults``."""
        if not parts:
            return np.zeros(observations, np.int64)
        tuples = list(zip(*parts, strict=True))
        numbers = list(map(self._bases.get, tuples))
        if None in numbers:
            for o, parts_of_one in enumerate(tuples):
                if numbers[o] is None:
                    numbers[o] = self._base(parts_of_one)
                    if numbers[o] == _TOO_LONG:
                        faults.setdefault(o, self._too_long)
        return np.array(numbers, np.int64)

    def _base(self, parts: tuple[str, ...]) -> int:
        """The number of a tuple of parts that may be new; :data:`_TOO_LONG` where no key can hold them."""
        if (known := self._bases.get(parts)) is not None:
            return known
        size = sum(map(self._size, parts)) + len(self._plan.parts) - 1
        if size > self._plan.max_key_bytes:
            return _TOO_LONG
        number = self._bases[parts] = len(self._base_parts)
        self._base_parts.append(parts)
        self._base_bytes.append(size)
        self._longest_base = max(self._longest_base, size)
        self._held_bytes += size
        return number

    def _size(self, part: str) -> int:
        """Bytes of a part in a key; of one that is too long in any case, its characters."""
        if len(part) > self._plan.max_key_bytes:
            return len(part)
        return len((_escaped(part) if len(self._plan.parts) > 1 else part).encode())

    def _long_names(self, rows: Rows, base_O: I64) -> list[int]:
        """The rows whose key is too long with the target's name in it."""
        if FIELD not in self._plan.parts or not len(rows.row_R):
            return []
        name_bytes = np.array([self._size(name) for name in rows.names], np.int64) * self._plan.parts.count(FIELD)
        alone = len(self._plan.parts) - 1
        if int(name_bytes.max()) + max(alone, self._longest_base) <= self._plan.max_key_bytes:
            return []
        sizes = self._base_bytes or [alone]
        base_bytes_O = np.array([0 if base == _TOO_LONG else sizes[base] for base in base_O.tolist()], np.int64)
        too_long_R = base_bytes_O[rows.observation_R] + name_bytes[rows.name_R] > self._plan.max_key_bytes
        return np.flatnonzero(too_long_R).tolist()

    def _series_id(self, place: tuple[str, int], base: int, name: str) -> SeriesId:
        at = (place, base, name)
        if (series := self._series.get(at)) is None:
            given = iter(self._base_parts[base] if self._base_parts else ())
            parts = [name if part == FIELD else next(given) for part in self._plan.parts]
            series = self._series[at] = SeriesId(*place, join_parts(parts))
            self._held_bytes += len(series.key)
        return series


def _texts(column: Sequence[Raw], path: str, faults: dict[int, Fault]) -> list[str]:
    """A column as text; observations where it is missing or unfit are added to ``faults``, and empty here."""
    texts: list[str] = []
    for o, raw in enumerate(column) if set(map(type, column)) - {str} else ():
        text = text_of(raw)
        if text is None:
            faults.setdefault(o, Fault("mapping", path, "missing"))
        elif isinstance(text, Unfit):
            faults.setdefault(o, Fault(text.reason, path, text.message))
        texts.append(text if isinstance(text, str) else "")
    return texts or [raw for raw in column if isinstance(raw, str)]


def _beside(part: Meta, messages: Messages, message_O: I64) -> list[Raw]:
    """A part that stands beside the message, for each observation."""
    at = message_O.tolist()
    match part.source:
        case "key":
            return [_utf8(messages.key[m]) for m in at]
        case "header":
            return [_utf8(_last_header(messages, m, part.name)) for m in at]
        case "topic":
            return [messages.cut[i].topic for i in messages.range_index[message_O].tolist()]
        case _:
            return [str(messages.cut[i].partition) for i in messages.range_index[message_O].tolist()]


def _last_header(messages: Messages, message: int, name: str) -> bytes | None:
    headers = messages.headers[message] if messages.headers else []
    return next((value for header, value in reversed(headers) if header == name), None)


def _utf8(raw: bytes | None) -> str | Unfit | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return Unfit("not UTF-8", "decode")


def _joined(columns: Sequence[Sequence[Raw]]) -> list[Raw]:
    """Several columns as one, their text joined by a space."""
    joined: list[Raw] = []
    for raws in zip(*columns, strict=True):
        texts = [text_of(raw) for raw in raws]
        unfit = next((text for text in texts if isinstance(text, Unfit)), None)
        joined.append(unfit or (None if None in texts else " ".join(map(str, texts))))
    return joined


def _dead_rows(
    rows: Rows, faults_O: dict[int, Fault], faults_R: dict[int, Fault], lost_R: NDArray[np.intp]
) -> Iterator[Dead]:
    """The rows that are no records, with the fault of their observation or else their own."""
    for r in lost_R.tolist():
        observation = int(rows.observation_R[r])
        fault = faults_O.get(observation) or faults_R[r]
        yield Dead(int(rows.message_O[observation]), int(rows.row_R[r]), fault)


def _rejected(messages: Messages, dead: list[Dead]) -> tuple[Rejected, ...]:
    rejected: list[Rejected] = []
    for message, row, (reason, path, why) in sorted(dead, key=lambda one: (one.message, one.row)):
        topic, partition, _, _ = messages.cut[int(messages.range_index[message])]
        offset = int(messages.offset[message])
        records = messages.unread[message].records if message in messages.unread else 1
        rejected.append(Rejected(topic, partition, offset, row, reason, path[:LONGEST_PATH], why, records))
    return tuple(rejected)
