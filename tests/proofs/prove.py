"""Slow proofs, one after the other: `make prove`, or `python tests/proofs/prove.py --only NAME`.

What is finished is kept in runs/proofs/, so a proof that was stopped goes on where it was. Work
is kept apart by a digest of the code: another code starts anew. Results go to docs/proofs.md.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "proofs"
TABLE = ROOT / "docs" / "proofs.md"
WORKFLOW = ROOT / "pipelines" / "cohort.smk"

FOLDERS = {
    "ingest": "ingest",
    "prepare": "prepare",
    "train": "model",
    "sample": "sample",
    "screen": "screen",
    "evaluate": "evaluate",
}
"""Stage to its folder in RUN/private; `release`, the last stage, has two folders of its own."""
STAGES = (*FOLDERS, "release")

# the longer stages are aimed at more often; they also go on from within
KILL9 = {
    "ingest": 2,
    "prepare": 2,
    "train": 6,
    "sample": 3,
    "screen": 2,
    "evaluate": 2,
    "release": 3,
}
SIGTERM = {"prepare": 1, "train": 2, "screen": 1, "release": 1}

CONFIG = """\
data:
  source: {source}
  modality: T1w
  conditions:
    diagnosis: {{kind: categorical, categories: [control, atrophy]}}
  grid: [32, 32, 32]
  spacing_mm: [6, 6, 6]
  holdout: 0.3
backbone: {{name: cvae, widths: [4, 8, 8], latent: 4}}
privacy: null
train: {{max_steps: {steps}, batch_patients: 4, checkpoint_minutes: 0.002}}
sample: {{count: {count}}}
evaluate: {{resamples: 100}}
"""


PRIVATE = """\
data:
  source: {source}
  patient: participant_id
  modality: T1w
  conditions:
    diagnosis: {{kind: categorical, categories: [control, atrophy]}}
  grid: [16, 16, 16]
  spacing_mm: [12, 12, 12]
  holdout: 0.3
  view: grid
