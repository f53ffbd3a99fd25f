"""What the nodes answered, as a table, as one sentence for each thing that is not well, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.doctor import Check
from jobs.output import table


@dataclass(frozen=True)
class Node:
    """One node's answers. `name` is its address and its host name."""

    name: str
    checks: list[Check]


def sentences(nodes: Sequence[Node]) -> list[str]:
    """One for each thing that is not well: the node, the thing, what it is, and what to do."""
    return [f"{n.name}: {c.name}: {c.finding}; {c.remedy}" for n in nodes for c in n.checks if not c.ok]


def text(nodes: Sequence[Node]) -> str:
    """For a person."""
    rows = [("ok" if c.ok else "FAILED", n.name, c.name, c.finding) for n in nodes for c in n.checks]
    wrong = sentences(nodes)
    end = wrong or [f"{len(nodes)} node(s), all well"]
    return "\n".join([table(("", "node", "check", "found"), rows), "", *end])


def to_json(nodes: Sequence[Node]) -> dict[str, Any]:
    """Plain values."""
    return {
        "nodes": [
            {
                "node": n.name,
                "checks": [{"check": c.name, "ok": c.ok, "found": c.finding, "remedy": c.remedy} for c in n.checks],
            }
            for n in nodes
        ],
        "problems": sentences(nodes),
    }


def from_json(data: Mapping[str, Any]) -> list[Node]:
    """Inverse of `to_json`."""
    return [
        Node(n["node"], [Check(c["check"], c["ok"], c["found"], c["remedy"]) for c in n["checks"]])
        for n in data["nodes"]
    ]
