"""YAML as data: no tags that make objects, no key written twice, no aliases that grow beyond all bounds."""

from __future__ import annotations

from typing import Any

import yaml

LARGEST = 100_000
"""Values of a text once its aliases are written out; recipes have hundreds."""
DEEPEST = 50
"""Blocks inside blocks; recipes have ten."""


class _Loader(yaml.SafeLoader):
    """PyYAML's own, which keeps the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in written and name != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{name}` is written twice", key.start_mark
                )
            written.add(name)
        return super().construct_mapping(node, deep)


def read(text: str) -> Any:
    """The value that `text` stands for. Raises yaml.YAMLError for anything but plain data."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, 0) > LARGEST:
            raise yaml.YAMLError(f"more than {LARGEST} values once its aliases are written out")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"more than {DEEPEST} blocks inside each other") from None
    except ValueError as error:  # a date or a number that there is not
        raise yaml.YAMLError(str(error)) from None


def _size(node: yaml.Node, known: dict[yaml.Node, int], depth: int) -> int:
    """How many values `node` is, an alias counted as what it stands for."""
    if depth > DEEPEST:
        raise yaml.YAMLError(f"more than {DEEPEST} blocks inside each other")
    if node not in known:
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        known[node] = 1 + sum(_size(part, known, depth + 1) for part in inner)
    return known[node]
