"""
Every key as a value: where it stands, what it may be, its class; and the hashes that classes give rise to.

Recovery stores the values of identity and learning keys beside a state, and asks :func:`changed` on the way back.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from streamlstm.config.model import Config, KeyClass, Means, Section
from streamlstm.errors import ConfigError

ENV_PREFIX = "STREAMLSTM_"


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf of the configuration. ``path`` is dotted."""

    path: str
    field: FieldInfo

    @property
    def klass(self) -> KeyClass:
        """What may become of a change."""
        extra = cast("dict[str, Any]", self.field.json_schema_extra)
        return extra["class"]

    @property
    def env(self) -> str:
        """The environment variable that sets it."""
        return ENV_PREFIX + self.path.replace(".", "__").upper()

    @property
    def kind(self) -> str:
        """What it may be, in words."""
        return describe(self.field.annotation, self.field.metadata)

    @property
    def is_text(self) -> bool:
        """Whether only text may stand here (or nothing)."""
        return all(arm is str or arm is NoneType for arm in map(_bare, _arms(self.field.annotation)))

    @property
    def is_mapping(self) -> bool:
        """Whether a mapping with names of the user's own may stand here."""
        return any(get_origin(_bare(arm)) is dict for arm in _arms(self.field.annotation))

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it knows."""
        return tuple(
            word
            for arm in map(_bare, _arms(self.field.annotation))
            for choice in (arm, *map(_bare, get_args(arm)))
            if get_origin(choice) is Literal
            for word in get_args(choice)
            if isinstance(word, str)
        )

    @property
    def meaning(self) -> str:
        """Its docstring, on one line."""
        return " ".join((self.field.description or "").split())

    @property
    def example(self) -> Any:  # noqa: ANN401, because it may be anything
        """What messages and the reference propose: an example where there is one, or the default."""
        return self.field.examples[0] if self.field.examples else self.field.default


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section that this field holds, if it holds one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key below a section, in order."""
    for name, field in section.model_fields.items():
        inner = subsection(field)
        if inner:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", field)


KEYS: Mapping[str, Key] = {key.path: key for key in leaves()}


def describe(annotation: object, metadata: Iterable[object] = ()) -> str:
    """
    A type in words.

    >>> KEYS["model.horizons"].kind, KEYS["model.season"].kind
    ('a whole number from 1 to 1000', 'a whole number from 2 to 20000, or none')
    """
    facts = _facts(metadata)
    said = next((fact.one for fact in facts if isinstance(fact, Means)), None)
    origin, args = get_origin(annotation), get_args(annotation)
    if said is not None:
        words = said
    elif origin is Annotated:
        words = describe(args[0], args[1:])
    elif origin is Literal:
        words = _any_of(str(arg) for arg in args)
    elif origin in (Union, UnionType):
        words = ", or ".join(describe(arg) for arg in args)
    elif origin is list:
        words = f"a list of {_several(args[0])}" + _bounds(facts)
    elif origin is dict:
        words = f"a mapping of names to {_several(args[1])}"
    else:
        plain: dict[object, str] = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "text",
            NoneType: "null",
        }
        words = plain[annotation] + _bounds(facts)
    return words


def describe_item(annotation: object) -> str:
    """One entry of a list or mapping, in words; of anything else, the thing itself."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_item(args[0])
    if origin in (Union, UnionType):
        inner = next((arg for arg in args if get_origin(arg) in (list, dict)), None)
        return describe_item(inner) if inner else describe(annotation)
    if origin in (list, dict):
        return describe(args[-1])
    return describe(annotation)


def _facts(metadata: Iterable[object]) -> list[object]:
    """Metadata, with what a ``Field(...)`` inside an annotation says."""
    facts: list[object] = []
    for fact in metadata:
        facts += fact.metadata if isinstance(fact, FieldInfo) else [fact]
    return facts


def _bare(annotation: object) -> object:
    """Without its metadata."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _arms(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _several(annotation: object) -> str:
    for fact in _facts(get_args(annotation)[1:]) if get_origin(annotation) is Annotated else ():
        if isinstance(fact, Means):
            return fact.many
    return describe(annotation)


