"""Counting requests: through every way of reading, with files read as before."""

from pathlib import Path

import pytest

from storage.objects import open_store
from storage.objects.local import FileStore
from storage.objects.tally import Count, Tally, counted


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_every_way_of_reading_is_counted_with_its_bytes(scheme: str, tmp_path: Path) -> None:
    url = tmp_path.as_uri() if scheme == "file" else "memory://tally"
    tally = Tally()
    store = counted(open_store(url), tally)
    assert store.put("a/b", bytes(range(100)))
    assert tally.now() == Count(0, 0), "writing is not reading"
    assert store.get("a/b") == bytes(range(100))
    assert store.get_range("a/b", 10, 20) == bytes(range(10, 20))
    assert store.get_ranges("a/b", [(0, 5), (90, 97)]) == [bytes(range(5)), bytes(range(90, 97))]
    assert store.get_suffix("a/b", 8) == bytes(range(92, 100))
    assert tally.now() == Count(5, 100 + 10 + 5 + 7 + 8)
    if isinstance(store, FileStore):
        into = bytearray(30)
        store.read_into("a/b", 3, memoryview(into))
        assert bytes(into) == bytes(range(3, 33))
        assert tally.now() == Count(6, 160)
    assert list(store.list("a/")) == ["a/b"]
