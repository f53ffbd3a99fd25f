"""Which servers a command is pointed at while a local stack is up, and whose keys it shows to whom."""

import os
from argparse import Namespace
from pathlib import Path

import psutil
import pytest

from cluster import services
from cluster import state as states
from jobs.cli.verbs.common import use_stack

pytestmark = pytest.mark.usefixtures("nothing_configured")
MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """A stack on paper, whose servers are this process; nothing listens at their ports."""
    monkeypatch.setattr(states, "_LONGEST", 4096)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what a command sets, it sets for its process
    state, me = states.prepare(tmp_path / "state"), psutil.Process()
    for nth, name in enumerate(states.SERVICES):
        ports = {purpose: 1 + 20 * nth + i for i, purpose in enumerate(services.PORTS[name])}
        state.services[name] = states.Service(me.pid, me.create_time(), ports, 1.0)
    states.save(tmp_path / "state", state)
    return Namespace(state=str(tmp_path / "state"))


def named(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def test_a_bare_environment_gets_all_of_it(stack: Namespace) -> None:
    use_stack(stack)
    assert named("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME") == [
        "http://127.0.0.1:1",
        "tomoscale",
        "http://127.0.0.1:21",
        "admin",
    ]


def test_another_mlflow_is_not_shown_the_password_of_the_stack(stack: Namespace) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = "https://mlflow.example.org"
    use_stack(stack)
    assert named(*MLFLOW) == ["https://mlflow.example.org", None, None]
    assert os.environ["AWS_PROFILE"] == "tomoscale"


def test_the_stack_is_not_shown_the_password_of_another_mlflow(stack: Namespace) -> None:
    os.environ.update(MLFLOW_TRACKING_USERNAME="me", MLFLOW_TRACKING_PASSWORD="mine")
    use_stack(stack)
    assert named(*MLFLOW[:2]) == ["http://127.0.0.1:21", "admin"]
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == states.secret(Path(stack.state), "mlflow_password")


def test_a_profile_of_the_users_own_does_not_hide_the_stacks(stack: Namespace) -> None:
    os.environ.update(AWS_PROFILE="work", AWS_SHARED_CREDENTIALS_FILE="/home/me/.aws/credentials")
    use_stack(stack)
    assert os.environ["AWS_PROFILE"] == "tomoscale"
    assert os.environ["AWS_SHARED_CREDENTIALS_FILE"].startswith(stack.state)


def test_what_is_said_of_the_stacks_own_servers_stays(stack: Namespace) -> None:
    os.environ.update(AWS_ENDPOINT_URL_S3="http://127.0.0.1:1", AWS_PROFILE="reader", MLFLOW_TRACKING_USERNAME="me")
    os.environ.update(MLFLOW_TRACKING_URI="http://127.0.0.1:21", MLFLOW_TRACKING_PASSWORD="mine")
    use_stack(stack)
    assert named("AWS_PROFILE", *MLFLOW[1:]) == ["reader", "me", "mine"]
