"""The pages of results: one summary, then a page for each paper, made from the files of results/."""

import html
import json
import math
import re
from pathlib import Path

from docs_names import DATA, PAGES, RUNS, TABLES, protocol_title, shown_name

LONG = 24  # characters of a row's name that leave room for one score less
PAGE = 93  # characters of a table that fit the page
PAPER = ' (paper: '  # before their number
CLAIM = 30  # characters of a claim that have room beside what is said of it
COLUMNS = 4  # scores beside one another that fit the page
FEW = '\N{NO-BREAK SPACE}†'  # beside what was trained too little
STORED = {  # the file that each paper's claims are judged by: its run on the data that come closest
    'gare': 'gare-pocus',
    'cheng_lam': 'cheng_lam-phantom',
    'arora': 'arora-pocus',
    'uscl': 'uscl-real',
    'merand': 'merand-real',
}
PAPER_PAGE = """\
A cell is a score with its 95 % interval, a bootstrap over patients; [the chapter](../papers/{}.ipynb)
explains rows and scores. Tables after the first of a protocol are folded. The *split* is a hash of which
patient is in which fold: equal hashes, equal splits. A *quick run* is a small demonstration: it
shows that the code runs, not what is true.
"""
SUMMARY = """\
A claim is judged by the *paired difference* over patients, under a protocol that shares no patient between
training and test and picks nothing on the test set; by [rule](papers/experiment.ipynb), not by judgement.
*Confirmed*: the interval is above 0. *Reversed*: it is below. *Not seen*: it holds 0 and leaves out what the
paper reports.
*Cannot tell*: it holds both, a row was trained too little, a first step saw simulated radiographs in place of
the paper's (Merand), or nothing was measured.
"""
DIFFERENCES = (
    'The score of the one minus that of the other, with its 95 % interval: each resample draws the same '
    'patients for both.'
)
SPLITS = """\
## One simple model, split by the rules of each

Accuracy of a linear layer on frozen features, on POCUS ([how](papers/splits.ipynb)): by published rules of
splitting and of choosing the epoch, and by patient with the last epoch.
"""


def number_text(
    value,  # a number, or None
    interval=None,  # its ends, or None
    sign: str = '',  # '+' for differences
) -> str:  # such as '0.685 [0.58, 0.76]'
    "A number with its interval, for a table: a line breaks between them, never within the interval."
    if value is None:
        return '–'
    count = interval is None and abs(value) > 1 and float(value).is_integer()
    text = f'{value:{sign},.0f}' if count or abs(value) >= 100 else f'{value:{sign}.3f}'
    if isinstance(interval, (list, tuple)) and None not in interval:
        digits = 2 if max(map(abs, interval)) >= 0.1 else 3
        text += ' [' + ',\N{NO-BREAK SPACE}'.join(f'{x:{sign}.{digits}f}' for x in interval) + ']'
    return text


def no_tags(
    text,  # Markdown, such as a docstring
) -> str:
    "Markdown for a cell of a table, without HTML and citations; code stays code."
    parts = re.split(r'(`[^`]*`)', str(text).replace('|', '\\|'))  # code stands at odd places
    parts[::2] = [p.replace('<', '&lt;').replace('@', '\\@') for p in parts[::2]]
    return ''.join(parts)


def plain(
    text,  # of a file of results
) -> str:
    "Text that Markdown takes as it is: no tag, link, image, formula, code or attribute; bold is kept."
    line = re.sub(r'\s*[\r\n]\s*', ' ', str(text))
    return re.sub(r'([\\`$\[\]{}|@])', r'\\\1', line).replace('<', '&lt;')


def code(
    text,  # of a file of results
) -> str:
    "Text as code."
    return '`' + re.sub(r'\s*[`\r\n]\s*', ' ', str(text)) + '`'


def heading(
    text,  # of a file of results
) -> str:
    "Text as a title in the head of a page."
    return json.dumps(plain(text), ensure_ascii=False)


