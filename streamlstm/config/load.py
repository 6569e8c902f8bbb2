"""
From a file, the environment and ``--set`` to a :class:`Config`: defaults < file < environment < ``--set``.

Everything that is wrong is told at once, each with where it stands, its path, its value and the fix. Later values win
key by key; what an environment variable or ``--set`` says is YAML, unless the key is text, which is taken as it is.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from streamlstm.config.keys import ENV_PREFIX, KEYS, Key, describe_item, subsection
from streamlstm.config.model import Config, Conflict, Conflicts, Section
from streamlstm.config.urls import mask_credentials
from streamlstm.config.yaml12 import Document, KeyPath, flow, parse
from streamlstm.errors import ConfigError

TEST_PREFIX = "STREAMLSTM_TEST_"
"""Variables of the test suite; no configuration."""

_LONGEST_VALUE = 60


class Origin(NamedTuple):
    """Where a value comes from; sorts as they are told: the file by line, the environment, ``--set``."""

    rank: int
    line: int
    text: str


class Problem(NamedTuple):
    """
    One thing that is wrong. ``value`` is how it was written, ``None`` where there is none to show.

    >>> print(Problem(Origin(0, 7, "a.yaml:7"), ("model", "horizons"), "write a whole number from 1 to 1000", "0"))
    a.yaml:7: model.horizons: 0 is refused: write a whole number from 1 to 1000
    """

    origin: Origin
    path: KeyPath
    fix: str
    value: str | None = None

    def __str__(self) -> str:
        where = [self.origin.text, dotted(self.path)]
        if not self.path or where[0].endswith(f" {where[1]}"):  # `--set key` has named it
            where.pop()
        return ": ".join(where) + ": " + (self.fix if self.value is None else f"{self.value} is refused: {self.fix}")


class Refused(ConfigError):
    """A configuration that cannot be used. ``problems`` is all that is wrong with it; so is the message."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in problems]
        several = f"{len(lines)} problems in the configuration:"
        super().__init__(lines[0] if len(lines) == 1 else "\n  ".join([several, *lines]))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where each key that is no default was set, by its dotted path."""

    config: Config
    origins: Mapping[str, str]
    file: Path


def dotted(path: KeyPath) -> str:
    """
    A path as users write it.

    >>> dotted(("source", "topics", 0))
    'source.topics[0]'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def load(file: Path, *, environ: Mapping[str, str], sets: Sequence[str] = ()) -> Loaded:
    """
    The configuration in ``file``, with what ``environ`` and ``sets`` (``section.key=value``) override.

    Raises :class:`ConfigError` (exit 78) that names every problem.
    """
    given = _Given(Origin(0, 0, str(file)))
    _take_file(given, file)
    for name, text in sorted(environ.items()):
        if name.startswith(ENV_PREFIX) and not name.startswith(TEST_PREFIX):
            _take_variable(given, name, text)
    for number, assignment in enumerate(sets):
        _take_assignment(given, number, assignment)
    config = _validate(given)
    origins = {dotted(path): origin.text for path, origin in given.origins.items()}
    return Loaded(config, origins, file)


