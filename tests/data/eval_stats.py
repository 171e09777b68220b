#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""eval_stats.py: the numbers that tests/eval_stats.c compares with, computed without keel's code.

Philox4x32-10 is written from Salmon et al. 2011, percentiles come from numpy.percentile, Wilson intervals from the roots of
the score equation. Prints the C initialisers.
"""
import itertools

import numpy as np

M = 0xFFFFFFFF


def philox(seed, stream, counter):
    c = [counter & M, counter >> 32, stream & M, stream >> 32]
    k = [seed & M, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & M, (a >> 32) ^ c[3] ^ k[1], a & M]
        k = [(k[0] + 0x9E3779B9) & M, (k[1] + 0xBB67AE85) & M]
    return c


def below(seed, n, stream=0):
    """keel_rng_below: words of a block from the last to the first; words under 2^32 mod n are thrown away."""
    counter = 0
    while True:
        for w in reversed(philox(seed, stream, counter)):
            if w >= 2**32 % n:
                yield w % n
        counter += 1


def bootstrap(num, den, cluster, draws, seed):
    num, den, cluster = map(np.asarray, (num, den, cluster))
    n = int(cluster.max()) + 1
    x = np.array([num[cluster == c].sum() for c in range(n)])
    w = np.array([den[cluster == c].sum() for c in range(n)])
    gen = below(seed, n)
    out = []
    for _ in range(draws):
        pick = [next(gen) for _ in range(n)]
        out.append(x[pick].sum() / w[pick].sum())
    return [num.sum() / den.sum(), *np.percentile(out, [2.5, 97.5])]


def pooled(base, runs, cluster, draws, seed):
    """Runs that answer the same prompts: each draw takes clusters and, from a second stream, runs."""
    base, runs, cluster = np.asarray(base), np.asarray(runs), np.asarray(cluster)
    n, r = int(cluster.max()) + 1, len(runs)
    member = np.array([cluster == c for c in range(n)])
    weight, b, t = member.sum(1), member @ base, np.array([member @ x for x in runs])
    gen, pick_run = below(seed, n), below(seed, r, 1)
    out = []
    for _ in range(draws):
        pick = [next(gen) for _ in range(n)]
        w = weight[pick].sum()
        after = np.mean([t[next(pick_run)][pick].sum() / w for _ in range(r)])
        out.append((b[pick].sum() / w, after, after - b[pick].sum() / w))
    ends = np.percentile(np.array(out), [2.5, 97.5], axis=0).T
    mean = [base.mean(), runs.mean(), runs.mean() - base.mean()]
    return [[m, *e] for m, e in zip(mean, ends)]


def wilson(k, n, z=1.959963984540054):
    # (k/n - p)^2 = z^2 p (1 - p) / n as a quadratic in p
    return sorted(np.roots([n + z * z, -(2 * k + z * z), k * k / n]).real)


if __name__ == "__main__":
    num = [0.5, -1.25, 2.0, 0.75, -0.5, 3.5, 1.0, -2.25, 0.125, 1.5]
    den = [1, 2, 1, 3, 1, 2, 1, 2, 1, 4]
    cluster = [0, 0, 1, 2, 2, 3, 4, 4, 4, 5]
    ones = [1] * 10
    print("mean, every item a cluster  ", bootstrap(num, ones, range(10), 2000, 7))
    print("mean, clustered             ", bootstrap(num, ones, cluster, 2000, 7))
    print("ratio, clustered            ", bootstrap(num, den, cluster, 2000, 7))
    runs = [[v + 0.5 for v in num], [v * 0.5 for v in num], [v - i * 0.25 for i, v in enumerate(num)]]
    for name, e in zip(("base", "tuned", "change"), pooled(num, runs, cluster, 2000, 7)):
        print(f"three runs, {name}", e)
    rank, drift = [4, 4, 16, 16, 64, 64], [0.1, 0.2, 0.2, 0.5, 0.4, 0.9]
    position = lambda v: np.array([np.sum(np.less(v, a)) + (np.sum(np.equal(v, a)) + 1) / 2 for a in v])
    print("spearman", np.corrcoef(position(rank), position(drift))[0, 1])
    every = [np.corrcoef(p, position(drift))[0, 1] for p in itertools.permutations(position(rank))]
    print("exact p", np.mean(np.array(every) >= np.corrcoef(position(rank), position(drift))[0, 1] - 1e-12))
    for k, n in ((3, 20), (0, 50), (50, 50), (126, 150)):
        print(f"wilson {k}/{n}", wilson(k, n))