backbone: {{name: cvae, widths: [4, 4], latent: 4, prior: standard}}
privacy: {{epsilon: 8, sample_rate: 0.5, patients: 20}}
train: {{max_steps: {steps}, checkpoint_minutes: 0.002}}
sample: {{count: {count}}}
evaluate: {{resamples: 100}}
"""


@dataclass(frozen=True)
class Case:
    """A small cohort and a config for it; every run of it shares one SYNTHMED_HOME."""

    folder: Path

    @classmethod
    def make(
        cls, folder: Path, patients: int, steps: int, count: int, config: str = CONFIG
    ) -> Case:
        """Phantoms and config in `folder`; what is there already is left alone."""
        folder.mkdir(parents=True, exist_ok=True)
        script = [sys.executable, str(ROOT / "sample_data/phantoms.py"), str(folder / "phantoms")]
        options = ["--patients", str(patients), "--grid", "32", "--seed", "3"]
        subprocess.run([*script, *options], check=True, stdout=subprocess.DEVNULL)
        text = config.format(source=folder / "phantoms", steps=steps, count=count)
        (folder / "small.yaml").write_text(text, encoding="utf-8")
        return cls(folder)

    @property
    def config(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def environment(self) -> dict[str, str]:
        """Private places for what synthmed and Snakemake keep beside a run, and a thread count."""
        own = {"SYNTHMED_HOME": self.folder / "home", "XDG_CACHE_HOME": self.folder / "cache"}
        threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        return {**threads, **os.environ, **{k: str(v) for k, v in own.items()}}

    def start(self, run: Path) -> subprocess.Popen[str]:
        """`synthmed generate` on its way."""
        wait_until_free(run)
        call = [sys.executable, "-m", "synthmed.cli", "generate", str(self.config)]
        return subprocess.Popen(
            [*call, "--run", str(run), "--device", "cpu", "--quiet"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, run: Path) -> dict[str, float]:
        """Let `generate` come to its end; seconds each stage was seen to take."""
        process = self.start(run)
        took = dict.fromkeys(STAGES, 0.0)
        before = time.monotonic()
        while process.poll() is None:
            time.sleep(0.002)
            now = time.monotonic()
            stage = under_way(run)
            if (private := workplace(run, stage)) is not None and private.exists():
                took[stage] += now - before
            before = now
        _, said = process.communicate()
        if process.returncode not in (0, 4):
            raise RuntimeError(f"generate ended with {process.returncode}: {said}")
        return took


def wait_until_free(run: Path) -> None:
    """Wait for the process of a proof that was killed itself: it may still be at work."""
    lock = run / "private" / ".lock"
    if lock.exists():
        with open(lock) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)


def under_way(run: Path) -> str:
    """The first stage whose result is not there; `done` when a decision is in place."""
    for stage, folder in FOLDERS.items():
        if not (run / "private" / folder / "manifest.json").exists():
            return stage
    decided = (run / "release").is_dir() or (run / "withheld").is_dir()
    return "done" if decided else "release"


def workplace(run: Path, stage: str) -> Path | None:
    """The hidden folder that a stage fills before it is renamed into place."""
    return None if stage == "done" else run / "private" / f".{FOLDERS.get(stage, stage)}.new"


def artifacts(run: Path) -> dict[str, str]:
    """SHA-256 of all that a run made: its config, every artifact, reports and what may leave."""
    places = [*(f"private/{f}" for f in FOLDERS.values()), "private/report", "release", "withheld"]
    found = [p for place in places for p in (run / place).rglob("*") if p.is_file()]
    return {
        str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted([run / "config.yaml", *found])
    }


def differing(a: Path, b: Path) -> list[str]:
    """Files that only one of two runs has, or that differ in any byte."""
    one, other = artifacts(a), artifacts(b)
    return sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))


def leftovers(run: Path) -> list[str]:
    """What a finished run should not hold: half-made, doomed or resumable folders and files."""
    hidden = [p for p in run.rglob(".*") if p.name not in (".lock", ".bidsignore")]
    return sorted(str(p.relative_to(run)) for p in [*hidden, *run.rglob("*.partial")])


@dataclass(frozen=True)
class Stop:
    """A signal sent to a run."""

    aimed: str
    fell: str
    exit: int
    said: str


def stop(
    case: Case, run: Path, number: signal.Signals, stage: str, delay: float
) -> tuple[bool, Stop]:
    """Start the run and send a signal `delay` seconds into `stage`.

    Returns:
        Whether the signal found the run still at work, and what came of it.
    """
    place = workplace(run, stage)
    assert place is not None
    left_by_another = identity(place)
    process = case.start(run)
    while process.poll() is None and identity(place) in (None, left_by_another):
        time.sleep(0.001)
    end = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    # with the decision in place a signal finds nothing to stop but the end of the process
    fell = under_way(run)
    hit = process.poll() is None and fell != "done"
    if hit:
        process.send_signal(number)
    _, said = process.communicate()
    return hit, Stop(stage, fell, process.returncode, said.strip())


def identity(place: Path) -> tuple[int, int] | None:
    """Tells a folder from an earlier one of that name; null where there is none."""
    try:
        about = place.stat()
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_ctime_ns


def interrupt(case: Case, number: signal.Signals, aims: dict[str, int], seed: int) -> list[Stop]:
    """One whole run, then others that are stopped as `aims` says and begun again each time.

    A run that ends before its signal comes is kept for the comparison, and another takes the
    signals that remain: exactly as many are sent as asked for.
    """
    state = case.folder / f"{number.name.lower()}.json"
    seen = [Stop(**s) for s in json.loads(state.read_text())] if state.exists() else []
    took = whole_run(case)
    draw = random.Random(seed)
    # drawn in full, so that a proof that goes on sends what it would have sent
    plan = [(stage, draw.random()) for stage, n in aims.items() for _ in range(n)]
    for stage, chance in plan[len(seen) :]:
        # a run that goes on has only its rest of the training and of the samples before it
        spread = 1.5 / aims[stage] if stage in ("train", "sample") else 1.0
        hit = False
        while not hit:
            run = stopped_runs(case, number)[-1]
            hit, result = stop(case, run, number, stage, chance * spread * took[stage])
            if not hit:
                if result.exit not in (0, 4):
                    raise RuntimeError(f"generate ended with {result.exit}: {result.said}")
                chance *= 0.7  # too late: the next run is stopped earlier
                next_run(case, number)
        seen.append(result)
        state.write_text(json.dumps([vars(s) for s in seen]))
    case.finish(stopped_runs(case, number)[-1])
    return seen


def whole_run(case: Case) -> dict[str, float]:
    """The uninterrupted run, made once; seconds of its stages."""
    state = case.folder / "whole.json"
    if not state.exists():
        wait_until_free(case.folder / "whole")
        shutil.rmtree(case.folder / "whole", ignore_errors=True)
        state.write_text(json.dumps(case.finish(case.folder / "whole")))
    took: dict[str, float] = json.loads(state.read_text())
    return took


def stopped_runs(case: Case, number: signal.Signals) -> list[Path]:
    """The runs that were stopped, the one under way last."""
    found = sorted(case.folder.glob(f"{number.name.lower()}-*"))
    return found or [next_run(case, number)]


def next_run(case: Case, number: signal.Signals) -> Path:
    """A folder for another run to be stopped."""
    prefix = f"{number.name.lower()}-"
    path = case.folder / f"{prefix}{len(list(case.folder.glob(prefix + '*'))):02}"
    path.mkdir()
    return path


@dataclass(frozen=True)
class Result:
    """What a proof found."""

    passed: bool
    figures: str


def stopped(case: Case, number: signal.Signals, aims: dict[str, int], seed: int) -> Result:
    """Stop runs by a signal and compare what they made with the uninterrupted run's."""
    stops = interrupt(case, number, aims, seed)
    runs = stopped_runs(case, number)
    wrong = [f"{r.name}/{x}" for r in runs for x in differing(case.folder / "whole", r)]
    left = [f"{r.name}/{x}" for r in runs for x in leftovers(r)]
    expected = 130 if number == signal.SIGTERM else -number
    exits = Counter(s.exit for s in stops)
    fell = Counter(s.fell for s in stops)
    where = ", ".join(f"{s} {fell[s]}" for s in STAGES if fell[s])
    n = len(artifacts(case.folder / "whole"))
    folders = f"{len(runs)} runs" if len(runs) > 1 else "one run"
    parts = [f"{len(stops)} stops in {folders} ({where})"]
    parts.append("exits " + ", ".join(f"{k}: {v}" for k, v in sorted(exits.items())))
    parts.append(several(wrong) if wrong else f"all {n} files of each run equal")
    if left:
        parts.append(f"left behind: {', '.join(left)}")
    return Result(not wrong and not left and set(exits) == {expected}, "; ".join(parts))


