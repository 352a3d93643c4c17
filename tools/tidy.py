"""Saved notebooks without outputs that show nothing, such as those a progress bar leaves behind, and with
what was printed in one piece:

python tools/tidy.py [NOTEBOOK ...]
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _text(x):
    return x if isinstance(x, str) else ''.join(x) if isinstance(x, list) else str(x)


def shows_nothing(
    output: dict,  # of a code cell, as JSON has it
) -> bool:
    "Whether an output tells a reader nothing: blank text, a style sheet alone, a progress bar that stopped."
    if output['output_type'] == 'stream':
        return not _text(output['text']).strip()
    if output['output_type'] == 'error':
        return False
    data = dict(output.get('data', {}))
    if _text(data.get('text/plain', '')).startswith('<div><progress '):
        return True
    if 'text/html' in data:  # its text is then the name of an object
        data.pop('text/plain', None)
    return not any(re.sub(r'<style>.*?</style>', '', _text(x), flags=re.S).strip() for x in data.values())


def tidied(
    outputs: list,  # of a code cell
) -> list:  # those that show something; texts printed one after another are one
    "The outputs of a cell as they are to be saved."
    kept = []
    for o in outputs:
        if shows_nothing(o):
            continue
        last = kept[-1] if kept else {}
        if o['output_type'] == 'stream' == last.get('output_type') and o['name'] == last['name']:
            text = _text(last['text']) + _text(o['text'])
            kept[-1] = {**last, 'text': text.splitlines(keepends=True)}
        else:
            kept.append(o)
    return kept


def tidy(
    path: Path,  # a notebook, written again where something is taken away
) -> int:  # how many outputs fewer it has
    "Tidy the outputs of a notebook."
    nb, fewer = json.loads(path.read_text(encoding='utf-8')), 0
    for c in nb['cells']:
        if 'outputs' in c:
            old, c['outputs'] = c['outputs'], tidied(c['outputs'])
            fewer += len(old) - len(c['outputs'])
    if fewer:
        path.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    return fewer


def main(*names):
    there = sorted((ROOT / 'nbs').rglob('*.ipynb'))
    shown = [p for p in there if not any(x[0] in '._' for x in p.relative_to(ROOT).parts)]
    paths = [Path(n) for n in names] or shown
    for p in paths:
        if n := tidy(p):
            print(f'{p}: {n} outputs fewer')


if __name__ == '__main__':
    main(*sys.argv[1:])
