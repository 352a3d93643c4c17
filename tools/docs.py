"""The documentation without the Quarto program.

Derive what nbdev wants in nbs/, make README.md, check the sources, render if possible:

python tools/docs.py all | derive | readme | check
"""

import configparser
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from gallery import gallery_page

root = Path(__file__).resolve().parents[1]


def settings(
    root: Path = root,  # the project's folder
) -> dict:  # name -> value of settings.ini
    "The entries of settings.ini."
    parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
    parser.read(root / 'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])


def _local(o):  # the root file says nbs/x, the derived ones are inside nbs/ and say x
    if isinstance(o, dict):
        return {k: _local(v) for k, v in o.items()}
    if isinstance(o, list):
        return [_local(v) for v in o]
    return o.removeprefix('nbs/') if isinstance(o, str) else o


def pages(
    o,  # a `contents` list of _quarto.yml, or any part of it
) -> list:  # the pages it names, in order
    "Every page named in a sidebar or navbar."
    if isinstance(o, str):
        return [o]
    if isinstance(o, list):
        return [p for v in o for p in pages(v)]
    if isinstance(o, dict):
        return ([o['href']] if 'href' in o else []) + pages(o.get('contents', []))
    return []


def _cell(x, digits=3):
    return '' if x is None else f'{x:.{digits}f}' if isinstance(x, float) else str(x).replace('|', '\\|')


def _rows(cells):
    "One Markdown table; `theirs` only where the paper gives a number."
    theirs = any(c.get('theirs') is not None for c in cells)
    out = ['| row | column | ours | interval |' + ' theirs |' * theirs, '|---|---|--:|---|' + '--:|' * theirs]
    for c in cells:
        i = c.get('interval')
        span = f'{_cell(i[0])} to {_cell(i[1])}' if isinstance(i, (list, tuple)) and len(i) == 2 else _cell(i)
        out.append(
            f"| {_cell(c.get('row'))} | {_cell(c.get('column'))} | {_cell(c.get('ours'))} | {span} |"
            + f" {_cell(c.get('theirs'))} |" * theirs
        )
    return out + ['']


def _evidence(r):
    "Paired differences, undertrained rows, other builds, and what was not run, if there are any."
    short = {}
    for t in r.get('trainings', {}).values():
        if t['reasons']:
            short.setdefault((t['protocol'], t['row']), []).append('; '.join(t['reasons']))
    out = []
    if r.get('differences'):
        out += ['### Paired differences', '', '| protocol | score | a | minus b | difference | p |']
        out += ['|---|---|---|---|---|--:|']
        for d in r['differences']:
            mark = ' (undertrained)' * any((d['protocol'], d[k]) in short for k in 'ab')
            value = f"{d['value']:+.3f} ({_cell(d['low'])} to {_cell(d['high'])}){mark}"
            names = ' | '.join(_cell(d[k]) for k in ('protocol', 'column', 'a', 'b'))
            out.append(f"| {names} | {value} | {_cell(d['p'])} |")
        out.append('')
    for (protocol, row), reasons in short.items():
        out += [f'- Undertrained: {row}, {protocol} ({len(reasons)} trainings; {reasons[0]}).']
    out += [''] * bool(short)
    if len(r.get('builds', [])) > 1:
        apart = [
            f"{', '.join(b['trainings'])}: torch {b['torch']}, {b['device']}, {b['precision']}"
            for b in r['builds']
        ]
        out += ['Trained apart: ' + '; '.join(apart) + '.', '']
    if r.get('not_run'):
        out += ['Not run: ' + ', '.join(r['not_run']) + '.', '']
    return out


def results_page(
    folder: Path,  # holds one JSON a reproduction
) -> str:  # a Quarto page
    "Ours beside theirs: a section a results file, in it one a protocol, in it a table for each of its paper."
    out = [
        '---',
        'title: Results',
        'description: Ours beside theirs, as the code wrote them',
        '---',
        '',
        'Each section is one file of `results/`, written by `lus_repro`, settings and versions included. '
        'Intervals come from a bootstrap over patients.',
        '',
    ]
    for f in sorted(Path(folder).glob('*.json')):
        r = json.loads(f.read_text(encoding='utf-8'))
        out += [
            f"## {r.get('paper', f.stem)} on {r.get('data', '?')}" + ' (quick)' * f.stem.endswith('-quick'),
            '',
        ]
        out += [
            f"`{r.get('command', '?')}`, {_cell(r.get('hours'), 1)} hours of training "
            f"on {r.get('device', '?')}; seeds {', '.join(map(str, r.get('seeds', [])))}; "
            f"phantom {r.get('versions', {}).get('phantom', '1')}. From `{f.name}`.",
            '',
        ]
        for name in dict.fromkeys(c.get('protocol', '') for c in r.get('cells', [])):
            protocol, own = (
                r.get('protocols', {}).get(name, {}),
                [c for c in r['cells'] if c.get('protocol', '') == name],
            )
            out += [
                f'### {name}',
                '',
                f"{protocol.get('description', '')} (split {protocol.get('split_hash', '?')}).",
                '',
            ]
            for table in dict.fromkeys(c.get('table', '') for c in own):
                out += [f'**{table}**', '', *_rows([c for c in own if c.get('table', '') == table])]
        out += _evidence(r)
    return '\n'.join(out).rstrip() + '\n'


def notebooks_page(
    root: Path,  # the project's folder
) -> str:  # a Quarto page
    "Every notebook by the sections of the sidebar: its title, its line, and a way into Colab."
    cfg, out = (
        settings(root),
        ['---', 'title: Notebooks', 'description: Every chapter, in reading order', '---', ''],
    )
    sidebar = yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar'][
        'contents'
    ]
    colab = f"https://colab.research.google.com/github/{cfg['git_url'].split('github.com/')[1]}/blob/{cfg['branch']}"
    for section in (s for s in sidebar if isinstance(s, dict) and 'section' in s):
        notebooks = [p for p in section['contents'] if p.endswith('.ipynb') and (root / p).is_file()]
        if not notebooks:
            continue
        out += [f"## {section['section']}", '', '| | what you find | |', '|---|---|---|']
        for p in notebooks:
            title, line = re.match(r'# (\S.*)\s+> (\S.*)', _join(_cells(root / p)[0]['source'])).groups()
            out.append(f"| [{title}]({p.removeprefix('nbs/')}) | {line} | [Colab]({colab}/{p}) |")
        out.append('')
    return '\n'.join(out).rstrip() + '\n'


