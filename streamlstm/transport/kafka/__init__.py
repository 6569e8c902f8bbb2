"""
Kafka, by kafka-python: a source that takes turns, the checked commit, the progress log, topics, and the preflight.

The library's silences are the reason for most of what stands here: see ``docs/adr/0002``.
"""
