"""Who asked for it hears of a promotion: the lines of the guide, a real MLflow server of two processes, a receiver."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
from cryptography.fernet import Fernet

from jobs.tracking import models as registry
from jobs.tracking import promotion
from ssl_core.bundle import write_bundle
from tests.kit import ROOT
from tests.kit.bundles import facts, network
from tests.kit.mlflow_server import environment, mlflow_server

pytestmark = pytest.mark.service
GUIDE = (ROOT / "docs/how-to-use-models.md").read_text(encoding="utf-8").partition("### Be told of a promotion")[2]
ASK, CHECK = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)[:2]
SECRET = "a secret of the receiver"


@pytest.fixture
def heard() -> Iterator[tuple[str, Queue[tuple[Any, bytes]]]]:
    """The receiver's address, and what it got: headers and body."""
    got: Queue[tuple[Any, bytes]] = Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.put((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/models", got
    server.shutdown()
    server.server_close()


@pytest.fixture
def told(
    heard: tuple[str, Queue[tuple[Any, bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Queue[tuple[Any, bytes]]]:
    """What a receiver hears of a server that was asked with the lines of the guide."""
    url, got = heard
    variables = {
        **environment(),
        "HOOK_SECRET": SECRET,
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "https,http",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with mlflow_server(tmp_path, workers=2) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert "https://ci.example.org/models" in ASK
        exec(ASK.replace("https://ci.example.org/models", url), {})
        yield got


def test_a_promotion_and_a_rollback_are_told_with_a_signature_that_holds(
    told: Queue[tuple[Any, bytes]], tmp_path: Path
) -> None:
    scope: dict[str, Any] = {}
    exec(CHECK, scope)
    for seed, score in ((0, 0.6), (1, 0.7)):
        evaluation = {"split": "abc/test", "measure": "Dice", "cases": {f"c{i}": score + i / 1000 for i in range(12)}}
        bundle = write_bundle(tmp_path / f"b{seed}", "segmenter", network(seed), facts(evaluation=evaluation))
        promotion.promote("liver", registry.register(bundle, "liver"))
    promotion.rollback("liver", "champion")
    seen = []
    while len(seen) < 3:
        try:
            headers, body = told.get(timeout=60)
        except Empty:
            pytest.fail(f"heard {seen} only")
        assert scope["is_of_mlflow"](headers, body, SECRET)
        assert not scope["is_of_mlflow"](headers, body.replace(b"liver", b"lungs"), SECRET)
        message = json.loads(body)
        assert (message["entity"], message["action"]) == ("model_version_alias", "created")
        if message["data"]["alias"] == "champion":
            seen.append((message["data"]["name"], message["data"]["version"]))
    assert sorted(seen) == [("liver", "1"), ("liver", "1"), ("liver", "2")], "in any order"
