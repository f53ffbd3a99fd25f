"""Write the bytecode of what the commands import, and of nothing else: in the image, and in the environment of `make`.

The root file system is read-only where the image runs, so that bytecode which is not there is made anew by every
process. That of all packages would be 430 MB, and two minutes of a processor.
"""

import importlib
import pkgutil
import sys

TOPS = ("storage", "ssl_core", "jobs", "cluster")
SERVERS = (
    "mlflow.server",
    "mlflow.server.auth",
    "mlflow.server.fastapi_app",
    "mlflow.cli",
    "psycopg2",
    "ray.scripts.scripts",
    "ray.dashboard.dashboard",
    "ray.dashboard.head",
    "ray.dashboard.agent",
    "ray._private.log_monitor",
    "ray._private.workers.default_worker",
    "ray.autoscaler._private.monitor",
    "ray._private.runtime_env.agent.main",
    "ray.train.torch",
    "ray.tune",
    "uvicorn.workers",
    "torch.distributed.fsdp",
    "monai.networks.nets",
)


def modules() -> list[str]:
    """Of the product, without what runs on import and the kits of tests, whose pytest the image lacks."""
    names = []
    for top in TOPS:
        package = importlib.import_module(top)
        names += [info.name for info in pkgutil.walk_packages(package.__path__, f"{top}.")]
    return [name for name in names if not name.endswith("__main__") and ".testing" not in name]


if __name__ == "__main__":
    for name in [*modules(), *SERVERS]:
        importlib.import_module(name)
    print(f"compiled {len(sys.modules)} modules")
