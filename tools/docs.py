"""The documentation without the Quarto program.

Derive what nbdev wants in nbs/, make README.md, check the sources, show the pages, render if possible:

python tools/docs.py all | derive | readme | check | preview [PAGE ...]
"""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from docs_checks import (
    LINK,
    cells_of,
    is_away,
    joined,
    keys_of,
    labels_of,
    notebooks_in,
    process,
    processed,
    prose_faults,
    split_fences,
    title_faults,
)
from docs_results import no_tags, paper_pages, read_all, summary_page
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
        return ([o['href']] if 'href' in o else []) + pages(o.get('contents', o.get('menu', [])))
    return []


def notebooks_page(
    root: Path,  # the project's folder
) -> str:  # a Quarto page
    "Every notebook by the sections of the sidebar: its title, its line, and a way into Colab."
    cfg = settings(root)
    out = ['---', 'title: All chapters', 'description: In reading order, with the course', '---', '']
    sidebar = yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar'][
        'contents'
    ]
    colab = f"https://colab.research.google.com/github/{cfg['git_url'].split('github.com/')[1]}/blob/{cfg['branch']}"
    for section in (s for s in sidebar if isinstance(s, dict) and 'section' in s):
        notebooks = [p for p in section['contents'] if p.endswith('.ipynb') and (root / p).is_file()]
        if not notebooks:
            continue
        out += [f"## {section['section']}", '', '| | what you find | |', '|----|------|-|']
        for p in notebooks:
            title, line = re.match(r'# (\S.*)\s+> (\S.*)', joined(cells_of(root / p)[0]['source'])).groups()
            out.append(f"| [{title}]({p.removeprefix('nbs/')}) | {line} | [Colab]({colab}/{p}) |")
        out.append('')
    return '\n'.join(out).rstrip() + '\n'


