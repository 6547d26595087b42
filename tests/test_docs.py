"""The documentation: its commands run, its links lead somewhere, its commands exist."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from conftest import TINY, Result, environment

from synthmed import cli
from tests import config_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# a block that a reader may type in; the comment before it says how it ends
RUNS = re.compile(r"^<!-- runs(?:: exit (\d+))? -->\n```console\n(.*?)^```", re.M | re.S)


def commands(page: Path) -> Iterator[tuple[str, int]]:
    """Every command of the runnable blocks, with the exit code it should end with."""
    for code, block in RUNS.findall(page.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if line.startswith("$ "):
                yield line[2:], int(code or 0)


@pytest.fixture
def workplace(tmp_path: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout after `make generate`, with a small cohort and little training."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "sample_data/generated").mkdir(parents=True)
    shutil.copytree(cohort, tmp_path / "sample_data/generated/quickstart")
    tree = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"))
    tree["data"]["grid"] = TINY["data"]["grid"]
    tree["data"]["spacing_mm"] = TINY["data"]["spacing_mm"]
    for part in ("backbone", "train", "sample", "screen", "evaluate", "policy"):
        tree[part] = TINY[part]
    (tmp_path / "configs/quickstart.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_runs(workplace: Path, synthmed: Callable[..., Result]) -> None:
    steps = list(commands(ROOT / "docs/tutorial.md"))
    assert len(steps) >= 8
    for command, expected in steps:
        words = shlex.split(command)
        if words[0] == "synthmed":
            result = synthmed(*words[1:])
            code, said = result.code, result.err + result.out
        else:
            done = subprocess.run(
                command, shell=True, capture_output=True, text=True, env=environment(), check=False
            )
            code, said = done.returncode, done.stderr + done.stdout
        assert code == expected, f"{command}\n{said}"
        if "--sign" in words:
            shared = json.loads(Path("runs/quickstart/release/report/report.json").read_text())
            assert shared["signature"]["name"] == "A. Curator"


def test_the_tutorial_names_what_a_run_holds(
    workplace: Path, synthmed: Callable[..., Result]
) -> None:
    assert synthmed("generate", "configs/quickstart.yaml", "-q").code == 0
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    listing = text.split("```text\nruns/quickstart/\n")[1].split("```")[0]
    run = workplace / "runs/quickstart"
    files = r"[\w-]+\.(?:yaml|jsonl|json|tsv|md)\b|SHA256SUMS"
    named = set(re.findall(rf"[\w.-]+/(?= )|{files}", listing))
    there = {p.name + "/" * p.is_dir() for p in run.rglob("*")}
    assert named <= there
    folders = {p.name + "/" for p in run.iterdir() if p.is_dir()}
    folders |= {p.name + "/" for p in (run / "private").iterdir() if p.is_dir()}
    assert folders <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    inside = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:", t)]
    missing = [t for t in inside if t and not (page.parent / t).exists()]
    assert not missing
    # what is named like a page of docs/ is one
    for name in re.findall(r"`(docs/[\w/-]+\.md)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_examples_hold(page: Path) -> None:
    failed, _ = doctest.testfile(str(page), module_relative=False)
    assert failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_option_exists(page: Path) -> None:
    """Each `synthmed COMMAND --option` in code is known to the command line."""
    group = typer.main.get_command(cli.app)
    known = {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"```.*?\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    calls = [m for c in code for m in re.findall(r"(?:^|\$ |\bbin/)synthmed +([^#\n]*)", c, re.M)]
    for call in calls:
        name, *rest = call.split()
        if name.startswith("-"):
            continue
        assert name in known, f"synthmed {name}"
        # --set and --reason take text that may look like an option: only words of their own count
        options = [w.split("=")[0] for w in rest if re.match(r"--?[a-z]", w)]
        assert set(options) <= known[name], call


def test_the_page_of_options_is_that_of_the_code() -> None:
    """Run `python tests/config_page.py` where it is not."""
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page()
    options = set(re.findall(r"^\| `(\w+)` \|", config_page.page(), re.M))
    assert {
        "legal_basis",
        "false_discovery_rate",
        "widths",
        "max_minutes",
        "low_percentile",
    } <= options


def test_the_readme_names_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("| command | |")[1].split("\n\n")[0]
    calls = re.findall(r"`([^`]+)`", table)
    named = {w for call in calls for w in re.findall(r"(?:^| )([a-z]+)\b", call.split(" --")[0])}
    group = typer.main.get_command(cli.app)
    assert named == set(group.commands)  # type: ignore[attr-defined]


def test_the_makefile_has_the_targets_the_docs_name() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:^(?:\$ )?|`)make ([a-z]+)", text, re.M)
        assert set(named) <= targets, page


def test_no_page_holds_a_path_of_the_machine_it_was_written_on() -> None:
    """Home folders and temporary ones have no place in what others read."""
    for page in PAGES:
        found = re.findall(r"(?:/home/|/root/|/tmp/|/Users/)\S*", page.read_text(encoding="utf-8"))
        assert not found, page