@dataclass(slots=True)
class _Given:
    """What was given: plain values, where each came from, and what was wrong already."""

    file: Origin
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    origins: dict[KeyPath, Origin] = field(default_factory=dict[KeyPath, Origin])
    problems: list[Problem] = field(default_factory=list[Problem])

    def origin(self, path: KeyPath) -> Origin:
        """Where this path was given; a missing one, where its section was."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return self.file

    def put(self, path: KeyPath, value: Any, origin: Origin) -> None:  # noqa: ANN401, because it may be anything
        """Override one path; a section key by key, anything else as a whole."""
        if isinstance(value, dict) and _section_at(path):
            for name, inner in value.items():
                self.put((*path, name), inner, origin)
            return
        node = self.values
        for depth, part in enumerate(path[:-1]):
            inner = node.setdefault(str(part), {})
            if inner is None:
                inner = node[str(part)] = {}
            if not isinstance(inner, dict):
                if not _section_at(path[: depth + 1]):  # of a section, validation says so
                    above = path[: depth + 1]
                    fix = f"{dotted(above)} is no mapping ({self.origin(above).text}): set it as a whole"
                    self.problems.append(Problem(origin, path, fix))
                return
            node = inner
        node[str(path[-1])] = value
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = origin


def _take_file(given: _Given, file: Path) -> None:
    try:
        raw = file.read_bytes()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror or error}"
        raise ConfigError(f"{file}: cannot be read: {reason}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}:{line}: this is not UTF-8 (byte 0x{raw[error.start]:02X}): save it as UTF-8"
        ) from error
    document = parse(text)
    given.problems += [Problem(_line(file, flaw.line), flaw.path, flaw.fix) for flaw in document.flaws]
    if document.value is None and given.problems:
        raise Refused(given.problems)
    if document.value is None:
        needed = ", ".join(key.path for key in KEYS.values() if key.field.is_required())
        raise ConfigError(f"{file}: there is nothing in it: a minimal file has source.topics, {needed}")
    if not isinstance(document.value, dict):
        raise ConfigError(f"{file}:1: this is no mapping: write keys with values, as 'source: ...'")
    given.values = document.value
    given.origins = {path: _line(file, line) for path, line in document.lines.items()}


def _line(file: Path, line: int) -> Origin:
    return Origin(0, line, f"{file}:{line}")


def _take_variable(given: _Given, name: str, text: str) -> None:
    origin = Origin(1, 0, f"environment {name}")
    path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
    if name != name.upper() or not _is_known(path):
        known = [key.env.removeprefix(ENV_PREFIX) for key in KEYS.values()]
        near = get_close_matches(name.upper().removeprefix(ENV_PREFIX), known, n=1)
        hint = (
            f"did you mean {ENV_PREFIX}{near[0]}?" if near else f"{ENV_PREFIX}SECTION__KEY sets section.key; unset it"
        )
        given.problems.append(Problem(origin, (), f"there is no such key; {hint}"))
        return
    _take_text(given, path, text, origin)


def _take_assignment(given: _Given, number: int, assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    origin = Origin(2, number, f"--set {key}")
    path = tuple(key.strip().split("."))
    if not equals:
        given.problems.append(Problem(origin, (), "write --set section.key=value"))
    elif not _is_known(path):
        given.problems.append(Problem(origin, (), _no_such_key(path)))
    else:
        _take_text(given, path, text, origin)


def _take_text(given: _Given, path: KeyPath, text: str, origin: Origin) -> None:
    document = _read_text(path, text)
    given.problems += [Problem(origin, path, flaw.fix) for flaw in document.flaws]
    if not document.flaws:
        given.put(path, document.value, origin)


def _read_text(path: KeyPath, text: str) -> Document:
    """YAML; but a key that can only be text takes it as it is, for a shell has eaten the quotes."""
    key = KEYS.get(dotted(path))
    return Document(text, {}, []) if key and key.is_text and text != "null" else parse(text)


def _section_at(path: KeyPath) -> type[Section] | None:
    """The section at this path, if one may stand there."""
    section: type[Section] | None = Config
    for part in path:
        found = section.model_fields.get(str(part)) if section else None
        section = subsection(found) if found else None
    return section


def _is_known(path: KeyPath) -> bool:
    """Whether a section, a key, or an entry of a key that is a mapping may stand at this path."""
    for end in range(1, len(path) + 1):
        key = KEYS.get(dotted(path[:end]))
        if key:
            return end == len(path) or (end == len(path) - 1 and key.is_mapping)
    return _section_at(path) is not None


def _no_such_key(path: KeyPath) -> str:
    """What was probably meant: a sibling of nearly that name, or a key of that name elsewhere."""
    depth = next(depth for depth in range(len(path)) if _section_at(path[: depth + 1]) is None)
    above, name = path[:depth], str(path[depth])
    if dotted(path[: depth + 1]) in KEYS:
        return f"{dotted(path[: depth + 1])} has no keys below it"
    if name.lower() in ("password", "sasl_plain_password", "ssl_password", "secret"):
        return "secrets come from files only: write source.security.password_file"
    section = _section_at(above)
    siblings = list(section.model_fields) if section else []
    near = [dotted((*above, sibling)) for sibling in get_close_matches(name, siblings, n=1)]
    meant = [*near, *(known for known in KEYS if known.split(".")[-1] == name)]
    if meant:
        return f"there is no such key; did you mean {meant[0]}?"
    return f"there is no such key; {dotted(above) or 'the file'} may have {', '.join(siblings)}"


def _validate(given: _Given) -> Config:
    """
    The configuration; raises :class:`Refused` with all that is wrong.

    What keys must agree on can only be asked of keys that are right one by one. So that it is told in the same go,
    the wrong ones are put aside; a disagreement in which one of those takes part is none yet.
    """
    values = deepcopy(given.values)
    _fill_sections(values, Config)
    outcome = _attempt(values)
    problems: list[Problem] = []
    wrong: list[str] = []
    if isinstance(outcome, list):
        problems = _field_problems(outcome, values, given)
        wrong = [dotted(_until_leaf(problem.path)) for problem in problems]
        if problems:
            for problem in problems:
                _put_aside(values, _until_leaf(problem.path))
            _fill_sections(values, Config, examples=True)
            outcome = _attempt(values)
    if isinstance(outcome, list):
        for conflict in _conflicts(outcome):
            if not any(_overlap(involved, path) for involved in conflict.involves for path in wrong):
                path = tuple(conflict.path.split("."))
                value = _value_at(given.values, path)
                shown = None if value is None else _shown(value)
                problems.append(Problem(given.origin(path), path, conflict.fix, shown))
    problems += given.problems
    if problems or isinstance(outcome, list):
        raise Refused(sorted(problems, key=lambda problem: (problem.origin, dotted(problem.path))))
    return outcome


def _attempt(values: dict[str, Any]) -> Config | list[ErrorDetails]:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        return error.errors(include_url=False)


def _fill_sections(values: dict[str, Any], section: type[Section], *, examples: bool = False) -> None:
    """A section that is empty or was left out has defaults; with ``examples``, what is required is made up."""
    for name, known in section.model_fields.items():
        inner = subsection(known)
        if inner is None:
            if examples and known.is_required() and known.examples:
                values.setdefault(name, known.examples[0])
            continue
        if values.get(name) is None:
            values[name] = {}
        if isinstance(values[name], dict):
            _fill_sections(values[name], inner, examples=examples)


def _field_problems(errors: list[ErrorDetails], values: dict[str, Any], given: _Given) -> list[Problem]:
    """What is wrong with single keys, one problem each, however many types it might have had."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        if not isinstance(_raised(error), Conflicts):
            by_path.setdefault(_path_of(error, values), []).append(error)
    return [
        _field_problem(path, of_path, values, given)
        for path, of_path in by_path.items()
        # Of a list or text, say: when an entry of the list is wrong, that it is no text is beside the point.
        if not any(other != path and other[: len(path)] == path for other in by_path)
    ]


