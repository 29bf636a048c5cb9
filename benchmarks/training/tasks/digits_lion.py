"""An MLP on digits, under Lion; gradient noise of infinite variance."""

from benchmarks.training.tasks import digits_heavy_tails

TASK = digits_heavy_tails.TASK._replace(
    name="digits_lion",
    optimizer="lion",
    rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
)
