"""Keys that turn up on a second partition: Kafka keeps a key on one, so a producer chooses otherwise."""

from collections.abc import Iterable

from streamlstm.records.batch import SeriesId

MOST_KEYS = 1 << 16
"""Remembered at once; beyond that all are forgotten and met anew."""


_COUNTED = -1


class Sightings:
    """
    Where keys were seen first. Approximate on purpose: memory stays bounded whatever the number of keys.

    >>> sightings = Sightings()
    >>> sightings.see([SeriesId("t", 0, "a"), SeriesId("t", 0, "b"), SeriesId("u", 1, "a")])
    0
    >>> sightings.see([SeriesId("t", 1, "a")]), sightings.see([SeriesId("t", 2, "a")])
    (1, 0)
    """

    def __init__(self, most_keys: int = MOST_KEYS) -> None:
        self._most_keys = most_keys
        self._partition: dict[int, int] = {}

    def see(self, series: Iterable[SeriesId]) -> int:
        """How many of these keys are on another partition than where they were seen first; each counts once."""
        found = 0
        if len(self._partition) > self._most_keys:
            self._partition.clear()
        for one in series:
            key = hash((one.topic, one.key))
            first = self._partition.setdefault(key, one.partition)
            if first not in (one.partition, _COUNTED):
                self._partition[key] = _COUNTED
                found += 1
        return found
