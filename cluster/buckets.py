"""`python -m cluster.buckets NAME...` makes missing buckets on the S3 server that the environment names."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any


def ensure(client: Any, names: Iterable[str]) -> None:
    """Make the buckets that are missing; raises what botocore raises."""
    existing = {bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])}
    for name in names:
        if name not in existing:
            client.create_bucket(Bucket=name)


def main(names: Sequence[str]) -> int:
    """0 when all are there; else 1, with the reason printed."""
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    once = Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    try:
        ensure(botocore.session.Session().create_client("s3", config=once), names)
    except (BotoCoreError, ClientError) as error:
        print(f"buckets: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
