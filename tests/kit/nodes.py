"""Machines from namespaces: each has its own address, mounts, processes, host name, /tmp, /dev/shm and home.

A node can be cut off or lose its power without touching the others. Nothing of it leaves the bridge between the nodes,
which leads nowhere else: what is sent elsewhere, and each name that is looked up, is refused and written down. It takes
root and `ip` of iproute2; `why_not` says what is missing.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit import ROOT

_GATEWAY = "10.88.0.254"
_PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "openssl", "wget")
_INSIDE = """
node=$1 here=$2 disk=$3; shift 3
hostname "$node"
mount --bind "$here/hosts" /etc/hosts
mount --bind "$here/resolv.conf" /etc/resolv.conf
mkdir -p /tmp/node
if [ -n "$disk" ]; then mount -t tmpfs -o "size=$disk" tmpfs "$here/tmp"; fi
mount --bind "$here/tmp" /tmp/node
mount -t tmpfs -o size=700m tmpfs /dev/shm
export HOME="$here/home" TMPDIR=/tmp/node
cd "$HOME"
exec "$@"
"""


def why_not() -> str:
    """Why no machines can be made here; empty where they can."""
    if os.geteuid() != 0:
        return "namespaces of their own need root"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True, text=True)
    return probe.stderr.strip()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Lab:
    """Nodes on one bridge.

    Args:
        names: Of the nodes; their addresses are 10.88.0.1, .2, ... in this order.
        own_name: What a node's /etc/hosts says of its own name: its `address`, 127.0.1.1 as Debian's installer writes
            it (`debian`), or nothing, nor of any other node (`none`). One for all, or one by node.
        disk: Sizes of /tmp by node, such as `64m`, where it is a disk of its own.
    """

    names: Sequence[str]
    own_name: str | Mapping[str, str] = "address"
    disk: Mapping[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lab", dir="/tmp")))
    _started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def __enter__(self) -> "Lab":
        try:
            _ip("netns", "add", self._space("hub"))
            _ip("-n", self._space("hub"), "link", "add", "br0", "type", "bridge")
            for link in ("br0", "lo"):
                _ip("-n", self._space("hub"), "link", "set", link, "up")
            self._answer_and_write_down()
            for name in self.names:
                self._add(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer_and_write_down(self) -> None:
        """The hub is everybody's way out and name server, and knows of no way and no name."""
        hub = self._space("hub")
        _ip("-n", hub, "addr", "add", f"{_GATEWAY}/24", "dev", "br0")
        _ip("-n", hub, "route", "add", "unreachable", "default")
        _ip("-n", hub, "link", "set", "br0", "promisc", "on")
        _ip("netns", "exec", hub, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.icmp_ratelimit=0")
        command = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", hub]
        command += [sys.executable, "-m", "tests.kit.connections", "br0", f"{_GATEWAY}/24"]
        with self._record.open("wb") as file:
            self._started.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True))
        end = time.monotonic() + 60
        while not self._record.read_text().startswith("listening"):
            if time.monotonic() > end:
                raise AssertionError(f"nobody writes down connections: {self._record.read_text()}")
            time.sleep(0.05)

    @property
    def _record(self) -> Path:
        return self.folder / "connections.jsonl"

    def connections(self) -> list[dict[str, Any]]:
        """Who connected to whom so far: `source`, `to`, `port`, `outside`, `asks`; see `tests.kit.connections`."""
        return [json.loads(line) for line in self._record.read_text().splitlines()[1:]]

    def calls_outside(self) -> list[dict[str, Any]]:
        """Those of `connections` that lead out of the network, or ask for a name that is none of a node or its address.

        A node whose /etc/hosts does not know it looks up its own name.
        """
        return [pair for pair in self.connections() if pair["outside"] or not self._is_own(pair["asks"])]

    def _is_own(self, name: str) -> bool:
        return not name or name.partition(".")[0] in self.names or name.endswith(".0.88.10.in-addr.arpa")

    def _space(self, name: str) -> str:
        return f"{self.folder.name}-{name}"

    def _add(self, name: str) -> None:
        node, hub = self._space(name), self._space("hub")
        _ip("netns", "add", node)
        _ip("link", "add", f"e{name}", "netns", node, "type", "veth", "peer", "name", f"p{name}", "netns", hub)
        _ip("-n", node, "addr", "add", f"{self.address(name)}/24", "dev", f"e{name}")
        for link in (f"e{name}", "lo"):
            _ip("-n", node, "link", "set", link, "up")
        _ip("-n", node, "route", "add", "default", "via", _GATEWAY)
        _ip("-n", hub, "link", "set", f"p{name}", "master", "br0", "up")
        for part in ("tmp", "home"):
            (self.folder / name / part).mkdir(parents=True)
        (self.folder / name / "resolv.conf").write_text(f"nameserver {_GATEWAY}\n")
        (self.folder / name / "hosts").write_text("\n".join(["127.0.0.1 localhost", *self._hosts(name), ""]))

    def _hosts(self, name: str) -> list[str]:
        kind = self.own_name if isinstance(self.own_name, str) else self.own_name[name]
        if kind == "none":
            return []
        others = [f"{self.address(other)} {other}" for other in self.names if other != name]
        return [f"127.0.1.1 {name}" if kind == "debian" else f"{self.address(name)} {name}", *others]

    def address(self, name: str) -> str:
        """Of a node."""
        return f"10.88.0.{self.names.index(name) + 1}"

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> "subprocess.Popen[bytes]":
        """Start a process as the first of a node's; when it ends, all others of the node do."""
        self.heal(name)
        inside = ["setpriv", "--pdeathsig", "KILL"]  # a killed test run leaves no machine
        inside += ["ip", "netns", "exec", self._space(name)]
        inside += ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--uts", "--ipc"]
        inside += ["bash", "-ec", _INSIDE, "node", name, str(self.folder / name), self.disk.get(name, ""), *command]
        with log.open("ab") as file:
            process = subprocess.Popen(
                inside, env=dict(environment), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._started.append(process)
        return process

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """The command line that runs a further process in a node at work.

        Raises:
            LookupError: the node's first process is not there yet, or has ended.
        """
        first = [pid for pid in self.pids(name) if _number_inside(pid) == 1]
        return ["nsenter", "-t", str(first[0]), "-a", *command]

    def cut(self, name: str) -> None:
        """Take a node's link down."""
        _ip("-n", self._space("hub"), "link", "set", f"p{name}", "down")

    def heal(self, name: str) -> None:
        """Bring it up again."""
        _ip("-n", self._space("hub"), "link", "set", f"p{name}", "up")

    def lose_power(self, name: str) -> None:
        """End every process of a node at once, with its link down: nobody is told that its connections end."""
        self.cut(name)
        self._end(name)

    def _end(self, name: str) -> None:
        for pid in self.pids(name):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def pids(self, name: str) -> list[int]:
        """Every process of a node, as numbered outside it."""
        listed = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def close(self) -> None:
        """End all nodes and take the network down."""
        for name in (*self.names, "hub"):
            self._end(name)
        for process in self._started:
            process.wait(timeout=30)
        for name in (*self.names, "hub"):
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _number_inside(pid: int) -> int:
    """What a process is called in its own namespace; 0 where it has ended or none of its own is seen."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    numbers = text.partition("NSpid:")[2].partition("\n")[0].split()
    return int(numbers[-1]) if len(numbers) > 1 else 0
