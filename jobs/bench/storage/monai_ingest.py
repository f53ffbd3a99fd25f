"""The first pass of a MONAI `PersistentDataset`, for `bench ingest`: `python -m jobs.bench.storage.monai_ingest JOB`.

JOB is that of `jobs.bench.storage.ingest.Tool`. With one core the data set is walked in this process; with more, by a
`DataLoader` with a worker process a core, each with one thread.
"""

import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from monai.data.dataset import PersistentDataset
from monai.transforms.compose import Compose
from monai.transforms.io.dictionary import LoadImaged
from monai.transforms.spatial.dictionary import Orientationd, Spacingd
from monai.transforms.utility.dictionary import EnsureChannelFirstd
from torch.utils.data import DataLoader

from jobs.bench.storage.ingest import Tool, timed

MONAI = Tool("monai PersistentDataset", __name__, "float32, uncompressed")


def first_pass(job: Mapping[str, Any]) -> None:
    """Fill the cache."""
    steps: list[Any] = [LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", axcodes="RAS")]
    if job["spacing_mm"] is not None:
        steps.append(Spacingd("image", pixdim=(float(job["spacing_mm"]),) * 3, mode="bilinear"))
    items = [{"image": path} for path in job["files"]]
    dataset = PersistentDataset(items, Compose(steps), cache_dir=job["target"])
    if job["cores"] == 1:
        for i in range(len(dataset)):
            dataset[i]
    else:
        for _ in DataLoader(dataset, batch_size=None, num_workers=int(job["cores"]), collate_fn=_nothing):
            pass


def _nothing(item: Any) -> int:
    """Keep the volumes in the workers: filling the cache does not need them back."""
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(timed(first_pass, json.loads(sys.argv[1]))))
