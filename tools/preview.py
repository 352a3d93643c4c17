"""Every page of the site as HTML without the Quarto program, and a browser that looks at them.

Pandoc (the package pypandoc_binary) makes the pages from what nbdev and `docs.py derive` wrote; the layout
follows Quarto's, with the columns that _quarto.yml asks for, and the site's own styles.css.
"""

import base64
import html
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import yaml
from docs_cells import split_options
from docs_checks import cells_of, is_away, joined

tools = Path(__file__).resolve().parent
WIDTHS = 1280, 390  # pixels of a desktop's window and of a phone
PATIENCE = 300_000  # milliseconds: a long page takes half a minute on a busy machine


def _fence(text, kind):
    ticks = '`' * max(3, 1 + max((len(m) for m in re.findall(r'`+', text)), default=0))
    return f'{ticks}{{{kind}}}\n{text}\n{ticks}'


def _figure(data, o, options):
    "An image as Quarto shows it: caption below, alternative text, its own size."
    kind = next(k for k in ('image/png', 'image/svg+xml', 'image/jpeg') if k in data)
    size = o.get('metadata', {}).get(kind, {}).get('width')
    text = joined(data[kind])
    coded = text.replace('\n', '') if kind != 'image/svg+xml' else base64.b64encode(text.encode()).decode()
    alt, caption = (options.get(k, '').strip('"\'') for k in ('fig-alt', 'fig-cap'))
    width = f' width="{size}"' if size else ''
    image = f'<img src="data:{kind};base64,{coded}" alt="{html.escape(alt)}"{width}>'
    below = f'<figcaption>{html.escape(caption)}</figcaption>' if caption else ''
    return _fence(f'<figure class="figure">{image}{below}</figure>', '=html')


def output_markdown(
    o: dict,  # an output of a cell
    options: dict,  # of the cell
) -> str:  # Markdown
    "One output, in the richest form that a page can hold."
    if o['output_type'] == 'stream':
        text = joined(o['text']).rstrip()
        shown = text if options.get('output') == 'asis' else _fence(text, '.output')
        return '' if o.get('name') == 'stderr' else shown
    if o['output_type'] == 'error':
        return _fence(f"{o['ename']}: {o['evalue']}", '.output')
    data = o.get('data', {})
    if any(k.startswith('image/') for k in data):
        return _figure(data, o, options)
    if 'text/markdown' in data:
        return joined(data['text/markdown'])
    if 'text/html' in data:
        return _fence(joined(data['text/html']), '=html')
    return _fence(joined(data.get('text/plain', '')), '.output')


def cell_markdown(
    c: dict,  # a cell of a notebook that nbdev has processed
) -> str:  # Markdown
    "A cell: its text, or its code and outputs, folded as its options say."
    source = joined(c['source'])
    if c['cell_type'] != 'code':
        return source
    options, code = split_options(source)
    if options.get('include') == 'false':
        return ''
    shown = _fence(code, '.python') if code and options.get('echo') != 'false' else ''
    fold = options.get('code-fold', 'false')
    if shown and fold in ('true', 'show'):
        summary = html.escape(yaml.safe_load(options.get('code-summary', 'Code')))
        opened = ' open' if fold == 'show' else ''
        start = f'<details class="code-fold"{opened}><summary>{summary}</summary>'
        shown = f"{_fence(start, '=html')}\n\n{shown}\n\n{_fence('</details>', '=html')}"
    outs = [] if options.get('output') == 'false' else c.get('outputs', [])
    parts = [m for o in outs if (m := output_markdown(o, options))]
    if parts and options.get('output') != 'asis':
        parts = ['::: {.cell-output .cell-output-display}', *parts, ':::']
    if label := options.get('label'):
        parts = [f'::: {{#{label}}}', *parts, ':::']
    return '\n\n'.join(['::: {.cell}', shown, *parts, ':::'])


