"""Damaged files by the thousand: every outcome is an answer, or an error of ours that names the file.

    python tests/fuzz/harness.py [--inputs 10000] [TARGET ...]

A module `<name>_targets.py` beside this one puts its targets into `TARGETS`. Hypothesis draws how a whole
file is damaged. Each target runs in processes of its own, which may take 2 GB more memory than they begin
with, and 20 seconds an input; whatever ends one is counted, and the file that did it is kept.
"""

import argparse
import collections
import faulthandler
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

HERE, TARGETS = Path(__file__).resolve().parent, {}  # name -> Target
SECONDS, MEMORY, CHUNK = 20, 2_000_000_000, 1000


@dataclass
class Target:
    "What is read, and from which whole files the damaged ones are made."

    seeds: object  # function of an empty folder: list of (file name, bytes)
    read: object  # function of a path: reads the file; its answer does not matter
    errors: tuple  # exceptions that are ours, if they name the file


_NUMBERS = [
    b'\0',
    b'\xff',
    b'\x7f',
    b'\x80',
    b'\0\0',
    b'\xff\xff',
    b'\0\0\0\0',
    b'\xff\xff\xff\xff',
    b'\x7f\xff\xff\xff',
]
_NUMBERS += [
    b'\xff\xff\xff\x7f',
    b'\0\0\xff\xff',
    b'\xff' * 8,
    b'999999999',
    b'-1',
    b'nan',
    b'1e400',
    b"';\n",
    b'\xc3',
    b'=1+1',
]
_place = st.integers(0, 160) | st.integers(0, 2**20)
_change = st.one_of(
    st.tuples(st.just('set'), _place, st.binary(min_size=1, max_size=4) | st.sampled_from(_NUMBERS)),
    st.tuples(st.just('flip'), _place, st.integers(0, 7)),
    st.tuples(st.just('cut'), _place, st.just(0)),
    st.tuples(st.just('drop'), _place, st.integers(1, 64)),
    st.tuples(st.just('insert'), _place, st.binary(min_size=1, max_size=16) | st.sampled_from(_NUMBERS)),
    st.tuples(st.just('repeat'), _place, st.integers(1, 256)),
    st.tuples(st.just('graft'), _place, _place),
)
damages = st.tuples(st.integers(0, 2**16), st.integers(0, 2**16), st.lists(_change, min_size=1, max_size=5))


def damaged(files, how):
    "Name and bytes of a file, damaged as `damages` drew it."
    which, other, changes = how
    (name, data), graft = files[which % len(files)], files[other % len(files)][1]
    data = bytearray(data)
    for kind, place, what in changes:
        at = place % (len(data) + 1)
        if kind == 'set':
            data[at : at + len(what)] = what
        elif kind == 'flip' and at < len(data):
            data[at] ^= 1 << what
        elif kind == 'cut':
            del data[at:]
        elif kind == 'drop':
            del data[at : at + what]
        elif kind == 'insert':
            data[at:at] = what
        elif kind == 'repeat':
            data[at:at] = data[at : at + what] * 4
        elif kind == 'graft':
            data[at:] = graft[what % (len(graft) + 1) :]
    return name, bytes(data)


def _short_of_memory(e):
    "Whether an error, or one that it came from, is a lack of memory; `from None` says that it is not."
    while e is not None:
        if isinstance(e, MemoryError):
            return True
        e = e.__cause__ or (None if e.__suppress_context__ else e.__context__)
    return False


