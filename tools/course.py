"""Lessons and their solutions, both made from one source.

python tools/course.py derive [LESSON ...]

A source is nbs/course/_source/NN_name.ipynb: the lesson with its exercises solved. From it come
nbs/course/NN_name.ipynb, where each solution is a stub that waits for the learner, and
nbs/course/NN_name_solutions.ipynb, which holds the exercises alone. In the source, the first line of a code
cell may be

#| solution    a function, or a dictionary of answers, that the learner is to write
#| exercise    also needed on the page of solutions: an exercise, a check, what they are made of

Cells of imports and the cell for Colab are on both pages, and so is text under a heading "## Exercise".
A page is executed where its code has changed; else it keeps its outputs.
"""

import ast
import json
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / 'nbs/course'


def text(
    cell: dict,  # of a notebook
) -> str:
    "The source of a cell."
    return cell['source'] if isinstance(cell['source'], str) else ''.join(cell['source'])


def marked(
    cell: dict,  # of a notebook
    word: str,  # 'solution' or 'exercise'
) -> bool:
    "Whether a code cell starts with a directive."
    return cell['cell_type'] == 'code' and text(cell).split('\n')[0].strip() == f'#| {word}'


def stub(
    code: str,  # of a solution, without the directive
) -> str:
    "What the learner gets: signature and docstring of a function, an empty dictionary for one of answers."
    out = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            lines = code.split('\n')[node.lineno - 1 : node.body[0].end_lineno]
            out.append('\n'.join([*lines, '    ...  # your turn']))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            out.append(f'{ast.unparse(node.targets[0])} = {{}}  # your turn')
        else:
            raise ValueError(
                f'line {node.lineno} of a solution is neither a function with a docstring nor a dictionary'
            )
    return '\n\n\n'.join(out)


def _imports(code):
    "Whether a cell only imports."
    body = [] if re.search(r'^[%!]', code, re.M) else ast.parse(code).body  # those are for IPython
    return bool(body) and all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in body)


def _used(code, others):
    "A cell of imports without those that other code does not use."
    body, out = ast.parse(code).body, []
    for s in body:
        names = [a.asname or a.name.split('.')[0] for a in s.names]
        used = [a for a, n in zip(s.names, names) if n == '*' or re.search(rf'\b{n}\b', others)]
        if used != s.names:
            s.names, code = used, ''
        out += [ast.unparse(s)] if used else []
    return code or '\n'.join(out)


def _cell(cell, code):
    "A copy of a cell with other text and without outputs."
    lines = code.strip('\n').splitlines(keepends=True)
    return cell | dict(source=lines) | (dict(outputs=[]) if cell['cell_type'] == 'code' else {})


def lesson(
    cells: list,  # of the source
) -> list:  # of the lesson
    "The lesson: stubs in the place of solutions."
    out = []
    for c in cells:
        code = re.sub(r'\A#\| (solution|exercise)\n', '', text(c))
        out.append(_cell(c, stub(code) if marked(c, 'solution') else code))
    return out


def _of_exercises(words, under):
    "The part of a cell's text that is under a heading of an exercise, and whether what follows is."
    kept = []
    for part in re.split(r'^(?=#+ )', words, flags=re.M):
        if part.startswith('#'):
            under = part.startswith('## Exercise')
        kept += [part] if under else []
    return ''.join(kept).strip('\n'), under


def solutions(
    cells: list,  # of the source
) -> list:  # of the page of solutions
    "The exercises, solved and checked."
    title = re.match(r'# (.+)', text(cells[0]))[1]
    line = 'What the exercises ask, a way to do it, and the check; all cells run within ten seconds'
    out, under = [_cell(cells[0], f'# Solutions: {title}\n\n> {line}')], False
    for c in cells[1:]:
        code = text(c)
        if c['cell_type'] == 'markdown':
            code, under = _of_exercises(code, under)
            keep = bool(code)
        else:
            keep = marked(c, 'solution') or marked(c, 'exercise') or 'eval: false' in code or _imports(code)
        if keep:
            out.append(_cell(c, re.sub(r'\A#\| (solution|exercise)\n', '', code)))
    code = '\n'.join(text(c) for c in out if c['cell_type'] == 'code' and not _imports(text(c)))
    out = [
        _cell(c, _used(text(c), code)) if c['cell_type'] == 'code' and _imports(text(c)) else c for c in out
    ]
    return [c for c in out if text(c)]


def derived(
    source: Path,  # in _source
) -> dict:  # file -> cells
    "The cells of both pages of a source, without outputs."
    cells = json.loads(source.read_text(encoding='utf-8'))['cells']
    pages = {f'{source.stem}.ipynb': lesson, f'{source.stem}_solutions.ipynb': solutions}
    return {COURSE / name: make(cells) for name, make in pages.items()}


def same_code(
    a: list,  # cells
    b: list,  # cells
) -> bool:
    "Whether two notebooks have the same code, cell by cell."
    codes = [[(c['id'], text(c)) for c in cells if c['cell_type'] == 'code'] for cells in (a, b)]
    return codes[0] == codes[1]


def execute(
    cells: list,  # of a notebook; the outputs are put into them
):
    "Run the code in a fresh kernel and an empty folder, on the phantom, all but the installation in Colab."
    import nbformat
    from nbclient import NotebookClient
    from tidy import tidied

    inline = 'module://matplotlib_inline.backend_inline'
    os.environ.update(MPLBACKEND=inline, PYTHONPATH=str(ROOT), LUS_HOME=tempfile.mkdtemp())
    os.environ.pop('LUS_DATA', None)
    code = [c for c in cells if c['cell_type'] == 'code' and 'eval: false' not in text(c)]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text(c), id=c['id']) for c in code])
    with tempfile.TemporaryDirectory() as folder:
        where = {'metadata': {'path': folder}}
        NotebookClient(nb, timeout=900, kernel_name='python3', resources=where).execute()
    for c, done in zip(code, nb.cells):
        c['outputs'] = tidied([o for o in done.outputs if o.get('name') != 'stderr'])


def write(
    path: Path,  # of the page
    cells: list,  # without outputs
) -> bool:  # whether it was executed
    "Write a page, with the outputs that it has where its code is the same."
    from nbdev.clean import nbdev_clean

    old = json.loads(path.read_text(encoding='utf-8'))['cells'] if path.exists() else []
    same = same_code(old, cells)
    if same:
        outputs = {c['id']: c['outputs'] for c in old if c['cell_type'] == 'code'}
        cells = [c | dict(outputs=outputs[c['id']]) if c['id'] in outputs else c for c in cells]
    else:
        execute(cells)
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    nb = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
    nbdev_clean.__wrapped__(fname=str(path))
    return not same


def main(what='', *names):
    if what != 'derive':
        sys.exit(__doc__)
    os.chdir(ROOT)
    for source in sorted((COURSE / '_source').glob('*.ipynb')):
        if names and source.stem not in names:
            continue
        for path, cells in derived(source).items():
            print(path.relative_to(ROOT), 'executed' if write(path, cells) else 'as before', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
