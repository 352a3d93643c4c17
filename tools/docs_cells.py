"""What the site makes of the cells of a notebook, after nbdev's own processing.

nbdev runs these eight (`doc_procs` in pyproject.toml): a line with the ways to Colab and to the source, no
links for private names or within links, no entries for private methods, defaults without an address in
memory, outputs without the types of NumPy and pandas, long heads of rows in several lines, code in lines
that fit the page, and folded tests, helpers, plots and exercises. The notebooks stay as they are.
"""

import ast
import json
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

from nbdev.config import get_config
from nbdev.process import Processor

FITS = 88  # characters of a line of code that a page of 1280 pixels shows
LONG_TEST, LONG_PLOT, LONG_HELPER = 3, 4, 8  # lines up to which a test, a plot and a helper stay open
LONG = 34  # and any other code
_option = re.compile(r'#\|\s*([\w-]+)(?::\s*(.*))?$')


def split_options(
    source: str,  # of a code cell
) -> tuple:  # its lines `#| key: value` as a dictionary, and the code below them
    "The options of a code cell, and its code."
    lines, options = source.splitlines(), {}
    while lines and (m := _option.match(lines[0].strip())):
        options[m[1]] = (m[2] or '').strip()
        del lines[0]
    return options, '\n'.join(lines).strip('\n')


def page_links(
    path: str,  # of a notebook, below nbs/
    git_url: str,  # of the repository, on GitHub
    branch: str,  # of the site
) -> str:  # Markdown
    "The line under each title: run it in Colab, read its source."
    blob = f'{git_url.split("github.com/")[1]}/blob/{branch}/nbs/{path}'
    colab, source = f'https://colab.research.google.com/github/{blob}', f'https://github.com/{blob}'
    return f'::: {{.page-links}}\n[Open in Colab]({colab}) [Notebook on GitHub]({source})\n:::'


class SiteLinks(Processor):
    "Insert the line of links under the title."

    def begin(self):
        from nbdev.processors import mk_cell

        cfg, path = get_config(), Path(self.nb.path_)
        if not path.is_absolute():
            path = Path(cfg.config_path) / path
        name = path.relative_to(cfg.nbs_path).as_posix()
        self.nb.cells.insert(1, mk_cell(page_links(name, cfg.git_url, cfg.branch), 'markdown'))


_string = re.compile(r"""^(\s+(?:\w+=|'[^']*': )?)(f?)(['"])((?:(?!\3)[^\\])*)\3(,?)$""")  # alone on its line


def _halves(line):
    "A long line that is one string, as two lines; as it was where it cannot be cut outside of braces."
    m = _string.match(line)
    cuts = [i for i, x in enumerate(m[4]) if x == ' '] if m else []
    cuts = [i for i in cuts if m[4][:i].count('{') == m[4][:i].count('}') and len(m[1]) + i < FITS - 6]
    if len(line) <= FITS or not cuts:
        return line
    start, end = m[4][: cuts[-1] + 1], m[4][cuts[-1] + 1 :]
    indent = ' ' * (len(m[1]) - len(m[1].lstrip()))
    return f'{m[1]}{m[2]}{m[3]}{start}{m[3]}\n{indent}{m[2]}{m[3]}{end}{m[3]}{m[5]}'


def _formatted(code):
    "Code in lines that fit, as ruff breaks them; as it was where that would change what it does."
    where = Path(__file__).resolve().parents[1]
    command = [
        sys.executable,
        '-m',
        'ruff',
        'format',
        '--quiet',
        f'--line-length={FITS}',
        '--stdin-filename',
        'cell.py',
        '-',
    ]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=where)
    if 'No module named' in done.stderr:
        raise ModuleNotFoundError('ruff breaks long lines of code: pip install "lus_fastai[docs]"')
    if done.returncode:  # a magic
        return code
    whole = done.stdout.rstrip('\n')
    cut = '\n'.join(map(_halves, whole.splitlines()))
    try:
        same = ast.dump(ast.parse(cut)) == ast.dump(ast.parse(whole))
    except SyntaxError:
        same = False
    return cut if same else whole


