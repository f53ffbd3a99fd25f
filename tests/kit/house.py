"""The rooms of the house, who may enter which, and what breaks the rules.

A room is a folder of a top folder, or a file that stands in one. `ROOMS` is the one table of them, and
`docs/architecture.md` shows it. A new room needs a line here.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.kit import ROOT

TOPS = ("storage", "ssl_core", "jobs", "cluster")

# Between top folders.
MAY_IMPORT: dict[str, set[str]] = {
    "storage": set(),
    "ssl_core": {"storage"},
    "cluster": {"storage"},
    "jobs": {"storage", "ssl_core", "cluster"},
}

# Within one: what a room may enter of its own top folder. `*` is all that is not shut.
ROOMS: dict[str, dict[str, str]] = {
    "storage": {
        "errors": "",
        "intensity_stats": "",
        "geometry": "errors",
        "nifti_header": "errors",
        "fork_guard": "errors",
        "objects": "errors fork_guard",
        "format": "errors intensity_stats objects",
        "reading": "errors fork_guard format objects",
        "stream": "errors fork_guard intensity_stats format reading",
        "ingest": "errors geometry nifti_header intensity_stats objects format reading",
        "datasets": "errors geometry ingest objects",
        "testing": "*",
    },
    "ssl_core": {
        "config": "",
        "distributed": "",
        "to_device": "",
        "losses": "",
        "portable": "",
        "superpixels": "config",
        "networks": "distributed portable",
        "views": "config superpixels to_device portable",
        "methods": "config distributed to_device losses superpixels networks views",
        "train": "config distributed networks views methods",
        "monitor": "networks views methods train",
        "downstream": "config distributed portable networks views methods train",
        "bundle": "bundle_card portable networks views",
        "bundle_card": "portable networks views",
        "encoder": "portable",
        "testing": "*",
    },
    "jobs": {
        "output": "",
        "options": "",
        "lease": "",
        "on_ray": "lease watch",
        "ingest_config": "",
        "configs": "ingest_config",
        "watch": "output",
        "submit": "watch",
        "tracking": "configs output",
        "pages": "output",
        "driver": "configs output tracking watch",
        "labelled": "configs",
        "pinning": "configs tracking",
        "data_check": "output",
        "ingestion": "output data_check",
        "ingest": "ingest_config ingestion on_ray driver",
        "superpixels": "configs output on_ray driver",
        "certificate": "tracking",
        "pretrain": "configs output watch lease on_ray tracking driver pinning ingest ingestion superpixels "
        "certificate",
        "replay": "configs tracking driver pinning certificate pretrain",
        "nodes": "output on_ray driver",
        "plan": "configs output tracking driver labelled pretrain finetune study",
        "torchrun": "configs output lease tracking driver certificate pretrain",
        "finetune": "configs output lease on_ray tracking pages driver labelled pinning",
        "tune": "configs ingest_config output lease on_ray tracking pages driver labelled pinning finetune",
        "predict": "on_ray output pages",
        "exchange": "tracking",
        "study": "configs output lease on_ray tracking driver labelled pinning finetune pretrain superpixels "
        "ingest ingestion pages",
        "demo": "configs output submit tracking pages driver ingestion labelled pretrain",
        "bench": "configs options output submit tracking demo on_ray pretrain finetune tune labelled",
        "cli": "*",
    },
    "cluster": {},
}

# Nobody enters these but tests and whoever is named.
SHUT: dict[str, tuple[str, ...]] = {
    "storage.testing": ("jobs.bench", "ssl_core.testing"),
    "ssl_core.testing": ("jobs.bench",),
    "jobs.bench": ("jobs.cli",),
    "jobs.cli": (),
}
MOST_FILES, MOST_LINES = 16, 400

Sources = Mapping[str, str]


@cache
def _read(root: Path) -> dict[str, str]:
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8")
        for top in TOPS
        for path in sorted((root / top).rglob("*.py"))
    }


def sources(root: Path = ROOT) -> dict[str, str]:
    """Text of every module of the product by dotted name; a package's own file is named `PACKAGE.__init__`."""
    return dict(_read(root))


@cache
def _imported(module: str, text: str) -> frozenset[tuple[str, str]]:
    """What a module imports, in functions too: pairs of a module and a name taken from it, or of a module and ''."""
    package = module.split(".")[:-1]
    pairs: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            pairs |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            pairs |= {(name, alias.name) for alias in node.names}
    return frozenset(pairs)


def _targets(module: str, text: str, modules: Sources) -> set[str]:
    """Modules of the product that a module imports."""
    targets: set[str] = set()
    for source, name in _imported(module, text):
        names = (f"{source}.{name}", f"{source}.{name}.__init__", source, f"{source}.__init__")
        targets |= {next((full for full in names if full in modules), module)}
    return targets - {module}


def _room(module: str) -> str:
    return module.split(".")[1]


def _within(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


def breaches(modules: Sources) -> list[str]:
    """What breaks the rules, a line each."""
    graph = {module: _targets(module, text, modules) for module, text in modules.items()}
    return [*_trespasses(graph), *_circles(graph), *_sizes(modules)]


def _trespasses(graph: Mapping[str, set[str]]) -> Iterator[str]:
    for module, targets in graph.items():
        top, room = module.split(".")[0], _room(module)
        if ROOMS[top] and room != "__init__" and room not in ROOMS[top]:
            yield f"{module}: room {top}.{room} is not in the table"
            continue
        for target in targets:
            for place, guests in SHUT.items():
                if _within(target, place) and not any(_within(module, guest) for guest in (place, *guests)):
                    yield f"{module} -> {target}: only {', '.join(('tests', *guests))} may enter {place}"
            other = target.split(".")[0]
            if other != top and other not in MAY_IMPORT[top]:
                yield f"{module} -> {target}: {top} may not import {other}"
            if other != top or not ROOMS[top] or _room(target) in (room, "__init__"):
                continue
            rule = ROOMS[top].get(room, "")  # a top folder's own file enters nothing
            if rule != "*" and _room(target) not in rule.split():
                yield f"{module} -> {target}: {room} may not enter {_room(target)}"


def _circles(graph: Mapping[str, set[str]]) -> Iterator[str]:
    """Files that import one another, however far around, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[str]:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in order:
                yield from visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == order[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                yield f"circle of files: {', '.join(sorted(circle))}"

    for module in sorted(graph):
        if module not in order:
            yield from visit(module)


def _sizes(modules: Sources) -> Iterator[str]:
    folders: dict[str, int] = {}
    for module, text in modules.items():
        if (lines := len(text.splitlines())) > MOST_LINES:
            yield f"{module}: {lines} lines, at most {MOST_LINES}"
        folder, _, name = module.rpartition(".")
        folders[folder] = folders.get(folder, 0) + (name != "__init__")
    for folder, files in folders.items():
        if files > MOST_FILES:
            yield f"{folder}: {files} files, at most {MOST_FILES}"


# Words that tell what happened to a value rather than what it is.
NAMELESS = {"found", "held", "kept", "said", "mine", "wanted", "seen", "known", "made", "given", "chosen", "named"}
NAMELESS |= {"asked", "told", "taken", "ours", "theirs", "wants", "shown", "there", "here"}


def bindings(text: str) -> Iterator[tuple[str, int]]:
    """Names that a module binds as variables and parameters, with their lines."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