def pyproject(
    cfg: dict,  # of `settings`
) -> str:  # the text pyproject.toml has to have
    "What setuptools and nbdev read from pyproject.toml; all else `setup.py` takes from settings.ini."
    return f'''# derived from settings.ini by tools/docs.py: edit that
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{cfg['lib_name']}"
description = "{cfg['description']}"
requires-python = ">={cfg['min_python']}"
authors = [{{name = "{cfg['author']}", email = "{cfg['author_email']}"}}]
dynamic = [
    "version", "readme", "license", "keywords", "classifiers",
    "dependencies", "optional-dependencies", "scripts",
]

[project.urls]
Repository = "{cfg['git_url']}"
Documentation = "{cfg['doc_host']}{cfg['doc_baseurl']}"

[tool.nbdev]
title = "{cfg['title']}"
branch = "{cfg['branch']}"
nbs_path = "{cfg['nbs_path']}"
lib_path = "{cfg['lib_path']}"
doc_path = "{cfg['doc_path']}"
readme_nb = "{cfg['readme_nb']}"
tst_flags = "{cfg['tst_flags']}"
custom_sidebar = {cfg['custom_sidebar'].lower()}
'''


def derive(
    root: Path = root,  # the project's folder
):
    "Write pyproject.toml, and what nbdev and Quarto read in nbs/, from the root's files."
    cfg, quarto = settings(root), _local(yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8')))
    sidebar = {'website': {'sidebar': quarto['website'].pop('sidebar')}}
    quarto['metadata-files'] = ['nbdev.yml', 'sidebar.yml']
    nbdev = {
        'project': {'output-dir': cfg['doc_path']},
        'website': {
            'title': cfg['title'],
            'site-url': cfg['doc_host'] + cfg['doc_baseurl'],
            'description': cfg['description'],
            'repo-branch': cfg['branch'],
            'repo-url': cfg['git_url'],
        },
    }
    nbs, head = root / 'nbs', '# derived by tools/docs.py: edit _quarto.yml at the root\n'
    for name, o in (('_quarto.yml', quarto), ('nbdev.yml', nbdev), ('sidebar.yml', sidebar)):
        (nbs / name).write_text(
            head + yaml.safe_dump(o, sort_keys=False, allow_unicode=True), encoding='utf-8'
        )
    shutil.copyfile(root / 'styles.css', nbs / 'styles.css')
    (nbs / 'results.qmd').write_text(results_page(root / 'results'), encoding='utf-8')
    (nbs / 'notebooks.qmd').write_text(notebooks_page(root), encoding='utf-8')
    gallery_page(root)
    toml = root / 'pyproject.toml'
    if not toml.is_file() or toml.read_text(encoding='utf-8') != pyproject(cfg):
        toml.write_text(pyproject(cfg), encoding='utf-8')  # make installs again when it is touched


_link = re.compile(r'(\]\()([^)\s]+)((?:\s+"[^"]*")?\))')
_away = re.compile(r'^(?:[a-z][a-z0-9+.-]*:|//|#)', re.I)


def _cells(path):
    return json.loads(Path(path).read_text(encoding='utf-8'))['cells']


def _join(x):
    return x if isinstance(x, str) else ''.join(x)


def _split_fences(text):
    return re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.M | re.S)  # odd parts are fenced code