def _field_problem(path: KeyPath, errors: list[ErrorDetails], values: dict[str, Any], given: _Given) -> Problem:
    origin = given.origin(path)
    types = {error["type"] for error in errors}
    if "extra_forbidden" in types:
        return Problem(origin, path, _no_such_key(path))
    key = KEYS.get(dotted(_until_leaf(path)))
    if "missing" in types and key:
        return Problem(origin, path, f"this is missing: write for example {path[-1]}: {flow(key.example)}")
    value = _value_at(values, path)
    if key is None:
        return Problem(origin, path, _as_section(path, value), _shown(value))
    said = next((str(raised) for raised in map(_raised, errors) if raised), None)
    if any("[key]" in error["loc"] for error in errors):
        # Of a name that is refused; its value may be a secret.
        return Problem(origin, path, said or "write another name")
    return Problem(origin, path, said or f"write {_expected(key, path, value)}", _shown(value))


def _as_section(path: KeyPath, value: object) -> str:
    """What a value that stands where a section belongs was probably meant to be."""
    section = _section_at(path)
    fields = section.model_fields if section else {}
    needed = next((name for name, known in fields.items() if known.is_required() and known.examples), None)
    if needed and isinstance(value, str):
        return f"write a mapping: {flow({needed: value})}"
    return f"write a mapping with keys of {', '.join(fields)}"


def _expected(key: Key, path: KeyPath, value: object) -> str:
    """What may stand there, and what was probably meant."""
    kind = key.kind if path == _until_leaf(path) else describe_item(key.field.annotation)
    if isinstance(value, str):
        near = get_close_matches(value, key.choices, n=1)
        if near:
            return f"{kind}; did you mean {near[0]}?"
        if kind.startswith(("a number", "a whole number")) and re.fullmatch(r"[-+]?[\d_]+(\.\d*)?", value):
            return f"{kind}, without quotes, underscores or leading zeros"
    if kind.startswith("a list") and isinstance(value, str | int | float):
        return f"{kind}: {flow([value])}"
    if (kind.startswith("text") or key.is_text) and isinstance(value, int | float):
        return f"{kind}, in quotes"
    return kind


def _raised(error: ErrorDetails) -> ValueError | None:
    """The exception of a validator of ours."""
    raised = error.get("ctx", {}).get("error")
    return raised if isinstance(raised, ValueError) else None


def _conflicts(errors: list[ErrorDetails]) -> Iterator[Conflict]:
    for error in errors:
        raised = _raised(error)
        if isinstance(raised, Conflicts):
            yield from raised.conflicts


def _path_of(error: ErrorDetails, values: dict[str, Any]) -> KeyPath:
    """The path of an error: pydantic's, without its marks for which type of several it tried."""
    path: list[str | int] = []
    node: Any = values
    for part in error["loc"]:
        if isinstance(node, dict) and (part in node or error["type"] == "missing"):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _until_leaf(path: KeyPath) -> KeyPath:
    """The key that an entry of a list or mapping belongs to; otherwise the path itself."""
    return next((path[:end] for end in range(1, len(path)) if dotted(path[:end]) in KEYS), path)


def _overlap(one: str, other: str) -> bool:
    """Whether one is the other, or stands below it."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _put_aside(values: dict[str, Any], path: KeyPath) -> None:
    above = _value_at(values, path[:-1])
    if isinstance(above, dict):
        above.pop(path[-1], None)


def _value_at(values: object, path: KeyPath) -> Any:  # noqa: ANN401, because it may be anything
    for part in path:
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part]
        else:
            return None
    return values


def _shown(value: object) -> str:
    """
    A value as the file had it, near enough, and not too long; without what a URL may tell of credentials.

    >>> _shown("a" * 100)
    '"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'
    """
    text = mask_credentials(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
