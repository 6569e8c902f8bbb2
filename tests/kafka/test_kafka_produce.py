"""`streamlstm produce` into a real broker."""

import json
import time
from pathlib import Path

import pytest
from deployment import Deployment

from streamlstm.cli.main import main
from streamlstm.errors import DataError
from streamlstm.transport.kafka.loader import Loader


def produce(deployment: Deployment, *options: str) -> int:
    return main(["produce", "--bootstrap", ",".join(deployment.cluster.bootstrap), *options])


def test_lines_are_sent_as_they_are_and_counted(
    deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.ndjson"
    file.write_bytes(
        b"".join(b'{"host": "h%d", "value": %d.50}\n' % (i % 3, i) for i in range(25_000)) + b"\nnot json\n"
    )
    assert produce(deployment, "--to", deployment.input, "--from", str(file)) == 0
    assert capsys.readouterr().out.startswith(f"25,001 records to {deployment.input} in ")
    loaded = deployment.committed(deployment.input)
    assert sorted(loaded) == sorted([*file.read_bytes().split(b"\n")[:25_000], b"not json"])


def test_records_of_one_key_stay_on_one_partition_in_order(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "m.ndjson"
    file.write_bytes(b"".join(b'{"tags":{"host":"h%d"},"n":%d}\n' % (i % 7, i) for i in range(3000)))
    assert produce(deployment, "--to", deployment.input, "--from", str(file), "--key", "$.tags.host") == 0
    partitions = [[json.loads(v) for v in values] for values in deployment.committed_by_partition(deployment.input)]
    hosts = [{r["tags"]["host"] for r in records} for records in partitions]
    assert hosts[0] & hosts[1] == set()
    assert hosts[0] | hosts[1] == {f"h{i}" for i in range(7)}
    assert all([r["n"] for r in records] == sorted(r["n"] for r in records) for records in partitions)


def test_rows_of_csv_become_objects(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "m.csv"
    file.write_text('date,OT,code,note\n2016-07-01 00:00:00,38.6619987,007,"a, b"\n2016-07-01 01:00:00,,1e3,\n')
    assert produce(deployment, "--to", deployment.input, "--from", str(file)) == 0
    assert sorted(deployment.committed(deployment.input)) == [
        b'{"date":"2016-07-01 00:00:00","OT":38.6619987,"code":"007","note":"a, b"}',
        b'{"date":"2016-07-01 01:00:00","OT":null,"code":1e3,"note":null}',
    ]


def test_before_a_line_that_cannot_be_used_all_others_are_sent_and_counted(
    deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.ndjson"
    file.write_bytes(b"".join(b'{"host":"h%d","n":%d}\n' % (i % 3, i) for i in range(12_345)) + b"not json\n{}\n")
    assert produce(deployment, "--to", deployment.input, "--from", str(file), "--key", "$.host") == 65
    assert "record 12,346 of" in (said := capsys.readouterr().err)
    assert "the 12,345 before it were sent" in said
    assert sorted(deployment.committed(deployment.input)) == sorted(file.read_bytes().split(b"\n")[:12_345])


def test_a_topic_can_be_made_on_the_way(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "m.ndjson"
    file.write_text('{"a":1}\n')
    topic = f"{deployment.name}.new"
    options = ("--to", topic, "--from", str(file), "--create-topic", "--partitions", "3")
    assert produce(deployment, *options) == 0
    assert produce(deployment, *options) == 0
    assert [len(p) for p in deployment.committed_by_partition(topic)].count(0) < 3
    assert deployment.committed(topic) == [b'{"a":1}'] * 2


def test_a_topic_that_is_not_there_ends_with_78(
    deployment: Deployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.ndjson"
    file.write_text('{"a":1}\n')
    assert produce(deployment, "--to", "nowhere", "--from", str(file)) == 78
    assert "nowhere: no such topic" in capsys.readouterr().err


def test_nobody_there_ends_with_69(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.ndjson"
    file.write_text('{"a":1}\n')
    assert main(["produce", "--bootstrap", "localhost:1", "--to", "t", "--from", str(file)]) == 69
    assert "localhost:1: nobody listens" in capsys.readouterr().err


def test_a_rate_is_kept(deployment: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "m.ndjson"
    file.write_text('{"a":1}\n' * 100)
    started = time.monotonic()
    assert produce(deployment, "--to", deployment.input, "--from", str(file), "--rate", "100") == 0
    assert time.monotonic() - started >= 1.0


def test_a_record_the_broker_refuses_is_not_counted(deployment: Deployment) -> None:
    topic = f"{deployment.name}.small"
    deployment.make_topic(topic, 1, max_message_bytes="1000")
    loader = Loader(deployment.config.source, topic)
    incompressible = bytes((i * i * 31 + i // 7) % 251 for i in range(50_000))
    loader.send([(None, incompressible)])
    with pytest.raises(DataError, match=rf"{topic}.*max\.message\.bytes"):
        loader.finish()
    assert loader.accepted == 0
    loader.close()
