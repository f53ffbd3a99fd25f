"""Bad input at the real command line: one message with name, expectation, finding, remedy; nothing half-published."""

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from jobs import ingest
from jobs.cli import main as cli
from jobs.demo import run as demo
from ssl_core.bundle import write_bundle
from storage.errors import ConfigError, RefusedInput
from tests.kit.bundles import facts, network
from tests.kit.phantoms import write_phantoms
from tests.kit.scans import disc, folder, phantom, save_nifti

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("nothing_configured")


class Command:
    """Runs the command line and takes its one message apart."""

    def __init__(self, capsys: pytest.CaptureFixture[str], store: Path) -> None:
        self._capsys, self.store = capsys, store
        self.url = store.as_uri()
        self.out = ""

    def ingest(self, source: Path, *more: str) -> tuple[int, str]:
        return self("data", "ingest", "--local", str(source), self.url, *more)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        code = cli.main(list(arguments))
        self.out, err = self._capsys.readouterr()
        assert "Traceback" not in err + self.out
        messages = [line for line in err.splitlines() if line.startswith("tomoscale: ")]
        assert len(messages) == (code != 0), err
        return code, "".join(messages).removeprefix("tomoscale: ")

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.store).as_posix() for p in self.store.rglob("*") if p.is_file())

    def published(self) -> bool:
        return any(name == "latest" or name.startswith("manifest") for name in self.files())


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    return Command(capsys, tmp_path / "store")


def check(message: str, *parts: str) -> None:
    assert "; expected " in message, message
    assert "; found " in message, message
    for part in parts:
        assert part in message, message


def test_an_empty_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    code, message = command.ingest(tmp_path / "scans")
    assert code == 3
    check(message, str(tmp_path / "scans"), "NIfTI", "an empty folder", "give the folder that holds images/")
    assert command.files() == []


def test_a_folder_that_is_not_there(command: Command, tmp_path: Path) -> None:
    code, message = command.ingest(tmp_path / "scans")
    assert code == 2
    check(message, str(tmp_path / "scans"), "no such", "check the path")
    assert command.files() == []


def test_the_job_of_an_ingest_tells_a_file_from_no_folder(tmp_path: Path) -> None:
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom())
    for source, found in ((scan, "a file"), (tmp_path / "absent", "no such folder")):
        (tmp_path / "c.yaml").write_text(f"source: {source}\ndata: memory://x\n")
        with pytest.raises(ConfigError) as caught:
            ingest.main([str(tmp_path / "c.yaml")])
        check(str(caught.value), str(source), found, "check the path")


@pytest.mark.parametrize("name", ["absent", "scan.nii.gz"])
def test_the_demo_looks_at_its_folder_before_it_starts_anything(command: Command, tmp_path: Path, name: str) -> None:
    save_nifti(tmp_path / "scan.nii.gz", phantom())
    state, out = tmp_path / "state", tmp_path / "out"
    code, message = command("demo", "--data", str(tmp_path / name), "--out", str(out), "--state", str(state))
    assert code == 2
    check(message, str(tmp_path / name), "a folder of volumes", "images/ and labels/")
    assert not state.exists()
    assert not out.exists()


