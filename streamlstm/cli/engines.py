"""How the commands make engines."""

from collections.abc import Mapping
from pathlib import Path

import structlog

from streamlstm.config.keys import changed, with_learning
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.relayout import Layout, relayout
from streamlstm.engine.state import EngineState
from streamlstm.recovery.making import EngineMaker
from streamlstm.recovery.progress import Value
from streamlstm.recovery.stored import Room, TieredEngine


def engine_maker(config: Config, device: str, directory: Path | None = None) -> EngineMaker:
    """
    Engines of a configuration under any values of its learning keys, and states taken over from one to another.

    ``directory``: see :class:`~streamlstm.recovery.stored.Room`.
    """
    log = structlog.get_logger("streamlstm")

    room = Room(directory)

    def create(learning: Mapping[str, Value]) -> TieredEngine:
        return TieredEngine(Engine.create(with_learning(config, learning), device), room)

    def restore(state: EngineState, then: Mapping[str, Value], now: Mapping[str, Value]) -> TieredEngine:
        after = with_learning(config, now)
        relaid = relayout(state, _layout(with_learning(config, then)), _layout(after))
        if keys := changed(then, now):
            log.info("learning keys were changed", step=state.step, keys=keys, windows_left_out=relaid.windows_left_out)
        return TieredEngine.of(Engine.restore(after, device, relaid.state), room, relaid.state)

    return EngineMaker(create, restore)


def _layout(config: Config) -> Layout:
    return Layout(config.training.k1, config.k2)