def _any_of(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _bounds(facts: list[object]) -> str:
    low = next((fact.ge for fact in facts if isinstance(fact, Ge)), None)
    high = next((fact.le for fact in facts if isinstance(fact, Le)), None)
    above = next((fact.gt for fact in facts if isinstance(fact, Gt)), None)
    if any(isinstance(fact, MinLen) for fact in facts):
        return ", at least one"
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return "" if above is None else f" above {above}"


def values(config: Config) -> dict[str, Any]:
    """Every key's value by its dotted path, as JSON and as a file would say it (durations as ``10s``)."""
    plain = config.model_dump(mode="json")
    return {path: _at(plain, path) for path in KEYS}


def _at(plain: dict[str, Any], path: str) -> Any:  # noqa: ANN401, because it may be anything
    value: Any = plain
    for part in path.split("."):
        value = value[part]
    return value


def _resolved(config: Config) -> dict[str, Any]:
    """Values as they work: what a default stands for must not change under a stored state either."""
    return values(config) | {
        "training.k2": config.k2,
        "training.optimizer.lr": config.learning_rate,
        "sink.forecasts.topic": config.forecast_topic,
        "sink.dead_letters.topic": config.dead_letter_topic,
        "sink.progress.topic": config.progress_topic,
    }


def identity_values(config: Config) -> dict[str, Any]:
    """Identity keys, resolved, as JSON values by dotted path."""
    return {path: value for path, value in _resolved(config).items() if KEYS[path].klass == "identity"}


def learning_values(config: Config) -> dict[str, Any]:
    """Learning keys, resolved, as JSON values by dotted path."""
    return {path: value for path, value in _resolved(config).items() if KEYS[path].klass == "learning"}


def with_learning(config: Config, learning: Mapping[str, Any]) -> Config:
    """
    The configuration with other values of its learning keys; what is not given, or is no key any more, stays out of it.

    They were recorded under another ``series.max_series``, which changes no bit: it is raised to what they need.

    Raises :class:`~streamlstm.errors.ConfigError` where they cannot stand beside the rest.
    """
    known = learning_values(config)
    wanted = {path: learning[path] for path in known if path in learning}
    if wanted == known:
        return config
    plain = config.model_dump(mode="json")
    for path, value in wanted.items():
        *sections, last = path.split(".")
        section: dict[str, Any] = plain
        for name in sections:
            section = section[name]
        section[last] = value
    plain["series"]["max_series"] = max(plain["series"]["max_series"], plain["training"]["max_wait"])
    try:
        return Config.model_validate(plain)
    except ValidationError as error:
        told = "; ".join(" ".join((*map(str, wrong["loc"]), wrong["msg"])) for wrong in error.errors())
        raise ConfigError(f"recorded values of learning keys do not go with the configuration: {told}") from error


def config_hash(config: Config) -> str:
    """SHA-256 (hex) of all that forecasts depend on: identity and learning keys."""
    return hash_values(identity_values(config) | learning_values(config))


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """
    Dotted keys that differ, or that only one side has, in order.

    >>> changed({"model.seed": 1, "name": "a"}, {"model.seed": 2, "name": "a"})
    ['model.seed']
    """
    return sorted(
        path for path in old.keys() | new.keys() if path not in old or path not in new or old[path] != new[path]
    )


def tell_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """
    Which keys were changed, and from what to what, as an operator is told; empty when none was.

    >>> tell_changes({"model.seed": 1, "season": None}, {"model.seed": 1, "season": "1d"})
    'keys were changed: season (was null, is "1d")'
    """
    told = [f"{path} (was {json.dumps(old.get(path))}, is {json.dumps(new.get(path))})" for path in changed(old, new)]
    return f"keys were changed: {', '.join(told)}" if told else ""


def hash_values(plain: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of keys and their values."""
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