def readme(
    root: Path = root,  # the project's folder
) -> str:  # the text README.md has to have
    "README.md from the index notebook: its words, code and printed output; images stay files."
    cfg, out = settings(root), []
    for c in _cells(root / 'nbs' / cfg['readme_nb']):
        src = _join(c['source'])
        directives = re.findall(r'^#\|\s*(.+?)\s*$', src, re.M)
        if any(d.split(':')[0].split()[0] in ('hide', 'default_exp') for d in directives):
            continue
        if c['cell_type'] == 'markdown':
            parts = _split_fences(src)
            parts[::2] = [
                _link.sub(lambda m: m[1] + ('' if _away.match(m[2]) else 'nbs/') + m[2] + m[3], p)
                for p in parts[::2]
            ]
            out.append(''.join(parts))
        elif c['cell_type'] == 'code':
            code = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip()
            if code and 'echo: false' not in directives:
                out.append(f'```python\n{code}\n```')
            for o in c['outputs']:
                data = o.get('data', {})
                if 'text/markdown' in data:
                    out.append(_join(data['text/markdown']))
                    continue
                text = (
                    _join(o['text'])
                    if o.get('name') == 'stdout'
                    else ''
                    if any(k.startswith('image') for k in data)
                    else _join(data.get('text/plain', ''))
                )
                if text.strip() and not re.match(r'<[\w.]+ object>|<Figure', text):
                    out.append('\n'.join('    ' + line for line in text.rstrip().splitlines()))
    return (
        '<!-- made from nbs/index.ipynb by `make docs`: edit the notebook -->\n\n'
        + '\n\n'.join(o.strip('\n') for o in out)
        + '\n'
    )


def check(
    root: Path = root,  # the project's folder; `derive` has run
) -> list:  # sentences, one a fault; empty when the site is sound
    "Faults of the site's sources: missing pages, broken links, front matter, a stale README."
    faults, nbs = [], root / 'nbs'
    made = {}
    for name in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml', 'results.qmd', 'notebooks.qmd'):
        try:
            text = (nbs / name).read_text(encoding='utf-8')
            made[name] = yaml.safe_load(text.split('---')[1] if name.endswith('.qmd') else text)
        except Exception as e:
            faults.append(f'nbs/{name}: {e}')
    if faults:
        return faults
    sidebar, navbar = (
        pages(made['sidebar.yml']['website']['sidebar']['contents']),
        pages(made['_quarto.yml']['website']['navbar']['left']),
    )
    for where, names in (('sidebar', sidebar), ('navbar', navbar)):
        faults += [
            f'_quarto.yml: the {where} names nbs/{p}, which does not exist'
            for p in names
            if not _away.match(p) and not (nbs / p).is_file()
        ]
    faults += [
        f'_quarto.yml: the sidebar names nbs/{p} twice'
        for p in dict.fromkeys(sidebar)
        if sidebar.count(p) > 1
    ]
    notebooks = sorted(
        p for p in nbs.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(nbs).parts)
    )
    faults += [
        f'_quarto.yml: nbs/{p.relative_to(nbs).as_posix()} is not in the sidebar, so no reader finds it'
        for p in notebooks
        if p.relative_to(nbs).as_posix() not in sidebar
    ]
    for p in notebooks:
        cells = _cells(p)
        first = _join(cells[0]['source']) if cells and cells[0]['cell_type'] == 'markdown' else ''
        if not re.match(r'# \S.*\n(?:\s*\n)?> \S.*', first):
            faults.append(f'{p.relative_to(nbs)}: the first cell is not "# title" with a "> line" under it')
        for i, c in enumerate(cells):
            src = _join(c['source'])
            if c['cell_type'] == 'raw' and src.strip().startswith('---'):
                try:
                    yaml.safe_load(src.strip().strip('-'))
                except yaml.YAMLError as e:
                    faults.append(f'{p.relative_to(nbs)}: cell {i}: front matter: {e}')
            if c['cell_type'] != 'markdown':
                continue
            for part in _split_fences(src)[::2]:
                for m in _link.finditer(re.sub(r'`[^`\n]*`', '', part)):
                    target = m[2].split('#')[0].split('?')[0]
                    if target and not _away.match(m[2]) and not (p.parent / target).exists():
                        faults.append(
                            f'{p.relative_to(nbs)}: cell {i}: links to {m[2]}, which does not exist'
                        )
    made_readme = readme(root)
    if 'data:image' in made_readme:
        faults.append('README.md would embed an image: save it under nbs/images and link to it')
    if not (root / 'README.md').is_file() or (root / 'README.md').read_text(encoding='utf-8') != made_readme:
        faults.append('README.md is not what nbs/index.ipynb gives: run `make docs`')
    return faults