def several(names: Sequence[str]) -> str:
    """How many files differ, and the first few."""
    return f"{len(names)} files differ: {', '.join(names[:3])}" + ", ..." * (len(names) > 3)


def prove_kill9(folder: Path) -> Result:
    case = Case.make(folder, patients=30, steps=150, count=40)
    return stopped(case, signal.SIGKILL, KILL9, seed=9)


def prove_sigterm(folder: Path) -> Result:
    case = Case.make(folder, patients=30, steps=150, count=40)
    return stopped(case, signal.SIGTERM, SIGTERM, seed=15)


def prove_snakemake(folder: Path) -> Result:
    case = Case.make(folder, patients=30, steps=60, count=20)
    whole_run(case)
    threads = int(case.environment["OMP_NUM_THREADS"])
    workflow(folder, case.config.name, "workflow", threads, case.environment)
    wrong = differing(folder / "whole", folder / "workflow")
    n = len(artifacts(folder / "whole"))
    return Result(not wrong, several(wrong) if wrong else f"all {n} files equal")


def workflow(
    folder: Path, config: str, run: str, threads: int, environment: Mapping[str, str], *more: str
) -> str:
    """Run cohort.smk from `folder`, with paths as given there; what Snakemake printed."""
    if find_spec("snakemake") is None:
        raise NotHere("snakemake is not installed (the extra `cluster`)")
    call = [sys.executable, "-m", "snakemake", "-s", str(WORKFLOW), "--cores", str(threads), *more]
    given = [f"config={config}", f"run={run}", "device=cpu", f"threads={threads}"]
    done = subprocess.run(
        [*call, "--config", *given],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"snakemake ended with {done.returncode}: {done.stderr}{done.stdout}")
    return done.stderr + done.stdout