def test_the_demo_wants_labels_before_it_pre_trains(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    few = write_phantoms(url, 8, shape=(8, 9, 10), label="label")
    with pytest.raises(RefusedInput) as caught:
        demo._refuse_too_few_labels(few, url)
    check(str(caught.value), url, "8 with label 'label' in the train split", "found 6", "tomoscale pretrain")
    other = (tmp_path / "other").as_uri()
    demo._refuse_too_few_labels(write_phantoms(other, 11, shape=(8, 9, 10), label="label"), other)


def test_a_folder_without_volumes(command: Command, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "notes.txt").write_text("hello")
    code, message = command.ingest(tmp_path / "scans")
    assert code == 3
    check(message, str(tmp_path / "scans"))
    assert command.files() == []


def text(path: Path) -> None:
    path.write_text("subject,age\n1,30\n")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = [
    pytest.param(text, ("a gzip file", "a text file", "check the download"), id="text"),
    pytest.param(cut, ("a complete gzip file", "ended", "truncated or damaged; fetch it again"), id="truncated"),
    pytest.param(empty, ("found", "empty"), id="empty"),
]


@pytest.mark.parametrize(("damage", "parts"), DAMAGE)
def test_damaged_files_alone_publish_nothing(
    command: Command, tmp_path: Path, damage: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    source = folder(tmp_path / "scans", 2, labelled=False)
    for path in (source / "images").iterdir():
        damage(path)
    code, message = command.ingest(source)
    assert code == 3
    check(message, str(source), "2 of 2", "images/case_00.nii.gz", "max_failed", *parts)
    assert command.files() == ["quarantine.jsonl"]
    assert (command.store / "quarantine.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(("damage", "parts"), DAMAGE)
def test_one_damaged_file_is_named_and_the_rest_goes_on(
    command: Command, tmp_path: Path, damage: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    source = folder(tmp_path / "scans", 4)
    damage(source / "images" / "case_02.nii.gz")
    code, _ = command.ingest(source)
    assert code == 0
    (line,) = [line for line in command.out.splitlines() if "refused: " in line]
    assert "images/case_02.nii.gz" in line
    assert all(part in line for part in parts), line
    assert command("data", "verify", command.url)[0] == 0
    assert "3 volumes" in command.out
    assert not any("case_02" in name for name in command.files())


def test_a_label_of_another_shape(command: Command, tmp_path: Path) -> None:
    source = folder(tmp_path / "scans", 3)
    save_nifti(source / "labels" / "case_01.nii.gz", disc((9, 12, 14)))
    assert command.ingest(source)[0] == 0
    (line,) = [line for line in command.out.splitlines() if "refused: " in line]
    for part in ("case_01.nii.gz", "label", "(10, 12, 14)", "(9, 12, 14)", "resample it"):
        assert part in line
    assert not any("case_01" in name for name in command.files())
    strict = tmp_path / "strict"
    code, message = command("data", "ingest", "--local", str(source), strict.as_uri(), "max_failed=0")
    assert code == 3
    check(message, "at most 0%", "1 of 3", "case_01.nii.gz")
    assert not (strict / "latest").exists()
    assert list(strict.glob("manifest*")) == []


def test_one_subject_only(command: Command, tmp_path: Path) -> None:
    code, message = command.ingest(folder(tmp_path / "scans", 1))
    assert code == 3
    check(message, str(tmp_path / "scans"), "at least 2 subjects", "found 1", "min_subjects")
    assert command.files() == []


def test_one_subject_that_is_left_of_two(command: Command, tmp_path: Path) -> None:
    source = folder(tmp_path / "scans", 2)
    text(source / "images" / "case_00.nii.gz")
    code, message = command.ingest(source)
    assert code == 3
    check(message, "at least 2 subjects", "found 1")
    assert not command.published()


def test_a_refused_second_ingest_leaves_the_first_one_as_it_was(command: Command, tmp_path: Path) -> None:
    source = folder(tmp_path / "scans", 3)
    assert command.ingest(source)[0] == 0
    latest, before = (command.store / "latest").read_bytes(), set(command.files())
    for path in (source / "images").iterdir():
        text(path)
    assert command.ingest(source)[0] == 3
    assert (command.store / "latest").read_bytes() == latest
    assert set(command.files()) - before == {"quarantine.jsonl"}
    assert command("data", "verify", command.url)[0] == 0


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("spacing=1.0", ("unknown key 'spacing'", "did you mean 'spacing_mm'")),
        ("zzz=1", ("unknown key 'zzz'",)),
        ("gaps=resample", ("config: gaps", "did you mean 'read.gaps'")),
        ("split=[1]", ("config: split",)),
        ("max_failed=many", ("config: max_failed", "'many'")),
    ],
)
def test_an_unknown_or_wrong_setting(command: Command, tmp_path: Path, setting: str, parts: tuple[str, ...]) -> None:
    code, message = command.ingest(folder(tmp_path / "scans", 2), setting)
    assert code == 2
    check(message, *parts)
    assert command.files() == []


@pytest.mark.parametrize("verb", ["plan pretrain", "plan tune", "plan finetune", "pretrain", "tune", "finetune"])
def test_an_unknown_key_of_a_job(command: Command, tmp_path: Path, verb: str) -> None:
    (tmp_path / "c.yaml").write_text("name: n\nexperimnt: x\n")
    code, message = command(*verb.split(), str(tmp_path / "c.yaml"))
    assert code == 2
    check(message, str(tmp_path / "c.yaml"), "'experimnt'", "did you mean 'experiment'")


def test_a_port_in_use(command: Command) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as state, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, title in (("s3", "SeaweedFS"), ("mlflow", "MLflow"), ("dashboard", "Ray")):
            code, message = command("up", "--state", f"{state}/s", f"--{name}-port", str(port))
            assert code == 1
            check(message, f"port {port}", title, "a free port", f"pid {os.getpid()}", "another port")
            assert command("down", "--state", f"{state}/s")[0] == 0
            assert "nothing was running" in command.out


def _limited() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    source = folder(tmp_path / "scans", 3, shape=(30, 32, 34))
    store = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", "data", "ingest", "--local", str(source), store.as_uri()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=_limited,
    )
    assert done.returncode == 1, done.stderr
    _one_message(done.stderr, store.as_uri(), "a writable directory with room", "File too large")
    _nothing_published(store)


def _one_message(err: str, *parts: str) -> None:
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("tomoscale: ")]
    check(message, *parts)


