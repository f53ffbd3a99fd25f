"""Which model was trained from which: the versions before one and those after it, by the tags of versions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.tracking.models import Version, list_models, resolve

PARENT = "tomoscale.parent"
_FACTS = {
    "data": "tomoscale.data",
    "fingerprint": "tomoscale.data_fingerprint",
    "method": "tomoscale.method",
    "confirmed": "tomoscale.confirmed.statement",
}


@dataclass(frozen=True)
class Node:
    """A version, or something that one was trained from.

    Attributes:
        uri: Registered version, folder or URL.
        version: What the registry has; None where it is none of its, or was deleted.
        children: Versions that were trained from it.
    """

    uri: str
    version: Version | None
    children: tuple["Node", ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Nested, with what the lines of `text` say."""
        return {"uri": self.uri, **_facts(self), "children": [child.to_json() for child in self.children]}


def tree(uri: str) -> tuple[Node, Version]:
    """The first ancestor of a version with the line down to it, and all that was trained from it; and the version.

    Raises:
        NotFound: no such model, version or alias.
    """
    version = resolve(uri)
    every = {item.uri: item for item in list_models()}
    below: dict[str, list[str]] = {}
    for item in every.values():
        if PARENT in item.tags:
            below.setdefault(item.tags[PARENT], []).append(item.uri)
    node = _down(version.uri, every, below, frozenset())
    passed = {version.uri}
    while (above := every.get(node.uri)) is not None and (parent := above.tags.get(PARENT, "none")) != "none":
        if parent in passed:  # tags may say anything
            break
        passed.add(parent)
        node = Node(parent, every.get(parent), (node,))
    return node, version


def text(node: Node, version: Version) -> str:
    """A line a model, indented below what it was trained from; an arrow at the one that was asked for."""
    return "\n".join(_lines(node, version.uri, ""))


def _down(uri: str, every: Mapping[str, Version], below: Mapping[str, list[str]], above: frozenset[str]) -> Node:
    path = above | {uri}
    children = sorted(set(below.get(uri, ())) - path)
    return Node(uri, every.get(uri), tuple(_down(child, every, below, path) for child in children))


def _lines(node: Node, uri: str, indent: str) -> Iterator[str]:
    facts = _facts(node)
    words = ", ".join(filter(None, [facts["kind"], *facts["aliases"]]))
    yield f"{indent}{node.uri}{f' ({words})' if words else ''}{'  <--' if node.uri == uri else ''}"
    for name in _FACTS:
        if facts[name]:
            yield f"{indent}    {name}: {facts[name]}"
    for child in node.children:
        yield from _lines(child, uri, f"{indent}  ")


def _facts(node: Node) -> dict[str, Any]:
    if node.version is None:
        kind = "not in this registry" if node.uri.startswith("models:/") else "not registered"
        return {"kind": kind, "aliases": [], **dict.fromkeys(_FACTS, "")}
    tags = node.version.tags
    return {
        "kind": tags.get("tomoscale.kind", ""),
        "aliases": list(node.version.aliases),
        **{name: tags.get(key, "") for name, key in _FACTS.items()},
    }
