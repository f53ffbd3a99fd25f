"""The settings that every node has: on the local stack, in compose, on Kubernetes and on one's own machines.

`cluster/kubernetes/base/settings.env` is the same list for those that read files. Addresses and keys are no part of it.
"""

SETTINGS = {
    # Unset, Ray decides by what it finds on the machine whether to ask for the token.
    "RAY_AUTH_MODE": "token",
    # `ray start` has no flag against Ray Client's server, which takes code on port 10001, nor against calls to Ray's
    # makers and to the cloud's metadata service.
    "RAY_START_HOOK": "cluster.ray_hooks.prepare_node",
    # How long an elastic group waits for as many workers as it had, before it takes fewer.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Without it a volume too large for a node's memory is tried for ever.
    "RAY_task_oom_retries": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Points are sent from a thread, which tries again by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "PYTHONUNBUFFERED": "1",
}