def numbered(
    text: str,  # of a page, in Markdown
) -> str:  # with "Figure 1: " before captions, and links in place of @fig-...
    "Number the figures that have a label, and refer to them, as Quarto does."
    number = {name: i for i, name in enumerate(re.findall(r'^::: \{#(fig-[\w-]+)\}$', text, re.M), 1)}
    caption = re.compile(r'^::: \{#(fig-[\w-]+)\}$.*?<figcaption>', re.M | re.S)
    text = caption.sub(lambda m: f'{m[0]}Figure {number[m[1]]}: ', text)
    return re.sub(r'(?<![\w`\\])@(fig-[\w-]*\w)', lambda m: f'[Figure\u00a0{number[m[1]]}](#{m[1]})', text)


def page_source(
    path: Path,  # a processed notebook, or a .qmd file
) -> tuple:  # its front matter as a dictionary, and the Markdown below it
    "What Pandoc reads of a page."
    if path.suffix == '.ipynb':
        first, *cells = cells_of(path)
        front = yaml.safe_load(joined(first['source']).strip().strip('-'))
        return front, numbered('\n\n'.join(map(cell_markdown, cells)))
    _, front, text = path.read_text(encoding='utf-8').split('---', 2)
    return yaml.safe_load(front), text


def sections(
    contents: list,  # of a sidebar
    titles: dict,  # page -> title
) -> list:  # (section or None, [(page, title)]), in order
    "The sidebar, flattened."
    found = []
    for o in contents:
        if isinstance(o, dict) and 'section' in o:
            pages = [p for _, ps in sections(o['contents'], titles) for p in ps]
            found.append((o['section'], pages))
        else:
            page = o if isinstance(o, str) else o['href']
            text = o.get('text') if isinstance(o, dict) else None
            found.append((None, [(page, text or titles.get(page, page))]))
    return found


def to_html(
    address: str,  # of a link on a page of the sources
    page: str,  # the page, below nbs/
    home: str,  # address of the published site, without a slash at its end
) -> str:
    "Where a link leads within the preview."
    if address.startswith(home):  # links to documented names hold the whole address
        target = address[len(home) :].lstrip('/') or 'index.html'
        name, hash_, anchor = target.partition('#')
        return os.path.relpath(name, Path(page).parent.as_posix() or '.') + hash_ + anchor
    return address if is_away(address) else re.sub(r'\.(ipynb|qmd)(?=$|[#?])', '.html', address)


def _anchor(page, here, title, active=False):
    target = os.path.relpath(page, Path(here).parent.as_posix() or '.')
    mark = ' class="active" aria-current="page"' if active else ''
    return f'<a href="{re.sub(r"[.](ipynb|qmd)$", ".html", target)}"{mark}>{html.escape(title)}</a>'


class Site:
    "The pages, their titles and what stands around each of them."

    def __init__(
        self,
        root: Path,  # the project's folder; `docs.derive` has run
    ):
        self.root, self.nbs = root, root / 'nbs'
        read = {
            n: yaml.safe_load((self.nbs / n).read_text(encoding='utf-8'))
            for n in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml')
        }
        self.config, self.about = read['_quarto.yml'], read['nbdev.yml']['website']
        self.home, contents = self.about['site-url'], read['sidebar.yml']['website']['sidebar']['contents']
        titles = {}
        for p in [*self.nbs.rglob('*.ipynb'), *self.nbs.rglob('*.qmd')]:
            name = p.relative_to(self.nbs).as_posix()
            if p.suffix == '.ipynb':
                titles[name] = joined(cells_of(p)[0]['source']).split('\n')[0].lstrip('# ')
            else:
                titles[name] = page_source(p)[0]['title']
        self.sections = sections(contents, titles)
        self.order = [page for _, pages in self.sections for page, _ in pages]
        self.titles = titles

    def sidebar(self, page):
        "The list of pages; the section of the page is open."
        out = []
        for section, pages in self.sections:
            links = ''.join(f'<li>{_anchor(p, page, t, p == page)}</li>' for p, t in pages)
            if section is None:
                out.append(links)
            else:
                opened = ' open' if page in [p for p, _ in pages] else ''
                out.append(
                    f'<li><details{opened}><summary>{section}</summary><ul>{links}</ul></details></li>'
                )
        return f'<ul>{"".join(out)}</ul>'

    def navbar(self, page):
        "The links on top, menus opened out of them."
        out = []
        for o in self.config['website']['navbar']['left']:
            if 'menu' in o:
                links = ''.join(f'<li>{self._item(m, page)}</li>' for m in o['menu'])
                out.append(f'<details class="menu"><summary>{o["text"]}</summary><ul>{links}</ul></details>')
            else:
                out.append(self._item(o, page))
        return ''.join(out)

    def _item(self, o, page):
        if is_away(o['href']):
            return f'<a href="{o["href"]}">{o["text"]}</a>'
        return _anchor(o['href'], page, o['text'], o['href'] == page)

    def neighbours(self, page):
        "Links to the previous and the next page."
        if page not in self.order:
            return ''
        i = self.order.index(page)
        before = f'← {self.titles[self.order[i - 1]]}' if i else ''
        after = f'{self.titles[self.order[i + 1]]} →' if i + 1 < len(self.order) else ''
        left = _anchor(self.order[i - 1], page, before) if before else '<span></span>'
        right = _anchor(self.order[i + 1], page, after) if after else '<span></span>'
        return left + right