def prove_screen(folder: Path) -> Result:
    from tests.proofs import screen_sampler

    cohorts = 300
    alarms = screen_sampler.run(cohorts)
    allowed = screen_sampler.ALLOWED * cohorts
    return Result(all(v <= allowed for v in alarms.values()), alarms_said(alarms, cohorts))


def prove_screen_fine(folder: Path) -> Result:
    from synthmed.metrics.stats import clopper_pearson
    from tests.proofs import screen_sampler

    cohorts = 100
    alarms = screen_sampler.run(cohorts, grid=screen_sampler.FINE)
    return Result(
        all(clopper_pearson(v, cohorts)[0] <= screen_sampler.ALLOWED for v in alarms.values()),
        alarms_said(alarms, cohorts),
    )


def alarms_said(alarms: Mapping[str, int], cohorts: int) -> str:
    """The figures of a proof about false alarms."""
    return f"alarms in {cohorts} cohorts: " + ", ".join(f"{k} {v}" for k, v in alarms.items())


def prove_private_kills(folder: Path) -> Result:
    return killed_privately(folder, kills=50, steps=250, seed=50)


def killed_privately(folder: Path, kills: int, steps: int, seed: int) -> Result:
    """Kill private trainings at random moments; they end as one that was left alone.

    All begin from one training that was stopped at its first steps, with its ledger, since an
    account that is opened anew draws other noise.
    """
    begun = begun_privately(folder / "begun", steps)
    whole = copied(begun, folder / "whole")
    whole.finish(whole.folder / "run")
    draw, done, copies, wrong = random.Random(seed), 0, 0, list[str]()
    while done < kills:
        case = copied(begun, folder / f"killed-{copies:02}")
        copies += 1
        hit = True
        while hit and done < kills:
            hit, _ = stop(case, case.folder / "run", signal.SIGKILL, "train", 8 * draw.random())
            done += hit
        case.finish(case.folder / "run")
        wrong += [f"{case.folder.name}/{x}" for x in unlike(whole, case)]
    said = several(wrong) if wrong else "weights, logs and ledgers equal"
    return Result(not wrong, f"{done} kills of {copies} trainings; {said}")


def begun_privately(folder: Path, steps: int) -> Case:
    """A private run that was stopped at its first steps, and so has an account in its ledger."""
    shutil.rmtree(folder, ignore_errors=True)
    case = Case.make(folder, patients=20, steps=steps, count=4, config=PRIVATE)
    process = case.start(folder / "run")
    while process.poll() is None and not (folder / "home/ledger.jsonl").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    if process.returncode != 130:
        raise RuntimeError(f"the training was not stopped: {said}")
    return case


