"""
A whole process, its disk, its broker and its clock, simulated from one number.

The product's own code runs: ``CheckpointStore``, ``resume``, ``Daemon``, ``BackgroundWriter``, ``KafkaPublisher`` and,
in a share of the runs, the real engine. What surrounds it is in memory and hostile: see :mod:`simulator.disk`,
:mod:`simulator.log` and :mod:`simulator.weather`. ``PYTHONPATH=tests python -m simulator --seed N`` repeats one run and
prints what happened in it. ``--delivery idempotent`` does without transactions; ``--twist``, which may be given several
times, adds series beyond memory, retention that is too fast, going back to an older checkpoint, or an object store.
"""
