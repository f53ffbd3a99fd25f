"""Where jobs run: the local stack, the job client, files for KubeRay and Ray's cluster launcher, the doctor."""

from typing import Any


def get_job_submission_client_cluster_info(address: str, **options: Any) -> Any:
    """What Ray asks for when an address reads `cluster://HOST:PORT`: it takes the part before `://` as a module.

    So a plain `ray job submit --address cluster://127.0.0.1:PORT` finds the token of the local stack by itself, in a
    shell without any variables, while `http://` addresses need RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH.
    """
    from cluster.jobclient import cluster_info

    return cluster_info(address, **options)
