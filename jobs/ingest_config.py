"""The configuration of an ingest, apart from those of training so that an ingest waits for no network library."""

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from ssl_core.config import Config
from storage.ingest.policy import IngestPolicy
from storage.objects.open import check_url


def _checked_url(url: str) -> str:
    if not url.strip():  # else said without its key
        raise ValueError("the place of a store, such as s3://bucket/folder or file:///data/folder; . is this folder")
    check_url(url)
    return url


# Refused before a configuration is printed, sent or logged.
Url = Annotated[str, AfterValidator(_checked_url)]
# The name of a folder below `runs`, of a run in MLflow and part of a job's id.
LONGEST_NAME = 200
"""Of a job or a model: a name of a folder has 255 bytes, and MLflow's databases hold 250 characters and more."""
JobName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_NAME)]


class IngestConfig(Config):
    """An ingest job."""

    name: JobName = Field("ingest", description="name of the job")
    source: Url = Field(description="folder of volumes that the nodes can see, or `simulated`")
    data: Url = Field(description="URL of the store")
    policy: IngestPolicy = IngestPolicy()
    append: bool = Field(False, description="keep published volumes that the source does not hold")
