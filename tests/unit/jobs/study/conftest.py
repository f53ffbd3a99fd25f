"""A store of phantoms that a test module shares, and a fresh place for what a study writes."""

import uuid

import pytest

from tests.kit.phantoms import write_phantoms


@pytest.fixture(scope="module")
def data() -> str:
    url = f"memory://study-{uuid.uuid4().hex}"
    write_phantoms(url, 24, shape=(8, 8, 8))
    return url


@pytest.fixture
def runs() -> str:
    return f"memory://study-{uuid.uuid4().hex}"
