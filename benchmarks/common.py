"""One way to measure: ours and a peer take turns in one process or one run, and the ratio of every pair is
kept."""

import statistics
import time


def seconds(
    call,  # function without arguments
) -> float:  # wall seconds
    "How long one call takes."
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    name: str,  # what is measured
    ours,  # function without arguments: n units of our work
    peer,  # function without arguments: n units of the peer's
    unit: str,  # what is counted, such as 'frames'
    n: float,  # how many of them one call does
    repeats: int = 5,  # pairs, after one unmeasured pair
    prepare=None,  # called before every measured call
) -> float:  # ratio of the medians: over 1, ours is faster
    "Alternate ours and the peer, print both rates and their ratio with the least and greatest of the pairs."
    ours()
    peer()
    pairs = []
    for _ in range(repeats):
        if prepare:
            prepare()
        a = seconds(ours)
        if prepare:
            prepare()
        pairs.append((a, seconds(peer)))
    a, b = (statistics.median(o) for o in zip(*pairs))
    each = [p / o for o, p in pairs]
    print(
        f'{name}: ours {n / a:.4g} {unit}/s, peer {n / b:.4g} {unit}/s, '
        f'ratio {b / a:.3f} ({min(each):.3f}..{max(each):.3f})',
        flush=True,
    )
    return b / a