def outcome(target, path):
    "'answer', 'ours', or what else came of reading a file."
    try:
        target.read(path)
        return 'answer'
    except target.errors as e:
        if _short_of_memory(e):
            return f'memory: {e}'
        return 'ours' if Path(path).name in str(e) else f'nameless: {type(e).__name__}: {str(e)[:200]}'
    except MemoryError as e:
        return f'memory: {e}'
    except Exception as e:
        return f'other: {type(e).__name__}: {str(e)[:200]}'


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory():
    "From here on this process may take 2 GB more."
    with open('/proc/self/statm') as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def run_here(name, inputs, start, folder):
    "Read `inputs` damaged files in this process; counts, and what was found."
    target, counts, found, slowest = TARGETS[name], collections.Counter(), [], 0.0
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty:
        files = target.seeds(Path(empty))
    for k, (file, data) in enumerate(files):
        (path := folder / f'{k}-{file}').write_bytes(data)
        assert (got := outcome(target, path)) == 'answer', f'{name}: the whole file {file} gives {got}'
        path.unlink()

    @seed(start)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damages)
    def one(how):
        nonlocal slowest
        file, data = damaged(files, how)
        (path := folder / file).write_bytes(data)
        begin = time.monotonic()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        got = outcome(target, path)
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - begin)
        counts[got.split(':')[0]] += 1
        if got not in ('answer', 'ours'):
            found.append(got)
            path.rename(path.with_name(f'found-{start}-{len(found)}-{file}'))

    begin = time.monotonic()
    one()
    spent = time.monotonic() - begin
    return dict(name=name, counts=counts, found=found[:20], slowest=slowest, seconds=spent, peak=_peak())


def load_targets(folder=HERE):
    "Import every module of targets in a folder."
    sys.path[:0] = [str(folder), str(HERE.parent)]  # beside the tests stands what they share
    sys.modules['harness'] = sys.modules[__name__]
    for path in sorted(Path(folder).glob('*_targets.py')):
        importlib.import_module(path.stem)


def run(names, inputs, folder, start=0, targets=HERE):
    "Read `inputs` damaged files a target in one other process: what came of each target, by name."
    command = [sys.executable, __file__, '--inside', str(start), '--inputs', str(inputs)]
    command += ['--folder', str(folder), '--targets', str(targets), *names]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(command, capture_output=True, text=True, errors='replace', env=env)
    lines = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith('@')]
    got = {line['name']: line for line in lines}
    if done.returncode:
        name = next(n for n in names if n not in got)
        kind = 'hang' if 'Timeout (' in done.stderr else 'crash'
        for path in (p for p in (Path(folder) / name).glob('*.*') if not p.name.startswith('found-')):
            path.rename(path.with_name(f'found-{start}-{kind}-{path.name}'))
        said = f'{kind}, exit {done.returncode}: {done.stderr[-1500:]}'
        got[name] = dict(counts={kind: 1}, found=[said], slowest=0, seconds=0, peak=0)
    return got


def _add(parts):
    "The sum of what came of a target in several processes."
    total = dict(counts=sum((collections.Counter(p['counts']) for p in parts), collections.Counter()))
    total |= {k: max(p[k] for p in parts) for k in ('slowest', 'peak')}
    return total | dict(found=sum((p['found'] for p in parts), []), seconds=sum(p['seconds'] for p in parts))


def _inside(args):
    "In the process that reads: a line a target."
    _limit_memory()
    for name in args.names:
        got = run_here(name, args.inputs, args.inside, args.folder / name)
        print('@' + json.dumps(got), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*')
    parser.add_argument('--inputs', type=int, default=10_000, help='damaged files for each target')
    parser.add_argument('--folder', type=Path, help='where files that end badly are kept')
    parser.add_argument('--targets', type=Path, default=HERE, help='folder of *_targets.py')
    parser.add_argument('--inside', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    load_targets(args.targets)
    if args.inside is not None:
        return _inside(args)
    top, bad = args.folder or Path(tempfile.mkdtemp(prefix='fuzz-')), 0
    row = '{:<14}{:>8}{:>9}{:>12}{:>7}{:>9}{:>9}{:>9}'.format
    print(row('target', 'inputs', 'answers', 'our errors', 'other', 'seconds', 'slowest', 'peak MB'))
    for name in args.names or sorted(TARGETS):
        starts = range(0, args.inputs, CHUNK)
        got = _add([run([name], min(CHUNK, args.inputs - k), top, k, args.targets)[name] for k in starts])
        n, counts = got['counts'].total(), got['counts']
        other = n - counts['answer'] - counts['ours']
        spent = f'{got["seconds"]:.0f}', f'{got["slowest"]:.2f}', f'{got["peak"] / 1e6:.0f}'
        print(row(name, n, counts['answer'], counts['ours'], other, *spent), flush=True)
        print(*(f'    {what}' for what in got['found']), sep='\n', end='\n' * bool(got['found']))
        bad += other
    if bad:
        sys.exit(f'{bad} input(s) ended badly; those files are in {top}')


if __name__ == '__main__':
    main()
