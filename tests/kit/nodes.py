"""Machines from namespaces: each has its own address, mounts, processes, host name, /tmp, /dev/shm and home.

A node can be cut off or lose its power without touching the others. Nothing of it leaves the bridge between the nodes,
which leads nowhere else. It takes root and `ip` of iproute2; `why_not` says what is missing.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "openssl", "wget")
_INSIDE = """
node=$1 here=$2 disk=$3; shift 3
hostname "$node"
mount --bind "$here/hosts" /etc/hosts
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
            for name in self.names:
                self._add(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _space(self, name: str) -> str:
        return f"{self.folder.name}-{name}"

    def _add(self, name: str) -> None:
        node, hub = self._space(name), self._space("hub")
        _ip("netns", "add", node)
        _ip("link", "add", f"e{name}", "netns", node, "type", "veth", "peer", "name", f"p{name}", "netns", hub)
        _ip("-n", node, "addr", "add", f"{self.address(name)}/24", "dev", f"e{name}")
        for link in (f"e{name}", "lo"):
            _ip("-n", node, "link", "set", link, "up")
        _ip("-n", hub, "link", "set", f"p{name}", "master", "br0", "up")
        for part in ("tmp", "home"):
            (self.folder / name / part).mkdir(parents=True)
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
        for name in self.names:
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
