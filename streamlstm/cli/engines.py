"""How the commands make engines."""

from collections.abc import Mapping

import structlog

from streamlstm.config.keys import changed, with_learning
from streamlstm.config.model import Config
from streamlstm.engine.core import Engine
from streamlstm.engine.relayout import Layout, relayout
from streamlstm.engine.state import EngineState
from streamlstm.recovery.making import EngineMaker
from streamlstm.recovery.progress import Value


def engine_maker(config: Config, device: str) -> EngineMaker:
    """Engines of a configuration under any values of its learning keys, and states taken over from one to another."""
    log = structlog.get_logger("streamlstm")

    def create(learning: Mapping[str, Value]) -> Engine:
        return Engine.create(with_learning(config, learning), device)

    def restore(state: EngineState, then: Mapping[str, Value], now: Mapping[str, Value]) -> Engine:
        after = with_learning(config, now)
        relaid = relayout(state, _layout(with_learning(config, then)), _layout(after))
        if keys := changed(then, now):
            log.info("learning keys were changed", step=state.step, keys=keys, windows_left_out=relaid.windows_left_out)
        return Engine.restore(after, device, relaid.state)

    return EngineMaker(create, restore)


def _layout(config: Config) -> Layout:
    return Layout(config.training.k1, config.k2)
