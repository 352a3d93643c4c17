"""Saved notebooks without outputs that show nothing, such as those a finished progress bar leaves behind:

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
    "Whether a reader sees nothing of an output: blank text, or HTML that holds at most a style sheet."
    if output['output_type'] == 'stream':
        return not _text(output['text']).strip()
    if output['output_type'] == 'error':
        return False
    data = dict(output.get('data', {}))
    if 'text/html' in data:  # its text is then the name of an object
        data.pop('text/plain', None)
    return not any(re.sub(r'<style>.*?</style>', '', _text(x), flags=re.S).strip() for x in data.values())


def tidy(
    path: Path,  # a notebook, written again where something is taken away
) -> int:  # how many outputs were taken away
    "Take the outputs that show nothing out of a notebook."
    nb = json.loads(path.read_text(encoding='utf-8'))
    n = 0
    for c in nb['cells']:
        kept = [o for o in c.get('outputs', []) if not shows_nothing(o)]
        n += len(c.get('outputs', [])) - len(kept)
        if 'outputs' in c:
            c['outputs'] = kept
    if n:
        path.write_text(json.dumps(nb, ensure_ascii=False, indent=1) + '\n', encoding='utf-8')
    return n


def main(*names):
    paths = [Path(n) for n in names] or sorted(
        p for p in (ROOT / 'nbs').rglob('*.ipynb') if not any(x[0] in '._' for x in p.relative_to(ROOT).parts)
    )
    for p in paths:
        if n := tidy(p):
            print(f'{p}: {n} outputs that show nothing taken away')


if __name__ == '__main__':
    main(*sys.argv[1:])
