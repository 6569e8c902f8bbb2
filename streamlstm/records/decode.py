"""
The one door from bytes to records.

Decoding is a function of the message, its place and the configuration alone: what stands beside a message in a
cut, or came before it, changes nothing. What cannot be used is a :class:`~streamlstm.records.batch.Rejected`
with one of these reasons:

============== ===============================================================================
``decode``     not JSON, not CSV, not UTF-8, nested too deep, or no value at all where
               ``decode.tombstone`` says that this is a fault
``schema``     of the wrong shape or type: text for a number, an object for a name, a time that is none
``mapping``    something that must be there is not: a part of the series id, the time, any target at all
``non_finite`` a target that is infinite, or overflows a float32
``oversize``   longer than ``decode.max_bytes``, more rows than ``decode.max_rows``, or a series whose key is
               longer than ``decode.max_key_bytes``
``codec``      a batch of records that cannot be unpacked, or to more than ``decode.max_batch_bytes``
============== ===============================================================================

Rows of a message are numbered from 0: observations in their order, and within one its targets in theirs. Each bad
row is rejected by itself; a message that gives no row at all is one rejected record, row 0.

A message without a value is a tombstone: no record, but passed over, or a reset of the series its key names.
"""

from collections.abc import Sequence
from typing import Protocol

from streamlstm.config.model import Decode
from streamlstm.errors import DataError
from streamlstm.records.batch import Messages, RecordBatch
from streamlstm.records.columns import Assembler, Rows
from streamlstm.records.csv import CsvReader
from streamlstm.records.json import JsonReader
from streamlstm.records.mapping import compile_plan


class _Reader(Protocol):
    def read(self, messages: Messages) -> Rows: ...


class Decoder:
    """Messages in, columns out. What it remembers between cuts is for speed only."""

    def __init__(self, reader: _Reader, assembler: Assembler) -> None:
        self._reader = reader
        self._assembler = assembler

    @property
    def naive_times(self) -> bool:
        """Whether a time without a zone has been taken as UTC so far; worth one warning."""
        return self._assembler.times.naive

    def decode(self, messages: Messages) -> RecordBatch:
        """The records of one cut, and its rejections. Raises on nothing that a message may hold."""
        return self._assembler.assemble(messages, self._reader.read(messages))


def compile_decoder(decode: Decode, columns: Sequence[str] | None = None) -> Decoder:
    """
    The decoder of a ``decode`` section; CSV needs the header's ``columns``.

    Raises :class:`~streamlstm.errors.ConfigError` with every path that cannot be used.
    """
    plan = compile_plan(decode, columns)
    reader = JsonReader(plan) if decode.format == "json" else CsvReader(plan, decode.csv, columns or ())
    return Decoder(reader, Assembler(plan))


def refuse_rejected(batch: RecordBatch) -> None:
    """``decode.on_error: fail``: raises :class:`~streamlstm.errors.DataError` for the first record not understood."""
    for r in batch.rejected:
        where = f"{r.topic}-{r.partition} offset {r.offset} row {r.row}"
        raise DataError(f"decode.on_error: fail: {where}: {': '.join(filter(None, (r.reason, r.path, r.message)))}")
