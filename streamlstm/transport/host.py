"""
Sources that need no broker: this machine's own metrics from ``/proc``, and made-up series where there is no ``/proc``.

Both send what a small agent would: ``{"host", "name", "timestamp", "value"}``, one metric a message, the time in
nanoseconds. :data:`DECODE` is how to read it.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from streamlstm.config.model import Decode, Timestamp
from streamlstm.errors import DataError, LogGap
from streamlstm.records.batch import F64, Cut, Messages, Range
from streamlstm.transport.interfaces import Position

DECODE = Decode(
    series_id=["$.host", "$.name"],
    timestamp=Timestamp(path="$.timestamp", unit="ns"),
    target="$.value",
)
"""How the messages of both sources are read."""

_SECTOR_BYTES = 512
_CPU_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_NO_DISK = re.compile(r"(loop|ram|zram|fd|sr|md|dm-|nbd)\d+")
_NO_INTERFACE = re.compile(r"(veth|docker|br-|virbr|ifb|dummy)")


class Sample(NamedTuple):
    """What ``/proc`` said at one moment: values as they are, counters whose rates count, and CPU ticks by mode."""

    time_ns: int
    gauges: dict[str, float]
    counters: dict[str, float]
    ticks: dict[str, float]


class _Message(NamedTuple):
    time_ns: int
    key: bytes
    value: bytes


def available(proc: Path = Path("/proc")) -> bool:
    """Whether this machine can be watched."""
    return (proc / "stat").is_file() and (proc / "meminfo").is_file()


def cpu_ticks(stat: str) -> dict[str, float]:
    """
    Time by mode, all CPUs together, of ``/proc/stat``.

    >>> cpu_ticks("cpu  10 0 5 80 1 0 0 0 0 0")["system"]
    5.0
    """
    for line in stat.splitlines():
        if line.startswith("cpu "):
            return dict(zip(_CPU_MODES, map(float, line.split()[1:]), strict=False))
    return {}


def memory_gauges(meminfo: str) -> dict[str, float]:
    r"""
    Bytes in use, of ``/proc/meminfo``.

    >>> memory_gauges("MemTotal: 100 kB\nMemAvailable: 60 kB\nCached: 20 kB")
    {'memory.used_bytes': 40960.0, 'memory.available_bytes': 61440.0, 'memory.cached_bytes': 20480.0}
    """
    kib = {
        name: float(rest.split()[0]) for name, _, rest in (line.partition(":") for line in meminfo.splitlines()) if rest
    }
    gauges: dict[str, float] = {}
    if "MemTotal" in kib and "MemAvailable" in kib:
        gauges["memory.used_bytes"] = (kib["MemTotal"] - kib["MemAvailable"]) * 1024
        gauges["memory.available_bytes"] = kib["MemAvailable"] * 1024
    if "Cached" in kib:
        gauges["memory.cached_bytes"] = kib["Cached"] * 1024
    if kib.get("SwapTotal"):
        gauges["memory.swap_used_bytes"] = (kib["SwapTotal"] - kib.get("SwapFree", 0.0)) * 1024
    return gauges


def load_gauges(loadavg: str) -> dict[str, float]:
    """
    Load averages, of ``/proc/loadavg``.

    >>> load_gauges("0.50 0.40 0.30 1/100 4242")
    {'load.1m': 0.5, 'load.5m': 0.4, 'load.15m': 0.3}
    """
    return dict(zip(("load.1m", "load.5m", "load.15m"), map(float, loadavg.split()[:3]), strict=False))


def disk_counters(diskstats: str) -> dict[str, float]:
    r"""
    Bytes and operations of real disks, whole ones only, of ``/proc/diskstats``.

    >>> text = "8 0 sda 7 0 8 0 5 0 2 0 0 0 0\n8 1 sda1 7 0 8 0 5 0 2 0 0 0 0\n7 0 loop0 1 0 1 0 1 0 1 0 0 0 0"
    >>> disk_counters(text)
    {'disk.sda.read_bytes': 4096.0, 'disk.sda.written_bytes': 1024.0, 'disk.sda.reads': 7.0, 'disk.sda.writes': 5.0}
    """
    rows = {cells[2]: cells for line in diskstats.splitlines() if len(cells := line.split()) >= 14}
    counters: dict[str, float] = {}
    for name, cells in rows.items():
        part = re.fullmatch(r"(.+?)p?\d+", name)
        if (part and part[1] in rows) or _NO_DISK.fullmatch(name):
            continue
        counters[f"disk.{name}.read_bytes"] = float(cells[5]) * _SECTOR_BYTES
        counters[f"disk.{name}.written_bytes"] = float(cells[9]) * _SECTOR_BYTES
        counters[f"disk.{name}.reads"] = float(cells[3])
        counters[f"disk.{name}.writes"] = float(cells[7])
    return counters


def network_counters(dev: str) -> dict[str, float]:
    r"""
    Bytes of the interfaces that have carried any, of ``/proc/net/dev``.

    >>> network_counters(" eth0: 9 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n ifb0: 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0")
    {'net.eth0.received_bytes': 9.0, 'net.eth0.sent_bytes': 7.0}
    """
    counters: dict[str, float] = {}
    for line in dev.splitlines():
        name, colon, rest = line.strip().rpartition(":")
        cells = rest.split()
        if not colon or len(cells) < 16 or _NO_INTERFACE.match(name):
            continue
        received, sent = float(cells[0]), float(cells[8])
        if received or sent:
            counters[f"net.{name}.received_bytes"] = received
            counters[f"net.{name}.sent_bytes"] = sent
    return counters


def take_sample(proc: Path, time_ns: int) -> Sample:
    """One look at ``/proc``; a file that is not there gives nothing."""
    return Sample(
        time_ns=time_ns,
        gauges=memory_gauges(_text(proc / "meminfo")) | load_gauges(_text(proc / "loadavg")),
        counters=disk_counters(_text(proc / "diskstats")) | network_counters(_text(proc / "net" / "dev")),
        ticks=cpu_ticks(_text(proc / "stat")),
    )


def metrics(previous: Sample | None, current: Sample) -> dict[str, float]:
    """
    What is worth sending, always in the same order: CPU shares, gauges, rates.

    Shares and rates need two samples. A counter that went backwards, or is new, has no rate this time.
    """
    found: dict[str, float] = {}
    if previous:
        spent = {mode: max(0.0, ticks - previous.ticks.get(mode, ticks)) for mode, ticks in current.ticks.items()}
        whole = sum(spent.values())
        if whole:
            found = {f"cpu.{mode}_percent": 100 * ticks / whole for mode, ticks in spent.items()}
            found["cpu.busy_percent"] = 100 - found.get("cpu.idle_percent", 0.0) - found.get("cpu.iowait_percent", 0.0)
    found |= current.gauges
    elapsed_s = (current.time_ns - previous.time_ns) / 1e9 if previous else 0.0
    if previous and elapsed_s > 0:
        for name, count in current.counters.items():
            if (before := previous.counters.get(name)) is not None and count >= before:
                found[f"{name}_per_second"] = (count - before) / elapsed_s
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _message(host: str, name: str, time_ns: int, value: float) -> _Message:
    body = {"host": host, "name": name, "timestamp": time_ns, "value": value}
    return _Message(time_ns, f"{host}|{name}".encode(), msgspec.json.encode(body))


def _one_range(topic: str, start: int, rows: Sequence[_Message]) -> Messages:
    return _messages((Range(topic, 0, start, start + len(rows)),), rows)


def _messages(cut: Cut, rows: Sequence[_Message]) -> Messages:
    return Messages(
        cut=cut,
        range_index=np.repeat(np.arange(len(cut), dtype=np.int32), [part.end - part.start for part in cut]),
        offset=np.concatenate([np.arange(part.start, part.end, dtype=np.int64) for part in cut]),
        broker_ns=np.array([row.time_ns for row in rows], np.int64),
        key=[row.key for row in rows],
        value=[row.value for row in rows],
    )


class HostSource:
    """
    The machine we run on, sampled at even distances: CPU, memory, load, disks, network.

    Its offsets count messages from where it was told to go on; the past cannot be read again.
    """

    topic = "host"

    def __init__(
        self,
        *,
        clock_ns: Callable[[], int],
        sleep: Callable[[float], None],
        proc: Path = Path("/proc"),
        interval_s: float = 1.0,
    ) -> None:
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._proc = proc
        self._interval_ns = round(interval_s * 1e9)
        self._host = _text(proc / "sys" / "kernel" / "hostname").strip() or "localhost"
        self._due_ns: int | None = None
        self._previous: Sample | None = None
        self._ready: deque[_Message] = deque()
        self._next = 0

    def seek(self, positions: Sequence[Position]) -> None:
        """Number the next message so; buffered ones are forgotten."""
        for position in positions:
            self._next = _offset_of(self.topic, position)
        self._ready.clear()

    def poll(self, max_records: int, timeout_s: float) -> Messages | None:
        """The metrics of a moment, as soon as it is due, or ``None`` when that is later than ``timeout_s``."""
        if not self._ready and self._wait(timeout_s):
            self._sample()
        rows = [self._ready.popleft() for _ in range(min(max_records, len(self._ready)))]
        if not rows:
            return None
        self._next += len(rows)
        return _one_range(self.topic, self._next - len(rows), rows)

    def read(self, cut: Cut, timeout_s: float) -> Messages:
        """Raises :class:`~streamlstm.errors.LogGap`: this machine's past is not kept."""
        raise LogGap(f"{self.topic}: {len(cut)} ranges were asked for within {timeout_s} s, but no past is kept")

    def close(self) -> None:
        """Nothing is held. Never raises."""

    def _wait(self, timeout_s: float) -> bool:
        """Whether the next sample is due, at the latest ``timeout_s`` from now."""
        now = self._clock_ns()
        if self._due_ns is None or self._due_ns - now > self._interval_ns:
            self._due_ns = now  # the first one, or the clock was set back
        if self._due_ns > now:
            self._sleep(min(timeout_s, (self._due_ns - now) / 1e9))
        return self._clock_ns() >= self._due_ns

    def _sample(self) -> None:
        now = self._clock_ns()
        assert self._due_ns is not None
        missed = (now - self._due_ns) // self._interval_ns
        self._due_ns += (missed + 1) * self._interval_ns
        current = take_sample(self._proc, now)
        self._ready += [
            _message(self._host, name, now, value) for name, value in metrics(self._previous, current).items()
        ]
        self._previous = current


