"""How long each notebook takes, written below its title:

python tools/times.py [NOTEBOOK ...]

Measure on a machine that does nothing else. Lessons of the course say it in words of their own.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {10: 'ten seconds', 30: 'half a minute', 60: 'a minute', 120: 'two minutes', 300: 'five minutes'}
SLOWER = 1.5  # times this machine


def sentence(
    seconds: float,  # of all cells on this machine
) -> str:  # ValueError where they take longer than any bound
    "What a reader is told."
    for bound, words in BOUNDS.items():
        if SLOWER * seconds < bound:
            return f'*Runs within {words} on one core, once the libraries are loaded.*'
    raise ValueError(f'{seconds:.0f} seconds are too long for a page of the site')


def measure(
    path: Path,  # a notebook; what it shows is not kept
) -> float:  # seconds of all its cells, in a kernel that has loaded the package
    "Execute a notebook on one core."
    os.environ['OMP_NUM_THREADS'] = '1'
    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if c.cell_type == 'code' and 'eval: false' not in c.source]
    nb.cells.insert(0, nbformat.v4.new_code_cell('from lus_fastai import *'))
    NotebookClient(nb, timeout=900, resources={'metadata': {'path': path.parent}}).execute()
    spans = [c.metadata.execution for c in nb.cells[1:]]
    times = [(s['iopub.execute_input'], s['shell.execute_reply']) for s in spans]
    return sum((datetime.fromisoformat(b) - datetime.fromisoformat(a)).total_seconds() for a, b in times)


def write(
    path: Path,  # a notebook
    seconds: float,  # from measure
):
    "Put the sentence below the cell for Colab, or in the place of the one that is there."
    nb = json.loads(path.read_text(encoding='utf-8'))
    cells = [c for c in nb['cells'] if c['id'] != 'how-long']
    colab = next(i for i, c in enumerate(cells) if 'eval: false' in ''.join(c['source']))
    cells.insert(
        colab + 1, dict(cell_type='markdown', id='how-long', metadata={}, source=[sentence(seconds)])
    )
    text = json.dumps(nb | dict(cells=cells), indent=1, ensure_ascii=False, sort_keys=True)
    path.write_text(text + '\n', encoding='utf-8')


def main(*names):
    "Every chapter and figure of the gallery, or some."
    chapters = [p for p in (ROOT / 'nbs').rglob('*.ipynb') if not {'course', '_proc'} & {*p.parts}]
    for path in map(Path, names) if names else sorted(chapters):
        if path.name != 'index.ipynb':  # the home page says it itself
            seconds = measure(path)
            write(path, seconds)
            print(f'{seconds:6.1f} s  {path}', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
