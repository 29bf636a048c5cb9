"""The rules with memory, implemented from their formulas in NumPy float64.

Each is a class whose ``step(n)`` returns (threshold, target) and records the norm
``n``. Its attributes are the expected state. Norms of zero are not recorded, unless
``zeros``.
"""

import numpy as np


class EmaRatio:
    def __init__(self, ratio, decay, *, record="clipped", eps=0.0, warmup=None):
        self.ratio, self.decay, self.record, self.eps = ratio, decay, record, eps
        self.warmup, self.level, self.count = warmup, 0.0, 0

    def step(self, n):
        warm = self.warmup and (self.count == 0 or self.count + 1 < self.warmup[0])
        if warm:
            limit = n * min(self.warmup[1] / (n + self.eps), 1.0)
        elif self.count == 0:
            limit = np.inf
        else:
            limit = self.ratio * max(self.level, self.eps)
        if n > 0:
            seen = min(n, limit) if self.record == "clipped" else n
            if self.count == 0:
                self.level = seen
            elif warm:
                self.level = min(self.level, seen)
            else:
                self.level = self.decay * self.level + (1 - self.decay) * seen
            self.count += 1
        return limit, limit


class ZScore:
    def __init__(self, thresh, alpha, warmup, *, top=np.inf, mode="zscore",
                 option="adaptive_scaling", factor=1.0, skip=False, escape=None,
                 eps=None):  # fmt: skip
        self.thresh, self.alpha, self.warmup, self.top = thresh, alpha, warmup, top
        self.mode, self.option, self.factor, self.skip = mode, option, factor, skip
        self.escape, self.seen, self.run, self.eps = escape, [], 0, eps
        self.mean = self.var = 0.0

    def step(self, n):
        if len(self.seen) < self.warmup:
            if n > 0:
                wild = bool(self.escape) and bool(self.seen)
                self.seen.append(min(n, 10 * self.mean) if wild else n)
                self.mean, self.var = np.mean(self.seen), np.var(self.seen)
            return self.top, self.top
        std = np.sqrt(self.var)
        padded = std + (1e-6 * self.mean if self.eps is None else self.eps)
        z = (n - self.mean) / padded
        trigger = self.mean + self.thresh * padded
        if self.mode == "percentile":
            target = self.mean + self.thresh * std
            trigger = trigger if self.eps is None else target
            spike = n > trigger
        else:
            spike = z > self.thresh
            target = self.mean
            if self.option == "adaptive_scaling" and spike:
                target = (self.mean + self.thresh**2 * std / z) * self.factor
        x = target if spike else n
        self.run = self.run + 1 if spike else 0
        if self.escape and self.run >= self.escape:
            self.seen, self.run, self.mean, self.var = [n], 0, n, 0.0
        elif n > 0 and not (spike and self.skip):
            self.mean = self.alpha * self.mean + (1 - self.alpha) * x
            apart = (x - self.mean) ** 2
            self.var = self.alpha * self.var + (1 - self.alpha) * apart
        end = min(target, n) if spike else np.inf
        return min(trigger, self.top), min(end, self.top)


class Sigma:
    def __init__(self, sigmas, decay, cap, escape=None):
        self.sigmas, self.decay, self.cap, self.escape = sigmas, decay, cap, escape
        self.mean = self.var = 0.0
        self.count = self.run = 0

    def step(self, n):
        limit = np.inf
        if self.count:
            limit = self.mean + self.sigmas * np.sqrt(self.var)
            limit = max(limit, self.mean * (1 + 1e-6)) if self.escape else limit
        over = n > limit
        self.run = self.run + 1 if over else 0
        away = bool(self.escape) and self.run >= self.escape
        if n > 0:
            if self.count == 0 or away:
                self.mean, self.var = (3 * n if away else min(3 * n, self.cap)), 0.0
            elif not over:
                self.mean = self.decay * self.mean + (1 - self.decay) * n
                apart = (n - self.mean) ** 2
                self.var = self.decay * self.var + (1 - self.decay) * apart
            self.count += 1
            self.run = 0 if away else self.run
        return limit, limit


