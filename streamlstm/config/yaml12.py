"""
YAML as people expect it: the core schema of YAML 1.2, with the line of every value.

Only ``true`` and ``false`` are booleans; ``NO``, ``on``, ``12:30``, ``2026-01-01`` and ``010`` are text; ``1e-3`` is a
number. Keys are text, a key may stand only once, and there are neither aliases nor tags. All of it in
``docs/adr/0001-configuration-files.md``.
"""

import math
import re
from typing import Any, NamedTuple

import yaml

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
_RESOLVERS = (
    (_NULL, r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # A leading zero makes it text (is 010 eight or ten?), and so does more than 64 bits.
    (_INT, r"[-+]?(0|[1-9][0-9]{0,17})", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(?:(?:(?:0|[1-9][0-9]*)?\.[0-9]+|(?:0|[1-9][0-9]*)\.)(?:[eE][-+]?[0-9]+)?|(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+)",
        list("-+.0123456789"),
    ),
)

KeyPath = tuple[str | int, ...]


class Flaw(NamedTuple):
    """What is wrong with the text, and where: line (from 1), the key it belongs to, and the fix."""

    line: int
    path: KeyPath
    fix: str


class Document(NamedTuple):
    """The value; the line of every key and list entry; and everything that is wrong."""

    value: Any
    lines: dict[KeyPath, int]
    flaws: list[Flaw]


class _NotRead(yaml.YAMLError):
    """Something of YAML that configuration files do without."""

    def __init__(self, event: yaml.Event, fix: str) -> None:
        super().__init__(fix)
        self.fix = fix
        self.line = event.start_mark.line + 1 if event.start_mark else 1


class _Loader(yaml.SafeLoader):
    """Composes nodes only; the values are made from them here."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, because yaml says so; it is filled below

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            # An alias may stand for itself, or for a billion of others.
            raise _NotRead(event, "aliases (*name) are not read: write the value out")
        if getattr(event, "tag", None) is not None:
            raise _NotRead(event, f"tags are not read: take {event.tag} out")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than text."""

    yaml_implicit_resolvers = {first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012, because yaml says so


for _tag, _pattern, _first in _RESOLVERS:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})\\Z"), _first)


def parse(text: str) -> Document:
    """
    Read one document. Never raises: what cannot be read at all is a flaw, and the value is ``None``.

    >>> parse("a: [1e-3, NO, 12:30, 010]").value
    {'a': [0.001, 'NO', '12:30', '010']}
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except _NotRead as error:
        return Document(None, {}, [Flaw(error.line, (), error.fix)])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return Document(None, {}, [Flaw(mark.line + 1 if mark else 1, (), _explain(error))])
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Document(
            None, {}, [Flaw(line, (), f"character U+{ord(text[error.position]):04X} is not allowed: take it out")]
        )
    except RecursionError:
        return Document(None, {}, [Flaw(1, (), "this is nested too deeply")])
    finally:
        loader.dispose()
    document = Document({}, {}, [])
    value = None if root is None else _build(root, (), document)
    return document._replace(value=value)


def flow(value: object) -> str:
    """
    One value on one line, as :func:`parse` reads it back.

    >>> flow(["a", "1e-3", "yes", 2, None])
    "[a, '1e-3', 'yes', 2, null]"
    """
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1 << 30, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _build(node: yaml.Node, path: KeyPath, document: Document) -> Any:  # noqa: ANN401, because it may be anything
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        sequence: list[Any] = []
        for index, item in enumerate(node.value):
            document.lines[*path, index] = item.start_mark.line + 1
            sequence.append(_build(item, (*path, index), document))
        return sequence
    return _scalar(node)


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.flaws.append(Flaw(line, path, "a key is a plain word: if this was text, put it in quotes"))
            continue
        here = (*path, key_node.value)
        if key_node.value in mapping:
            document.flaws.append(Flaw(line, here, f"take one out: it stands in line {document.lines[here]} already"))
            continue
        document.lines[here] = line
        mapping[key_node.value] = _build(value_node, here, document)
    return mapping


def _scalar(node: yaml.Node) -> Any:  # noqa: ANN401, because it may be anything
    text: str = node.value
    if node.tag == _NULL:
        value = None
    elif node.tag == _BOOL:
        value = text.lower() == "true"
    elif node.tag == _INT:
        value = int(text)
    elif node.tag == _FLOAT and math.isfinite(float(text)):
        value = float(text)
    else:
        value = text
    return value


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "this is not YAML"
    if match := re.fullmatch(r"found character '(.+)' that cannot start any token", problem):
        if match[1] == "\\t":
            return "indent with spaces, not tabs"
        return f"put text that begins with {match[1]} in quotes"
    if problem.startswith("but found another document"):
        return "write one document: a file with --- between several is not read"
    if problem.startswith("mapping values are not allowed"):
        return "this is not YAML (a colon where none may stand): check the indentation, or put the text in quotes"
    return f"this is not YAML: {problem}"