_KNOT_TICKS = 600


class SyntheticSource:
    """
    Seeded series that look like metrics: a trend that turns now and then, two sinusoids, noise.

    Tick t of every series is a function of the seed and t alone, so any of it can be read again. ``speed`` is how many
    seconds of its time pass in one of the clock's; ``None`` gives as much as is asked for.
    """

    topic = "synthetic"

    def __init__(
        self,
        *,
        clock_ns: Callable[[], int],
        sleep: Callable[[float], None],
        seed: int = 17,
        series: int = 8,
        interval_s: float = 1.0,
        speed: float | None = 1.0,
        start_ns: int | None = None,
    ) -> None:
        self._clock_ns = clock_ns
        self._sleep = sleep
        self._seed = seed
        self._series = series
        self._interval_ns = round(interval_s * 1e9)
        self._speed = speed
        self._began_ns = clock_ns()
        self._start_ns = self._began_ns if start_ns is None else start_ns
        self._first_tick = 0
        self._next = 0
        rng = np.random.default_rng([seed, 0])
        self._level = rng.uniform(20, 80, series)
        self._swing = rng.uniform(2, 12, (2, series))
        self._period = np.stack([rng.uniform(20, 60, series), rng.uniform(90, 300, series)])
        self._phase = rng.uniform(0, 2 * np.pi, (2, series))
        self._noise_scale = rng.uniform(0.2, 1.5, series)
        self._names = [f"wave-{i}" for i in range(series)]

    def values(self, tick: int) -> F64:
        """The value of every series at a tick."""
        knot, beyond = divmod(tick, _KNOT_TICKS)
        here, there = (np.random.default_rng([self._seed, 1, k]).normal(0, 8, self._series) for k in (knot, knot + 1))
        trend = here + (there - here) * beyond / _KNOT_TICKS
        waves = (self._swing * np.sin(2 * np.pi * tick / self._period + self._phase)).sum(0)
        noise = np.random.default_rng([self._seed, 2, tick]).standard_normal(self._series)
        return self._level + trend + waves + self._noise_scale * noise

    def seek(self, positions: Sequence[Position]) -> None:
        """Go on from this message; what is due is counted anew from now."""
        for position in positions:
            self._next = _offset_of(self.topic, position)
        self._first_tick = self._next // self._series
        self._began_ns = self._clock_ns()

    def poll(self, max_records: int, timeout_s: float) -> Messages | None:
        """What is due, or ``None`` when nothing is within ``timeout_s``."""
        due = max_records if self._speed is None else self._due(self._speed, timeout_s)
        count = min(max_records, due)
        if count <= 0:
            return None
        self._next += count
        return _one_range(self.topic, self._next - count, self._rows(self._next - count, self._next))

    def read(self, cut: Cut, timeout_s: float) -> Messages:  # noqa: ARG002, because nothing has to be waited for
        """Exactly these messages: they can always be made again."""
        for part in cut:
            _offset_of(self.topic, Position(part.topic, part.partition, part.start))
        rows = [row for part in cut for row in self._rows(part.start, part.end)]
        self._next = cut[-1].end if cut else self._next
        return _messages(cut, rows)

    def close(self) -> None:
        """Nothing is held. Never raises."""

    def _due(self, speed: float, timeout_s: float) -> int:
        """Messages due now, or after a wait of at most ``timeout_s``."""
        tick_ns = max(1, round(self._interval_ns / speed))
        next_ns = self._began_ns + (self._next // self._series - self._first_tick) * tick_ns
        wait_s = (next_ns - self._clock_ns()) / 1e9
        if wait_s > 0:
            self._sleep(min(timeout_s, wait_s))
        ticks = self._first_tick + (self._clock_ns() - self._began_ns) // tick_ns + 1
        return ticks * self._series - self._next

    def _rows(self, start: int, end: int) -> list[_Message]:
        rows: list[_Message] = []
        for tick in range(start // self._series, -(-end // self._series)):
            time_ns = self._start_ns + tick * self._interval_ns
            values = self.values(tick).tolist()
            first, last = max(start - tick * self._series, 0), min(end - tick * self._series, self._series)
            rows += [_message("synthetic", self._names[i], time_ns, values[i]) for i in range(first, last)]
        return rows


def _offset_of(topic: str, position: Position) -> int:
    if (position.topic, position.partition) != (topic, 0):
        raise DataError(f"there is no {position.topic}[{position.partition}], only {topic}[0]")
    return position.next_offset
