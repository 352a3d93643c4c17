"""The gallery's page: a thumbnail, a title and a line for each example of nbs/gallery."""

import base64
import json
from pathlib import Path

HEAD = """---
title: Gallery
description: One figure each, in a dozen lines
toc: false
---

Each page is a notebook: open it in Colab and change a number.
"""


def _text(cell):
    return cell['source'] if isinstance(cell['source'], str) else ''.join(cell['source'])


def example(
    path: Path,  # a notebook of the gallery, with its saved figure
) -> dict:  # title, line, alt (alternative text), png (bytes)
    "What the gallery shows of an example; ValueError that names a notebook without a figure."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    title, line = (x.strip('#> ') for x in _text(cells[0]).split('\n\n'))
    for cell in cells:
        for output in cell.get('outputs', []):
            png = output.get('data', {}).get('image/png')
            if png:
                alt = next(x for x in _text(cell).splitlines() if x.startswith('#| fig-alt:'))
                alt = json.loads(alt.removeprefix('#| fig-alt:'))
                return dict(title=title, line=line, alt=alt, png=base64.b64decode(''.join(png)))
    raise ValueError(f'{path} holds no figure; execute it and save it with its outputs')


def gallery_page(
    root: Path,  # the project's folder
) -> Path:  # nbs/gallery/index.qmd, written anew with the thumbnails beside it
    "Write the page of the gallery, its examples in the order of their titles."
    folder = root / 'nbs/gallery'
    (folder / 'thumbs').mkdir(exist_ok=True)
    shown = {p.stem: example(p) for p in sorted(folder.glob('*.ipynb'))}
    blocks = []
    for name, e in sorted(shown.items(), key=lambda item: item[1]['title']):
        (folder / f'thumbs/{name}.png').write_bytes(e['png'])
        image = f'[![{e["alt"]}](thumbs/{name}.png)]({name}.ipynb)'
        blocks.append(
            f'::: {{.g-col-12 .g-col-md-4}}\n{image}\\\n**[{e["title"]}]({name}.ipynb)**\\\n{e["line"]}\n:::'
        )
    page = folder / 'index.qmd'
    page.write_text(f'{HEAD}\n:::: {{.grid .gallery}}\n' + '\n\n'.join(blocks) + '\n::::\n', encoding='utf-8')
    return page