def _nothing_published(store: Path) -> None:
    left = sorted(p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file())
    assert not any(name == "latest" or name.startswith("manifest") for name in left), left
    assert not any(".put-" in name for name in left), "no half-written files"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    point = tmp_path / "disk"
    point.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tomoscale-test", str(point)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"may not mount a tmpfs: {made.stderr.strip()}")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_and_room_again(command: Command, tmp_path: Path, small_disk: Path) -> None:
    source = folder(tmp_path / "scans", 3, shape=(30, 32, 34))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(960 * 1024))
    store = small_disk / "store"
    code, message = command("data", "ingest", "--local", str(source), store.as_uri())
    assert code == 1
    check(message, store.as_uri(), "room", "No space left on device")
    _nothing_published(store)
    filler.unlink()
    assert command("data", "ingest", "--local", str(source), store.as_uri())[0] == 0
    assert command("data", "verify", store.as_uri())[0] == 0
    assert "3 volumes" in command.out


def test_what_does_not_fit_on_a_disk_is_named_and_not_half_there(
    command: Command, tmp_path: Path, small_disk: Path, segmenter: Path
) -> None:
    write_phantoms(command.url, 2, shape=(8, 9, 10))
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom())
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    page, mask = small_disk / "page.html", small_disk / "mask.nii.gz"
    for target, arguments in (
        (page, ["data", "show", command.url, "--html", str(page)]),
        (mask, ["predict", str(segmenter), str(scan), str(mask)]),
        (small_disk / "docs", ["methods", "--markdown", "--out", str(small_disk / "docs")]),
    ):
        code, message = command(*arguments)
        assert code == 1
        check(message, str(target), "a disk with room", "No space left on device", "free space")
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["filler"]


def test_a_page_for_a_folder_that_is_not_there(command: Command, tmp_path: Path) -> None:
    write_phantoms(command.url, 2, shape=(8, 9, 10))
    code, message = command("data", "show", command.url, "--html", str(tmp_path / "absent" / "page.html"))
    assert code == 2
    check(message, str(tmp_path / "absent"), "a folder", "create it first")


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_tolerance_that_is_none(command: Command, segmenter: Path, value: str) -> None:
    code, message = command("evaluate", str(segmenter), command.url, f"--tolerance-mm={value}")
    assert code == 2
    check(message, "--tolerance-mm", "above 0", value)


def test_no_s3_credentials(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    source = folder(tmp_path / "scans", 2)
    for arguments in (["data", "ingest", "--local", str(source), "s3://volumes/x"], ["data", "show", "s3://volumes/x"]):
        code, message = command(*arguments)
        assert code == 2
        check(message, "s3://volumes/x", "credentials in the AWS environment", "found none", "AWS_PROFILE")


@pytest.mark.parametrize("verb", ["data show", "data verify"])
def test_a_store_with_nothing_published(command: Command, verb: str) -> None:
    code, message = command(*verb.split(), command.url)
    assert code == 1
    check(message, command.url, "a published data set", "ingest into it first")


def test_no_mlflow_is_named(command: Command) -> None:
    code, message = command("models", "list")
    assert code == 1
    check(message, "MLFLOW_TRACKING_URI", "found nothing", "tomoscale up")


def test_an_unreachable_mlflow(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound and not listening: nobody else can take it
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        for arguments in (["models", "list"], ["models", "show", "seg"], ["models", "pull", "seg", "nowhere"]):
            code, message = command(*arguments)
            assert code == 1
            check(message, f"MLflow at {url}", "an answer", "tomoscale up")
            assert len(message) < 600


def test_no_cluster_and_an_unreachable_one(command: Command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: n\ndata: memory://x\n")
    code, message = command("pretrain", str(tmp_path / "c.yaml"))
    assert code == 1
    check(message, "cluster", "--address", "tomoscale up")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        for arguments in (["pretrain", str(tmp_path / "c.yaml")], ["jobs", "list"]):
            code, message = command(*arguments, "--address", url)
            assert code == 1
            check(message, url, "a job server", "check the address")


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "segmenter", "segmenter", network(), facts())


@pytest.mark.parametrize("damage", [text, cut, empty, None], ids=["text", "truncated", "empty", "absent"])
def test_prediction_of_a_damaged_file(
    command: Command, tmp_path: Path, damage: Callable[[Path], None] | None, segmenter: Path
) -> None:
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom())
    if damage is None:
        scan.unlink()
    else:
        damage(scan)
    code, message = command("predict", str(segmenter), str(scan), str(tmp_path / "mask.nii.gz"))
    assert code == (2 if damage is None else 3), message
    check(message, str(scan))
    assert not (tmp_path / "mask.nii.gz").exists()


def test_an_encoder_does_not_segment(command: Command, tmp_path: Path) -> None:
    encoder = write_bundle(tmp_path / "encoder", "encoder", network(), facts(labels=()))
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom())
    code, message = command("predict", str(encoder), str(scan), str(tmp_path / "mask.nii.gz"))
    assert code == 2
    check(message, str(encoder), "a segmenter", "an encoder", "tomoscale finetune")