def render_page(
    site: Site,  # all pages
    page: str,  # below nbs/
    source: Path,  # of the page: a processed notebook or a .qmd file
    out: Path,  # folder of the preview
) -> Path:  # the HTML file
    "One page."
    import pypandoc

    front, text = page_source(source)
    to = (out / page).with_suffix('.html')
    to.parent.mkdir(parents=True, exist_ok=True)
    up = os.path.relpath(out, to.parent)
    width = site.config['format']['html']['grid']
    around = dict(
        sidebar=site.sidebar(page),
        navbar=site.navbar(page),
        neighbours=site.neighbours(page),
        up=up,
        site=site.about['title'],
        pagetitle=front['title'],
        footer=_footer(site),
    ) | {k.replace('-', ''): v for k, v in width.items()}
    options = [
        '--standalone',
        '--toc',
        '--toc-depth=3',
        '--mathml',
        f'--template={tools / "preview.template"}',
        '--wrap=none',
        f'--lua-filter={site.root / "words.lua"}',
    ]
    if (site.root / 'references.bib').is_file():
        options += [
            '--citeproc',
            f'--bibliography={site.root / "references.bib"}',
            '--metadata=link-citations',
        ]
    options += [f'--variable={k}={v}' for k, v in around.items()]
    head = yaml.safe_dump({k: front[k] for k in ('title', 'description', 'nocite') if k in front})
    page_html = pypandoc.convert_text(f'---\n{head}---\n\n{text}', 'html5', 'markdown', extra_args=options)
    links = re.compile(r'(<a\b[^>]*?\bhref=")([^"]+)(")')
    to.write_text(
        links.sub(lambda m: m[1] + to_html(m[2], page, site.home) + m[3], page_html), encoding='utf-8'
    )
    return to


def _footer(site):
    "The page's footer; its Markdown links become HTML."
    parts = site.config['website'].get('page-footer', {})
    texts = (
        re.sub(r'\[([^\]]+)\]\(([^)]+)\)', r'<a href="\2">\1</a>', parts.get(k, ''))
        for k in ('left', 'right')
    )
    return ''.join(f'<div>{t}</div>' for t in texts)


def render(
    root: Path,  # the project's folder; `docs.derive` has run
    sources: dict,  # page -> file that Pandoc reads
    out: Path,  # folder of the preview
) -> list:  # HTML files
    "The pages as HTML, with the style sheets and images that they need."
    site = Site(root)
    out.mkdir(parents=True, exist_ok=True)
    for f in (root / 'styles.css', tools / 'preview.css'):
        shutil.copyfile(f, out / f.name)
    for f in (*site.nbs.rglob('*.png'), *site.nbs.rglob('*.svg')):
        to = out / f.relative_to(site.nbs)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f, to)
    return [render_page(site, page, source, out) for page, source in sources.items()]


