"""What ``streamlstm replay`` was asked for."""

from pathlib import Path
from typing import NamedTuple


class Asked(NamedTuple):
    """The options of the command, by their names there."""

    sources: tuple[str, ...]
    start: str | None
    end: str | None
    rows: int | None
    score_from: int
    standardise: int | None
    recorded: bool
    out: Path | None
    dead_letters: Path | None
    strict: bool
    from_checkpoint: str | None = None
    checkpoint_to: Path | None = None
    resume: bool = False

    def lasting(self, *, of_files: bool) -> dict[str, object]:
        """
        What cannot be another when a replay goes on, by option.

        Not how far: ``--rows`` may grow. Nor the names of files: their rows are compared.
        """
        return {
            "--from": None if of_files else list(self.sources),
            "--start": self.start,
            "--end": self.end,
            "--score-from": self.score_from,
            "--standardise": self.standardise,
            "--cuts": self.recorded,
            "--from-checkpoint": self.from_checkpoint,
            "--out": str(self.out.absolute()) if self.out else None,
            "--dead-letters": str(self.dead_letters.absolute()) if self.dead_letters else None,
        }
