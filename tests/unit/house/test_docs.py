"""What the documentation says is there: configurations and commands parse, links resolve, quoted tests exist."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from docs.studies_chart import PICTURE, comparisons
from docs.update import ARCHITECTURE, MARKED, NODES, REFERENCE, TABLES, disasters, rooms, table
from jobs import configs
from jobs.cli import main as cli
from jobs.configs import search as search_configs
from jobs.configs.study import StudyConfig
from jobs.exchange.foreign import ImportMap
from jobs.ingest_config import IngestConfig
from ssl_core.config import Config, load, parse, resolved
from ssl_core.methods.base import method_names
from ssl_core.testing.method_contract import MethodContract
from ssl_core.testing.views import DEGENERATE
from storage.errors import ConfigError

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/configs/*.yaml"))
KINDS: dict[str, type[Config]] = {
    "pretrain": configs.PretrainConfig,
    "tune": search_configs.TuneConfig,
    "finetune": configs.FinetuneJobConfig,
    "ingest": IngestConfig,
    "study": StudyConfig,
}
KEYS_OF_A_MAP = {"rename", "drop"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(read(page)) if name == language]


def words_after_tomoscale(page: Path) -> list[list[str]]:
    """The words after each `tomoscale` that is written as code: in a fence or between backticks."""
    text = read(page)
    code = [line for _, body in FENCE.findall(text) for line in body.splitlines()]
    code += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    found = [re.findall(r"(?:^|[\s(/\"])tomoscale +([^`#]*)", line) for line in code if "import" not in line]
    return [hit.split() for hits in found for hit in hits]


def verbs() -> dict[str, set[str]]:
    """Each verb of the command line and its actions."""
    top = cli.parser()
    chosen = {}
    for verb, parser in _choices(top).items():
        chosen[verb] = set(_choices(parser))
    return chosen


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(nested[0].choices) if nested else {}


def kind_of(data: dict[str, object]) -> str:
    """Which job a configuration is for, told by the keys that only it has."""
    if "starts" in data:
        return "finetune" if "labelled" in data else "study"
    if "encoders" in data:
        return "tune"
    return "ingest" if set(data) <= set(IngestConfig.model_fields) else "pretrain"


@pytest.mark.parametrize("path", EXAMPLES, ids=page_id)
def test_example_configs_are_valid(path: Path) -> None:
    kind = path.stem.partition("_")[0]
    assert resolved(load(KINDS[kind], path))["name"]


def test_the_study_of_the_script_for_a_gpu_is_a_valid_config() -> None:
    text = read(ROOT / "docs/gpu/study.sh")
    (body,) = re.findall(r"<<YAML\n(.*?)^YAML$", text, re.MULTILINE | re.DOTALL)
    study = parse(StudyConfig, yaml.safe_load(body.replace("$store", "file:///data").replace("$source", "null")))
    assert study.gpus_per_cell == 1
    trained = len(study.starts) * study.search.draws * len(study.search.lr) * len(study.search.steps)
    tested = len(study.starts) * len(study.labels) * study.draws
    said = " ".join(text.replace("\n#", " ").split())
    assert f"{trained} trainings of the search and {tested} tested ones" in said, "the cost that it states"
    subprocess.run(["bash", "-n", ROOT / "docs/gpu/study.sh"], check=True, timeout=60)


def test_there_is_an_example_for_each_job_that_takes_a_config() -> None:
    assert {path.stem.partition("_")[0] for path in EXAMPLES} == {"pretrain", "tune", "finetune", "study"}


def test_the_first_example_needs_nothing_but_a_fresh_stack() -> None:
    config = load(configs.PretrainConfig, ROOT / "examples/configs/pretrain_aligned.yaml")
    assert config.source == "simulated"
    later = load(configs.FinetuneJobConfig, ROOT / "examples/configs/finetune.yaml")
    search = load(search_configs.TuneConfig, ROOT / "examples/configs/tune.yaml")
    encoder = f"models:/{config.model_name}@candidate"
    assert encoder in later.starts.values()
    assert encoder in search.encoders
    assert later.labelled.data == search.labelled.data == config.data


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_yaml_blocks_are_valid_configs(page: Path) -> None:
    for block in blocks(page, "yaml"):
        data = yaml.safe_load(block)
        if set(data) >= KEYS_OF_A_MAP:  # what `tomoscale models import` takes
            load(ImportMap, data)
            continue
        load(KINDS[kind_of(data)], data)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_verb_that_is_named_exists(page: Path) -> None:
    known = verbs()
    for words in words_after_tomoscale(page):
        verb = words[0].rstrip(",.;:)\"'") if words else ""
        if verb.isupper() or verb.startswith(("-", "<", "[")):
            continue  # a placeholder, or an option of the program itself
        assert verb in known, f"`tomoscale {' '.join(words)}`: no verb {verb!r}"
        if known[verb] and len(words) > 1:
            actions = [w.rstrip(",.;:)\"'") for w in words[1].split("|")]
            assert {a for a in actions if not (a.isupper() or a.startswith("-"))} <= known[verb], " ".join(words)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_in_a_shell_block_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if not words or Path(words[0]).name != "tomoscale" or words[1:] == ["--help"]:
                continue
            try:
                arguments = cli.parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{line}: {capsys.readouterr().err}")
            for value in (getattr(arguments, "config", None), getattr(arguments, "source", None)):
                if value and str(value).startswith(("examples/", "docs/")):
                    assert (ROOT / value).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    code = [line for _, body in FENCE.findall(read(page)) for line in body.splitlines()]
    code += re.findall(r"`([^`\n]+)`", FENCE.sub("", read(page)))
    named = [word for line in code if line.startswith("make ") for word in shlex.split(line, comments=True)[1:]]
    assert {word for word in named if re.fullmatch(r"[a-z][a-z-]*", word)} <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_example_configs_that_are_named_exist(page: Path) -> None:
    text = read(page)
    named = set(re.findall(r"^[^#\n]*?(examples/configs/[\w.-]+\.yaml)", text, re.MULTILINE))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", read(page))
    for target in LINK.findall(text) + re.findall(r"src=\"([^\"]+)\"", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} in {page.name}"
        assert there.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    text = FENCE.sub("", read(page))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_index() -> None:
    text = read(ROOT / "docs/index.md")
    linked = {(ROOT / "docs" / target.partition("#")[0]).resolve() for target in LINK.findall(text)}
    missing = [page.name for page in ROOT.glob("docs/*.md") if page.name != "index.md" and page not in linked]
    assert missing == []


def test_tests_that_the_guarantees_quote_exist() -> None:
    text = read(ROOT / "docs/explain-guarantees.md")
    quoted = re.findall(r"\[`(test_\w+)`\]\(\.\./([\w/.]+)\)", text)
    assert len(quoted) > 20
    assert len(quoted) == len(re.findall(r"`test_\w+`", text)), "a test is quoted without its file"
    missing = [f"{file}: {name}" for name, file in quoted if f"def {name}(" not in read(ROOT / file)]
    assert missing == []


def test_methods_that_the_readme_rates_are_the_registered_ones() -> None:
    text = read(ROOT / "README.md")
    section = text.partition("## What is certain about the methods")[2].partition("\n## ")[0]
    rated = {
        name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert rated == set(method_names())


@pytest.mark.parametrize("model", TABLES, ids=lambda model: model.__name__)
def test_the_reference_lists_every_key_with_its_default_and_meaning(model: type[BaseModel]) -> None:
    text = read(REFERENCE)
    (written,) = re.findall(MARKED.format(model.__name__), text, re.DOTALL)
    assert written == table(model), "bring it up to date: python docs/update.py"


def test_the_rooms_on_the_page_are_those_that_the_test_holds() -> None:
    (written,) = re.findall(MARKED.format("rooms"), read(ARCHITECTURE), re.DOTALL)
    assert written == rooms(), "bring it up to date: python docs/update.py"


def test_the_table_of_disasters_is_what_was_measured() -> None:
    (written,) = re.findall(MARKED.format("nodes"), read(NODES), re.DOTALL)
    assert written == disasters(), "bring it up to date: python docs/update.py"


def test_the_picture_of_the_studies_shows_every_tested_comparison() -> None:
    drawn, shown = read(PICTURE), comparisons()
    assert {one.labels for one in shown} >= {1, 2, 5, 10}
    missing = [one.title for one in shown if one.title not in drawn or one.figures not in drawn]
    assert not missing, "bring it up to date: python docs/studies_chart.py"
    assert drawn.count(" draws x ") == len(shown)


def test_unknown_keys_are_refused_as_the_reference_says() -> None:
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        load(configs.PretrainConfig, {"name": "a", "data": "s3://b/c", "engine": {"stps": 3}})


def test_the_picture_is_well_formed_and_says_what_it_shows() -> None:
    root = ElementTree.parse(ROOT / "docs/flow.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title") is not None
    assert root.find(f"{space}desc") is not None
    assert "prefers-color-scheme" in "".join(root.itertext())


@pytest.fixture(scope="module")
def how_to(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with the how-to's files where the page says that they belong."""
    folder = tmp_path_factory.mktemp("how-to")
    for package in ("storage", "ssl_core", "jobs", "cluster", "tests/contract"):
        # With what is compiled already, but not what another process of the tests is writing there.
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.pyc.*"))
    (folder / "tests/kit").mkdir()
    shutil.copy(ROOT / "tests/kit/phantoms.py", folder / "tests/kit")
    (folder / "tests/__init__.py").touch()
    text = read(ROOT / "docs/how-to-add-a-method.md")
    written = []
    for fence in FENCE.finditer(text):
        if fence[1] in ("python", "text"):
            path = re.findall(r"`([\w./]+\.(?:py|yaml))`", text[: fence.start()])[-1]
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(fence[2], encoding="utf-8")
            written.append(path)
    assert written == ["ssl_core/methods/voco.py", "tests/unit/ssl_core/methods/test_voco.py", "voco.yaml"]
    return folder


