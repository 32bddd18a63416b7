"""YAML as recipes have it: read without anchors, with the line of every key; written with short lists on one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ..errors import InputError

DEPTH = 20  # levels of nesting


def parsed(text: str) -> yaml.Node | None:
    """The document, if it is not nested without end and has no anchors; else YAMLError."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: nested too deep")
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: anchors and aliases are not supported")
    return yaml.compose(text, yaml.SafeLoader)


def lines_of(node: yaml.Node | None, place: tuple = ()) -> Iterator[tuple[tuple, int]]:
    """(place, line) of every key and item."""
    if node is None:
        return
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for k, item in enumerate(node.value):
            yield from lines_of(item, (*place, k))
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise InputError(f"line {key.start_mark.line + 1}: {key.value} comes twice")
            seen.add(key.value)
            yield from lines_of(value, (*place, key.value))
            yield (*place, key.value), key.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line."""

    def represent_list(self, data: list[Any]) -> yaml.Node:
        flow = not any(isinstance(x, (list, dict)) for x in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _Dumper.represent_list)


def dumped(raw: Mapping[str, Any]) -> str:
    """`raw` as YAML, keys in their order."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