class _Anchors(HTMLParser):
    "Identifiers and links of a page."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get('id')} - {None}
        if tag == 'a' and attrs.get('href'):
            self.links.append(attrs['href'])


def anchor_faults(
    out: Path,  # folder of a preview of every page
) -> list:  # sentences
    "Links within the site that lead nowhere, to a page or to a place on it."
    pages = {p: _Anchors(p.read_text(encoding='utf-8')) for p in sorted(out.rglob('*.html'))}
    faults = []
    for page, parsed in pages.items():
        for link in dict.fromkeys(parsed.links):
            name, _, anchor = unquote(link).partition('#')
            if re.match(r'[a-z][a-z0-9+.-]*:|//', name, re.I):
                continue
            target = (page.parent / name).resolve() if name else page
            if target not in pages and not target.is_file():
                faults.append(f'{page.relative_to(out)}: links to {link}, which is no page')
            elif anchor and target in pages and anchor not in pages[target].ids:
                faults.append(f'{page.relative_to(out)}: links to {link}, and that page has no such place')
    return faults


LOOK = """() => {
  const closed = [...document.querySelectorAll('main details:not([open])')]
  closed.forEach(e => e.open = true)
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth
  const code = [...document.querySelectorAll('pre.sourceCode, div.sourceCode')]
  const scrolls = code.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))
  const images = [...document.querySelectorAll('main img')].filter(e => !e.alt).length
  const head = e => e.innerText.trim().replace(/\\s+/g, ' ').slice(0, 60)
  const large = [...document.querySelectorAll('main table')].filter(e => e.scrollWidth > e.clientWidth + 1)
  const tables = large.map(e => `${head(e)} (${e.scrollWidth - e.clientWidth} pixels)`)
  closed.forEach(e => e.open = false)
  return {wide, scrolls, images, tables: window.innerWidth < 1000 ? [] : tables}
}"""


def browser_faults(
    pages: list,  # HTML files
    widths: tuple = WIDTHS,  # of the window, pixels
    shots: Path = None,  # folder for pictures of the pages, in the preview's folder; None: none are taken
) -> list:  # sentences
    "What a reader stumbles over: what scrolls sideways (a table may on a phone), a request to elsewhere."
    import playwright.sync_api as api

    faults, chromium = [], shutil.which('chromium') or shutil.which('chromium-browser')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        for width in widths:
            page, asked = _watched(browser, width)
            for file in pages:
                asked.clear()
                page.goto(file.as_uri(), timeout=PATIENCE)
                where = f'{file.parent.name}/{file.name} at {width} pixels'
                faults += [f'{where}: {x}' for x in _seen(page.evaluate(LOOK), asked)]
                if shots:
                    to = shots / shot_name(file.relative_to(shots.parent), width)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=to, full_page=True, timeout=PATIENCE)
        browser.close()
    return faults


def shot_name(
    page: Path,  # below the preview's folder, such as data/folds.html
    width: int,  # of the window, pixels
) -> str:  # such as 'data/folds-390.png'
    "Where the picture of a page is, below the folder of pictures."
    return f'{page.with_suffix("").as_posix()}-{width}.png'


def _watched(browser, width):
    "A new page of a browser, and the list of what it asks for."
    page, asked = browser.new_page(viewport=dict(width=width, height=900)), []
    page.on('request', lambda r: asked.append(r.url))
    page.on('pageerror', lambda e: asked.append(f'error: {e}'))
    return page, asked


def _seen(found, asked):
    "Sentences for what the script in a page has found, and for what the page asked for."
    away = [a for a in asked if not a.startswith(('file:', 'data:', 'blob:'))]
    return (
        [f'scrolls sideways by {found["wide"]} pixels'] * (found['wide'] > 0)
        + [f'a code block scrolls sideways: {s!r}' for s in found['scrolls']]
        + [f'a table scrolls sideways: {t}' for t in found['tables']]
        + [f'{found["images"]} images without alternative text'] * (found['images'] > 0)
        + [f'asks for {a}' for a in away]
    )