LINE = "--- the method at work ---"
AT_WORK = """
import json, sys
from pathlib import Path
from jobs.cli import main as cli
from jobs.configs import PretrainConfig
from jobs.pretrain.loop import Hooks, run
from ssl_core.config import load
from tests.kit.phantoms import write_phantoms
import torch
assert cli.main(["methods"]) == 0
assert cli.main(["methods", "voco"]) == 0
assert cli.main(["methods", "--out", "docs/methods"]) == 0
assert cli.main(["plan", "pretrain", "voco.yaml"]) == 0
assert cli.main(["pretrain", "voco.yaml", "--dry-run"]) == 0
data = Path("store").absolute().as_uri()
write_phantoms(data, 4, shape=(32, 40, 36))
small = ["engine.steps=3", "engine.warmup_steps=1", "engine.log_every=1", "method.hidden=16"]
small += ["backbone.arguments.features=[4,4,8,8,16,4]"]
losses = []
hooks = Hooks(publish=lambda *_: None, on_point=lambda p: losses.append(p.metrics["loss/position"]))
run(load(PretrainConfig, Path("voco.yaml"), [f"data={data}", *small]), hooks, restore=None, device=torch.device("cpu"))
print(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def in_the_copy(how_to: Path) -> "subprocess.CompletedProcess[str]":
    """The contract and the how-to's tests, a line, and the method at work: in one process, as both import the same."""
    command = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(how_to), "-k", "voco"]
    command += ["tests/contract/test_methods.py", "tests/unit/ssl_core/methods/test_voco.py"]
    program = f"import pytest\nassert pytest.main({command!r}) == 0\nprint({LINE!r})\n{AT_WORK}"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=how_to,
        env=os.environ | {"PYTHONPATH": str(how_to), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def test_the_method_of_the_how_to_meets_the_contract_and_its_own_tests(
    how_to: Path, in_the_copy: "subprocess.CompletedProcess[str]"
) -> None:
    said, line, _ = in_the_copy.stdout.partition(LINE)
    assert line, said + in_the_copy.stderr
    (passed,) = re.findall(r"\b(\d+) passed", said)
    own = read(how_to / "tests/unit/ssl_core/methods/test_voco.py").count("def test_")
    many = {"test_loss_is_finite": 3, "test_degenerate_views_give_a_finite_loss_and_gradient": len(DEGENERATE)}
    contract = sum(many.get(name, 1) for name in vars(MethodContract) if name.startswith("test_"))
    assert int(passed) == own + contract
    assert "deselected" in said


def test_the_method_of_the_how_to_is_listed_and_pre_trains(
    how_to: Path, in_the_copy: "subprocess.CompletedProcess[str]"
) -> None:
    assert in_the_copy.returncode == 0, in_the_copy.stdout + in_the_copy.stderr
    said = in_the_copy.stdout.partition(LINE)[2]
    assert re.search(r"^voco +VoCo: tell from an embedding|^voco +Tell from an embedding", said, re.MULTILINE)
    assert "w_discrepancy" in said
    assert (how_to / "docs/methods/voco.md").is_file()
    losses = json.loads(said.splitlines()[-1])
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
