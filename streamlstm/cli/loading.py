"""What ``streamlstm produce`` does: rows of files to keys and values, in chunks, at a rate, behind a progress bar."""

import gc
import itertools
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from csv import Error as CsvError
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from streamlstm.config.load import load
from streamlstm.config.model import Csv, Decode, Source, Timestamp
from streamlstm.errors import ConfigError, DataError
from streamlstm.records.csv import split
from streamlstm.records.mapping import parse_path
from streamlstm.records.values import Unfit, text_of
from streamlstm.transport.files import FileSource
from streamlstm.transport.kafka.loader import Loader, create_input_topic
from streamlstm.transport.kafka.preflight import preflight

_CHUNK = 2000
_LONGEST = 64 << 20
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")

Keyed = tuple[bytes | None, bytes]


class _Unusable(DataError):
    """A row that nothing can be sent of."""


class Wanted(NamedTuple):
    """What to load, from where, to where. ``partitions``: make the topic, if it is not there, with so many."""

    source: Source
    csv: Csv
    topic: str
    files: Sequence[Path]
    key: str | None
    rate: float | None
    partitions: int | None


def where(
    config_file: Path | None, sets: Sequence[str], environ: Mapping[str, str], bootstrap: str | None
) -> tuple[Source, Csv]:
    """The broker, and how CSV is written, from a configuration or from ``--bootstrap``."""
    if config_file is not None:
        config = load(config_file, sets=sets, environ=environ).config
        return config.source, config.decode.csv
    assert bootstrap is not None
    try:
        return Source(bootstrap_servers=bootstrap.split(",")), Csv()
    except ValueError as error:
        raise ConfigError(f"--bootstrap: {bootstrap}: write host:port, as localhost:9092") from error


def load_files(wanted: Wanted, *, say: Callable[[str], None]) -> str:
    """Load everything, and return the line that says what was loaded."""
    started = time.monotonic()
    files, rows = _open(wanted)
    for warning in preflight(wanted.source):
        say(f"warning: {warning}")
    if wanted.partitions is not None:
        made = create_input_topic(wanted.source, wanted.topic, wanted.partitions)
        say(f"{wanted.topic}: {made.outcome}" + "".join(f"; {difference}" for difference in made.differs))
    loader = Loader(wanted.source, wanted.topic)
    with closing(loader), closing(files), _progress(files) as told, _uncollected():
        pace = _Pace(wanted.rate)
        while (messages := files.poll(pace.chunk, 0)) is not None:
            try:
                loader.send(rows(messages.value))
            except _Unusable as error:
                loader.finish()
                before = f"; the {loader.accepted:,} before it were sent" if loader.accepted else ""
                raise DataError(f"{error}{before}") from error
            pace.wait(len(messages))
            told()
        loader.finish()
        told()
    elapsed_s = max(1e-9, time.monotonic() - started)
    per_s = loader.accepted / elapsed_s
    return f"{loader.accepted:,} records to {wanted.topic} in {elapsed_s:.1f} s, {per_s:,.0f} records/s"


def _open(wanted: Wanted) -> tuple[FileSource, "Callable[[Sequence[bytes | None]], Generator[Keyed]]"]:
    """The files, which must be of one kind, and what makes keyed JSON of their rows."""
    kinds = {path.suffix.lower() == ".csv" for path in wanted.files}
    if len(kinds) > 1:
        raise ConfigError("--from: CSV and NDJSON cannot be loaded together; run it once for each")
    is_csv = kinds == {True}
    # What is decoded here is the file, not the records; the paths are those of nothing.
    decode = Decode(
        format="csv" if is_csv else "json",
        series_id=["@key"],
        timestamp=Timestamp(path="$.none"),
        target="$.none",
        csv=wanted.csv,
        max_bytes=_LONGEST,
    )
    files = FileSource(wanted.files, topic=wanted.topic, decode=decode)
    key_of = key_finder(wanted.key) if wanted.key else None
    as_json = json_of(files.columns, wanted.csv) if files.columns is not None else None

    def keyed(value: bytes) -> Keyed:
        if len(value) > _LONGEST:
            raise DataError(f"longer than {_LONGEST >> 20} MiB")
        document = value if as_json is None else as_json(value)
        return (None if key_of is None else key_of(document)), document

    number = itertools.count(1)

    def rows(values: Sequence[bytes | None]) -> Generator[Keyed]:
        for value in values:
            n = next(number)
            assert value is not None
            try:
                row = keyed(value)
            except DataError as error:
                raise _Unusable(f"record {n:,} of {', '.join(map(str, wanted.files))}: {error}") from error
            yield row

    return files, rows


def key_finder(path: str) -> Callable[[bytes], bytes | None]:
    """
    What finds the key of a JSON document: the text of a field, ``None`` where it is absent.

    >>> find = key_finder("$.tags.host")
    >>> find(b'{"tags": {"host": "a"}}'), find(b'{"tags": {"host": 7}}'), find(b"{}")
    (b'a', b'7', None)
    """
    try:
        field = parse_path(path)
    except ValueError as error:
        raise ConfigError(f"--key {path}: {error}") from error
    decode = msgspec.json.Decoder().decode

    def find(document: bytes) -> bytes | None:
        try:
            found = text_of(field.scalar(decode(document)))
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"--key {path}: a line is no JSON: {error}") from error
        if isinstance(found, Unfit):
            raise DataError(f"--key {path}: {found.message}")
        return None if found is None else found.encode()

    return find


def json_of(columns: Sequence[str], csv: Csv) -> Callable[[bytes], bytes]:
    """
    What makes a JSON object of a CSV row. Numbers keep their digits; a cell that is no number is text.

    >>> json_of(["host", "value", "id", "note"], Csv(delimiter=";", decimal=","))(b"a;1,50;007;")
    b'{"host":"a","value":1.50,"id":"007","note":null}'
    """
    encode = msgspec.json.Encoder().encode
    names = [encode(column) + b":" for column in columns]
    comma = csv.decimal if csv.decimal != "." else None

    def cell(text: str) -> bytes:
        number = text if comma is None else text.replace(comma, ".")
        if _NUMBER.fullmatch(number) and (comma is None or "." not in text):
            return number.encode()
        return encode(text) if text else b"null"

    def convert(row: bytes) -> bytes:
        try:
            cells = split(row, csv.delimiter)
        except (CsvError, UnicodeDecodeError) as error:
            raise DataError(f"a row is not CSV in UTF-8: {error}") from error
        if len(cells) != len(names):
            raise DataError(f"a row has {len(cells)} cells, the header {len(names)} columns")
        return b"{" + b",".join([name + cell(text) for name, text in zip(names, cells, strict=True)]) + b"}"

    return convert


class _Pace:
    """So many records per second, in chunks of at most a tenth of a second."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._began = time.monotonic()
        self._sent = 0
        self.chunk = _CHUNK if rate is None else max(1, min(_CHUNK, int(rate / 10)))

    def wait(self, sent: int) -> None:
        """Sleep until so many may have been sent."""
        self._sent += sent
        if self._rate is not None:
            time.sleep(max(0.0, self._began + self._sent / self._rate - time.monotonic()))


@contextmanager
def _uncollected() -> Generator[None]:
    """Without the cyclic garbage collector: the client makes none, and the collector's rounds cost a fifth."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _progress(files: FileSource) -> Generator[Callable[[], None]]:
    """A bar on a terminal's stderr, by bytes of the files."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("loading", total=files.bytes_total)
        yield lambda: bar.update(task, completed=files.bytes_read)
