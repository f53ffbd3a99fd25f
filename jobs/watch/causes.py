"""Why a job or a worker failed, in one sentence that comes before any traceback.

Libraries say it in the middle of pages of text, and what follows a death (every other worker loses its connection)
comes after it. Here the last cause counts, and a consequence only where there is no cause.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from storage.errors import TomoscaleError


@dataclass(frozen=True)
class Kind:
    """One kind of failure: the words by which it is told, and a sentence for it; `{0}` is the first group."""

    pattern: re.Pattern[str]
    sentence: str

    def match(self, text: str) -> tuple[int, str] | None:
        """Where its last words begin in a text, and the sentence; None where it has none."""
        matches = list(self.pattern.finditer(text))
        if not matches:
            return None
        last = matches[-1]
        return last.start(), self.sentence.format(*(" ".join((part or "").split()) for part in last.groups()))


def _kind(pattern: str, sentence: str) -> Kind:
    return Kind(re.compile(pattern, re.MULTILINE), sentence)


_CAUSES = (
    _kind(
        r"CUDA out of memory\. Tried to allocate ([\d.]+ \w+)",
        "the GPU is out of memory: it had no {0} left; use smaller crops, a smaller batch, engine.accumulate or "
        "engine.activation_checkpointing",
    ),
    _kind(
        r"killed due to the node running low on memory|killed due to memory pressure|OutOfMemoryError: Task was killed",
        "a node ran out of memory and Ray ended the worker; give it fewer workers, a smaller batch or more memory",
    ),
    _kind(
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory: you tried to allocate (\d+) bytes",
        "a node is out of memory: it had no {0} bytes left; use smaller crops or a smaller batch",
    ),
    _kind(r"^MemoryError|: MemoryError|Unable to allocate [\d.]+ \w+ for an array", "a node is out of memory"),
    _kind(
        r"[Nn]ode (?:was |is |has )?(?:terminated|died|dead|preempted|lost|drained)|its node has died|NodeDiedError|"
        r"[Nn]ode .{0,80}(?:marked (?:as )?dead|missed too many heartbeats)|raylet .{0,40}died",
        "a node was lost: switched off, taken away or cut from the network",
    ),
    _kind(
        r"killed by SIGKILL by OOM killer|WorkerCrashedError|[Ww]orker (?:exit type|died|crashed)|ActorDiedError|"
        r"The actor (?:died|is dead)",
        "a worker process was killed or crashed; a kernel that is out of memory does that, and its log names it",
    ),
    _kind(
        r"(?:AWS Error NETWORK_CONNECTION|Could not connect to the endpoint URL|EndpointConnectionError|"
        r"curlCode: \d+)[:, ]*([^\n]{0,120})",
        "S3 did not answer ({0}); the job goes on from its last checkpoint when it is back and the job is sent again",
    ),
    _kind(r"AWS Error ACCESS_DENIED[^\n]*|InvalidAccessKeyId|SignatureDoesNotMatch", "S3 refused the key of the nodes"),
    _kind(r"No space left on device|Disk quota exceeded|AWS Error .{0,40}QuotaExceeded", "a disk or a quota is full"),
    _kind(r"[Bb]us error|insufficient shared memory", "a worker ran out of shared memory (/dev/shm)"),
    _kind(r"No module named '([\w.]+)'", "a node lacks the package {0}; all nodes need what the client has"),
    _kind(r"(CUDA error: [^\n]{1,120})", "the GPU failed: {0}"),
    # An error of ours, with its whole sentence, as a worker's traceback ends in it.
    _kind(r"^(?:[\w.]+\.)?[A-Z]\w+: ([^\n]+; expected [^\n]+)$", "{0}"),
)
_CONSEQUENCES = (
    _kind(
        r"Connection (?:closed by peer|reset by peer|refused)|NCCL error|ncclRemoteError|ncclSystemError|"
        r"[Gg]loo[^\n]{0,40}failed|Timed out waiting \d+ms",
        "a worker lost its connection to another one, which ended or is cut off",
    ),
)


def cause_in(text: str) -> str | None:
    """The cause that a text tells of, in one sentence; None where it tells of none that is known here."""
    return _last(_CAUSES, text) or _last(_CONSEQUENCES, text)


def _last(kinds: Iterable[Kind], text: str) -> str | None:
    matches = [match for kind in kinds if (match := kind.match(text)) is not None]
    return max(matches)[1] if matches else None


def cause_of(error: BaseException) -> str:
    """The cause of an error in one sentence: of those that led to it the innermost that is known here.

    Where none is, its type and its last line.
    """
    chain = list(_chain(error))
    for inner in reversed(chain):
        if isinstance(inner, TomoscaleError):
            return str(inner)
    for kinds in (_CAUSES, _CONSEQUENCES):
        for inner in reversed(chain):
            if (sentence := _last(kinds, f"{type(inner).__name__}: {inner}")) is not None:
                return sentence
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" #")]
    last = lines[-1][:300] if lines else ""
    name = type(error).__name__
    return last if last.startswith(name) else f"{name}: {last}".rstrip(": ")


def cause_of_workers(errors: Mapping[int, BaseException]) -> str:
    """The cause of what several ranks died of: of the lowest rank that does not only tell of another's death."""
    sentences = {rank: cause_of(error) for rank, error in sorted(errors.items())}
    consequences = {kind.sentence for kind in _CONSEQUENCES}
    for rank, sentence in sentences.items():
        if sentence not in consequences:
            return f"rank {rank}: {sentence}"
    return next((f"rank {rank}: {sentence}" for rank, sentence in sentences.items()), "no worker says why")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, Ray's `cause` of a remote one included; each once."""
    met: list[BaseException] = []
    queue: list[BaseException] = [error]
    while queue:
        current = queue.pop(0)
        if any(current is other for other in met):
            continue
        met.append(current)
        yield current
        failures = getattr(current, "worker_failures", None)
        inner = [current.__cause__, current.__context__, getattr(current, "cause", None)]
        inner += list(failures.values()) if isinstance(failures, dict) else []
        queue += [item for item in inner if isinstance(item, BaseException)]
