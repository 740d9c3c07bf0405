"""Mean and standard deviation per band, streamed: one pass, parts in any number, merged exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class BandStatistics:
    """Count, mean and sum of squared deviations per band, mergeable.

    T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equation 2.1; B. P. Welford, "Note on a Method for Calculating Corrected Sums of Squares and
    Products", 1962, is its case of parts of one value.

    Attributes:
        count: Pixels seen, the same for all bands.
        mean: (C,) float64.
        m2: (C,) float64, the sum over pixels of (x - mean)².
    """

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, channels: int) -> BandStatistics:
        """Of no pixel: what a merge leaves unchanged."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, values: npt.NDArray[np.generic]) -> BandStatistics:
        """Of values (C, N), computed in float64."""
        count = values.shape[1]
        if count == 0:
            return cls.empty(len(values))
        values64 = values.astype(np.float64)
        mean = values64.mean(axis=1)
        values64 -= mean[:, None]
        return cls(count, mean, np.einsum("cn,cn->c", values64, values64))

    def merge(self, other: BandStatistics) -> BandStatistics:
        """Of the pixels of both."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return BandStatistics(
            count,
            self.mean + delta * (other.count / count),
            self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
        )

    def to_reflectance(self, scale: float, offset: float) -> BandStatistics:
        """Of reflectance = (dn + offset) * scale, from those of the DN."""
        return BandStatistics(self.count, (self.mean + offset) * scale, self.m2 * scale**2)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """(C,) standard deviation of the pixels (divided by their count); zero for none."""
        return np.sqrt(self.m2 / max(self.count, 1))
