"""What other backends are tested with: a public contract.

Needs pytest. `StoreContract`, or for what is read only `ReadOnlyContract`, is subclassed by a test class that gives the
fixture `store`. See also `storage.testing.streams` and `storage.testing.fault_proxy`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from storage.errors import ConfigError, CorruptChunk, NotFound, NotOffered
from storage.objects import ByteStore, join, open_store


class ReadContract:
    """What every `ByteStore` does when it is read.

    Subclass it and give a fixture `store`: open and empty. One that cannot write needs a fixture `writer` too: a store
    that puts objects where the other one reads them.
    """

    @pytest.fixture
    def writer(self, store: ByteStore) -> ByteStore:
        """What objects are put by; the store itself where it writes."""
        return store

    def test_what_was_put_is_what_is_read(self, store: ByteStore, writer: ByteStore) -> None:
        """Also an empty object, one byte, any byte value, and keys with odd letters."""
        for key, data in {"a": b"", "b/c": b"\x00", "b/d e": bytes(range(256)) * 5000, "ü+%20#1?": b"odd"}.items():
            writer.put(key, data)
            assert store.get(key) == data
            assert store.head(key) == len(data)
            assert store.exists(key)

    def test_a_range_is_exact(self, store: ByteStore, writer: ByteStore) -> None:
        """Half open, as in Python."""
        data = bytes(range(256)) * 40
        writer.put("x", data)
        for start, stop in [(0, 1), (0, len(data)), (17, 4711), (len(data) - 1, len(data)), (5, 5)]:
            assert store.get_range("x", start, stop) == data[start:stop]
        ranges = [(9, 12), (0, 3), (9000, len(data)), (10, 11)]
        assert store.get_ranges("x", ranges) == [data[a:b] for a, b in ranges]
        assert store.get_ranges("x", []) == []

    def test_a_range_beyond_the_end_raises_and_names_the_key(self, store: ByteStore, writer: ByteStore) -> None:
        """Neither fewer bytes nor other ones."""
        writer.put("folder/x", b"0123456789")
        writer.put("empty", b"")
        for key, start, stop in [("folder/x", 5, 11), ("folder/x", 10, 12), ("folder/x", 50, 60), ("empty", 0, 1)]:
            with pytest.raises(CorruptChunk, match=key):
                store.get_range(key, start, stop)
        with pytest.raises(CorruptChunk, match="folder/x"):
            store.get_ranges("folder/x", [(0, 3), (5, 11)])

    @pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2)])
    def test_a_reversed_or_negative_range_is_refused(
        self, store: ByteStore, writer: ByteStore, start: int, stop: int
    ) -> None:
        """Before any request."""
        writer.put("x", b"0123456789")
        with pytest.raises(ConfigError, match="x"):
            store.get_range("x", start, stop)

    def test_a_suffix_is_the_end_or_the_whole(self, store: ByteStore, writer: ByteStore) -> None:
        """Also of an empty object."""
        writer.put("x", b"0123456789")
        writer.put("empty", b"")
        assert store.get_suffix("x", 4) == b"6789"
        assert store.get_suffix("x", 40) == b"0123456789"
        assert store.get_suffix("empty", 4) == b""

    def test_a_missing_object_raises_and_names_the_key(self, store: ByteStore) -> None:
        """By every way of reading."""
        calls: list[Callable[[], Any]] = [
            lambda: store.get("no/such"),
            lambda: store.get_range("no/such", 0, 1),
            lambda: store.get_ranges("no/such", [(0, 1), (2, 3)]),
            lambda: store.get_suffix("no/such", 4),
            lambda: store.head("no/such"),
        ]
        for call in calls:
            with pytest.raises(NotFound, match="no/such"):
                call()
        assert not store.exists("no/such")

    def test_equal_urls_see_the_same_objects(self, store: ByteStore, writer: ByteStore) -> None:
        """And a longer one sees its part."""
        writer.put("part/x", b"here")
        assert open_store(store.url).get("part/x") == b"here"
        assert open_store(join(store.url, "part")).get("x") == b"here"

    def test_threads_read_together(self, store: ByteStore, writer: ByteStore) -> None:
        """Every thread its own bytes."""
        data = np.random.default_rng(0).bytes(200_000)
        writer.put("x", data)
        with ThreadPoolExecutor(16) as pool:
            parts = pool.map(lambda i: store.get_range("x", i * 997, i * 997 + 991), range(200))
            assert [*parts] == [data[i * 997 : i * 997 + 991] for i in range(200)]

    @pytest.mark.parametrize("key", ["", "/x", "x/", "a//b", "../x", "a/./b", "a\\b"])
    def test_a_key_that_leaves_the_store_is_not_read(self, store: ByteStore, key: str) -> None:
        """Before any request."""
        with pytest.raises(ConfigError):
            store.get(key)

    @pytest.mark.parametrize("prefix", ["../", "a/../../b", "/", "/etc/"])
    def test_a_prefix_that_leaves_the_store_is_refused(self, store: ByteStore, prefix: str) -> None:
        """Names outside it are nobody's business."""
        with pytest.raises(ConfigError):
            list(store.list(prefix))


