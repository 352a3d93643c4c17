"""What is wrong with the site, found without Quarto: in the sources, and in what nbdev makes of them."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import yaml
from docs_cells import FITS, split_options

LINK = re.compile(r'(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)((?:\s+"[^"]*")?\))')
_away = re.compile(r'^(?:[a-z][a-z0-9+.-]*:|//|#)', re.I)
_mention = re.compile(r'(?<![\w/.@\\])@([A-Za-z][\w:.-]*\w)')  # a citation or a cross-reference of Pandoc
_image = re.compile(r'!\[([^\]]*)\]\(')
_html = set(
    'a abbr b blockquote br center code dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i '
    'img input ins kbd label li mark ol p picture pre s small source span strong style sub summary sup svg '
    'table tbody td tfoot th thead tr u ul var video'.split()
)
PICTURE = 800  # pixels of a picture that a page shows at full size
KNOWN = set(  # options of a code cell that Quarto takes away from what is shown
    'label echo eval output include warning error code-fold code-summary code-overflow code-line-numbers '
    'fig-cap fig-alt fig-subcap fig-align fig-width fig-height layout layout-ncol layout-nrow column classes '
    'tbl-cap lst-cap lst-label tags id'.split()
)


def cells_of(
    path,  # of a notebook
) -> list:  # its cells, as JSON has them
    "The cells of a notebook."
    return json.loads(Path(path).read_text(encoding='utf-8'))['cells']


def joined(
    text,  # of a cell or an output: a string, or a list of lines
) -> str:
    "Text of a notebook as one string."
    return text if isinstance(text, str) else ''.join(text)


def split_fences(
    text: str,  # Markdown
) -> list:  # parts; those at odd places are fenced code
    "Markdown, apart from its fenced code."
    return re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.M | re.S)


def prose_of(
    text: str,  # Markdown
) -> str:
    "Markdown without code, formulas and comments."
    prose = ''.join(split_fences(text)[::2])
    return re.sub(r'`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|<!--.*?-->', '', prose, flags=re.S)


def links_of(
    text: str,  # Markdown
) -> list:  # addresses
    "What the prose of a page links to, images included."
    return [m[2] for m in LINK.finditer(prose_of(text))]


def is_away(
    address: str,  # of a link
) -> bool:
    "Whether a link leaves the site, or stays on its page."
    return bool(_away.match(address))


def notebooks_in(
    nbs: Path,  # a folder
) -> list:  # of Path, sorted
    "The notebooks that are pages."
    there = (p for p in nbs.rglob('*.ipynb') if not any(x[0] in '._' for x in p.relative_to(nbs).parts))
    return sorted(there)


def keys_of(
    bibliography: Path,  # a BibTeX file
) -> set:  # of names
    "What can be cited."
    if not bibliography.is_file():
        return set()
    return set(re.findall(r'^@\w+\{([^,\s]+),', bibliography.read_text(encoding='utf-8'), re.M))


def title_faults(
    cells: list,  # of a notebook
) -> list:  # sentences
    "A first cell that is no title with a line under it; front matter that is no YAML."
    first = joined(cells[0]['source']) if cells and cells[0]['cell_type'] == 'markdown' else ''
    faults = []
    if not re.match(r'# \S.*\n(?:\s*\n)?> \S.*', first):
        faults.append('the first cell is not "# title" with a "> line" under it')
    for i, c in enumerate(cells):
        src = joined(c['source']).strip()
        if c['cell_type'] == 'raw' and src.startswith('---'):
            try:
                yaml.safe_load(src.strip('-'))
            except yaml.YAMLError as e:
                faults.append(f'cell {i}: front matter: {e}')
    return faults


def prose_faults(
    text: str,  # Markdown of a page, or of one cell
    page: Path,  # the page's file; links start from its folder
    known: set,  # what can be cited, and the labels of the page
) -> list:  # sentences
    "Dead links, images without alternative text, unknown citations, tags that no browser knows."
    prose, faults = prose_of(text), []
    for address in links_of(text):
        target = address.split('#')[0].split('?')[0]
        if target and not is_away(address) and not (page.parent / target).exists():
            faults.append(f'links to {address}, which does not exist')
    if _image.search(prose) and any(not alt.strip() for alt in _image.findall(prose)):
        faults.append('an image has no alternative text: ![text](file)')
    faults += [
        f'@{name} is no label of a figure and not in references.bib' for name in _unknown(prose, known)
    ]
    tags = [t for t in re.findall(r'(?<!\\)<([A-Za-z][\w-]*)[^<>:@]*>', prose) if t.lower() not in _html]
    return faults + [f'<{t}> in the text would vanish: put it between backticks' for t in tags]


def _unknown(prose, known):
    return [
        m
        for m in dict.fromkeys(_mention.findall(re.sub(r'\{[^}\n]*\}|\S+@\S+\.\w+', '', prose)))
        if m not in known
    ]


def labels_of(
    cells: list,  # of a notebook, or of what nbdev made of it
) -> set:  # such as 'fig-scores'
    "What can be referred to on a page."
    text = '\n'.join(joined(c['source']) for c in cells)
    return set(re.findall(r'^#\|\s*label:\s*(\S+)', text, re.M)) | set(
        re.findall(r'\{[^}\n]*#((?:fig|tbl|sec|eq)-[\w-]+)', text)
    )


def undocumented(
    cell,  # of a notebook that nbdev has processed
):  # the match of its call, or None
    "The `show_doc` call of a cell that gave no Markdown."
    call = (
        re.search(r'^show_doc\(.*\)', joined(cell['source']), re.M) if cell['cell_type'] == 'code' else None
    )
    given = any('text/markdown' in o.get('data', {}) for o in cell.get('outputs', []))
    return None if given else call


def told(
    cell,  # of a notebook
) -> str:  # in one line
    "What a cell's outputs say of an error."
    errors = [
        f"{o['ename']}: {o['evalue']}" for o in cell.get('outputs', []) if o.get('output_type') == 'error'
    ]
    return ' '.join('; '.join(errors).split()) or 'no output'


def figure_faults(
    cell,  # of a notebook that nbdev has processed
) -> list:  # sentences
    "A figure without a caption, alternative text, or a label by which the text can refer to it."
    drawn = any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {}))
    options, _ = split_options(joined(cell['source']))
    if not drawn or options.get('output') == 'false' or options.get('include') == 'false':
        return []
    names = {'fig-cap': 'caption', 'fig-alt': 'alternative text', 'label': 'label'}
    return [
        f'its figure has no {what}: "#| {k}: ..."'
        for k, what in names.items()
        if not options.get(k, '').strip('"\' ')
    ]


def width_faults(
    cell,  # of a notebook that nbdev has processed
) -> list:  # sentences
    "A picture that is shown wider than a page is: it is made smaller, and its text with it."
    widths = [o.get('metadata', {}).get('image/png', {}).get('width', 0) for o in cell.get('outputs', [])]
    return [f'a picture of {w} pixels, and {PICTURE} fit the page' for w in widths if w > PICTURE]


def tag_faults(
    cell,  # of a notebook that nbdev has processed
) -> list:  # sentences
    "Options and outputs of the raw notebook that a reader would see."
    options, code = split_options(joined(cell['source']))
    faults = [f'"#| {k}" is no option that Quarto knows, so it would show' for k in options if k not in KNOWN]
    faults += [
        f'"{line.strip()}" stands below code, so it would show'
        for line in code.splitlines()
        if re.match(r'\s*#\s*\|\s*[\w-]', line)
    ]
    for o in cell.get('outputs', []):
        plain = joined(o.get('data', {}).get('text/plain', '')).strip()
        alone = not any(
            k.startswith(('image/', 'text/html', 'text/markdown', 'application/')) for k in o.get('data', {})
        )
        if alone and re.match(r'<[\w.]+(?: object)?[^\n]* at 0x|<Figure size|<IPython\.', plain):
            faults.append(f'its output would show as {plain.splitlines()[0]}')
    return faults


def option_faults(
    cell,  # of a notebook that nbdev has processed
) -> list:  # sentences
    "Options that YAML cannot read: Quarto would stop at the page."
    faults = []
    for key, value in split_options(joined(cell['source']))[0].items():
        try:
            yaml.safe_load(f'{key}: {value}')
        except yaml.YAMLError as e:
            faults.append(f'"#| {key}" is no YAML ({e.problem}): quote it')
    return faults


def line_faults(
    cell,  # of a notebook that nbdev has processed
) -> list:  # sentences
    "Lines of visible code that are too long for the page; a comment or a string may wrap as text does."
    options, code = split_options(joined(cell['source']))
    if options.get('echo') == 'false' or options.get('include') == 'false':
        return []
    long = [x for x in code.splitlines() if len(x) > FITS and not re.match(r"""\s*(#|[fr]*['"])""", x)]
    return [f'a line of {len(x)} characters, and {FITS} fit the page: {x.strip()[:40]}...' for x in long]


def cell_faults(
    cells: list,  # of a notebook that nbdev has processed
    page: Path,  # its source
    known: set,  # what can be cited
) -> list:  # sentences
    "Everything that is wrong with the cells of a page."
    faults, known = [], known | labels_of(cells)
    for c in cells:
        src, name = joined(c['source']), c.get('id', '')
        if c['cell_type'] == 'markdown':
            found = prose_faults(src, page, known)
        elif c['cell_type'] == 'raw':
            found = [] if src.strip().startswith('---') else ['a raw cell would show as it is']
        elif call := undocumented(c):
            found = [f'{call[0]} has no documentation: {told(c)}']
        else:
            found = figure_faults(c) + width_faults(c) + tag_faults(c) + option_faults(c) + line_faults(c)
        faults += [f'cell {name}: {what}' for what in found]
    return faults


def processed(
    path: Path,  # a notebook
    root: Path,  # the project's folder
) -> Path:  # in _proc, beside what Quarto reads
    "What nbdev makes of a notebook, made again where it or the tools have changed."
    from fastcore.nbio import read_nb, write_nb
    from nbdev.processors import FilterDefaults

    to = root / '_proc' / path.relative_to(root / 'nbs')
    tools = Path(__file__).with_name('docs_cells.py')
    newest = max(f.stat().st_mtime for f in (path, tools, root / 'pyproject.toml'))
    if to.is_file() and to.stat().st_mtime >= newest:
        return to
    nb, printed = read_nb(path), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        FilterDefaults()(nb)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, to)
    return to


def process(
    root: Path,  # the project's folder
    names=None,  # pages to look at, such as 'core.ipynb'; default: all
) -> list:  # sentences
    "nbdev's own processing of each notebook, and what is wrong with what comes out of it."
    os.chdir(root)
    os.environ['IN_TEST'] = '1'
    nbs, faults = root / 'nbs', []
    known = keys_of(root / 'references.bib')
    for p in [nbs / n for n in names] if names else notebooks_in(nbs):
        name = p.relative_to(nbs).as_posix()
        try:
            cells = cells_of(processed(p, root))
        except Exception as e:
            why = f' ({type(e.__cause__).__name__}: {e.__cause__})' if e.__cause__ else ''
            faults.append(f'{name}: nbdev could not process it: {" ".join(str(e).split())}{why}')
            continue
        front = joined(cells[0]['source']).strip().strip('-') if cells[0]['cell_type'] == 'raw' else ''
        if not (yaml.safe_load(front) or {}).get('title'):
            faults.append(f'{name}: nbdev finds no title in it')
        faults += [f'{name}: {what}' for what in cell_faults(cells, p, known)]
    return faults
