"""The command line: parse, call, print. Heavy imports wait for the command that needs them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.exceptions

from synthmed import __version__, ranks
from synthmed.errors import NOT_RELEASED, InputError, SynthmedError, UsageError
from synthmed.exits import frames, guarded, speakable

if TYPE_CHECKING:
    from synthmed.config import Config
    from synthmed.store import Run
    from synthmed.types import Decision

app = typer.Typer(
    name="synthmed",
    help="Synthetic MRI cohorts from your scans, with the evidence to decide about sharing them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigArg = Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped config.")]
RunArg = Annotated[Path, typer.Argument(help="The run's folder.")]
RunOption = Annotated[
    Path | None, typer.Option("--run", help="Where the run lies. Default: runs/<config's name>.")
]
InputOption = Annotated[
    str | None, typer.Option("--input", help="Folder of scans, or a PACS (data.source).")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one config value.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Root seed of the run.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Make stages anew that the config no longer fits.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Every policy line.")]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"synthmed {__version__}")
        raise typer.Exit


@app.command()
def generate(
    config: ConfigArg,
    run: RunOption = None,
    input_: InputOption = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Synthetic scans.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE:COUNT", help="Ask for counts of a category."),
    ] = None,
    masks: Annotated[
        str | None, typer.Option("--masks", help="Label maps to draw images for (sample.masks).")
    ] = None,
    seed: SeedOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Scans in, screened synthetic cohort and decision out; goes on from where a run stopped."""
    from synthmed import configfile

    file = configfile.find(config)
    values = {
        "data.source": input_,
        "sample.count": count,
        "sample.masks": masks,
        "seed": seed,
    }
    given: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
    if label:
        given["sample.labels"] = parse_labels(label)
    resolved = configfile.load(file, set_ or [], given)
    place = run or Path("runs") / file.stem
    if dry_run:
        _dry_run(place, resolved, as_json)
        return
    on = pick_device(device)
    with opened(place, resolved, overwrite) as (folder, chosen):
        from synthmed.pipeline import Line

        decision = Line(folder, chosen, on, quiet, overwrite).generate()
    report_decision(place, decision, as_json, verbose)


def _stage_command(name: str, text: str) -> None:
    @app.command(name, help=text)
    def command(
        run: RunArg,
        config: Annotated[
            str | None, typer.Option("--config", help="A config to begin with.")
        ] = None,
        input_: InputOption = None,
        set_: SetOption = None,
        device: DeviceOption = "auto",
        overwrite: OverwriteOption = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
    ) -> None:
        from synthmed import configfile

        given = {"data.source": input_} if input_ else {}
        if config is None and not (run / "config.yaml").is_file():
            raise UsageError(f"run {run}: not begun yet", "Name a config with --config.")
        file = configfile.find(config) if config else run / "config.yaml"
        resolved = configfile.load(file, set_ or [], given)
        on = pick_device(device)
        with opened(run, resolved, overwrite) as (folder, chosen):
            from synthmed.pipeline import Line

            artifact = Line(folder, chosen, on, quiet, overwrite).artifact(name)
        if as_json:
            print_json({"stage": name, "folder": str(artifact.path), **artifact.manifest.facts})
        elif name == "ingest":
            print_receipt(folder, artifact.path)


for _name, _text in {
    "ingest": "Read the scans: catalogue, pseudonyms, quarantine.",
    "prepare": "One grid, one intensity scale, a split by patient.",
    "train": "Train the backbone.",
    "sample": "Draw the synthetic cohort.",
    "screen": "Find samples that copy a patient, and replace them (not under privacy).",
    "evaluate": "Measure fidelity, memorization and membership.",
}.items():
    _stage_command(_name, _text)


