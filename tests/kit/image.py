"""The image of docker/Dockerfile without a Docker engine: built by buildah in chroot isolation, run in namespaces.

The base is Debian's, by mmdebstrap, with Debian's Python in place of the Dockerfile's default. Where packages come from
is what apt and pip of this machine are set to; nothing of it is in the repository.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kit import ROOT

SUITE = "bookworm"
BASE, IMAGE = "localhost/base", "localhost/tomoscale:dev"
PROGRAMS = ("buildah", "mmdebstrap", "apt-get", "setpriv", "openssl")
PACKAGES = "python3,python3-venv"
PIP_FOLDER = "/etc/xdg/pip"
HOOKS = "/usr/share/mmdebstrap/hooks"


def _output(command: Sequence[str | Path], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr)[-6000:]}")
    return done.stdout


def mirror() -> str:
    """Where apt gets Debian's packages of `SUITE` from; empty where it is set to none."""
    try:
        lines = _output(["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages"])
    except (OSError, RuntimeError):
        return ""
    pairs = [line.split(maxsplit=1) for line in lines.splitlines()]
    return next((pair[1] for pair in pairs if len(pair) == 2 and pair[0] == SUITE), "")


def why_not() -> str:
    """Why the image cannot be built here; empty where it can."""
    if os.geteuid() != 0:
        return "building in chroot isolation needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    source = mirror()
    if not source:
        return f"apt has no source of Debian {SUITE} here"
    try:
        urllib.request.urlopen(f"{source.rstrip('/')}/dists/{SUITE}/InRelease", timeout=60).close()
    except (urllib.error.URLError, TimeoutError) as error:
        return f"apt's source of Debian {SUITE} does not answer: {error}"
    return ""


@dataclass(frozen=True)
class PipSettings:
    """What pip of this machine is set to, for a build.

    Args:
        folder: Holds pip.conf and what it names of certificates; mounted as `PIP_FOLDER`.
        mounts: Folders of packages that it names, mounted where they are.
    """

    folder: Path
    mounts: tuple[Path, ...]

    @property
    def own_sources(self) -> bool:
        """Whether packages come from elsewhere than PyPI too."""
        return bool(self.mounts)


def pip_settings(folder: Path) -> PipSettings:
    """Write them to this folder. Constraints are left out: the lock says all versions."""
    folder.mkdir()
    kinds = ("global", "user", "site", ":env:")  # the later one counts
    lines = [line for line in _output([sys.executable, "-m", "pip", "config", "list"]).splitlines() if "=" in line]
    values: dict[str, str] = {}
    for line in sorted(lines, key=lambda line: kinds.index(line.split(".")[0])):
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    values.pop("constraint", None)
    mounts = []
    for key, value in values.items():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if not path.is_absolute() or not path.exists():
                continue
            if path.is_file():
                shutil.copy(path, folder / path.name)
                values[key] = f"{PIP_FOLDER}/{path.name}"
            else:  # the pages of an index name files beside it
                mounts.append(path.parent if word.startswith("file://") else path)
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in values.items()))
    return PipSettings(folder, tuple(dict.fromkeys(mounts)))


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own in `folder`."""

    folder: Path

    def __call__(self, *arguments: str | Path) -> str:
        """Its output.

        Raises:
            RuntimeError: it failed; with the end of what it printed.
        """
        own = ["--root", self.folder / "root", "--runroot", self.folder / "run", "--storage-driver", "vfs"]
        environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}
        return _output(["buildah", *own, *arguments], env=environment)

    def make_base(self) -> None:
        """Debian with its Python, as the image `BASE`; all that stays of it is in the storage."""
        archive = self.folder / "base.tar"
        # Without manuals and translations, like the slim images that the Dockerfile stands on.
        slim = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "info", "locale", "man")]
        # They are laid out with a merged /usr; what would merge it afterwards needs all of Perl.
        merged = f"--hook-directory={HOOKS}/merged-usr"
        fast = "--dpkgopt=force-unsafe-io"
        options = ["--variant=minbase", *slim, fast, merged, f"--include={PACKAGES}"]
        _output(["mmdebstrap", *options, SUITE, archive, mirror()])
        container = self("from", "scratch").strip()
        self("add", container, archive, "/")
        archive.unlink()
        self("commit", "--rm", container, BASE)

    def build(self, pip: PipSettings) -> None:
        """`IMAGE` of docker/Dockerfile, for the CPU."""
        mounts = [f"--volume={path}:{path}:ro" for path in pip.mounts]
        index = ["--build-arg=CPU_INDEX="] if pip.own_sources else []
        command = ["bud", "--format=docker", "--pull-never", f"--build-arg=BASE={BASE}", *index]
        files = [f"--file={ROOT}/docker/Dockerfile", f"--ignorefile={ROOT}/docker/Dockerfile.dockerignore"]
        self(*command, f"--volume={pip.folder}:{PIP_FOLDER}:ro", *mounts, *files, f"--tag={IMAGE}", ROOT)

    def config(self) -> dict[str, Any]:
        """What the image says of user, entry point, health and labels."""
        config: dict[str, Any] = json.loads(self("inspect", "--type=image", IMAGE))["Docker"]["config"]
        return config

    def root_of_image(self) -> Path:
        """Its root file system, to be read and mounted."""
        root = Path(self("mount", self("from", "--pull-never", IMAGE).strip()).strip())
        (root / "etc" / "hosts").touch()  # Docker too makes what it mounts onto
        return root

    def remove(self) -> None:
        """Unmount and remove all that is stored."""
        self("umount", "--all")
        shutil.rmtree(self.folder)


def size_of(root: Path) -> int:
    """Bytes of all files; one with several names counts once."""
    inodes: dict[int, int] = {}
    for path in _walk(root):
        status = path.lstat()
        inodes[status.st_ino] = status.st_size
    return sum(inodes.values())


def _walk(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield from (Path(folder) / name for name in names)


# As Docker starts a process for `cap_drop: [ALL]` and `no-new-privileges`.
AS_USER = [
    "setpriv",
    "--reuid=1000",
    "--regid=1000",
    "--clear-groups",
    "--no-new-privs",
    "--bounding-set=-all",
    "--inh-caps=-all",
    "--",
]
# Arguments: the image's root, a folder of this node's own, its volumes, then the command. A node's mounts are its own,
# so that none of these outlives it. The root is read-only; volumes are the user's; `run` holds the secrets.
_CONTAINER = """
image=$1 own=$2 volumes=$3; shift 3
root=$own/root
mkdir -p "$root"
mount --bind "$image" "$root"
mount -o remount,ro,bind "$root"
for part in proc dev sys; do mount --rbind "/$part" "$root/$part"; done
mount --bind /etc/hosts "$root/etc/hosts"
mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
mount --bind "$own/run" "$root/run"
for volume in $volumes; do
    mkdir -p "$own/$volume"
    chown 1000:1000 "$own/$volume"
    mount --bind "$own/$volume" "$root/$volume"
done
exec chroot "$root" "$@"
"""


def in_container(root: Path, own: Path, volumes: Sequence[str], command: Sequence[str]) -> list[str]:
    """The command line that runs a command as uid 1000 on a read-only root, for the first process of a node."""
    volume_names = " ".join(volume.strip("/") for volume in volumes)
    # The first process of a node has the node's HOME and TMPDIR.
    home = ["env", "-u", "TMPDIR", "HOME=/home/tomoscale"]
    inside = [*home, *AS_USER, "sh", "-c", 'cd "$HOME"; exec "$@"', "sh", *command]
    return ["bash", "-ec", _CONTAINER, "container", str(root), str(own), volume_names, *inside]
