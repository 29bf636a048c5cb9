"""The limits above which a measurement counts as a symptom."""

import dataclasses

__all__ = ["LIMITS", "Limits"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits that the rules use; `diagnose` includes them in its signals.

    Attributes:
        growth: Decades of growth over the layers of a network.
        mild_growth: The same if there are at least ``many`` layers and removing the
            growth lowers the norm.
        many: The number of layers that counts as many.
        time_growth: Decades of growth over the earlier half of the steps of a
            recurrence. A sum of equal contributions grows by 0.3.
        position_growth: Decades by which the derivative with respect to the inputs
            grows from the last positions of a sequence to the first.
        shrink: Decades by which a signal shrinks over the layers.
        drop: Decades by which a remedy must lower the norm.
        mild_drop: The same if the remedy also makes a step achieve the predicted
            decrease in the loss.
        weights: Size of the weights relative to He initialization.
        layer: Growth per layer above which the cause is the weights, not the depth.
        activation: Gain of an activation that counts as a symptom.
        outlier: Decades by which the norm of a bad batch exceeds the others.
        outlier_z: The same in robust standard deviations.
        few: The largest fraction of batches that can be outliers.
        trust: Fraction of the predicted decrease in the loss that is achieved.
        mild_trust: The same, if steps a tenth as large achieve the prediction.
        trust_after: The same for smaller steps.
        twice: Range of loss ratios that count as a factor of two.
        fourfold: The same for a factor of four, or slightly more: a sum over pairs has
            n * (n - 1) terms.
        rise: Factor by which the loss must rise in a rehearsal of a run that has
            started.
        lost: Fraction of its improvement over all-zero parameters that such a run must
            also lose.
        leap: The same factor at any step of a rehearsal, for any run.
        excess: Average ratio of the update to its cap above which steps without the
            cap are tried.
        faster: Factor by which steps without the cap must lower the loss more.
        progress: Fraction of the loss that they must lower it by.
        unit: Root mean square of a column of the batches above which standardized ones
            are tried.
        factor: Size of a factor in the loss above which smaller ones are tried.
        wins: Factor by which standardized batches, or smaller weights, must lower the
            loss, relative to that of an untrained model, if the model also trains
            without the change.
        factor_wins: The same for a smaller factor in the loss, which is only tried if
            steps achieve little.
        rounded: Fraction of the updates that are rounded away.
        imprecise: Relative difference of the loss or the gradient's norm to those of
            the same program in float32.
        long: Number of steps from which on it is enough, for a learning rate that is
            too high, that a tenth of it wins the rehearsal.
        worse: Fraction of the initial loss by which a rehearsal must end above one with
            smaller steps.
    """

    growth: float = 2.0
    mild_growth: float = 0.8
    many: int = 16
    time_growth: float = 0.5
    position_growth: float = 2.0
    shrink: float = 3.0
    drop: float = 1.0
    mild_drop: float = 0.5
    weights: float = 1.2
    layer: float = 1.3
    activation: float = 1.2
    outlier: float = 1.0
    outlier_z: float = 5.0
    few: float = 0.25
    trust: float = 0.25
    mild_trust: float = 0.4
    trust_after: float = 0.35
    twice: tuple[float, float] = (1.8, 2.2)
    fourfold: tuple[float, float] = (3.6, 5.0)
    rise: float = 1.5
    lost: float = 0.1
    leap: float = 100.0
    excess: float = 2.0
    faster: float = 2.0
    progress: float = 0.02
    unit: float = 8.0
    factor: float = 20.0
    wins: float = 2.0
    factor_wins: float = 1.25
    rounded: float = 0.5
    imprecise: float = 0.3
    long: int = 100
    worse: float = 0.1


LIMITS = Limits()
