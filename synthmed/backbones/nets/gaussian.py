"""The Gaussian of a cohort, labels its linear part: where other models may start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from synthmed.backbones.examining import in_chunks, scans, shares
from synthmed.backbones.generative import Batch, Round, VolumeSpec, known
from synthmed.backbones.nets.intensity import before_output

_PSEUDO = 5.0  # patients' worth of doubt in what a condition shifts
_RIDGE = 1e-6  # of the strongest column's energy, below which a column says nothing of a volume
_COLUMNS = 2**16  # numbers of a volume that are held in float64 at once


class CohortGaussian(nn.Module):
    """N(mean + c W, A A^T) over n numbers, in buffers; all zero until `fit`.

    What a label shifts is part of the covariance where the label is not known: A then has further
    columns, W^T times a root of that label's own covariance.

    Args:
        n: numbers of a volume.
        factors: most columns of A beside those of labels.
        condition_width: D.
        label_widths: how many of the D each label has; empty where they are one label's.
        per_factor: people that a factor needs: there are at most people / per_factor of them.
    """

    mean_n: Tensor
    weight_Dn: Tensor
    centre_D: Tensor
    factor_nk: Tensor

    def __init__(
        self,
        n: int,
        factors: int,
        condition_width: int,
        label_widths: Sequence[int] = (),
        per_factor: int = 1,
    ) -> None:
        super().__init__()
        self.label_widths = tuple(label_widths)
        self.factors, self.per_factor = factors, per_factor
        self.columns = factors + condition_width
        """Columns of A, those of labels last."""
        self.register_buffer("mean_n", torch.zeros(n))
        self.register_buffer("weight_Dn", torch.zeros(condition_width, n))
        self.register_buffer("centre_D", torch.zeros(condition_width))
        self.register_buffer("factor_nk", torch.zeros(n, self.columns))

    def start(self, enter: Callable[[Tensor, Tensor], Tensor]) -> Round:
        """A round without a step, whose end fits this to the training patients.

        Args:
            enter: scans (B, C, X, Y, Z) and their whole conditions, of which the first D numbers
                are the labels, to volumes of n numbers each, in any shape.
        """

        @torch.no_grad()
        def finish(batches: Sequence[Batch]) -> Mapping[str, float]:
            volumes, conditions = [], []
            for batch in batches:
                x, c, _ = scans(batch)
                volumes.append(enter(x, c).flatten(1))
                conditions.append(c[:, : len(self.centre_D)])
            y = torch.cat(volumes)
            volumes.clear()
            each = torch.cat([shares(batch) for batch in batches])
            return {"linear_explained": round(self.fit(y, torch.cat(conditions), each), 4)}

        return Round(
            [],
            share=0.0,
            finish=finish,
            finish_privacy="refused",
            finish_floats=2 * len(self.mean_n),
        )

    @torch.no_grad()
    def fit(self, y: Tensor, c: Tensor, weight: Tensor | None = None) -> float:
        """Match mean and covariance, as far as the factors reach.

        Args:
            y: (m, n) volumes. They are spent: cohorts are large, and what is left of them after
                the fit is written over them.
            c: (m, D) encoded conditions; a label that somebody lacks shifts nothing for them.
            weight: (m,) how much each counts, in people: those of a person add up to 1. Null
                where every volume is a person of its own.

        Returns:
            Share of the variance in labels and factors.
        """
        return self._match(y, c, weight)[1]

    def _match(self, y: Tensor, c: Tensor, weight: Tensor | None) -> tuple[Tensor, float]:
        """Set the buffers: the variance (n,) that is left, and the share that is not."""
        each = y.new_ones(len(y), 1) if weight is None else weight[:, None].to(y)
        m = people = round(float(each.sum()))
        told = known(c, self.label_widths)
        mean = (each.T @ y)[0] / m
        centre = (each * c).sum(0) / (each * told).sum(0).clamp(min=1)
        # scaled by the root of its weight, each counts as often as it should in every square
        root = each.sqrt()
        x = (root * torch.where(told, c - centre, 0)).double()
        rest = y.sub_(mean).mul_(root)
        norm = torch.linalg.vector_norm  # without the squares of all volumes at once
        total = float(norm(rest)) ** 2
        ridge = _PSEUDO * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
        shown = torch.cat([x.T @ part.double() for part in torch.split(rest, _COLUMNS, 1)], 1)
        shift = torch.linalg.solve(x.T @ x + ridge, shown).float()
        rest.addmm_(x.float(), shift, alpha=-1)
        # of somebody without a label its shift is still there: they would count it as texture
        whole = told.all(1)
        n = float(each[whole].sum())
        if m / 2 <= n < m:
            rest, m = rest[whole], round(n)
        # the left singular vectors from the small Gram matrix: n is far larger than m
        _, vectors = torch.linalg.eigh((rest @ rest.T).double())
        k = min(self.factors, m // self.per_factor)
        factor = (
            rest.T @ vectors[:, -k:].float() / math.sqrt(m) if k else rest.new_zeros(len(mean), 0)
        )
        left = (norm(rest, dim=0) ** 2 / m - norm(factor, dim=1) ** 2).clamp(min=0)
        self.mean_n.copy_(mean)
        self.weight_Dn.copy_(shift)
        self.centre_D.copy_(centre)
        self.factor_nk.zero_()
        self.factor_nk[:, :k] = factor
        self.factor_nk[:, self.factors :] = shift.T @ self._spread(x, each * told)
        return left, 1 - float(left.sum()) * people / max(total, 1e-12)

    def _spread(self, x: Tensor, told: Tensor) -> Tensor:
        """(D, D) R with R R^T the labels' covariance, each label's own, from (m, D) weighted rows.

        Args:
            x: conditions less their mean, times the root of the weight; 0 where not told.
            told: (m, D) weight where told, else 0.
        """
        out = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        start = 0
        for width in self.label_widths or (x.shape[1],):
            own = slice(start, start := start + width)
            people = told[:, own].amax(1).sum().clamp(min=1) if width else 1
            values, vectors = torch.linalg.eigh(x[:, own].T @ x[:, own] / people)
            out[own, own] = vectors * values.clamp(min=0).sqrt()
        return out.float()

    def centred(self, c: Tensor) -> Tensor:
        """(B, n) means given (B, D) conditions; a label of zeros says nothing."""
        told = known(c, self.label_widths)
        return self.mean_n + torch.where(told, c - self.centre_D, 0) @ self.weight_Dn

    def drawn_along(self, c: Tensor) -> Tensor:
        """(B, k): 1 for the columns of A that count given (B, D) conditions, 0 for those of labels
        that are known."""
        unknown = (~known(c, self.label_widths)).float()
        return torch.cat([unknown.new_ones(len(c), self.factors), unknown], 1)

    def draw(self, unit: Tensor, c: Tensor) -> Tensor:
        """(B, n) volumes from standard normal numbers (B, k) and (B, D) conditions."""
        return self.centred(c) + (unit * self.drawn_along(c)) @ self.factor_nk.T

    def begin(self, unit: Tensor, c: Tensor) -> Tensor:
        """The same in float32 before the output's activation, which cuts off what is below black.

        Args:
            unit: (B, k or more), of which the first k count.
            c: (B, D or more), whole conditions, of which the first D are the labels.
        """
        with torch.autocast(unit.device.type, enabled=False):
            labels = c[:, : len(self.centre_D)].float()
            return before_output(self.draw(unit[:, : self.columns].float(), labels))

    def distance(self, y: Tensor, c: Tensor) -> Tensor:
        """Mean square a number of what volumes (B, n) have that no draw can have: (B,) float64.

        With a factor for everybody that is nothing for those it was fitted to.
        """
        a = self.factor_nk.double()
        gram = a.T @ a
        r = (y - self.centred(c)).double()
        out = []
        for row, on in zip(r, self.drawn_along(c).bool(), strict=True):
            inverse = torch.linalg.pinv(gram[on][:, on], rtol=1e-9, hermitian=True)
            out.append((row - a[:, on] @ (inverse @ (a.T @ row)[on])).square().mean())
        return torch.stack(out)

    def closeness(self, x: Tensor, c: Tensor) -> Tensor:
        """Minus the log of scans' `distance`, for a membership attack: (n,) float64.

        Args:
            x: (n, C, X, Y, Z).
            c: (n, D or more), whole conditions.
        """
        labels = c[:, : len(self.centre_D)]
        apart = in_chunks(lambda v, k: self.distance(v.flatten(1), k), x, labels)
        return -apart.clamp(min=1e-30).log()


class LinearCode(CohortGaussian):
    """The same, with a code for each volume: what an encoder and its decoder may start from.

    With a factor for everybody it gives back exactly who it was fitted to.
    """

    gram_kk: Tensor

    def __init__(
        self, n: int, factors: int, condition_width: int, label_widths: Sequence[int] = ()
    ) -> None:
        super().__init__(n, factors, condition_width, label_widths)
        self.register_buffer("gram_kk", torch.zeros(self.columns, self.columns))

    @classmethod
    def of(cls, spec: VolumeSpec, factors: int) -> LinearCode | None:
        """That of volumes of this kind; None where it is to have no factors."""
        n = spec.channels * math.prod(spec.grid)
        return cls(n, factors, spec.n_labels, spec.label_widths) if factors else None

    def _match(self, y: Tensor, c: Tensor, weight: Tensor | None) -> tuple[Tensor, float]:
        matched = super()._match(y, c, weight)
        self.gram_kk.copy_(self.factor_nk.T @ self.factor_nk)
        return matched

    def code(self, y: Tensor, c: Tensor) -> Tensor:
        """(B, k) numbers whose draw is nearest to volumes (B, n) given conditions (B, D or more).

        Of people who are like those it was fitted to they are about standard normal. Those of
        columns that do not count, or hold nothing, are 0.
        """
        with torch.autocast(y.device.type, enabled=False):
            labels = c[:, : len(self.centre_D)].float()
            on = self.drawn_along(labels)
            seen = ((y.float() - self.centred(labels)) @ self.factor_nk) * on
            gram = self.gram_kk * on[:, :, None] * on[:, None]
            # a column that is float32's rounding has a gram of rounding; it must not be divided by
            ridge = (_RIDGE * self.gram_kk.diagonal().max()).clamp(min=_RIDGE)
            weak = ridge + (1 - on)
            whole = gram + torch.diag_embed(weak)
            code: Tensor = torch.linalg.solve(whole.double(), seen.double()).float()
            return code