def _scan_and_mask(tmp_path: Path) -> tuple[Path, Path]:
    """A scan and a mask that somebody drew, with links to both."""
    (tmp_path / "case").mkdir()
    scan = save_nifti(tmp_path / "case/scan.nii.gz", phantom())
    manual = tmp_path / "case/manual.nii.gz"
    manual.write_bytes(b"drawn by hand")
    (tmp_path / "case/link.nii.gz").symlink_to("scan.nii.gz")
    (tmp_path / "case/hard.nii.gz").hardlink_to(scan)
    (tmp_path / "case/other.nii.gz").symlink_to("manual.nii.gz")
    (tmp_path / "case/nowhere.nii.gz").symlink_to("absent.nii.gz")
    return scan, manual


@pytest.mark.parametrize("name", ["scan", "link", "../case/scan", "hard", "manual", "other", "nowhere", "folder"])
def test_prediction_replaces_neither_the_scan_nor_what_is_there(
    command: Command, tmp_path: Path, segmenter: Path, name: str
) -> None:
    scan, manual = _scan_and_mask(tmp_path)
    (tmp_path / "case/folder.nii.gz").mkdir()
    before = scan.read_bytes()
    target = tmp_path / "case" / f"{name}.nii.gz"
    code, message = command("predict", str(segmenter), str(scan), str(target))
    assert code == 2
    check(message, str(target), "expected ")
    if (target.exists() and target.samefile(scan)) or target.is_dir():
        code, _ = command("predict", str(segmenter), str(scan), str(target), "--overwrite")
        assert code == 2
    assert scan.read_bytes() == before
    assert manual.read_bytes() == b"drawn by hand"
    assert (tmp_path / "case/nowhere.nii.gz").is_symlink()
    assert not (tmp_path / "case/absent.nii.gz").exists()


def test_prediction_replaces_a_mask_when_told(command: Command, tmp_path: Path, segmenter: Path) -> None:
    scan, manual = _scan_and_mask(tmp_path)
    assert command("predict", str(segmenter), str(scan), str(manual), "--overwrite")[0] == 0
    assert manual.read_bytes()[:2] == b"\x1f\x8b"
    assert not list((tmp_path / "case").glob(".*"))


@pytest.mark.parametrize("value", [1e300, -1e39, 2e38])
def test_prediction_of_values_beyond_float32(command: Command, tmp_path: Path, segmenter: Path, value: float) -> None:
    array = phantom().astype(np.float64)
    array[3, 3, 3] = value
    scan = save_nifti(tmp_path / "scan.nii.gz", array)
    code, message = command("predict", str(segmenter), str(scan), str(tmp_path / "mask.nii.gz"))
    assert code == 3
    check(message, str(scan), "float32")
    assert not (tmp_path / "mask.nii.gz").exists()


@pytest.mark.parametrize(
    ("name", "parts"), [("mask", (".nii.gz", "found ")), ("absent/mask.nii.gz", ("absent", "folder"))]
)
def test_prediction_to_nowhere(
    command: Command, tmp_path: Path, segmenter: Path, name: str, parts: tuple[str, ...]
) -> None:
    scan = save_nifti(tmp_path / "scan.nii.gz", phantom())
    code, message = command("predict", str(segmenter), str(scan), str(tmp_path / name))
    assert code == 2
    check(message, *parts)