def copied(case: Case, folder: Path) -> Case:
    """A case as it stands, with its run and its ledger, in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case.folder, folder, symlinks=True)
    return Case(folder)


def unlike(a: Case, b: Case) -> list[str]:
    """What differs between two private trainings: weights, private log, ledger."""
    names = ("run/private/model/weights.safetensors", "run/private/model/training.jsonl")
    return [
        name
        for name in (*names, "home/ledger.jsonl")
        if (a.folder / name).read_bytes() != (b.folder / name).read_bytes()
    ]


def prove_mechanism(folder: Path) -> Result:
    from tests.proofs import mechanism

    runs = 300
    count, found = mechanism.run(runs)
    missed = [bug for bug, there in found.items() if not there]
    said = f"missed: {', '.join(missed)}" if missed else f"all {len(found)} planted bugs found"
    passed = count <= mechanism.ALLOWED * runs and not missed
    return Result(passed, f"{count} alarms in {runs} honest runs; {said}")


def prove_canaries(folder: Path) -> Result:
    from tests.proofs import mechanism

    bounds = mechanism.canary_bounds(seeds=20)
    means = {where: sum(found) / len(found) for where, found in bounds.items()}
    said = [
        f"{where}: mean {means[where]:.2f} ({means[where] / mechanism.CLAIM:.2f} of the claim), "
        f"{min(found):.2f} to {max(found):.2f}"
        for where, found in bounds.items()
    ]
    never_more = all(max(found) <= mechanism.CLAIM for found in bounds.values())
    enough = max(means.values()) >= 0.3 * mechanism.CLAIM
    return Result(never_more and enough, f"20 seeds; {'; '.join(said)}")


def prove_posing(folder: Path) -> Result:
    from tests.proofs import evidence

    made_up = [evidence.posing(folder, seed, 300, 300, 300) for seed in range(1, 6)]
    first = made_up[0]
    figures = f"phantoms, {first.n_train} + {first.n_holdout}: {evidence.said(made_up)}"
    passed = all(j.decision == "RELEASE" for j in made_up)
    data = os.environ.get("SYNTHMED_REAL_DATA")
    for cohort in evidence.REAL if data else ():
        real = [evidence.real_posing(Path(str(data)), cohort, folder, seed) for seed in range(3)]
        figures += f"; {cohort}, {real[0].n_train} + {real[0].n_holdout}: {evidence.said(real)}"
        passed &= all(j.decision != "WITHHELD" for j in real)
    return Result(passed, figures if data else f"{figures}; real cohorts not at hand")


def prove_overfit(folder: Path) -> Result:
    from tests.proofs import evidence

    found = evidence.overfit(folder, steps=6000)
    passed = found.decision == "WITHHELD" and "copied_patients" in found.failed
    return Result(passed, f"{found.n_train} people: {evidence.said([found])}")


class NotHere(Exception):
    """A proof needs something that this machine has not."""


@dataclass(frozen=True)
class Proof:
    """A proof: what it shows, in words, and how it is run in a folder of its own."""

    shows: str
    run: Callable[[Path], Result]


PROOFS = {
    "kill9": Proof(
        "A run killed (SIGKILL) twenty times, begun again each time, makes the bytes of a run "
        "that was left alone.",
        prove_kill9,
    ),
    "sigterm": Proof(
        "SIGTERM ends a run with exit 130, and it goes on to the same bytes.", prove_sigterm
    ),
    "snakemake": Proof(
        "pipelines/cohort.smk makes the bytes that `synthmed generate` makes.", prove_snakemake
    ),
    "screen": Proof(
        "The copies test raises at most 6 alarms in 300 cohorts for each sampler that copies "
        "nobody.",
        prove_screen,
    ),
    "screen-fine": Proof(
        "On scans of twice the voxels a side, where the copies test looks closer, nothing says "
        "that more than 2 % of such cohorts raise an alarm (exact bound of 100).",
        prove_screen_fine,
    ),
    "private-kills": Proof(
        "A private training killed (SIGKILL) fifty times ends in the weights, the log and the "
        "ledger of one that was left alone.",
        prove_private_kills,
    ),
    "mechanism": Proof(
        "Six planted bugs of a private mechanism are found; at most 3 of 300 honest runs alarm.",
        prove_mechanism,
    ),
    "canaries": Proof(
        "1000 canaries at epsilon 8 and delta 1e-5: no bound above the claim, and a mean of at "
        "least 0.3 of it at full batches.",
        prove_canaries,
    ),
    "posing": Proof(
        "People nobody trained on, handed in as a synthetic cohort, are released where 300 are "
        "held out (five cohorts of phantoms), and never withheld on real cohorts.",
        prove_posing,
    ),
    "overfit": Proof(
        "A diffusion model that was trained on twenty people until it copies them is withheld.",
        prove_overfit,
    ),
}


def code_digest() -> str:
    """Twelve digits that change with any code a proof runs."""
    seen = hashlib.sha256()
    for place in ("synthmed", "sample_data", "pipelines", "tests/proofs", "tests/metrics"):
        for path in sorted((ROOT / place).rglob("*")):
            if path.suffix in (".py", ".smk", ".html", ".css", ".js", ".md"):
                seen.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:12]


def commit() -> str:
    """The short commit, with `-dirty` where more than the table of proofs differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!docs/proofs.md")
        return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def prove(name: str) -> bool:
    """Run one proof unless this very code has been proven, and enter it in the table."""
    code = code_digest()
    kept = WORK / f"{name}.json"
    if kept.exists() and (there := json.loads(kept.read_text()))["code"] == code:
        print(f"{name}: done already, {word(there['passed'])}: {there['figures']}", flush=True)
        return bool(there["passed"])
    folder = WORK / code / name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {PROOFS[name].shows}", flush=True)
    started = time.monotonic()
    try:
        result = PROOFS[name].run(folder)
    except NotHere as error:
        print(f"{name}: not run: {error}", flush=True)
        return True
    if code_digest() != code:
        print(f"{name}: the code changed meanwhile; nothing is recorded", flush=True)
        return False
    print(f"{name}: {word(result.passed)}: {result.figures}", flush=True)
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    row = {"passed": result.passed, "figures": result.figures, "code": code, "commit": commit()}
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    kept.write_text(json.dumps({**row, "date": date}, indent=1) + "\n")
    write_table(TABLE, {name: {**row, "date": date}})
    return result.passed


