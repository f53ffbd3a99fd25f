"""The configuration of a batch of predictions that a client submits."""

from pydantic import Field

from ssl_core.config import Config


class PredictJobConfig(Config):
    """Masks of every scan at a place, one task a scan."""

    model: str = Field(min_length=1, description="model URI, such as models:/NAME@ALIAS")
    scans: str = Field(min_length=1, description="folder or URL of .nii and .nii.gz, or URL of a store")
    masks: str = Field(min_length=1, description="folder or URL to write to; a URL where the scans have one")
    split: str | None = Field(None, description="of a store: only this split")
    force: bool = Field(False, description="predict what is far from all that the model learned from")
    cpus: int = Field(4, ge=1, description="CPUs of a task")
    gpus: int = Field(0, ge=0, description="GPUs of a task")

    def words(self) -> list[str]:
        """Arguments of `python -m jobs.predict`."""
        options = ["--cpus", str(self.cpus), "--gpus", str(self.gpus)]
        options += ["--split", self.split] if self.split is not None else []
        return [self.model, self.scans, self.masks, *options, *(["--force"] if self.force else [])]
