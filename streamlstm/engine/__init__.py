"""The program: ``step(batch) -> StepReport``, a pure function of its state and the log."""
