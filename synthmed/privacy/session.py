"""One private training: what it may spend, and its steps, each written down before it is taken."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from synthmed import ranks
from synthmed.backbones.generative import Generative, Phase, trained_by
from synthmed.config import Config, Privacy
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.errors import BudgetExhausted, InputError
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.privacy import oracle
from synthmed.privacy.accounting import CURVE, affordable, epsilon, epsilon_rdp, noise_for
from synthmed.privacy.gradients import Way, per_patient
from synthmed.privacy.ledger import Account, Charge, Ledger, Steps
from synthmed.privacy.noise import SecretStream
from synthmed.privacy.patient_step import Chunk, Mechanism, PatientStep
from synthmed.training import Training, owned, where


class Session:
    """The private side of a training.

    Args:
        config: the run's, with a `privacy` block.
        loader: the cohort.
        state: the training, before its first step or restored.
        device: where it runs.
        attempt: of the process that this one follows, where it follows one.

    Raises:
        BudgetExhausted: the planned steps cost some patient more than is left.
        InputError: the ledger lacks what this training has charged before.
        UsageError: something of the config or the model cannot be done privately.
    """

    def __init__(
        self,
        config: Config,
        loader: Loader,
        state: Training,
        device: str,
        attempt: str | None = None,
    ) -> None:
        if config.privacy is None:
            raise ValueError("a private session needs a privacy block")
        self.config, self.promise, self.loader, self.device = config, config.privacy, loader, device
        self._names = Pseudonyms.load()
        self.ledger = Ledger(names=self._names)
        self.n_steps = private_steps(state.model, state.steps)
        self.ways: dict[str, tuple[Way, float]] = {}
        self._steps: dict[str, PatientStep] = {}
        self._limit: tuple[int, int, int] | None = None
        self._n_trained = 0
        self._check(state)
        if state.private is None:
            self._open(state)
        else:
            self._go_on(state.private)
        self._mark(state)
        fresh = secrets.token_hex(8) if not device.startswith("cpu") else ""
        self.attempt = fresh if attempt is None else attempt

    # --- before the first step ----------------------------------------------------------------

    def _check(self, state: Training) -> None:
        """The oracle, for every phase that reads patients.

        A training that goes on keeps the way it had: another one would round otherwise, and its
        steps would be others.
        """
        key = Key.root(self.config.seed).fold("oracle")
        before: Mapping[str, Way] = (state.private or {}).get("ways", {})
        for number, current in enumerate(state.rounds):
            for phase in current.phases:
                if phase.reads_patients:
                    name = f"{number}.{phase.name}"
                    wanted = trained_by(phase, state.params)
                    self._n_trained += sum(p.numel() for p in wanted.values())
                    allowed = (before[name],) if name in before else oracle.WAYS
                    self.ways[name] = oracle.examine(
                        state.model,
                        phase,
                        state.params,
                        list(wanted),
                        self.loader.spec,
                        key,
                        self.device,
                        allowed,
                    )

    def _open(self, state: Training) -> None:
        """Settle the noise, see that everybody can pay for it, and open an account."""
        patients = frozenset(self.loader.patients)
        planned = planned_steps(self.promise, self.n_steps)
        self.account = Account(
            secrets.token_hex(16),
            self.config.export.name,
            patients,
            planned._replace(n=1),
            (self.promise.epsilon, self.promise.delta),
        )
        # under the ledger's lock: others may have charged while the oracle worked
        self.ledger.begin(
            self.account, lambda: require_budget(self.ledger, patients, self.promise, planned)
        )

    def _go_on(self, mark: Mapping[str, Any]) -> None:
        account = self.ledger.accounts.get(str(mark["run"]))
        if account is None or not self.ledger.holds(str(mark["head"])):
            raise InputError(
                "the privacy ledger in SYNTHMED_HOME does not hold what this training has charged",
                "Restore the ledger from a backup, or begin anew with --overwrite, which charges "
                "the patients again.",
            )
        same = account.mechanism.sample_rate == self.promise.sample_rate
        if account.patients != frozenset(self.loader.patients) or not same:
            raise InputError(
                "the checkpoint of this training was charged to other patients, or at another rate",
                "It comes from another run: begin anew with --overwrite.",
            )
        self.account = account

    def _mark(self, state: Training) -> None:
        state.private = {
            "run": self.account.run,
            "head": self.ledger.head,
            "ways": {name: way for name, (way, _) in self.ways.items()},
        }

    # --- steps --------------------------------------------------------------------------------

    def step(self, state: Training, phase: Phase, progress: float) -> dict[str, float]:
        """One private step: charged, then taken. Returns what the private log keeps of it."""
        name = f"{state.round}.{phase.name}"
        mine = owned(state.optimizers[phase.name])
        here = None
        if ranks.rank() == 0:
            here = self._state_digest(mine)
            self._charge((name, state.step, here))
            self._mark(state)
        with ranks.step(where(state, phase)):
            ranks.same(list(state.params.values()))
            return self._take(state, phase, name, here or self._state_digest(mine), progress)

    def _take(
        self, state: Training, phase: Phase, name: str, here: str, progress: float
    ) -> dict[str, float]:
        """The step itself, in every process that takes part; `here` is what it begins with."""
        taking = self._steps.get(name)
        if taking is None:
            taking = self._steps[name] = PatientStep(state.optimizers[phase.name], self.mechanism)
        text = f"{self.account.run}/{name}/{state.step}/{here}/{self.attempt}"
        secret = self._secret(text)
        drawn = [p for p in self.loader.patients if self._is_drawn(secret, p)]
        wanted = list(trained_by(phase, state.params))

        def chunks() -> Iterator[Chunk | None]:
            key = Key(hmac.digest(secret, b"draws", "sha256"))
            size, every = self.promise.at_once, ranks.world()
            for at in range(0, len(drawn), size * every):
                mine = at + size * ranks.rank()
                some = drawn[mine : mine + size]
                if not some:
                    yield None
                    continue
                batch, draws = self.loader.private_batch(
                    phase, key, some, self.promise.draws, self.device
                )
                yield per_patient(
                    self.ways[name][0], phase, state.params, wanted, batch, draws, progress
                )

        stream = SecretStream(hmac.digest(secret, b"noise", "sha256"))
        taken = taking.take(chunks(), stream)
        return {
            phase.name: round(taken.loss, 6),
            f"{phase.name}.gradient": round(taken.gradient, 6),
            f"{phase.name}.patients": taken.n_patients,
            f"{phase.name}.largest": taken.largest,
            f"{phase.name}.off": taken.off,
            f"{phase.name}.noise": taken.noise,
        }

    @property
    def mechanism(self) -> Mechanism:
        """The public constants of every step."""
        return Mechanism(
            sample_rate=self.promise.sample_rate,
            noise_multiplier=self.account.mechanism.noise_multiplier,
            clip=self.promise.clip,
            divisor=self.promise.sample_rate * self.promise.patients,
        )

    def _secret(self, text: str) -> bytes:
        """What a step draws from: as unknown as the key in SYNTHMED_HOME."""
        return bytes.fromhex(self._names.digest("private step", text))

    def _is_drawn(self, secret: bytes, patient: str) -> bool:
        """With probability q, whoever else there is."""
        place = hmac.digest(secret, f"drawn {patient}".encode(), "sha256")
        return int.from_bytes(place[:8], "big") < self.promise.sample_rate * 2**64

    def _state_digest(self, params: Sequence[Tensor]) -> str:
        """What a step begins with: replayed from the same weights it is the same random variable.

        On other devices than a CPU the same weights do not promise the same gradient, so a training
        that goes on there is another attempt, whose steps are drawn and charged afresh.
        """
        seen = hashlib.sha256(self.attempt.encode())
        for p in params:
            seen.update(p.detach().cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()[:32]

    def _charge(self, charge: Charge) -> None:
        """Write the step down, unless it would break a promise that stands on a patient."""
        account = self.ledger.accounts[self.account.run]

        def before() -> None:
            if len(account.charges) + 1 > self._affordable():
                raise BudgetExhausted(
                    f"privacy: step {charge[1]} of {charge[0]} would break a promise made to its "
                    f"patients: {len(account.charges)} steps are charged to this run",
                    "Steps that were drawn afresh after an interruption cost again, and other runs "
                    "may have charged since. What these patients had to spend is spent.",
                )

        self.ledger.charge(account.run, charge, before)

    def _affordable(self) -> int:
        """How many steps this run may charge in all; looked up again when others have charged.

        Those that were planned, or fewer; once these are charged, twice as many at most.
        """
        others = self._charged_by_others()
        wanted = self.n_steps * (2 if self._is_spent() else 1)
        if self._limit is None or self._limit[:2] != (others, wanted):
            most = self.account.mechanism._replace(n=wanted)
            besides = self.ledger.histories(self.account.patients, besides=self.account.run)
            limits = [
                affordable([a.steps for a in history], most, *promise)
                for history in besides
                for promise in promises(history, self.promise)
            ]
            self._limit = (others, wanted, min(limits))
        return self._limit[2]

    def _is_spent(self) -> bool:
        return len(self.ledger.accounts[self.account.run].charges) >= self.n_steps

    def _charged_by_others(self) -> int:
        return sum(
            len(a.charges)
            for a in self.ledger.accounts.values()
            if a.run != self.account.run and a.patients & self.account.patients
        )

    # --- after the last step ------------------------------------------------------------------

    def statement(self) -> dict[str, Any]:
        """What the reports say of privacy.

        `epsilon`, with the curve and the cross-check, is this run's own, from public constants
        alone. `lifetime` is what the patient who has paid most has paid in all runs: it tells who
        was in which, and stays in the house.
        """
        account = self.ledger.accounts[self.account.run]
        delta, own = self.promise.delta, [account.steps]
        histories = self.ledger.histories(account.patients)
        mechanism = self.mechanism
        return {
            "epsilon": _up(epsilon(own, delta)),
            "odds": math.exp(epsilon(own, delta)),
            "delta": delta,
            "promised": self.promise.epsilon,
            "unit": "patient",
            "adjacency": "add or remove one patient, with all scans and labels",
            "accountant": "PRV, the larger of both directions",
            "epsilon_crosscheck": _up(epsilon_rdp(own, delta)),
            "curve": {f"{d:g}": _up(epsilon(own, d)) for d in sorted({*CURVE, delta})},
            "steps": len(account.charges),
            "sample_rate": mechanism.sample_rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "clip": mechanism.clip,
            "divisor": mechanism.divisor,
            "draws": self.promise.draws,
            "init_is_public": self.promise.init_is_public,
            "generator": "AES-256 in counter mode, keyed in SYNTHMED_HOME",
            "n_trained": self._n_trained,
            "gradients": {name: way for name, (way, _) in sorted(self.ways.items())},
            "lifetime": {
                "run": self.account.run,
                "epsilon": _up(max(epsilon([a.steps for a in h], delta) for h in histories)),
                "runs_charged": len(self.ledger.runs_of(account.patients)),
                "runs_unprotected": self.ledger.without_protection(account.patients),
            },
        }


def promises(history: Sequence[Account], mine: Privacy) -> list[tuple[float, float]]:
    """Every (epsilon, delta) that was promised for good to the patients of a history, and ours."""
    return sorted({a.promise for a in history} | {(mine.epsilon, mine.delta)})


def planned_steps(promise: Privacy, n_steps: int) -> Steps:
    """The steps that a new run will take, with the noise that keeps them within what it spends."""
    spend = promise.spend or promise.epsilon
    sigma = noise_for(spend, promise.delta, promise.sample_rate, n_steps)
    return Steps(sigma, promise.sample_rate, n_steps)


def require_budget(
    ledger: Ledger, patients: Collection[str], promise: Privacy, planned: Steps
) -> None:
    """See that every patient can pay for the steps that a new run will take.

    Raises:
        BudgetExhausted: some cannot.
    """
    spend = promise.spend or promise.epsilon
    for history in ledger.histories(patients):
        spent = [a.steps for a in history]
        for most, delta in promises(history, promise):
            total = epsilon([*spent, planned], delta)
            if total > most:
                raise BudgetExhausted(
                    f"privacy: this run would cost epsilon {spend:g} and {total:.2f} in all: some "
                    f"of its patients have paid {epsilon(spent, delta):.2f} before, and {most:g} "
                    f"at delta {delta:g} was promised to them for good",
                    "Set privacy.spend to less than what is left (synthmed ledger shows it), or "
                    "use the model that the patients have paid for.",
                )


def private_steps(model: Generative, steps: Sequence[int]) -> int:
    """How many steps of a training read patients, over all its rounds and phases."""
    return sum(
        math.ceil(n / phase.every)
        for current, n in zip(model.rounds(), steps, strict=True)
        for phase in current.phases
        if phase.reads_patients
    )


def _up(value: float) -> float:
    """Rounded to four digits, never down."""
    return math.ceil(value * 1e4) / 1e4
