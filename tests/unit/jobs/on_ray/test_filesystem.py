"""Where Ray writes is where the job itself writes."""

from pathlib import Path

import pytest

from jobs.on_ray.filesystem import storage_for
from storage.errors import ConfigError
from storage.objects import open_store


def test_a_url_of_a_folder_is_read_as_the_stores_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    url = folder.as_uri()
    assert "%20" in url
    path, files = storage_for(url)
    open_store(url).put("a/note", b"there")
    assert files.open_input_stream(f"{path}/a/note").read() == b"there"
    assert storage_for(str(folder))[0] == path == str(folder)


@pytest.mark.parametrize("url", ["runs", "gs://bucket/runs"])
def test_what_ray_could_not_write_to_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="all nodes reach"):
        storage_for(url)