def fit_code(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Break the lines of code that are too long for the page."
    if cell.cell_type != 'code' or not any(len(x) > FITS for x in cell.source.splitlines()):
        return
    options, code = split_options(cell.source)
    if code and options.get('echo') != 'false':
        head = cell.source[: cell.source.index(code)]
        cell.source = head + _formatted(code)


_nested = re.compile(r'\[([^\[\]]*)\[(`[^`]+`)\]\(https?://[^)]*\)([^\[\]]*)\]\(')


def unlink_private(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Take away the links that nbdev makes of private names, which no page documents, and of names in a link."
    if cell.cell_type == 'markdown':
        text = re.sub(r'\[(`_\w+`)\]\(https?://[^)]*\)', r'\1', cell.source)
        cell.source = _nested.sub(r'[\1\2\3](', text)


def name_pictures(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Give a picture its caption as alternative text: Quarto gives one that stands alone a caption only."
    if cell.cell_type == 'markdown':
        cell.source = re.sub(r'^!\[([^\]"]+)\]\(\S+\)$', r'\g<0>{fig-alt="\1"}', cell.source, flags=re.M)


def steady_defaults(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Show a default that is an object by its type, not its address; and fastai's two dozen events in a word."
    for o in cell.get('outputs', []):
        text = o.get('data', {}).get('text/markdown')
        if text:
            text = text if isinstance(text, str) else ''.join(text)
            text = re.sub(r'<(?:\w+\.)*(\w+) object at 0x[0-9a-f]+>', r'\1()', text)
            text = re.sub(
                r'\*, (?:(?:before|after)_\w+:NoneType=None[,\s]*)+', '**events\n', text
            )  # fastai's
            o['data']['text/markdown'] = text.replace('__main__.', '')


_entry = re.compile(r'^show_doc\((?:\w+\.)*(\w+)\.(\w+)[,)]', re.M)


def hide_private(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Take away the entries of methods that say nothing: of private classes, of printing, without a docstring."
    m = _entry.search(cell.source) if cell.cell_type == 'code' else None
    if not m:
        return
    said = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in cell['outputs'])
    silent = said and not re.search(r'^\*[^*\s]', said, re.M)
    if m[1].startswith('_') or m[2] in ('__repr__', '__str__') or silent:
        cell.source, cell['outputs'] = '#| include: false', []


HEAD, HEAD_OF_MANY = 34, 24  # characters of a row's head in one line: usually, and beside MANY columns
MANY, HEAD_OF_INTERVALS = 4, 14  # and beside more than so many columns that have intervals


_head = re.compile(r'<th([^>]*)>([^<]+)</th>')
_interval = re.compile(r'(\[[-+]?[\d.]+,) ([-+]?[\d.]+\])')  # such as [0.58, 0.76]


def _broken(width, head):
    "The head of a row or a column in lines that are not wider."
    lines = textwrap.wrap(head[2], width, break_long_words=False, break_on_hyphens=False)
    return f'<th{head[1]}>{"<br>".join(lines)}</th>' if len(head[2]) > width else head[0]


def break_heads(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Break the long heads of a table's rows, which would leave no room for its numbers, and no interval."

    for o in cell.get('outputs', []):
        page = o.get('data', {}).get('text/html')
        if page:
            page = page if isinstance(page, str) else ''.join(page)
            columns = max(row.count('<td') for row in page.split('<tr'))
            width = HEAD if columns < MANY else HEAD_OF_MANY
            if columns > MANY and _interval.search(page):
                width = HEAD_OF_INTERVALS
            page = _head.sub(partial(_broken, width), page)
            o['data']['text/html'] = _interval.sub('\\1\N{NO-BREAK SPACE}\\2', page)


_SCALAR = re.compile(r'\bnp\.(?:float|u?int|bool|str)\w*\(([^()]*)\)')
_SERIES = re.compile(r'\n(?:Name: [^\n]*, |Length: \d+, )*dtype: \w+\Z')


def plain_outputs(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Show numbers without NumPy's types, a Series without its last line, and no object beside its figure."
    outputs = cell.get('outputs', [])
    drawn = any('image/png' in o.get('data', {}) for o in outputs)
    for o in list(outputs):
        data = o.get('data', {})
        if list(data) != ['text/plain']:
            continue
        text = data['text/plain'] if isinstance(data['text/plain'], str) else ''.join(data['text/plain'])
        if drawn and re.fullmatch(r'<[\w.]+[^\n]*>', text):
            outputs.remove(o)
        data['text/plain'] = _SERIES.sub('', _SCALAR.sub(r'\1', text))


def is_test(
    node,  # a statement, of ast
) -> bool:
    "Whether a statement does nothing but assert."
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = getattr(node.value.func, 'id', getattr(node.value.func, 'attr', ''))
        return name.startswith(('test_', 'expect_fail', 'assert_'))
    if isinstance(node, ast.With):
        calls = [i.context_expr for i in node.items if isinstance(i.context_expr, ast.Call)]
        expected = any(getattr(c.func, 'id', '') in ('expect_fail', 'ExceptionExpected') for c in calls)
        return expected or all(map(is_test, node.body))
    return isinstance(node, (ast.For, ast.If)) and all(map(is_test, node.body))


def helper_fold(
    body: list,  # statements of a cell, of ast
) -> str:  # what the fold says, or '' where something else is defined, or nothing
    "Whether a cell defines private helpers alone, or what draws: names, and what the first one does."
    defined = [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    rest = [n for n in body if n not in defined and not isinstance(n, (ast.Assign, ast.Expr))]
    names = [n.name for n in defined]
    if not names or rest or not all(n.startswith('_') or n.startswith('plot_') for n in names):
        return ''
    does = next((text for n in defined if (text := ast.get_docstring(n))), '')
    return f'{", ".join(names)}: {does}'.rstrip(': ')


def folding(
    code: str,  # of a cell, without its options
    outputs: list,  # of the cell
) -> str:  # what the fold says, or '' where the code stays open
    "Whether a cell is a long test or helper, the code of a plot or an exercise, or very long."
    lines = len(code.splitlines())
    if any('image/png' in o.get('data', {}) for o in outputs):
        return 'Code of the figure' if lines > LONG_PLOT else ''
    try:
        body = ast.parse(code).body
    except SyntaxError:  # a magic or a shell command
        return ''
    if body and not outputs and lines >= LONG_TEST and all(map(is_test, body)):
        return 'Tests'
    if lines > LONG_HELPER and (summary := helper_fold(body)):
        return summary
    asks = next((k for k in ('Exercise', 'Quiz') if re.search(rf'^\w+ = {k}\($', code, re.M)), '')
    return f'Code of the {asks.lower()}' if asks else 'Code' if lines > LONG else ''


def fold_code(
    cell,  # of a notebook that nbdev has processed; changed in place
):
    "Fold long tests, helpers, plots and exercises, but where the cell says otherwise; name each fold."
    if cell.cell_type != 'code':
        return
    options, code = split_options(cell.source)
    if options.get('code-fold') == 'false' or 'code-summary' in options or options.get('echo') == 'false':
        return
    drawn = any('image/png' in o.get('data', {}) for o in cell.get('outputs', []))
    asked = 'code-fold' in options
    summary = 'Code of the figure' if asked and drawn else folding(code, cell.get('outputs', []))
    if summary:
        fold = '' if asked else '#| code-fold: true\n'
        cell.source = f'{fold}#| code-summary: {json.dumps(summary)}\n{cell.source}'