class ReadOnlyContract(ReadContract):
    """What a store does beside that which can only be read: it refuses the rest by name, at once."""

    def test_every_write_is_refused_and_names_the_key(self, store: ByteStore, writer: ByteStore) -> None:
        """And changes nothing."""
        writer.put("folder/x", b"old")
        calls: list[Callable[[], Any]] = [
            lambda: store.put("folder/x", b"new"),
            lambda: store.put("folder/y", b"new"),
            lambda: store.put("folder/y", b"new", if_absent=True),
            lambda: store.swap("folder/x", b"new", b"old"),
            lambda: store.swap("folder/y", b"new", None),
            lambda: store.delete("folder/x"),
        ]
        for call in calls:
            with pytest.raises(NotOffered, match=r"folder/[xy].*read-only"):
                call()
        assert list(writer.list()) == ["folder/x"]
        assert store.get("folder/x") == b"old"


class StoreContract(ReadContract):
    """What every `ByteStore` does that can be written. The fixture `store` is open, empty and writable."""

    def test_put_says_that_it_wrote(self, store: ByteStore) -> None:
        """And the object is there at once."""
        assert store.put("a/b", b"-") is True
        assert store.get("a/b") == b"-"

    @pytest.mark.parametrize("key", ["", "/x", "x/", "a//b", "../x", "a/./b", "a\\b"])
    def test_a_key_that_leaves_the_store_is_not_written(self, store: ByteStore, key: str) -> None:
        """Nor may a write go there."""
        with pytest.raises(ConfigError):
            store.put(key, b"-")

    def test_put_replaces(self, store: ByteStore) -> None:
        """The last one wins, whole."""
        store.put("x", b"a" * 100)
        store.put("x", b"b")
        assert store.get("x") == b"b"

    def test_put_if_absent_keeps_the_first(self, store: ByteStore) -> None:
        """And says so."""
        assert store.put("x", b"first", if_absent=True) is True
        assert store.put("x", b"second", if_absent=True) is False
        assert store.get("x") == b"first"

    def test_of_many_writers_if_absent_one_wins(self, store: ByteStore) -> None:
        """At the same time."""
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: store.put("lock", str(i).encode(), if_absent=True), range(8)))
        assert won.count(True) == 1
        assert store.get("lock") == str(won.index(True)).encode()

    def test_swap_replaces_only_what_was_seen(self, store: ByteStore) -> None:
        """And says whether it did; `None` stands for no object."""
        assert store.swap("folder/x", b"new", b"old") is False
        assert not store.exists("folder/x")
        assert store.swap("folder/x", b"1", None) is True
        assert store.swap("folder/x", b"2", None) is False
        assert store.swap("folder/x", b"2", b"0") is False
        assert store.get("folder/x") == b"1"
        assert store.swap("folder/x", b"2", b"1") is True
        assert store.get("folder/x") == b"2"
        assert list(store.list()) == ["folder/x"]

    def test_of_many_writers_that_swap_none_is_lost(self, store: ByteStore) -> None:
        """A counter that eight threads raise, each reading and trying again until it was the one."""
        store.put("counter", b"0")

        def add(_: int) -> None:
            count = store.get("counter")
            while not store.swap("counter", str(int(count) + 1).encode(), count):
                count = store.get("counter")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(40)))
        assert store.get("counter") == b"40"

    def test_list_is_sorted_and_filtered_by_plain_prefix(self, store: ByteStore) -> None:
        """A prefix need not end at a slash."""
        keys = ["a/1", "a/2/3", "ab", "b/x", "manifest-1", "manifest-2"]
        for key in reversed(keys):
            store.put(key, b"-")
        assert list(store.list()) == keys
        assert list(store.list("a")) == ["a/1", "a/2/3", "ab"]
        assert list(store.list("a/")) == ["a/1", "a/2/3"]
        assert list(store.list("a/2")) == ["a/2/3"]
        assert list(store.list("manifest-")) == ["manifest-1", "manifest-2"]
        assert list(store.list("none/")) == []

    def test_delete_removes_and_may_be_repeated(self, store: ByteStore) -> None:
        """A missing object is no error."""
        store.put("x", b"-")
        store.delete("x")
        store.delete("x")
        assert not store.exists("x")
        assert list(store.list()) == []
