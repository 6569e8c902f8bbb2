import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuts import keys_of

from streamlstm.errors import DataError, LogGap
from streamlstm.records.batch import Messages, Range
from streamlstm.records.decode import compile_decoder
from streamlstm.transport.host import DECODE, HostSource, SyntheticSource, available, disk_counters, network_counters
from streamlstm.transport.interfaces import Position, Source

SECOND = 10**9
START = 1_795_161_600 * SECOND


class Clock:
    """Moved by hand, or by who sleeps on it."""

    def __init__(self) -> None:
        self.now_ns = START

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * SECOND)


STAT = "cpu  {user} 0 50 {idle} 10 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n"
DISKS = """\
 254 0 vda {reads} 0 {sectors} 0 10 0 20 0 0 0 0
 254 1 vda1 1 0 1 0 1 0 1 0 0 0 0
   7 0 loop0 9 0 9 0 9 0 9 0 0 0 0
"""
NET = """\
Inter-|   Receive
 face |bytes
  eth0: {rx} 1 0 0 0 0 0 0 500 1 0 0 0 0 0 0
  ifb0: 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "net").mkdir()
    (tmp_path / "sys" / "kernel").mkdir(parents=True)
    (tmp_path / "sys" / "kernel" / "hostname").write_text("box\n")
    (tmp_path / "meminfo").write_text(
        "MemTotal: 1000 kB\nMemAvailable: 600 kB\nCached: 100 kB\nSwapTotal: 8 kB\nSwapFree: 6 kB\n"
    )
    (tmp_path / "loadavg").write_text("0.50 0.40 0.30 1/100 4242\n")
    show(tmp_path, user=100, idle=840, reads=5, sectors=100, rx=1000)
    return tmp_path


def show(proc: Path, **counts: int) -> None:
    (proc / "stat").write_text(STAT.format(**counts))
    (proc / "diskstats").write_text(DISKS.format(**counts))
    (proc / "net" / "dev").write_text(NET.format(**counts))


def values(messages: Messages | None) -> dict[str, float]:
    assert messages is not None
    return {body["name"]: body["value"] for body in map(json.loads, filter(None, messages.value))}


def test_the_first_sample_has_no_rates(proc: Path) -> None:
    clock = Clock()
    source = HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc)
    assert values(source.poll(100, 0.0)) == {
        "memory.used_bytes": 409_600.0,
        "memory.available_bytes": 614_400.0,
        "memory.cached_bytes": 102_400.0,
        "memory.swap_used_bytes": 2048.0,
        "load.1m": 0.5,
        "load.5m": 0.4,
        "load.15m": 0.3,
    }


def test_the_second_sample_has_shares_and_rates_by_the_time_between(proc: Path) -> None:
    clock = Clock()
    source = HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc, interval_s=2.0)
    source.poll(100, 0.0)
    show(proc, user=130, idle=900, reads=9, sectors=108, rx=3000)
    second = source.poll(100, 5.0)
    found = values(second)
    assert list(found)[:9] == [
        *(f"cpu.{mode}_percent" for mode in ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")),
        "cpu.busy_percent",
    ]
    assert found["cpu.user_percent"] == pytest.approx(100 * 30 / 90)
    assert found["cpu.busy_percent"] == pytest.approx(100 * 30 / 90)
    assert {name: value for name, value in found.items() if name.startswith(("disk", "net"))} == {
        "disk.vda.read_bytes_per_second": 8 * 512 / 2,
        "disk.vda.written_bytes_per_second": 0.0,
        "disk.vda.reads_per_second": 2.0,
        "disk.vda.writes_per_second": 0.0,
        "net.eth0.received_bytes_per_second": 1000.0,
        "net.eth0.sent_bytes_per_second": 0.0,
    }
    assert second is not None
    assert set(second.broker_ns.tolist()) == {START + 2 * SECOND}


def test_a_counter_that_went_backwards_has_no_rate_once(proc: Path) -> None:
    clock = Clock()
    source = HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc)
    source.poll(100, 0.0)
    show(proc, user=1, idle=900, reads=0, sectors=0, rx=5)
    found = values(source.poll(100, 5.0))
    assert "net.eth0.received_bytes_per_second" not in found
    assert found["cpu.user_percent"] == 0.0
    show(proc, user=2, idle=900, reads=0, sectors=0, rx=25)
    assert values(source.poll(100, 5.0))["net.eth0.received_bytes_per_second"] == pytest.approx(20)


def test_samples_are_due_at_even_distances_and_missed_ones_are_left_out(proc: Path) -> None:
    clock = Clock()
    source = HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc)
    times: list[int] = []
    for pause_s in (0.0, 0.3, 0.1, 3.7, 0.0):
        clock.sleep(pause_s)
        messages = source.poll(100, 10.0)
        assert messages is not None
        times.append((messages.broker_ns[0] - START) / SECOND)
    assert times == [0.0, 1.0, 2.0, 5.7, 6.0]


def test_a_poll_waits_no_longer_than_it_may(proc: Path) -> None:
    clock = Clock()
    source = HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc)
    source.poll(100, 0.0)
    assert source.poll(100, 0.2) is None
    assert clock.now_ns == START + SECOND // 5


def test_a_clock_that_was_set_back_stops_nothing(proc: Path) -> None:
    clock = Clock()
    source = HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc)
    source.poll(100, 0.0)
    clock.now_ns -= 3600 * SECOND
    assert "net.eth0.sent_bytes_per_second" not in values(source.poll(100, 0.0))
    assert "net.eth0.sent_bytes_per_second" in values(source.poll(100, 1.0))


def test_a_small_poll_leaves_the_rest_for_the_next(proc: Path) -> None:
    clock = Clock()
    source = HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc)
    source.seek([Position("host", 0, 40)])
    first, second = source.poll(4, 0.0), source.poll(100, 0.0)
    assert first is not None
    assert second is not None
    assert (first.cut, second.cut) == ((Range("host", 0, 40, 44),), (Range("host", 0, 44, 47),))
    assert first.broker_ns[0] == second.broker_ns[0]


def test_the_past_of_a_machine_is_not_kept(proc: Path) -> None:
    clock = Clock()
    with pytest.raises(LogGap, match="no past"):
        HostSource(clock_ns=clock, sleep=clock.sleep, proc=proc).read((Range("host", 0, 0, 1),), 1.0)


def test_a_machine_without_proc_cannot_be_watched(proc: Path, tmp_path: Path) -> None:
    assert available(proc)
    assert not available(tmp_path / "nowhere")


def test_partitions_and_made_up_devices_are_no_disks() -> None:
    names = ("nvme0n1", "nvme0n1p1", "sda", "sda12", "mmcblk0", "mmcblk0p2", "dm-0", "zram0", "sr0", "xvda1", "md127")
    text = "\n".join(f"1 0 {name} 1 0 1 0 1 0 1 0 0 0 0" for name in names)
    assert {name.split(".")[1] for name in disk_counters(text)} == {"nvme0n1", "sda", "mmcblk0", "xvda1"}


def test_interfaces_of_containers_are_left_out() -> None:
    text = "\n".join(
        f"{name}: 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0" for name in ("lo", "eth0", "veth1a", "docker0", "br-1", "eth0:1")
    )
    assert {name.split(".")[1] for name in network_counters(text)} == {"lo", "eth0", "eth0:1"}


@pytest.mark.skipif(not available(), reason="there is no /proc here")
def test_this_machine_is_decoded_without_a_rejection() -> None:
    source: Source = HostSource(clock_ns=time.time_ns, sleep=time.sleep, interval_s=0.2)
    decoder = compile_decoder(DECODE)
    for _ in range(2):
        messages = source.poll(10_000, 1.0)
        assert messages is not None
        batch = decoder.decode(messages)
        assert batch.rejected == ()
        assert len(batch.series) == len(batch) == len(messages)
        assert len(set(batch.time_ns.tolist())) == 1
    assert any("cpu.busy_percent" in key for key in keys_of(batch))


def synthetic(clock: Clock, **settings: Any) -> SyntheticSource:
    return SyntheticSource(clock_ns=clock, sleep=clock.sleep, **settings)


def test_synthetic_series_decode_like_the_machines() -> None:
    source: Source = synthetic(Clock(), speed=None, series=3)
    messages = source.poll(7, 0.0)
    assert messages is not None
    batch = compile_decoder(DECODE).decode(messages)
    assert batch.rejected == ()
    assert keys_of(batch)[:4] == ["synthetic|wave-0", "synthetic|wave-1", "synthetic|wave-2", "synthetic|wave-0"]
    assert batch.time_ns.tolist() == [START + t * SECOND for t in (0, 0, 0, 1, 1, 1, 2)]


def test_synthetic_values_depend_on_the_seed_and_the_place_alone() -> None:
    whole = synthetic(Clock(), speed=None).poll(4000, 0.0)
    parts = synthetic(Clock(), speed=None)
    assert whole is not None
    assert (
        list(itertools.chain.from_iterable(p.value for p in [parts.poll(n, 0.0) for n in (1, 999, 3000)] if p))
        == whole.value
    )
    again = parts.read((Range("synthetic", 0, 5, 21), Range("synthetic", 0, 2, 3)), 0.0)
    assert again.value == [*whole.value[5:21], whole.value[2]]
    assert again.offset.tolist() == [*range(5, 21), 2]
    other = synthetic(Clock(), speed=None, seed=18).poll(4000, 0.0)
    assert other is not None
    assert other.value != whole.value


def test_synthetic_series_come_as_fast_as_asked() -> None:
    clock = Clock()
    source = synthetic(clock, series=2, speed=10.0)
    assert len(source.poll(100, 0.0) or ()) == 2
    assert source.poll(100, 0.05) is None
    assert len(source.poll(100, 1.0) or ()) == 2
    assert clock.now_ns == START + SECOND // 10
    clock.sleep(1.0)
    assert len(source.poll(100, 0.0) or ()) == 20


def test_a_sought_synthetic_source_goes_on_at_the_same_speed() -> None:
    clock = Clock()
    source = synthetic(clock, series=2)
    source.seek([Position("synthetic", 0, 101)])
    messages = source.poll(100, 0.0)
    assert messages is not None
    assert messages.offset.tolist() == [101]
    assert messages.broker_ns.tolist() == [START + 50 * SECOND]
    assert len(source.poll(100, 1.0) or ()) == 2
    with pytest.raises(DataError, match="other"):
        source.seek([Position("other", 0, 0)])


def test_synthetic_series_are_worth_forecasting() -> None:
    source = synthetic(Clock(), series=4, speed=None)
    y_TS = np.array([source.values(t) for t in range(1500)])
    step = np.abs(np.diff(y_TS, axis=0)).mean(0)
    assert (y_TS.std(0) > 2 * step).all()
    assert (step > 0.1).all()
