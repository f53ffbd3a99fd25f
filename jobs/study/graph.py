"""Cells in an order that their needs allow, as many at a time as the pool takes."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from jobs.output import duration
from jobs.study import cells as kinds
from jobs.study.cells import Cell, stored
from jobs.study.pools import Pool
from jobs.study.work import Task, score

Result = dict[str, Any]


class Clock:
    """Time left of a study, from how long cells of each kind took so far.

    Args:
        total: Cells of each kind in all.
        size: Cells at a time.
    """

    def __init__(self, total: dict[str, int], size: int) -> None:
        self.total, self.size = total, size
        self.seconds: dict[str, list[float]] = {kind: [] for kind in total}

    def add(self, cell: Cell, result: Result) -> None:
        """Count a cell that is done."""
        self.seconds.setdefault(cell.kind, []).append(float(result["seconds"]))

    @property
    def done(self) -> int:
        """Cells that are done."""
        return sum(map(len, self.seconds.values()))

    @property
    def unknown(self) -> tuple[str, ...]:
        """Kinds of which none is done yet; tests that are about to come count as searches, which they resemble."""
        known = {kind for kind, seconds in self.seconds.items() if seconds}
        if kinds.SEARCH in known:
            known.add(kinds.TEST)
        return tuple(kind for kind, total in self.total.items() if total and kind not in known)

    @property
    def left_s(self) -> float:
        """Seconds left of the kinds that are known."""
        searches = self.seconds.get(kinds.SEARCH, [])
        left = 0.0
        for kind, total in self.total.items():
            known = self.seconds[kind] or (searches if kind == kinds.TEST else [])
            if known:
                left += (total - len(self.seconds[kind])) * fmean(known)
        return left / self.size

    def text(self) -> str:
        """How many are done, and about how long the rest takes."""
        left, every = self.left_s, sum(self.total.values())
        words = f"{self.done}/{every}"
        if self.done >= every:
            return words
        amount = duration(left)
        if not self.unknown:
            return f"{words}, about {amount} left"
        nobody_knows = f"how long {', '.join(self.unknown)} take is not known yet"
        return f"{words}, {amount} left and more: {nobody_knows}" if left else f"{words}; {nobody_knows}"


def execute(
    cells: Sequence[Cell],
    pool: Pool,
    task_of: Callable[[Cell], Task],
    clock: Clock,
    *,
    on_done: Callable[[Cell, Result], None] = lambda _cell, _result: None,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """Results of all cells by key; those that are stored are not done again.

    Args:
        cells: In the order in which they are begun, as far as their needs allow; needs are among them or stored.
        pool: Where they run.
        task_of: What a cell takes.
        clock: Counts them.
        on_done: Hears of each cell, also of those of before; may write about it.
        check: Raises where this driver has to stop.
        say: Hears a line for each cell.
    """
    results = stored(cells)
    for cell in cells:
        if cell.key in results:
            clock.add(cell, results[cell.key])
            on_done(cell, results[cell.key])
    if results:
        say(f"{len(results)} of {len(cells)} cells were done before")
    own = {cell.key for cell in cells}
    todo = [cell for cell in cells if cell.key not in results]
    running = 0
    try:
        while todo or running:
            ready = [cell for cell in todo if all(need in results or need not in own for need in cell.needs)]
            for cell in ready[: pool.size - running]:
                todo.remove(cell)
                pool.submit(task_of(cell))
                running += 1
            task, result = pool.next_done()
            running -= 1
            check()
            cell = task.cell
            results[cell.key] = result
            clock.add(cell, result)
            on_done(cell, result)
            say(f"{cell.title}: {_words(cell, result)}{result['seconds']:.0f} s ({clock.text()})")
    finally:
        if running:
            pool.close()
    return results


def _words(cell: Cell, result: Result) -> str:
    if cell.kind == kinds.SEARCH:
        return f"validation Dice {score(result):.3f}, "
    if cell.kind == kinds.TEST:
        return f"test Dice {fmean(case['dice'] for case in result['cases']):.3f}, "
    collapsed = "COLLAPSED, " if result.get("probes", {}).get("probe/collapsed") else ""
    return f"loss {result['losses'][-1][1]:.3f}, {collapsed}" if result.get("losses") else ""
