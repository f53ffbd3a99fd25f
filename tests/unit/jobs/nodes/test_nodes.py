"""What `doctor --nodes` makes of the answers of nodes."""

import json

import ray.exceptions

from cluster.doctor import Check
from cluster.node_settings import SETTINGS
from jobs.nodes.ask import no_answer
from jobs.nodes.look import CODE, compiler, differences, gpu, interface, settings, versions
from jobs.nodes.report import Node, from_json, sentences, text, to_json


def test_a_node_with_another_torch_or_other_code_is_named_with_what_to_do() -> None:
    client = versions()
    assert all(client.values()), client
    assert all(check.ok for check in differences(client, client))
    node = client | {"torch": "2.1.0", CODE: "0" * 12, "monai": ""}
    wrong = sentences([Node("10.0.0.2 (b)", differences(client, node))])
    assert len(wrong) == 3
    assert wrong[0] == (
        f"10.0.0.2 (b): torch: 2.1.0, where the client has {client['torch']}; install requirements.lock there"
    )
    assert "monai: not installed, where the client has" in wrong[1]
    assert CODE in wrong[2]


def test_a_torch_built_for_cuda_is_the_same_torch() -> None:
    checks = differences({"torch": "2.10.0+cpu"}, {"torch": "2.10.0+cu128"})
    assert [check.ok for check in checks] == [True]


def test_settings_that_a_node_lacks_are_named() -> None:
    assert [check.ok for check in settings(SETTINGS)] == [True]
    (check,) = settings({**SETTINGS, "RAY_AUTH_MODE": "disabled"} | {"RAY_task_oom_retries": ""})
    assert not check.ok
    assert check.finding == ("RAY_AUTH_MODE is disabled instead of token, RAY_task_oom_retries is not set instead of 3")


def test_the_interface_of_collectives_is_what_the_process_was_told() -> None:
    assert interface({"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "eth1"}) == Check("interface", True, "eth1")
    assert not interface({}).ok


def test_a_node_without_a_compiler_says_what_is_refused_there_and_is_well() -> None:
    check = compiler({"CXX": "/nonexistent/g++"})
    assert check == Check("compiler", True, "no /nonexistent/g++: engine.compile=true is refused there")
    assert compiler({"CXX": "sh"}) == Check("compiler", True, "sh")


def test_a_gpu_that_torch_has_no_cuda_for_is_named() -> None:
    import torch

    if torch.version.cuda is None:
        (check,) = gpu(4.0)
        assert not check.ok
        assert "has no CUDA" in check.finding


def test_answers_survive_their_way_through_a_log() -> None:
    nodes = [Node("a", [Check("S3", False, "no credentials", "set AWS_PROFILE")]), Node("b", [Check("S3", True, "ok")])]
    data = json.loads(json.dumps(to_json(nodes)))
    assert from_json(data) == nodes
    assert data["problems"] == ["a: S3: no credentials; set AWS_PROFILE"]
    assert text(nodes).endswith("a: S3: no credentials; set AWS_PROFILE")
    assert text(nodes[1:]).endswith("1 node(s), all well")


def test_a_node_that_ended_a_moment_ago_is_told_from_one_that_cannot_answer() -> None:
    gone = no_answer(ray.exceptions.TaskUnschedulableError("The node ... doesn't exist any more"), "compare")
    assert "it is gone" in gone.finding
    assert "ask again" in gone.remedy
    other = no_answer(ray.exceptions.RaySystemError("no module named jobs"), "compare")
    assert "no module named jobs" in other.finding
    assert other.remedy == "compare"