def api_page(
    root: Path,  # the project's folder
) -> str:  # a Quarto page
    "Every documented name by module, with its line and the place that explains it."
    out = ['---', 'title: API', 'description: Every name, and where it is explained', '---', '']
    out += ['`from lus_fastai import *` brings all of them; a paper comes as a module.', '']
    sidebar = yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar'][
        'contents'
    ]
    for page in (p for p in pages(sidebar) if p.endswith('.ipynb')):
        module = root / 'lus_fastai' / Path(page).relative_to('nbs').with_suffix('.py')
        if not module.is_file():
            continue
        tree, rows = ast.parse(module.read_text(encoding='utf-8')), []
        named = next(n.value for n in tree.body if ast.unparse(n).startswith('__all__ = '))
        for node in tree.body:
            if getattr(node, 'name', None) in ast.literal_eval(named):
                link = f'{page.removeprefix("nbs/")}#{node.name.lower()}'
                line = (ast.get_docstring(node) or ' ').splitlines()[0]
                rows.append(f'| [`{node.name}`]({link}) | {no_tags(line)} |')
        if rows:
            name = Path(page).relative_to('nbs').with_suffix('').as_posix().replace('/', '.')
            out += [f'## {name}', '', '| | |', '|---|-------|', *rows, '']
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
allowed_out_metadata_keys = ["image/png"]
doc_procs = [
    "docs_cells:SiteLinks", "docs_cells:unlink_private", "docs_cells:hide_private",
    "docs_cells:steady_defaults", "docs_cells:plain_outputs", "docs_cells:break_heads",
    "docs_cells:fit_code", "docs_cells:fold_code", "docs_cells:name_pictures",
]
'''


REFERENCES = """---
title: References
description: The papers and the data sets, from references.bib
nocite: '@*'
---

Each entry was compared with the publisher's page, the authors' repository or a deposited copy, but for two:
of Merand and Klein (2021) no record was found, and of Gare et al. (2021) none that confirms the address.

::: {#refs}
:::
"""
COPIED = 'styles.css', 'words.lua', 'references.bib'  # what Quarto looks for beside the pages


def made_pages(
    root: Path,  # the project's folder
) -> dict:  # name below nbs/ -> text
    "The pages that are written by code."
    runs = read_all(root / 'results')
    found = {f'results/{name}.qmd': text for name, text in paper_pages(runs).items()}
    return found | {
        'results.qmd': summary_page(runs),
        'notebooks.qmd': notebooks_page(root),
        'api.qmd': api_page(root),
        'references.qmd': REFERENCES,
    }


def name_release(
    root: Path,  # the project's folder
):
    "Write the version of settings.ini into the cell of each notebook that installs the package in Colab."
    cfg = settings(root)
    for path in sorted((root / 'nbs').rglob('*.ipynb')):
        text = path.read_text(encoding='utf-8')
        named = re.sub(
            r'(/content \] && pip install -Uqq )[^"]+', rf"\g<1>{cfg['lib_name']}=={cfg['version']}", text
        )
        if named != text:
            path.write_text(named, encoding='utf-8')


def derive(
    root: Path = root,  # the project's folder
):
    "Write pyproject.toml, the release that notebooks install, and what nbdev and Quarto read in nbs/."
    name_release(root)
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
    for name in COPIED:
        shutil.copyfile(root / name, nbs / name)
    for name, text in made_pages(root).items():
        (nbs / name).parent.mkdir(exist_ok=True)
        (nbs / name).write_text(text, encoding='utf-8')
    gallery_page(root)
    toml = root / 'pyproject.toml'
    if not toml.is_file() or toml.read_text(encoding='utf-8') != pyproject(cfg):
        toml.write_text(pyproject(cfg), encoding='utf-8')  # make installs again when it is touched


def readme(
    root: Path = root,  # the project's folder
) -> str:  # the text README.md has to have
    "README.md from the index notebook: its words, code and printed output; images stay files."
    cfg, out = settings(root), []
    for c in cells_of(root / 'nbs' / cfg['readme_nb']):
        src = joined(c['source'])
        directives = re.findall(r'^#\|\s*(.+?)\s*$', src, re.M)
        if any(d.split(':')[0].split()[0] in ('hide', 'default_exp') for d in directives):
            continue
        if c['cell_type'] == 'markdown':
            parts = split_fences(src)
            parts[::2] = [
                LINK.sub(lambda m: m[1] + ('' if is_away(m[2]) else 'nbs/') + m[2] + m[3], p)
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
                    out.append(joined(data['text/markdown']))
                    continue
                text = (
                    joined(o['text'])
                    if o.get('name') == 'stdout'
                    else ''
                    if any(k.startswith('image') for k in data)
                    else joined(data.get('text/plain', ''))
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
    "Faults of the site's sources: missing pages, broken links, front matter, citations, a stale README."
    faults, nbs, made = [], root / 'nbs', {}
    qmd = sorted(p.relative_to(nbs).as_posix() for p in nbs.rglob('*.qmd') if '_proc' not in p.parts)
    for name in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml', *qmd):
        try:
            text = (nbs / name).read_text(encoding='utf-8')
            made[name] = yaml.safe_load(text.split('---')[1] if name.endswith('.qmd') else text)
        except Exception as e:
            faults.append(f'nbs/{name}: {e}')
    if faults:
        return faults
    faults += navigation_faults(made, nbs, [p.relative_to(nbs).as_posix() for p in notebooks_in(nbs)] + qmd)
    known = keys_of(root / 'references.bib')
    for p in notebooks_in(nbs):
        cells, name = cells_of(p), p.relative_to(nbs).as_posix()
        found, labels = title_faults(cells), labels_of(cells)
        for i, c in enumerate(cells):
            text = joined(c['source']) if c['cell_type'] == 'markdown' else ''
            found += [f'cell {i}: {what}' for what in prose_faults(text, p, known | labels)]
        faults += [f'{name}: {what}' for what in found]
    for name in qmd:
        text = (nbs / name).read_text(encoding='utf-8').split('---', 2)[2]
        faults += [f'{name}: {what}' for what in prose_faults(text, nbs / name, known)]
    return faults + readme_faults(root)


def navigation_faults(
    made: dict,  # name -> content of the derived files
    nbs: Path,  # the folder of pages
    there: list,  # every page, below nbs/
) -> list:  # sentences
    "Pages that are named and missing, named twice, or in no menu."
    sidebar = pages(made['sidebar.yml']['website']['sidebar']['contents'])
    navbar = pages(made['_quarto.yml']['website']['navbar']['left'])
    faults = []
    for where, names in (('sidebar', sidebar), ('navbar', navbar)):
        lost = (p for p in names if not is_away(p) and not (nbs / p).is_file())
        faults += [f'_quarto.yml: the {where} names nbs/{p}, which does not exist' for p in lost]
    twice = [p for p in dict.fromkeys(sidebar) if sidebar.count(p) > 1]
    faults += [f'_quarto.yml: the sidebar names nbs/{p} twice' for p in twice]
    lost = [p for p in there if p not in sidebar]
    return faults + [f'_quarto.yml: nbs/{p} is not in the sidebar, so no reader finds it' for p in lost]


def readme_faults(
    root: Path,  # the project's folder
) -> list:  # sentences
    "A README that is not what the first notebook gives, or that embeds an image."
    faults, made = [], readme(root)
    if 'data:image' in made:
        faults.append('README.md would embed an image: save it under nbs/images and link to it')
    if not (root / 'README.md').is_file() or (root / 'README.md').read_text(encoding='utf-8') != made:
        faults.append('README.md is not what nbs/index.ipynb gives: run `make docs`')
    return faults


def preview(
    root: Path = root,  # the project's folder; `derive` has run
    names=None,  # pages, such as 'core.ipynb'; default: all
) -> list:  # sentences, one a fault
    "HTML of every page in _preview, without Quarto, and what a browser finds in it."
    from preview import anchor_faults, browser_faults, render

    os.chdir(root)
    os.environ['IN_TEST'] = '1'
    nbs, out = root / 'nbs', root / '_preview'
    there = [*notebooks_in(nbs), *sorted(nbs.rglob('*.qmd'))]
    if unknown := [name for name in names or () if nbs / name not in there]:
        sys.exit(f"no page {', '.join(unknown)}; a page is named as in nbs/, such as core.ipynb")
    names = names or [p.relative_to(nbs).as_posix() for p in there]
    sources = {n: processed(nbs / n, root) if n.endswith('.ipynb') else nbs / n for n in names}
    made = render(root, sources, out)
    (out / 'answer.html').write_text('made by `make docs`, where npm is')  # with the model that ships
    faults = anchor_faults(out) if len(names) == len(there) else []
    if not (shutil.which('chromium') or shutil.which('chromium-browser')):
        print('no chromium on the PATH, so no browser has looked at the pages')
        return faults
    return faults + browser_faults(made, shots=out / 'shots')


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
    tools = os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
    command = [sys.executable, '-c', 'from nbdev.quarto import nbdev_docs; nbdev_docs()']
    subprocess.run(command, cwd=root, check=True, env={**os.environ, 'PYTHONPATH': tools})  # for doc_procs
    answer_page(root / cfg['doc_path'] / 'answer.html')
    print(f"rendered: {cfg['doc_path']}/index.html")


def main(what='all', *names):
    if what not in ('all', 'derive', 'readme', 'check', 'preview'):
        sys.exit(__doc__)
    derive()
    if what == 'derive':
        return
    if what in ('all', 'readme'):
        (root / 'README.md').write_text(readme(), encoding='utf-8')
        print('README.md made from nbs/index.ipynb')
    if what == 'readme':
        return
    faults = preview(root, names) if what == 'preview' else check() + process(root)
    if faults:
        sys.exit('\n'.join(faults))
    if what == 'preview':
        return print('previewed: _preview/index.html, pictures of each page in _preview/shots')
    print(
        "the site's sources are sound: every page exists and is reachable, every link and citation resolves, "
        "every name is documented, every figure has a caption, a label and alternative text, every line fits"
    )
    if what == 'all':
        render()


if __name__ == '__main__':
    main(*sys.argv[1:])
