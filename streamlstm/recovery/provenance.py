"""Where a state stands, and ``meta.json``, which says so: a generation without its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

from streamlstm.config.keys import config_hash, identity_values, learning_values
from streamlstm.config.model import Config
from streamlstm.engine.state import EngineState
from streamlstm.records.batch import Range
from streamlstm.recovery.leavers import Left
from streamlstm.recovery.manifest import Count
from streamlstm.recovery.progress import Link, Value
from streamlstm.recovery.snapshot import describe_columns
from streamlstm.transport.interfaces import LeaderEpochs, Position


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration as far as state hangs on it: its hash, and the keys whose change matters, by dotted name."""

    name: str
    hash: str
    identity: Mapping[str, Value]
    learning: Mapping[str, Value]

    @classmethod
    def of(cls, config: Config) -> Self:
        """Of a configuration."""
        return cls(config.name, config_hash(config), identity_values(config), learning_values(config))


@dataclass(frozen=True, slots=True)
class Provenance:
    """
    Where a state stands: in the input (``positions``), in the progress chain, and under which configuration.

    ``progress`` is the record that ends with the state's step, ``None`` for a generation 0 that precedes the chain.
    ``incarnation`` is the process that computed it, empty for generation 0. ``revision`` counts the branches of the
    chain up to here, and ``excluded`` are the ranges that they pass over: both survive the chain's trimming.
    ``leader_epochs`` are those of the last messages before the positions, where they are known.
    """

    lineage: str
    incarnation: str
    positions: tuple[Position, ...]
    topic_ids: Mapping[str, str]
    progress: Link | None
    settings: Settings
    fingerprint: Mapping[str, str]
    created_ms: int
    revision: int = 0
    excluded: tuple[Range, ...] = ()
    leader_epochs: LeaderEpochs = field(default_factory=dict[tuple[str, int], int])


@dataclass(frozen=True, slots=True)
class Generation:
    """
    One checkpoint that is whole. ``digest`` is that of its manifest, and so of every byte in it.

    ``series`` are in memory, ``stored`` beyond it.
    """

    step: int
    digest: str
    bytes: int
    series: int
    stored: int
    provenance: Provenance


class _Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    topic: str
    partition: Count
    next_offset: Count
    leader_epoch: int | None


class _Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    offset: Count
    digest: str


class _Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    hash: str
    identity: dict[str, Any]
    learning: dict[str, Any]


class ColumnMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the state files hold of a column per series."""

    dtype: str
    shape: tuple[Count, ...]


class Meta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``meta.json``."""

    step: Count
    series: Count
    created_ms: Count
    lineage: str
    incarnation: str
    revision: Count
    excluded: tuple[tuple[str, Count, Count, Count], ...]
    positions: tuple[_Position, ...]
    topic_ids: dict[str, str]
    progress: _Link | None
    config: _Config
    columns: dict[str, ColumnMeta | None]
    state: dict[str, Any]
    left: Left | None = None

    def provenance(self, fingerprint: Mapping[str, str]) -> Provenance:
        """Read; the fingerprint stands in the manifest."""
        config = self.config
        return Provenance(
            lineage=self.lineage,
            incarnation=self.incarnation,
            positions=tuple(Position(p.topic, p.partition, p.next_offset) for p in self.positions),
            topic_ids=self.topic_ids,
            progress=Link(self.progress.offset, self.progress.digest) if self.progress else None,
            settings=Settings(config.name, config.hash, config.identity, config.learning),
            fingerprint=fingerprint,
            created_ms=self.created_ms,
            revision=self.revision,
            excluded=tuple(Range(*r) for r in self.excluded),
            leader_epochs={(p.topic, p.partition): e for p in self.positions if (e := p.leader_epoch) is not None},
        )


def meta_of(state: EngineState, provenance: Provenance, left: Left | None) -> dict[str, Any]:
    """What :class:`Meta` reads."""
    settings, progress, columns = provenance.settings, provenance.progress, describe_columns(state)
    return {
        "step": state.step,
        "series": len(state.series),
        "created_ms": provenance.created_ms,
        "lineage": provenance.lineage,
        "incarnation": provenance.incarnation,
        "revision": provenance.revision,
        "excluded": [list(r) for r in provenance.excluded],
        "positions": [
            {**p._asdict(), "leader_epoch": provenance.leader_epochs.get((p.topic, p.partition))}
            for p in provenance.positions
        ],
        "topic_ids": dict(provenance.topic_ids),
        "progress": {"offset": progress.offset, "digest": progress.digest} if progress else None,
        "config": {
            "name": settings.name,
            "hash": settings.hash,
            "identity": dict(settings.identity),
            "learning": dict(settings.learning),
        },
        "columns": {
            name: {"dtype": columns[name].dtype, "shape": list(columns[name].shape)} if name in columns else None
            for name in state.columns
        },
        "state": state.meta,
        **({} if left is None else {"left": msgspec.to_builtins(left)}),
    }
