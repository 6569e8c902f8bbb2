"""
CSV: one message is one row, the header's columns are known beforehand.

=================================== ==============================================================
``$.<column>``                      the cell of that column; spaces around a cell do not count
empty, ``NaN`` or ``null``          missing, whatever the case
``$.*``                             every column but the time's and those of the series id, in the
                                    header's order, as if each had been listed: text that is no
                                    number is rejected, for nothing may vanish unseen
more or fewer cells than columns    rejected: nobody knows which cell belongs where
=================================== ==============================================================

A column of labels should not be left to ``$.*``: list the targets. A cell that would be a number with the other
decimal mark says so, or a wrong ``decode.csv.decimal`` would be hard to see.
"""

import csv
import re
from collections.abc import Iterable, Sequence

import numpy as np

from streamlstm.config.model import Csv
from streamlstm.records.batch import Messages
from streamlstm.records.columns import Dead, Fault, Rows, spread
from streamlstm.records.mapping import Path, Plan
from streamlstm.records.values import NOT_A_NUMBER, NumberColumn, Raw, Unfit, numbers_of_text

_OTHER_MARK = Unfit("a number with another decimal mark than decode.csv.decimal")
_WITH_MARK = re.compile(r"[+-]?[0-9]+[.,][0-9]+")


class CsvReader:
    """Finds the plan's values in rows of CSV whose columns are known."""

    def __init__(self, plan: Plan, csv: Csv, columns: Sequence[str]) -> None:
        self._plan = plan
        self._csv = csv
        self._columns = tuple(columns)
        if plan.wildcard is None:
            self._targets = [(target.field, target.path) for target in plan.targets]
        else:
            names = [name for name in columns if name and name not in plan.wildcard.excluded]
            self._targets = [(name, Path(f"$.{name}", relative=False, steps=(name,))) for name in names]

    def read(self, messages: Messages) -> Rows:
        """The rows of these messages. Nothing that a message may hold makes it raise."""
        dead: list[Dead] = []
        kept: list[int] = []
        rows: list[list[str]] = []
        for m, value in enumerate(messages.value):
            cells = self._cells(value)
            if isinstance(cells, Fault):
                dead.append(Dead(m, 0, cells))
            else:
                kept.append(m)
                rows.append(cells)
        cells_of = dict(zip(self._columns, zip(*rows, strict=True), strict=True)) if rows else {}
        columns = [self._numbers(cells_of.get(path.name, ())) for _, path in self._targets]
        return spread(
            np.array(kept, np.int64),
            [self._texts(cells_of, path) for path in self._plan.fields],
            [self._texts(cells_of, path) for path in self._plan.times],
            [(name, path, column) for (name, path), column in zip(self._targets, columns, strict=True)],
            dead,
        )

    def _cells(self, value: bytes | None) -> list[str] | Fault:
        """The cells of one row, or why there are none."""
        if value is None:
            return Fault("decode", "", "null value")
        if len(value) > self._plan.max_bytes:
            return Fault("oversize", "", f"longer than {self._plan.max_bytes} bytes")
        try:
            cells = split(value, self._csv.delimiter)
        except UnicodeDecodeError:
            return Fault("decode", "", "not UTF-8")
        except csv.Error as why:
            return Fault("decode", "", f"not a row of CSV: {why}")
        if len(cells) != len(self._columns):
            return Fault("schema", "", f"the header has {len(self._columns)} columns, the row {len(cells)} cells")
        return cells

    @staticmethod
    def _texts(cells_of: dict[str, tuple[str, ...]], path: Path) -> list[Raw]:
        return [cell or None for cell in cells_of.get(path.name, ())]

    def _numbers(self, cells: Iterable[str]) -> NumberColumn:
        """A column of numbers, in which ``null`` too is missing."""
        texts = [cell or "nan" for cell in cells]
        column = numbers_of_text(texts, self._csv.decimal)
        unfit: dict[int, Unfit] = {}
        for i, why in column.unfit.items():
            if why is NOT_A_NUMBER and texts[i].lower() == "null":
                continue
            unfit[i] = _OTHER_MARK if why is NOT_A_NUMBER and _WITH_MARK.fullmatch(texts[i]) else why
        return NumberColumn(column.values, unfit)


def split(row: bytes, delimiter: str) -> list[str]:
    """
    The cells of one row.

    >>> split(b'a, "b,""c", ', ",")
    ['a', 'b,"c', '']

    Raises :class:`csv.Error` where a quoted cell is not closed or a row holds a line's end, UnicodeDecodeError
    where it is not UTF-8.
    """
    line = row.decode()
    if '"' not in line and "\n" not in line and "\r" not in line:
        return [cell.strip() for cell in line.split(delimiter)]
    if ends_quoted(row, delimiter.encode()):
        raise csv.Error("a quoted cell is not closed")
    (cells,) = csv.reader([line], delimiter=delimiter, skipinitialspace=delimiter != " ")
    return [cell.strip() for cell in cells]


def ends_quoted(line: bytes, delimiter: bytes, *, quoted: bool = False) -> bool:
    r"""
        Whether a line ends inside a quoted cell, so that its row goes on. ``quoted`` says the same of the line before.

        A quote opens a cell only where one begins: ``5" pipe`` is a cell like any other.

    >>> ends_quoted(b'a,"b\n', b","), ends_quoted(b'c"",d",5" pipe\n', b",", quoted=True)
    (True, False)
    """
    at = 0
    while (quote := line.find(b'"', at)) >= 0:
        at = quote + 1
        if quoted:
            if line[at : at + 1] == b'"':
                at += 1
            else:
                quoted = False
        else:
            before = quote
            while before > 0 and delimiter != b" " and line[before - 1 : before] == b" ":
                before -= 1
            quoted = before == 0 or line.endswith(delimiter, 0, before)
    return quoted
