"""
Recorded steps under the learning values they were made with.

Learning keys may change at a clean stop, so a replay may cross such a change: each step is computed under the values
that its process ran with, and between two of them the state is taken over as it was then.
"""

from collections.abc import Mapping

from streamlstm.config.keys import changed
from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError, ConfigError
from streamlstm.recovery.generations import Loaded
from streamlstm.recovery.making import EngineMaker, Steppable
from streamlstm.recovery.progress import Chain, RecordedStep, Value


class Segments:
    """An engine that goes on from a generation, remade where the learning values change."""

    def __init__(self, maker: EngineMaker, chain: Chain, loaded: Loaded) -> None:
        self._maker, self._chain = maker, chain
        # An incarnation that was trimmed away is the one that wrote the checkpoint too.
        self._made = self._learning = loaded.generation.provenance.settings.learning
        self._state: EngineState | None = loaded.state
        self._engine: Steppable | None = None

    def engine_for(self, step: RecordedStep) -> Steppable:
        """The engine to compute this step with. Steps must be asked for in their order."""
        incarnation = self._chain.incarnation(step.incarnation)
        return self.engine_under(incarnation.learning if incarnation else self._made)

    def engine_under(self, learning: Mapping[str, Value]) -> Steppable:
        """
        The engine to go on with under these values.

        Raises :class:`~streamlstm.errors.ConfigError` when the state cannot take them over, and
        :class:`~streamlstm.errors.CheckpointError` when it does not fit the configuration at all.
        """
        if self._engine is None or changed(self._learning, learning):
            state = self._state if self._engine is None else self._engine.state()
            assert state is not None
            self._engine = self._remake(state, learning)
            self._state, self._learning = None, learning
        return self._engine

    def _remake(self, state: EngineState, learning: Mapping[str, Value]) -> Steppable:
        try:
            return self._maker.restore(state, self._learning, learning)
        except ValueError as error:
            if keys := changed(self._learning, learning):
                raise ConfigError(f"the state cannot take over {', '.join(keys)}, set them back: {error}") from error
            raise CheckpointError(f"the state of step {state.step} does not fit the configuration: {error}") from error
