import textwrap

import pytest

from streamlstm.config.load import Refused, load
from streamlstm.errors import ConfigError

MINIMAL = """\
source:
  topics: [metrics.raw]
decode:
  series_id: [$.host]
  timestamp: {path: $.ts}
  target: $.value
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "a.yaml").write_text(textwrap.dedent(text), encoding="utf-8")
        return type(tmp_path)("a.yaml")

    return write


@pytest.fixture
def config(write):
    def config(more="", *, environ=None, sets=()):
        return load(write(MINIMAL + textwrap.dedent(more)), environ=environ or {}, sets=sets).config

    return config


@pytest.fixture
def problems(write):
    def problems(text, *, environ=None, sets=()):
        with pytest.raises(Refused) as refused:
            load(write(text), environ=environ or {}, sets=sets)
        assert refused.value.exit_code == 78
        assert all(str(problem) in str(refused.value) for problem in refused.value.problems)
        return [str(problem) for problem in refused.value.problems]

    return problems


@pytest.fixture
def problem(problems):
    """The only problem that a minimal file with one more thing has."""

    def problem(more="", **rest):
        (only,) = problems(MINIMAL + textwrap.dedent(more), **rest)
        return only

    return problem


def test_a_minimal_file_is_enough(config):
    made = config()
    assert made.source.topics == ["metrics.raw"]
    assert (made.model.horizons, made.k2, made.checkpoint.every.time) == (24, 48, 60.0)


def test_the_file_beats_defaults_the_environment_the_file_and_set_the_environment(config):
    file = "model: {horizons: 2, hidden_size: 2, season: 2}\n"
    environ = {"STREAMLSTM_MODEL__HIDDEN_SIZE": "3", "STREAMLSTM_MODEL__SEASON": "3"}
    model = config(file, environ=environ, sets=["model.season=4"]).model
    assert (model.seed, model.horizons, model.hidden_size, model.season) == (17, 2, 3, 4)


def test_of_two_sets_the_later_wins(config):
    assert config(sets=["model.horizons=2", "model.horizons=3"]).model.horizons == 3


def test_each_key_says_where_it_was_set(write):
    loaded = load(
        write(MINIMAL + "model:\n  horizons: 5\n  season:\n    24\n"),
        environ={"STREAMLSTM_MODEL__SEED": "1"},
        sets=["model.hidden_size=8", "model.horizons=6"],
    )
    assert loaded.origins["source.topics"] == "a.yaml:2"
    assert loaded.origins["model.season"] == "a.yaml:9"
    assert loaded.origins["model.seed"] == "environment STREAMLSTM_MODEL__SEED"
    assert loaded.origins["model.hidden_size"] == "--set model.hidden_size"
    assert loaded.origins["model.horizons"] == "--set model.horizons"
    assert "model.loss" not in loaded.origins


def test_an_overridden_value_is_blamed_on_what_overrode_it(problem):
    told = problem("model: {horizons: 5}\n", environ={"STREAMLSTM_MODEL__HORIZONS": "many"})
    assert told.startswith('environment STREAMLSTM_MODEL__HORIZONS: model.horizons: "many" is refused')
    assert problem(sets=["model.horizons=0"]).startswith("--set model.horizons: 0 is refused")


def test_an_entry_of_an_overridden_list_is_not_blamed_on_the_file(problem):
    assert problem(sets=["source.topics=[a/b]"]).startswith('--set source.topics: source.topics[0]: "a/b" is refused')


def test_every_problem_is_told_in_one_go(problems):
    told = problems(
        """\
        source:
          topics: metrics.raw
          tpye: kafka
        decode:
          series_id: [$.host]
          target: {cpu: 3}
        model:
          horizons: "12"
          season: 1
        training:
          k2: 20
          k1: 16
        series: {interval: 3q}
        series: {interval: 3s}
        checkpoint: {keep: {last: 1}}
        """,
        environ={"STREAMLSTM_NMAE": "x"},
        sets=["model.hidden=3"],
    )
    assert [line.split(" ")[0] + " " + line.split(" ")[1] for line in told] == [
        "a.yaml:2: source.topics:",
        "a.yaml:3: source.tpye:",
        "a.yaml:4: decode.timestamp.path:",
        "a.yaml:6: decode.target.cpu:",
        "a.yaml:8: model.horizons:",
        "a.yaml:9: model.season:",
        "a.yaml:13: series.interval:",
        "a.yaml:14: series:",
        "a.yaml:15: checkpoint.keep.last:",
        "environment STREAMLSTM_NMAE:",
        "--set model.hidden:",
    ]


def test_keys_that_disagree_are_told_beside_keys_that_are_wrong(problems):
    told = problems(MINIMAL + "model: {horizons: 30}\ntraining: {k2: 40, max_wait: x}\nlogging: {level: loud}\n")
    assert len(told) == 3
    assert "a.yaml:8: training.k2: 40 is refused: write at least model.horizons + training.k1 = 46" in told[0]


def test_a_disagreement_with_a_wrong_key_is_none_yet(problem):
    assert "model.horizons" in problem("model: {horizons: x}\ntraining: {k2: 30}\n")


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        ("sources: {}", "there is no such key; did you mean source?"),
        ("hidden_size: 3", "there is no such key; did you mean model.hidden_size?"),
        ("model: {horizon: 3}", "there is no such key; did you mean model.horizons?"),
        ("zzz: 3", "there is no such key; the file may have version, name, source,"),
        ("model: {horizons: 1.5}", "1.5 is refused: write a whole number from 1 to 1000"),
        ("model: {horizons: 010}", '"010" is refused: write a whole number from 1 to 1000, without quotes'),
        ("model: {horizons: true}", "true is refused: write a whole number from 1 to 1000"),
        ("model: {horizons: [1]}", "[1] is refused: write a whole number from 1 to 1000"),
        ("model: {horizons: }", "null is refused: write a whole number from 1 to 1000"),
        ("model: {season: daily}", '"daily" is refused: write a whole number from 2 to 20000, or none'),
        ("model: {loss: hubr}", '"hubr" is refused: write huber, mse or mae; did you mean huber?'),
        ("model: {calendar: [hour, hour]}", "refused: name each phase once"),
        ("model: 5", "5 is refused: write a mapping with keys of hidden_size, horizons"),
        ("name: ..", '".." is refused: write a name'),
        ("name: 5", "5 is refused: write a name of 1 to 100 letters"),
        ("training: {enabled: no}", '"no" is refused: write true or false'),
        ("training: {k2: []}", "[] is refused: write a whole number from 1 to 20000, or auto"),
        ("training: {k1: 30}", "training.k1: 30 is refused: write at most 24"),
        ("training: {clip_norm: 1e999}", '"1e999" is refused: write a number above 0'),
        ("training: {optimizer: {lr: -1e-3}}", "-0.001 is refused: write a number above 0, or auto"),
        ("series: {interval: 10}", "10 is refused: write auto, null, or a duration with its unit"),
        ("series: {max_ahead: 0s}", '"0s" is refused: write a duration'),
        ("series: {max_ahead: 99999d}", '"99999d" is refused: write a duration'),
        ("checkpoint: {keep: {last: 1}}", "1 is refused: write a whole number from 2 to 1000"),
        ("checkpoint: {url: ' '}", "write a local directory, s3://bucket/prefix or gs://bucket/prefix"),
        ("checkpoint: {url: hdfs://a/b}", "write a local directory, s3://bucket/prefix or gs://bucket/prefix"),
        ("checkpoint: {url: s3://Bucket_/b}", "write the bucket's name as it is"),
        ("checkpoint: {url: s3://bucket/a/../b}", "write a prefix of plain names"),
        ("checkpoint: {url: 's3://bucket/b?token=x'}", "write at most endpoint_override, region, scheme"),
        ("checkpoint: {url: 'gs://bucket/b?region=x'}", "write at most endpoint_override, scheme"),
        ("checkpoint: {url: 's3://bucket/b?scheme=ftp'}", "write scheme=https or scheme=http"),
        ("checkpoint: {url: s3://anonymous@bucket/b}", "take the credentials out"),
        ("http: {listen: 9108}", "9108 is refused: write host:port"),
        ("http: {listen: localhost}", "write host:port"),
        ("http: {listen: localhost:65536}", "write host:port with a port up to 65535"),
        ("runtime: {deadline: 999ms}", '"999ms" is refused: write 1s to 3650d'),
        ("runtime: {shutdown_timeout: 1ms}", '"1ms" is refused: write 1s to 3650d'),
        ("runtime: {device: gpu}", '"gpu" is refused: write auto, cpu, cuda or cuda:N'),
        ("sink: {forecasts: {topic: a/b}}", "write a topic name"),
        ("sink: {forecasts: {topic: metrics.raw}}", "write another topic: metrics.raw is source.topics already"),
        ("sink: {progress: {topic: forecasts}}", "write another topic: forecasts is sink.forecasts.topic already"),
        ("version: 2", "2 is refused: write 1"),
    ],
)
def test_a_problem_says_its_line_value_and_fix(problem, more, fix):
    told = problem(more)
    assert told.startswith("a.yaml:7: ")
    assert fix in told


def test_credentials_in_a_url_are_refused_and_not_repeated(problem):
    told = problem("checkpoint: {url: s3://key:secret@bucket/prefix}")

    assert 'checkpoint.url: "s3://***@bucket/prefix" is refused: take the credentials out' in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("topics: []", "name at least one input topic"),
        ("topics: [a, a]", "name a once"),
        ("topics: [..]", '".." is refused: write a topic name'),
        ("topics: [a]\n  start: tomorrow", "write earliest, latest or timestamp:2026-01-01T00:00:00Z"),
        ("topics: [a]\n  start: timestamp:2026-01-01T00:00:00", "with its zone"),
        ("topics: [a]\n  bootstrap_servers: [kafka://a:9092]", "bootstrap_servers[0]"),
        ("topics: [a]\n  bootstrap_servers: a:9092", "write a list of host:port, at least one: ['a:9092']"),
        ("topics: [a]\n  properties: {acks: 1}", "source.properties.acks: the transport decides this itself"),
        ("topics: [a]\n  properties: {transactional.id: x}", "the transport decides this itself"),
        ("topics: [a]\n  properties: {ssl_cafile: x}", "this belongs under source.security"),
        ("topics: [a]\n  properties: {ssl_check_hostname: false}", "the broker's name is always checked"),
        ("topics: [a]\n  properties: {fetch.min.bytes: 1}", "kafka-python writes it fetch_min_bytes"),
        ("topics: [a]\n  properties: {fetch_min_bytes: [1]}", "write text, a number, true or false"),
        ("topics: [a]\n  security: {protocol: SASL_SSL, sasl_mechanism: PLAIN, username: u}", "password_file: source"),
        ("topics: [a]\n  security: {username: u}", "PLAINTEXT authenticates nobody by it"),
        ("topics: [a]\n  security: {ca_file: u}", "PLAINTEXT does not encrypt"),
        ("topics: [a]\n  security: {protocol: SSL, cert_file: u}", "write both"),
    ],
)
def test_a_source_is_refused_with_the_fix(problems, source, fix):
    (told,) = problems(MINIMAL.replace("topics: [metrics.raw]", source))
    assert fix in told


@pytest.mark.parametrize(
    ("old", "new", "fix"),
    [
        ("  series_id: [$.host]\n", "", "decode.series_id: this is missing: write for example series_id: [$.host"),
        ("[$.host]", "[]", "write a list of paths such as $.host or names such as @key, at least one"),
        ("[$.host]", "$.host", '"$.host" is refused: write a list of paths'),
        ("[$.host]", "['@keys']", '"@keys" is refused: write a path ($.host), @key,'),
        ("[$.host]", "[host]", '"host" is refused: write a path from the message\'s root: $.host'),
        ("[$.host]", "['@.host']", "@. means an element of decode.explode"),
        ("{path: $.ts}", "$.ts", '"$.ts" is refused: write a mapping: {path: $.ts}'),
        ("{path: $.ts}", "{path: $.ts, unit: seconds}", "write auto, s, ms, us, ns, iso8601, or a strptime pattern"),
        ("{path: $.ts}", "{path: $.ts, unit: '%H:%M'}", "a strptime pattern with a year"),
        ("target: $.value", "target: 5", "5 is refused: write a path such as $.value, or a mapping of names"),
        ("target: $.value", "target: {a: b}", 'decode.target.a: "b" is refused: write a path'),
        ("target: $.value", "target: $.v\n  format: csv", "csv is read from files only"),
        ("target: $.value", "target: $.v\n  csv: {decimal: ','}", "another character than decode.csv.delimiter"),
        ("target: $.value", "target: $.v\n  csv: {delimiter: ', '}", "write a single character"),
        ("target: $.value", "target: $.v\n  max_bytes: 1MB5", "write a number of bytes above zero"),
        ("target: $.value", "target: $.v\n  max_bytes: 65MiB", '"65MiB" is refused: write 1 to 64MiB'),
        ("target: $.value", "target: $.v\n  max_key_bytes: 1MiB", '"1MiB" is refused: write 16 to 64KiB'),
        ("target: $.value", "target: {a: $.a, b: $.b}\n  max_rows: 1", "write at least 2: a message has one record"),
    ],
)
def test_decoding_is_refused_with_the_fix(problems, old, new, fix):
    assert old in MINIMAL
    (told,) = problems(MINIMAL.replace(old, new))
    assert fix in told


def test_a_secret_in_the_file_is_refused_and_not_repeated(problems):
    told = "\n".join(
        problems(
            MINIMAL.replace(
                "topics: [metrics.raw]",
                "topics: [a]\n  security: {password: hunter2}\n  properties: {sasl_plain_password: hunter2}",
            )
        )
    )
    assert told.count("secrets come from files only") == 2
    assert "hunter2" not in told


def test_an_empty_section_has_its_defaults(config):
    assert config("model:\nsink:\n  progress:\n") == config()


def test_the_shell_ate_the_quotes_of_text(config):
    made = config(
        sets=["name=123", "source.security.ca_file=null"], environ={"STREAMLSTM_DECODE__TIMESTAMP__UNIT": "%Y"}
    )
    assert (made.name, made.source.security.ca_file, made.decode.timestamp.unit) == ("123", None, "%Y")


def test_lists_mappings_and_whole_sections_are_set_as_yaml(config):
    made = config(
        environ={"STREAMLSTM_SOURCE__TOPICS": "[a, b]", "STREAMLSTM_SOURCE__PROPERTIES__FETCH_MIN_BYTES": "5"},
        sets=["checkpoint.every={time: 5m}", "decode.target={x: $.x}", "decode.target.y=$.y"],
    )
    assert made.source.topics == ["a", "b"]
    assert made.source.properties == {"fetch_min_bytes": 5}
    assert (made.checkpoint.every.time, made.checkpoint.every.records) == (300.0, 500_000)
    assert made.decode.target == {"x": "$.x", "y": "$.y"}


def test_a_mapping_cannot_be_continued_where_there_is_none(problem):
    assert "decode.target is no mapping (a.yaml:6)" in problem(sets=["decode.target.y=$.y"])


def test_unknown_variables_are_refused_with_the_nearest_name(problem):
    for name in ("STREAMLSTM_MODEL_HORIZONS", "STREAMLSTM_model__horizons", "STREAMLSTM_MODEL__HORIZON"):
        assert "did you mean STREAMLSTM_MODEL__HORIZONS?" in problem(environ={name: "3"})
    assert "unset it" in problem(environ={"STREAMLSTM_QQQQQQQQ": "3"})


def test_variables_of_the_test_suite_of_completion_and_of_others_are_left_alone(config):
    environ = {"STREAMLSTM_TEST_ANYTHING": "1", "_STREAMLSTM_COMPLETE": "bash_source", "STREAM": "x"}
    assert config(environ=environ) == config()


@pytest.mark.parametrize(
    ("assignment", "fix"),
    [
        ("model.horizons", "write --set section.key=value"),
        ("horizons=3", "did you mean model.horizons?"),
        ("name.first=3", "name has no keys below it"),
        ("=3", "there is no such key"),
        ("model.horizons=[", "this is not YAML"),
    ],
)
def test_a_set_is_refused_with_the_fix(problem, assignment, fix):
    assert fix in problem(sets=[assignment])


@pytest.mark.parametrize(
    ("raw", "fix"),
    [
        (b"", "there is nothing in it: a minimal file has source.topics, decode.series_id"),
        (b"# only this\n", "there is nothing in it"),
        (b"- a\n", "this is no mapping"),
        (b"a: 1\nb: \xff\n", "a.yaml:2: this is not UTF-8 (byte 0xFF)"),
        (b"a: 1\nb: [\n", "a.yaml:3: this is not YAML"),
        (b"a: 1\nb: @x\n", "a.yaml:2: put text that begins with @ in quotes"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(write, raw, fix):
    file = write("")
    file.write_bytes(raw)
    with pytest.raises(ConfigError) as refused:
        load(file, environ={})
    assert fix in str(refused.value)


def test_a_missing_file_and_a_directory_say_so(write, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: there is no such file"):
        load(tmp_path / "none.yaml", environ={})
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path, environ={})


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    file = write("")
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load(file, environ={}).config.decode.target == "$.value"