class Dual:
    def __init__(self, trigger, target, fast, slow, escape=None):
        self.trigger, self.target, self.escape = trigger, target, escape
        self.decays, self.sums, self.count, self.run = (fast, slow), [0.0, 0.0], 0, 0

    def step(self, n):
        threshold = target = np.inf
        if self.count:
            fast, slow = (
                s / (1 - d**self.count)
                for s, d in zip(self.sums, self.decays, strict=True)
            )
            threshold, target = self.trigger * slow, min(self.target * fast, n)
        over = n > threshold
        self.run = self.run + 1 if over else 0
        if n > 0:
            seen, self.count = (target if over else n), self.count + 1
            if self.escape and self.run >= self.escape:
                self.sums, self.count, self.run, seen = [0.0, 0.0], 1, 0, n
            self.sums = [
                d * s + (1 - d) * seen
                for s, d in zip(self.sums, self.decays, strict=True)
            ]
        return threshold, target


class Window:
    """A percentile of the last norms, by rank; the first norm fills the window."""

    def __init__(self, percentile, window, *, current=True, rank=False):
        self.percentile, self.window, self.kept = percentile, window, []
        self.current, self.rank = current, rank

    def step(self, n):
        kept = list(self.kept)
        if n > 0 or self.current:
            first = self.rank and not kept
            kept = [n] * self.window if first else [*kept, n][-self.window :]
        used = kept if self.current else self.kept
        if not used:
            limit = np.inf
        elif self.rank:
            limit = np.sort(used)[int(self.percentile * self.window // 100)]
        else:
            limit = np.percentile(used, self.percentile)
        if n > 0:
            self.kept = kept
        return limit, limit


class WindowSigma:
    def __init__(self, sigmas, window, floor=None):
        self.sigmas, self.window, self.kept = sigmas, window, []
        self.floor = floor

    def step(self, n):
        limit, kept = np.inf, self.kept[-self.window :]
        if len(kept) >= max(2, self.window // 2):
            floor = 1e-6 * np.max(kept) if self.floor is None else self.floor
            limit = np.mean(kept) + self.sigmas * max(np.std(kept), floor)
        self.kept += [n] if n > 0 else []
        return limit, limit


class LogWindowSigma:
    """Deviations of the logarithm of the norms before this one."""

    def __init__(self, sigmas, window, ratio=2.0):
        self.sigmas, self.window, self.ratio, self.kept = sigmas, window, ratio, []

    def step(self, n):
        limit, kept = np.inf, self.kept[-self.window :]
        if len(kept) >= max(2, self.window // 2):
            above = max(self.sigmas * np.std(kept), np.log(self.ratio))
            limit = np.exp(np.mean(kept) + above)
        self.kept += [np.log(n)] if n > 0 else []
        return limit, limit


class Quantile:
    def __init__(self, quantile, margin, rate, warmup):
        self.p, self.margin, self.rate, self.warmup = quantile, margin, rate, warmup
        self.log, self.count = 0.0, 0

    def step(self, n):
        x, count = np.log(max(n, 1e-30)), self.count + 1
        level = self.log
        if count <= self.warmup:
            level = x if count == 1 else min(level, x)
        limit = self.margin * np.exp(level)
        if n > 0:
            self.count, self.log = count, level
            if count > self.warmup:
                pull = self.p if x > level else self.p - 1
                pull = 1 if n > 10 * limit else pull
                self.log = level + max(self.rate, 1 / count) * pull
        return limit, limit


class Smooth:
    def __init__(self, first, second, eps):
        self.decays, self.eps, self.sums, self.count = (first, second), eps, [0, 0], 0

    def step(self, n):
        first, second = self.decays
        sums = [first * self.sums[0] + (1 - first) * n,
                second * self.sums[1] + (1 - second) * n * n]  # fmt: skip
        count = self.count + 1
        mean, square = sums[0] / (1 - first**count), sums[1] / (1 - second**count)
        if n > 0:
            self.sums, self.count = sums, count
        target = mean / (np.sqrt(square) + self.eps)
        return target, target