@app.command()
def release(
    run: RunArg,
    config: Annotated[str | None, typer.Option("--config", help="A config to begin with.")] = None,
    sign: Annotated[str | None, typer.Option("--sign", metavar="NAME", help="Who signs.")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why it may be released.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Decide, write the reports and the release; or sign a cohort in REVIEW."""
    from synthmed import configfile
    from synthmed.pipeline import Line
    from synthmed.stages.release import sign as sign_off

    if bool(sign) != bool(reason):
        raise UsageError("release: --sign and --reason go together", "Say who, and why.")
    if config is None and not (run / "config.yaml").is_file():
        raise UsageError(f"run {run}: not begun yet", "Name a config with --config.")
    resolved = configfile.load(configfile.find(config) if config else run / "config.yaml")
    with opened(run, resolved, overwrite) as (folder, chosen):
        line = Line(folder, chosen, "cpu", quiet)
        read = sign is not None and line.standing() is not None
        decision = line.release()
        if sign and reason:
            if not read:
                raise UsageError(
                    f"run {run}: its report was made only now, and nobody has read it",
                    f"Read {run / 'private/report/report.html'}, then sign.",
                )
            sign_off(folder, chosen, sign, reason)
            folder.record(__version__)
    report_decision(run, decision, as_json, verbose)


@app.command()
def report(run: RunArg) -> None:
    """Build the pages anew from report.json."""
    from synthmed.stages.release import rebuild
    from synthmed.store import Run

    _require_run(run)
    folder = Run(run)
    with folder.lock():
        rebuild(folder)
    typer.echo(f"{run / 'private/report/report.html'}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of assessments.")],
    page: Annotated[
        Path | None, typer.Option("--page", help="Also write a page with plots to this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Set runs side by side: a table here, and a page where asked for."""
    from synthmed import compare as comparison
    from synthmed.store import write_bytes

    table = comparison.compare(runs)
    if page is not None:
        os.umask(0o077)  # made of restricted reports, it stays in the house as they do
        try:
            write_bytes(page, comparison.page(table).encode())
        except OSError as error:
            raise UsageError(
                f"--page {page}: cannot be written ({error.strerror})", "Name a file in a folder."
            ) from None
    if as_json:
        print_json(table)
        return
    for line in comparison.lines(table):
        typer.echo(line)
    if page is not None:
        typer.echo(f"page    {page}")


@app.command()
def check(config: ConfigArg, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Validate a config and print it resolved."""
    from synthmed import configfile, policy

    resolved = configfile.load(configfile.find(config), set_ or [])
    policy.verify(resolved)
    if as_json:
        print_json(resolved.model_dump(mode="json"))
    else:
        typer.echo(configfile.dump(resolved), nl=False)


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="backbones, metrics, exporters, configs or pipelines.")
    ] = "all",
    as_json: JsonOption = False,
) -> None:
    """Name what a config can choose from."""
    from synthmed.inventory import KINDS, inventory

    if what != "all" and what not in KINDS:
        raise UsageError(f"list {what}: unknown", f"Known: {', '.join(KINDS)}.")
    table = {k: v for k, v in inventory().items() if what in ("all", k)}
    if as_json:
        print_json(table)
        return
    for kind, members in table.items():
        typer.echo(f"{kind}:")
        for name, text in members.items():
            typer.echo(f"  {name:<22} {text}")


@app.command()
def look(
    source: Annotated[str, typer.Argument(help="A folder of DICOM files, or a PACS.")],
    config: Annotated[str | None, typer.Option("--config", help="What it wants is marked.")] = None,
    set_: SetOption = None,
    all_descriptions: Annotated[
        bool, typer.Option("--all-descriptions", help="Also those of one or two patients.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a folder of DICOM series, or a PACS, holds and what would become of it.

    Nothing is kept. A PACS is read by way of TMPDIR, as a whole unless --config restricts it.
    """
    from synthmed import configfile
    from synthmed.formats import selection
    from synthmed.formats.quarantine import listed
    from synthmed.progress import Progress
    from synthmed.stages import ingest

    given: dict[str, Any] = {"data.source": source, "data.format": "dicom"}
    file = configfile.find(config or "dicom")
    if config is None:  # the folder alone: no table, no labels
        given |= {"data.table": None, "data.patient": None, "data.conditions": {}}
    resolved = configfile.load(file, set_ or [], given)
    found = ingest.look(resolved, all_descriptions, Progress("look", as_json).update)
    if as_json:
        print_json(found)
        return
    for line in selection.lines(found["volumes"]):
        typer.echo(line)
    if found["refused"]:
        typer.echo(f"other files: {listed(found['refused'])}")


@app.command()
def plan(
    config: ConfigArg,
    input_: InputOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Before training: what the data are, and the memory and time the config will take."""
    from synthmed import configfile, policy
    from synthmed.plan import describe, fingerprint

    values = {"data.source": input_} if input_ else {}
    resolved = configfile.load(configfile.find(config), set_ or [], values)
    policy.verify(resolved)
    facts = fingerprint(resolved, pick_device(device), quiet)
    if as_json:
        print_json(facts)
    else:
        typer.echo(describe(facts))


@app.command()
def audit(
    run: RunArg,
    canaries: Annotated[
        int, typer.Option("--canaries", min=20, help="How many, for a private run.")
    ] = 1000,
    worlds: Annotated[
        int,
        typer.Option(
            "--worlds", min=0, help="Trainings with and without one person, for a private run."
        ),
    ] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the audit.")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Attack a run's own weights; of a private run check also its records against its claim."""
    from synthmed import configfile
    from synthmed.privacy.run_audit import describe, perform
    from synthmed.progress import Progress

    _require_run(run)
    on = pick_device(device)
    with opened(run, configfile.load(run / "config.yaml"), overwrite=False) as (there, config):
        model, progress = there.require("model"), Progress("audit", quiet)
        result = perform(there, config, model, canaries, worlds, seed, on, progress)
        if not result["passed"]:
            there.discard_release()  # `release` decides anew, knowing of it
    if as_json:
        print_json(result)
    else:
        typer.echo(describe(result))
    raise typer.Exit(0 if result["passed"] else NOT_RELEASED)


@app.command()
def ledger(
    delta: Annotated[float, typer.Option("--delta", min=0, help="Where epsilon is read.")] = 1e-5,
    patients: Annotated[
        bool, typer.Option("--patients", help="Every pseudonym, not only how many.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What the patients of this SYNTHMED_HOME have paid in private runs, and in which."""
    from synthmed.privacy.overview import describe, overview

    facts = overview(delta, patients)
    if as_json:
        print_json(facts)
    else:
        typer.echo(describe(facts))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has: device, memory, disk, versions, optional parts."""
    from synthmed.inventory import machine

    facts = machine()
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        typer.echo(f"{name:<16} {value}")


@app.command()
def assess(
    real: Annotated[Path, typer.Argument(help="Folder of real scans with participants.tsv.")],
    synthetic: Annotated[Path, typer.Argument(help="Folder of synthetic scans, likewise.")],
    out: Annotated[Path, typer.Option("--out", help="Where evidence and reports go.")],
    patient: Annotated[
        str | None, typer.Option("--patient", help="Column that names one person.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option("--holdout", help="Folder of real scans never trained on.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="Config with grid, conditions and policy.")
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Evidence and a decision for a cohort that any other tool has made."""
    from synthmed.assess import assess as run_assess

    on = pick_device(device)
    decision = run_assess(real, synthetic, out, patient, holdout, config, seed, on, quiet)
    report_decision(out, decision, as_json, verbose)


@app.command()
def deidentify(
    source: Annotated[Path, typer.Argument(help="Folder of DICOM files.")],
    target: Annotated[Path, typer.Argument(help="New folder for the clean ones.")],
    shift_dates: Annotated[
        bool, typer.Option("--shift-dates", help="Keep dates, moved back per patient.")
    ] = False,
    keep_device: Annotated[
        bool, typer.Option("--keep-device", help="Keep names and numbers of the scanner.")
    ] = False,
    clean_descriptors: Annotated[
        bool, typer.Option("--clean-descriptors", help="Keep words of the trade in descriptions.")
    ] = False,
    text: Annotated[
        str, typer.Option("--text", help="Text drawn into pixels: keep, mask or refuse.")
    ] = "keep",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write clean DICOM: pseudonyms, new UIDs, no name or number in any header; faces stay."""
    from synthmed.deid.clean import Options
    from synthmed.deidentify import deidentify as run_deidentify
    from synthmed.deidentify import refused_list
    from synthmed.formats.quarantine import listed

    if text not in ("keep", "mask", "refuse"):
        raise UsageError(f"--text {text}: unknown", "Known: keep, mask, refuse.")
    options = Options(shift_dates, keep_device, clean_descriptors, cast(Any, text))
    receipt = run_deidentify(source, target, options, quiet)
    if as_json:
        print_json(receipt)
        return
    typer.echo(
        f"{receipt['n_written']} files of {receipt['n_series']} series, "
        f"{receipt['n_studies']} studies and {receipt['n_patients']} patients in {target}"
    )
    if receipt["n_same_twice"]:
        typer.echo(f"{receipt['n_same_twice']} more are copies of these, and written once")
    if receipt["n_text_masked"]:
        typer.echo(f"text painted over in {receipt['n_text_masked']} of them")
    if receipt["n_refused"]:
        refused = listed(receipt["refused"])
        typer.echo(f"refused: {refused}; {refused_list(target)} stays in the house")
    typer.echo(f"not covered: {receipt['not_covered']}")


@app.command()
def forget(
    patient: Annotated[
        str | None,
        typer.Argument(help="The hospital's id, a pseudonym, or - to read them from stdin."),
    ] = None,
    folders: Annotated[
        list[Path] | None,
        typer.Option("--in", metavar="DIR", help="Where runs and clean DICOM lie. Default: runs."),
    ] = None,
    yes: YesOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a person out of runs and clean DICOM, keep them out, and list what was made of them.

    Models and releases that were made with them stay.

    Without PATIENT: whoever was forgotten before is taken out of what is found.
    """
    from synthmed.forget import describe
    from synthmed.forget import forget as run_forget

    people = sys.stdin.read().splitlines() if patient == "-" else [patient or ""]
    if patient is not None and not any(p.strip() for p in people):
        raise UsageError("forget: the patient's id is empty")
    places = folders or [p for p in [Path("runs")] if p.is_dir()]
    outcome = removal(
        "forget", lambda dry: run_forget(people, places, dry), describe, yes, dry_run, as_json
    )
    if n := outcome["n_found_nowhere"]:
        listed = "" if dry_run else "; they are on the list all the same"
        raise InputError(
            f"forget: {n} of {outcome['n_asked']} were found nowhere{listed}",
            "Write it as the table or PatientID has it, or FOLDER/ID where folders of the source "
            "have tables of their own; name all folders with --in.",
        )


@app.command()
def purge(
    run: RunArg,
    all_: Annotated[bool, typer.Option("--all", help="Remove release/ as well.")] = False,
    yes: YesOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove all that a run holds of patients: volumes, model, samples; what left stays on file."""
    from synthmed.purge import describe
    from synthmed.purge import purge as run_purge

    removal("purge", lambda dry: run_purge(run, all_, dry), describe, yes, dry_run, as_json)


def removal(
    word: str,
    remove: Callable[[bool], dict[str, Any]],
    describe: Callable[[Mapping[str, Any], bool], str],
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> dict[str, Any]:
    """Look what would be removed, ask, remove it, and print what was; what that found.

    Args:
        word: the command's name.
        remove: does it, or with True looks alone.
        describe: its outcome as text, and whether it was done.
        yes: do not ask.
        dry_run: look alone.
        as_json: print the outcome itself.
    """
    outcome = remove(True)
    if not dry_run:
        if not yes:
            typer.echo(describe(outcome, False), err=True)
            confirm(word)
        outcome = remove(False)
    if as_json:
        print_json(outcome)
    else:
        typer.echo(describe(outcome, not dry_run))
    return outcome


def confirm(word: str) -> None:
    """Have the command's name typed on a terminal before something is removed for good.

    Raises:
        UsageError: it was not, or there is no terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"{word}: removes data for good", "Pass --yes, or --dry-run to see what.")
    typer.echo(f"Type {word} to go on: ", nl=False, err=True)
    if sys.stdin.readline().strip() != word:
        raise UsageError(f"{word}: not confirmed, nothing was done")


def _require_run(place: Path) -> None:
    if not (place / "config.yaml").is_file():
        raise UsageError(f"run {place}: no run in this folder")


def parse_labels(items: list[str]) -> dict[str, dict[str, int]]:
    """`key=value:count` items as {key: {value: count}}.

    >>> parse_labels(["diagnosis=atrophy:40", "diagnosis=control:2"])
    {'diagnosis': {'atrophy': 40, 'control': 2}}
    """
    out: dict[str, dict[str, int]] = {}
    for item in items:
        key, equals, rest = item.partition("=")
        value, colon, number = rest.rpartition(":")
        counted = number.isdecimal() and len(number) < 10 and int(number) > 0
        if not (equals and colon and key and value and counted):
            raise UsageError(
                f"--label {item}: expected KEY=VALUE:COUNT", "For example diagnosis=atrophy:40."
            )
        if value in out.setdefault(key, {}):
            raise UsageError(f"--label {key}={value}: is asked for twice", "Give it one count.")
        out[key][value] = int(number)
    return out


def pick_device(name: str) -> str:
    """The torch device for --device.

    Raises:
        UsageError: cuda is asked for and there is none, or the name is unknown.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name}: unknown", "Use auto, cpu or cuda.")
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: no CUDA device is usable here",
            "See `synthmed doctor`; the README says how to install torch for CUDA.",
        )
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def opened(place: Path, config: Config, overwrite: bool) -> Iterator[tuple[Run, Config]]:
    """A run folder, locked and settled for a config; a failure leaves one line in its log."""
    from synthmed.pipeline import begin, keep_refusals
    from synthmed.store import Run

    run = Run(place)
    with run.lock():
        begin(run, config, overwrite)
        try:
            yield run, config
        except (SynthmedError, KeyboardInterrupt, OSError, MemoryError) as error:
            keep_refusals(run)
            run.log("stopped", kind=type(error).__name__)
            raise
        except Exception as error:
            run.log("internal_error", kind=type(error).__name__, frames=frames(error))
            raise


def report_decision(place: Path, decision: Decision, as_json: bool, verbose: bool) -> None:
    """Print the outcome and leave with the contract's exit code."""
    released = (place / "release").is_dir()
    folder = place / ("release" if released else "withheld")
    if as_json:
        print_json(
            {
                "decision": decision.decision,
                "reasons": list(decision.reasons),
                "cohort": str(folder),
                "report": str(place / "private/report/report.html"),
            }
        )
    else:
        typer.echo(decision.decision)
        for text in decision.reasons:
            typer.echo(f"  {text}")
        if verbose:
            for v in decision.verdicts:
                typer.echo(f"  [{v.status}] {v.reason}")
        typer.echo(f"cohort  {folder}")
        typer.echo(f"report  {place / 'private/report/report.html'}")
    raise typer.Exit(0 if released else NOT_RELEASED)


def print_receipt(run: Run, catalogue: Path) -> None:
    """What an ingest found, and how fast."""
    from synthmed.receipt import PAGE, RECEIPT, lines

    last = run.logged("ingest")[-1:]
    receipt = json.loads((catalogue / RECEIPT).read_text(encoding="utf-8"))
    for line in lines(receipt, last[0]["seconds"] if last else None):
        typer.echo(line)
    typer.echo(f"receipt  {catalogue / PAGE}")


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=1))


def _dry_run(place: Path, config: Config, as_json: bool) -> None:
    from synthmed.pipeline import STAGES, preview

    todo = preview(place, config)
    if as_json:
        print_json({"run": str(place), "stages": todo})
        return
    typer.echo(f"run {place}")
    for stage in STAGES:
        typer.echo(f"  {stage:<9} {todo[stage]}")


def main() -> None:
    """Entry point: every error becomes one or two lines and the contract's exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    speakable()
    if ranks.launched():
        sys.exit(guarded(_together))
    sys.exit(guarded(lambda: command(sys.argv[1:])))


def command(words: Sequence[str]) -> Any:
    """Do what was typed; no word of it may be empty, for an empty path is the working folder."""
    for word in words:
        option, _, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not value.strip() and (not option or "=" in word):
            raise UsageError(
                f"{option or 'an argument'}: is empty",
                "A shell variable that is not set? Write it with a value, or leave it out.",
            )
    return app(list(words), standalone_mode=False)


def _together() -> Any:
    """The command in process 0 of those that torchrun has started; the others follow it."""
    with ranks.joined():
        if ranks.rank() == 0:
            return command(sys.argv[1:])
        from synthmed.pipeline import follow

        return follow()


def _terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