def word(passed: bool) -> str:
    return "holds" if passed else "DOES NOT HOLD"


INTRO = """\
# Proofs

What takes too long for the test suite. `make prove` runs them all, `make prove ARGS="--only
kill9"` one; what is finished is kept in `runs/proofs/`, so a proof that was stopped goes on.
Figures stand here only as they were measured, and a result stands for the commit in its row, not
for later code; `-dirty` means that the working tree differed from the commit.

| proof | shows | result | figures | commit | date |
|---|---|---|---|---|---|
"""


def write_table(path: Path, results: dict[str, dict[str, str | bool]]) -> None:
    """Put results into the table at `path`; rows of other proofs stay as they are."""
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = {n: line for n in PROOFS for line in old if line.startswith(f"| {n} |")}
    for name, r in results.items():
        cells = (name, PROOFS[name].shows, word(bool(r["passed"])))
        rest = (str(r["figures"]).replace("|", "/"), r["commit"], r["date"])
        rows[name] = "| " + " | ".join(str(c) for c in (*cells, *rest)) + " |"
    missing = {n: f"| {n} | {PROOFS[n].shows} | not yet measured | | | |" for n in PROOFS}
    path.write_text(INTRO + "".join(rows.get(n, missing[n]) + "\n" for n in PROOFS), "utf-8")


def chosen(arguments: Sequence[str] | None) -> Iterator[str]:
    """Names of the proofs to run; `--list` prints them and ends."""
    parser = argparse.ArgumentParser(description="Run the slow proofs and write docs/proofs.md.")
    parser.add_argument("--only", action="append", choices=PROOFS, help="one proof; repeatable")
    parser.add_argument("--list", action="store_true", help="name the proofs")
    options = parser.parse_args(arguments)
    if options.list:
        for name, proof in PROOFS.items():
            print(f"{name:<10} {proof.shows}")
        return
    yield from options.only or PROOFS


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every proof that was run holds."""
    return int(not all([prove(name) for name in chosen(arguments)]))


if __name__ == "__main__":
    sys.exit(main())