def table(
    head: list,  # of columns
    rows: list,  # of lists of texts
    least: int = 13,  # characters of the first column, where it has so many
) -> list:  # lines of Markdown
    "A Markdown table; columns are as wide as their longest text, the first as what they leave of the page."
    widths = [min(40, max(map(_width, column))) for column in zip(head, *rows)]
    widths[0] = min(widths[0], max(least, PAGE - sum(w + 2 for w in widths[1:])))
    out = ['| ' + ' | '.join(map(plain, head)) + ' |', '|' + '|'.join('-' * (w + 2) for w in widths) + '|']
    return out + ['| ' + ' | '.join(map(plain, r)) + ' |' for r in rows] + ['']


def _width(text):
    "Characters of a cell in one line; theirs goes under ours, and so may an interval of three digits."
    ours = str(text).split(PAPER)[0]
    return min(len(ours), 18 + 3 * (ours[0] in '+-')) if ours.endswith(']') else len(ours)


def folded(
    summary: str,  # what the fold says
    lines: list,  # of Markdown
) -> list:  # lines
    "Details to open."
    return ['<details>', f'<summary>{plain(html.escape(summary))}</summary>', '', *lines, '</details>', '']


def portions(
    o: list,
    most: int,  # in a part
) -> list:  # of lists
    "A list in as few parts as it takes, of nearly the same length."
    parts = math.ceil(len(o) / most)
    return [o[i * len(o) // parts : (i + 1) * len(o) // parts] for i in range(parts)]


def without_empty(
    head: list,  # of columns
    rows: list,  # of lists of texts
) -> tuple:  # head and rows
    "Only the columns that say something in some row; the first is kept."
    kept = [i for i in range(len(head)) if not i or any(r[i] not in ('', '–') for r in rows)]
    return [head[i] for i in kept], [[r[i] for i in kept] for r in rows]


def pivot(
    cells: list,  # of one table of one protocol
    marked: tuple = (),  # rows that were trained too little
) -> list:  # lines of Markdown
    "Rows against scores that have a number, with its interval; the longer of both goes down the page."
    scored = {c['column'] for c in cells if c['ours'] is not None}
    cells = [c for c in cells if c['column'] in scored]
    rows, columns = ([*dict.fromkeys(c[k] for c in cells)] for k in ('row', 'column'))
    text = {}
    for c in cells:
        theirs = '' if c.get('theirs') is None else f'{PAPER}{c["theirs"]:.3f})'
        text[c['row'], c['column']] = number_text(c['ours'], c.get('interval')) + theirs
    shown = {r: shown_name(r) + FEW * (r in marked) for r in rows}
    if len(columns) > COLUMNS and len(rows) <= COLUMNS:
        return table(
            ['score', *shown.values()],
            [[shown_name(c), *(text.get((r, c), '') for r in rows)] for c in columns],
        )
    out = []
    most = COLUMNS - (max(map(len, shown.values()), default=0) > LONG)
    for some in portions(columns, most):
        full = [r for r in rows if any((r, c) in text for c in some)]
        head = ['', *map(shown_name, some)]
        out += table(head, [[shown[r], *(text.get((r, c), '') for c in some)] for r in full])
    return out


def undertrained(
    results: dict,  # of a file
) -> dict:  # (protocol, row) -> reasons, one a training
    "Rows of which some training was too short to tell, by the rule of the package."
    short = {}
    for t in results.get('trainings', {}).values():
        if t['reasons']:
            short.setdefault((t['protocol'], t['row']), []).append('; '.join(t['reasons']))
    return short


def protocol_section(
    results: dict,  # of a file
    name: str,  # of the protocol
    paper: str,  # its module
) -> list:  # lines of Markdown
    "A protocol in words, its first table, and the others folded."
    own = [c for c in results.get('cells', []) if c.get('protocol', '') == name]
    about = results.get('protocols', {}).get(name, {})
    marked = tuple(row for protocol, row in undertrained(results) if protocol == name)
    out = [
        f'### {plain(protocol_title(paper, name))}',
        '',
        f"{plain(sentence(about.get('description', '')))} In the file this is protocol {code(name)}, "
        f"split {code(about.get('split_hash', '?'))}.",
        '',
    ]
    for i, t in enumerate(dict.fromkeys(c.get('table', '') for c in own)):
        lines = pivot([c for c in own if c.get('table', '') == t], marked)
        title = capital(TABLES.get(t, t))
        heading = [f'**{plain(title)}**' + ' († trained too little)' * any('†' in x for x in lines), '']
        out += heading + lines if not i else folded(title, lines)
    return out


def capital(text: str) -> str:
    "Text that begins with a capital."
    return text[:1].upper() + text[1:]


def sentence(
    text: str,  # such as the description of a protocol
) -> str:
    "Text as a sentence."
    return capital(text).rstrip('.') + '.' if text else text


def difference_section(
    results: dict,  # of a file
    paper: str,  # its module
) -> list:  # lines of Markdown
    "Paired differences, a fold for each protocol; rows that were trained too little are marked."
    short, out = undertrained(results), []
    for name in dict.fromkeys(d['protocol'] for d in results.get('differences', [])):
        own = [d for d in results['differences'] if d['protocol'] == name]
        cells = []
        for d in own:
            mark = FEW * any((name, d[k]) in short for k in 'ab')
            text = number_text(d['value'], (d['low'], d['high']), '+') + mark
            row = f'{shown_name(d["a"])} minus {shown_name(d["b"])}'
            cells.append(dict(row=row, column=shown_name(d['column']), text=text))
        rows, columns = ([*dict.fromkeys(c[k] for c in cells)] for k in ('row', 'column'))
        text = {(c['row'], c['column']): c['text'] for c in cells}
        for some in portions(columns, COLUMNS - 1):
            lines = [
                [r, *(text.get((r, c), '') for c in some)] for r in rows if any((r, c) in text for c in some)
            ]
            title = f'{protocol_title(paper, name)} – {", ".join(some)}'
            out += folded(title, table(['paired difference', *some], lines))
    return ['### Paired differences', '', DIFFERENCES, '', *out] if out else []


def remarks(
    results: dict,  # of a file
    paper: str,  # its module
) -> list:  # lines of Markdown
    "What was trained too little, apart or not at all."
    out = [
        f'- Trained too little: {plain(row)}, {plain(protocol_title(paper, protocol))} '
        f"({len(why)} training{'s' * (len(why) > 1)}; {plain(why[0])})."
        for (protocol, row), why in undertrained(results).items()
    ]
    if len(builds := distinct_builds(results)) > 1:
        apart = [
            f"{', '.join(b['trainings'])}: torch {b['torch']}, {b['device']}, {b['precision']}"
            for b in builds
        ]
        out.append(f"- Trained apart: {plain('; '.join(apart))}.")
    if results.get('not_run'):
        out.append(f"- Not run: {plain('; '.join(results['not_run']))}.")
    return folded(f'What to know of the trainings ({len(out)} remarks)', [*out, '']) if out else []


def distinct_builds(
    results: dict,  # of a file
) -> list:  # of builds, each with all of its trainings
    "What trained what; builds that differ by the spelling of a device alone are one."
    found = []
    for build in results.get('builds', []):
        about = {k: v for k, v in build.items() if k != 'trainings'}
        about['device'] = _device(about['device'])
        same = next((b for b in found if {**b, 'trainings': 0} == {**about, 'trainings': 0}), None)
        if same is None:
            found.append(dict(about, trainings=list(build['trainings'])))
        else:
            same['trainings'] += build['trainings']
    return found


def run_section(
    results: dict,  # of a file
    stem: str,  # of the file's name
) -> list:  # lines of Markdown
    "One file: what was typed, its protocols, its differences."
    r, paper = results, module_of(stem)
    data = r.get('data', '?')
    special = [x for x in (RUNS.get(stem), 'quick run' * stem.endswith('-quick')) if x]
    out = [f"## Data: {plain(', '.join([DATA.get(data, data), *special]))}", '']
    out += [*command_block(r), f'{run_facts(r)} Every number is in {code(f"results/{stem}.json")}.', '']
    if changed := changed_settings(r, paper):
        names = ', '.join(map(code, changed))
        out += [f'Settings of this command that have changed since or are new: {names}.', '']
    for name in dict.fromkeys(c.get('protocol', '') for c in r.get('cells', [])):
        out += protocol_section(r, name, paper)
    return out + difference_section(r, paper) + remarks(r, paper)


def command_block(
    results: dict,  # of a file
) -> list:  # lines of Markdown
    "What was typed, as a block of code: a long command wraps there."
    return ['```sh', code(results.get('command', '?')).strip('`'), '```', '']


def run_facts(
    results: dict,  # of a file
) -> str:  # Markdown
    "How long it took, where, and with which seeds."
    hours = results.get('hours', 0)
    minutes = max(1, round(60 * hours))
    spent = f'{hours:.1f} hours' if hours >= 0.1 else f"{minutes} minute{'s' * (minutes != 1)}"
    took = f'{spent} of training' if hours else 'no network was trained'
    seeds = list(map(str, results.get('seeds', [])))
    phantom = results.get('versions', {}).get('phantom', '1')
    return (
        f"{capital(took)} on {plain(_device(results.get('device', '?')))}; "
        f"seed{'s' * (len(seeds) != 1)} {plain(', '.join(seeds))}; version {plain(phantom)} of the phantom."
    )


def _device(text):
    "A device, one thread as newer files have it."
    return re.sub(r'\b1 threads$', '1 thread', text)


def changed_settings(
    results: dict,  # of a file
    paper: str,  # its module
) -> list:  # names, sorted; empty where the command or its settings are not known
    "Settings that the same command would take otherwise today."
    from dataclasses import asdict
    from importlib import import_module

    from lus_fastai.cli import _settings_of

    typed = re.fullmatch(rf'lus_repro {paper}( [^"]*)?(?:"(.*)")?', results.get('command', ''))
    module = typed and import_module(f'lus_fastai.papers.{paper}')
    if not hasattr(module, 'DEFAULT'):
        return []
    text = typed[2] or ('QUICK' if '--quick' in (typed[1] or '') else '')
    today = json.loads(json.dumps(asdict(_settings_of(module, text))))
    changed = set()
    for protocol in results['protocols'].values():
        then = protocol.get('settings', today)
        changed |= {k for k in {*then, *today} if k not in then or k not in today or then[k] != today[k]}
    return sorted(changed)


def module_of(
    stem: str,  # of a file of results
) -> str:  # such as 'gare'
    "The paper's module."
    return 'sim_to_real' if stem.startswith('sim-to-real') else stem.split('-')[0]


def read_all(
    folder: Path,  # holds one JSON file a run
) -> dict:  # stem -> results, sorted
    "Every file of results."
    return {f.stem: json.loads(f.read_text(encoding='utf-8')) for f in sorted(Path(folder).glob('*.json'))}


def paper_pages(
    runs: dict,  # from read_all
) -> dict:  # paper's module -> text of a Quarto page
    "A page for each paper: its whole runs, then its quick ones."
    pages = {}
    for name, stems in stems_of(runs).items():
        out = [
            '---',
            f'title: {heading(page_title(runs, name) + ": results")}',
            'description: Every number of the stored runs, by protocol',
            '---',
            '',
            PAPER_PAGE.format(name),
        ]
        for s in stems:
            out += run_section(runs[s], s)
        pages[name] = '\n'.join(out).rstrip() + '\n'
    return pages


def stems_of(
    runs: dict,  # from read_all
) -> dict:  # paper's module -> stems, whole runs before quick ones
    "The files of each paper."
    papers = {}
    for stem in sorted(runs, key=lambda s: (s.endswith('-quick'), len(s))):
        papers.setdefault(module_of(stem), []).append(stem)
    return {name: papers[name] for name in sorted(papers)}


def page_title(
    runs: dict,  # from read_all
    name: str,  # paper's module
) -> str:
    "What a paper's page of results is called."
    return PAGES.get(name) or runs[stems_of(runs)[name][0]].get('paper', name)


def find_value(
    results: dict,  # of a file
    row: str,
    column: str,
    protocol: str,
    table: str = None,  # None: whichever has it
) -> dict:  # the cell, or None
    "The cell of a row and a score under a protocol."
    wanted = dict(row=row, column=column, protocol=protocol) | (dict(table=table) if table else {})
    return next((c for c in results['cells'] if all(c.get(k) == v for k, v in wanted.items())), None)


def split_rows(
    results: dict,  # of lus_repro splits
) -> list:  # of rows of a table: what is split and by whom, and four numbers as text
    "What each published rule of splitting is worth to one simple model."
    cells, rows = {(c['row'], c['column']): c for c in results['cells']}, []
    for rule, protocol in results['protocols'].items():
        published, honest, worth = (cells[rule, c] for c in ('as published', 'by patient', 'worth'))
        reported = '–' if published['theirs'] is None else f"{published['theirs']:.3f}"
        texts = [number_text(*_value(c)) for c in (published, honest)]
        rows.append([protocol['description'], reported, *texts, number_text(*_value(worth), '+')])
    return rows


def _value(cell):
    "A number and its interval."
    return cell['ours'], cell['interval']


def _both(results, claim, protocol):
    "The two rows of a claim under a protocol, as text."
    cells = [protocol and find_value(results, row, claim.column, protocol) for row in (claim.a, claim.b)]
    return '–' if None in cells or '' in cells else ' against '.join(f"{c['ours']:.3f}" for c in cells)


def claim_section(
    results: dict,  # of a file
    claims: list,  # of the paper
    name: str,  # of the paper's module
) -> list:  # lines of Markdown
    "A paper's claims, those that were measured on top, the others folded."
    from importlib import import_module

    from lus_fastai.papers.experiment import verdicts

    own = getattr(import_module(f'lus_fastai.papers.{name}'), 'claims_table', None)  # with rules of its own
    judged = own(results) if own else verdicts(results, claims)
    few, open_, closed = undertrained(results), [], []
    for claim, (_, v) in zip(claims, judged.iterrows()):
        same, honest = _both(results, claim, claim.as_theirs), _both(results, claim, claim.protocol)
        short = ', trained too little' * any((claim.protocol, r) in few for r in (claim.a, claim.b))
        said = f"**{v['verdict']}**{short}"
        gap = (v['difference, honest'] or '–').replace(' ', '\N{NO-BREAK SPACE}')
        row = [claim.text, claim.theirs or '–', same, honest, gap, said]
        (open_ if v['difference, honest'] or v['difference, their protocol'] else closed).append(
            (row, claim.needs)
        )
    data = plain(DATA.get(results['data'], results['data']))
    about = f'Data: {data} ([every number](results/{name}.qmd), [chapter](papers/{name}.ipynb)).'
    head = ['claim', 'theirs', 'ours, their protocol', 'ours, honest', 'paired difference, honest', 'verdict']
    out = [f"## {plain(results['paper'])}", '', about, '']
    out += (
        table(*without_empty(head, [r for r, _ in open_]), CLAIM)
        if open_
        else ['No difference that tests a claim is stored yet.', '']
    )
    if closed:
        head = ['claim', 'theirs', 'it would take']
        lines = table(*without_empty(head, [[*r[:2], n or 'the run'] for r, n in closed]))
        out += folded(f'Cannot tell: claims that no stored difference tests ({len(closed)})', lines)
    return out


def summary_page(
    runs: dict,  # from read_all
) -> str:  # a Quarto page
    "For each paper: claims, their numbers, ours, the paired difference, the verdict."
    from importlib import import_module

    out = [
        '---',
        'title: Results',
        'description: What five papers claim, and what an honest split leaves of it',
        '---',
        '',
        SUMMARY,
    ]
    if 'splits-pocus' in runs:
        head = ['rule', 'they report', 'by the rule', 'by patient', 'paired difference']
        out += [SPLITS, *table(head, split_rows(runs['splits-pocus']))]
    for name, stem in STORED.items():
        module = import_module(f'lus_fastai.papers.{name}')
        claims = module.arora_claims() if name == 'arora' else module.CLAIMS
        out += claim_section(runs[stem], claims, name) if stem in runs else []
    others = [n for n in paper_pages(runs) if n not in STORED]
    links = [f'- [{plain(page_title(runs, n))}](results/{n}.qmd)' for n in others]
    return '\n'.join([*out, '## Beyond the papers', '', *links]).rstrip() + '\n'
