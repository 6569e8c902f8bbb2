from streamlstm.records.batch import SeriesId
from streamlstm.service.sightings import Sightings


def on(partition: int, *keys: str) -> list[SeriesId]:
    return [SeriesId("in", partition, key) for key in keys]


def test_a_key_on_a_second_partition_is_found_once() -> None:
    sightings = Sightings()
    assert [sightings.see(on(p, "a", "b")) for p in (0, 0, 1, 1, 2, 0)] == [0, 0, 2, 0, 0, 0]


def test_the_same_key_in_another_topic_is_another_key() -> None:
    sightings = Sightings()
    assert sightings.see([SeriesId("in", 0, "a"), SeriesId("other", 1, "a")]) == 0


def test_keys_without_end_are_forgotten() -> None:
    sightings = Sightings(most_keys=100)
    for i in range(10_000):
        sightings.see(on(0, f"k{i}"))
    assert len(sightings._partition) <= 101