def _undocumented(cell):
    "The `show_doc` call of a cell that gave no Markdown, or None."
    call = re.search(r'^show_doc\(.*\)', cell.source, re.M) if cell.cell_type == 'code' else None
    return (
        None if call and any('text/markdown' in o.get('data', {}) for o in cell.get('outputs', [])) else call
    )


def _told(cell):
    "What a cell's outputs say of an error, in one line."
    errors = [
        f"{o['ename']}: {o['evalue']}" for o in cell.get('outputs', []) if o.get('output_type') == 'error'
    ]
    return ' '.join('; '.join(errors).split()) or 'no output'


def process(
    root: Path = root,  # the project's folder
) -> list:  # sentences, one a notebook that nbdev could not process
    "nbdev's own processing of each notebook; a `show_doc` cell without Markdown would stall Pandoc."
    from fastcore.nbio import read_nb
    from nbdev.processors import FilterDefaults

    os.chdir(root)
    os.environ['IN_TEST'] = '1'
    faults = []
    for p in sorted(
        p
        for p in (root / 'nbs').rglob('*.ipynb')
        if not any(part[0] in '._' for part in p.relative_to(root).parts)
    ):
        nb, printed = read_nb(p), io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                FilterDefaults()(nb)
            front = (
                yaml.safe_load(nb.cells[0].source.strip().strip('-'))
                if nb.cells[0].cell_type == 'raw'
                else {}
            )
            if not front.get('title'):
                faults.append(f'{p.relative_to(root / "nbs")}: nbdev finds no title in it')
            faults += [
                f'{p.name}: {shown[0]} has no documentation: {_told(c)}'
                for c in nb.cells
                if (shown := _undocumented(c))
            ]
        except Exception as e:
            why = f' ({type(e.__cause__).__name__}: {e.__cause__})' if e.__cause__ else ''
            faults.append(
                f'{p.relative_to(root / "nbs")}: nbdev could not process it: {" ".join(str(e).split())}{why}'
            )
    return faults


def answer_page(
    path: Path,  # in the rendered site
):
    "Write the page that answers in the browser, with the model that ships; npm fetches what it needs."
    from lus_fastai.export import web_page
    from lus_fastai.predict import load_model

    web_page(load_model(), path)


def render(
    root: Path = root,  # the project's folder
):
    "Render the site into _docs with nbdev and Quarto, or say how."
    cfg = settings(root)
    if not shutil.which('quarto'):
        return print(
            "the site's sources are checked; to render it, install Quarto "
            "(https://quarto.org/docs/get-started) and run `make docs` again"
        )
    (root / 'README.md').touch()  # nbdev would otherwise make its own from the index
    subprocess.run(
        [sys.executable, '-c', 'from nbdev.quarto import nbdev_docs; nbdev_docs()'], cwd=root, check=True
    )
    answer_page(root / cfg['doc_path'] / 'answer.html')
    print(f"rendered: {cfg['doc_path']}/index.html")


def main(what='all'):
    if what not in ('all', 'derive', 'readme', 'check'):
        sys.exit(__doc__)
    derive()
    if what == 'derive':
        return
    if what in ('all', 'readme'):
        (root / 'README.md').write_text(readme(), encoding='utf-8')
        print('README.md made from nbs/index.ipynb')
    if what == 'readme':
        return
    faults = check() + process()
    if faults:
        sys.exit('\n'.join(faults))
    print(
        "the site's sources are sound: every page exists and is reachable, every internal link resolves, "
        "every name is documented"
    )
    if what == 'all':
        render()


if __name__ == '__main__':
    main(*sys.argv[1:])
