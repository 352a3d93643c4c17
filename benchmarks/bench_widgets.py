"How long a panel takes to show another frame, from the key to the image in a browser; 150 ms look at once."

import statistics
import sys
import tempfile
from pathlib import Path

import playwright.sync_api as api

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests/site'))
from test_widgets import voila  # noqa: E402

PANELS = """
import torch
from IPython.display import display
from lus_fastai.core import CLASSES
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.toys import toy_net
from lus_fastai.widgets import ClipBrowser, Explainer, FanEditor, MModePanel
table = phantom_dataset('clips', patients=3, clips=1, n=32, size=(384, 512), workers=1)
explainer = Explainer(toy_net(1), table, CLASSES)
display(ClipBrowser(table), explainer, MModePanel(table), FanEditor(table, 'clips.csv'))
"""
ANOTHER = """panel => new Promise(done => {
  const handle = panel.querySelector('[role=slider]'), image = panel.querySelector('img')
  const start = performance.now()
  image.addEventListener('load', () => done(performance.now() - start), {once: true})
  handle.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))
})"""

with tempfile.TemporaryDirectory() as tmp, voila(Path(tmp), PANELS) as address, api.sync_playwright() as p:
    browser = p.chromium.launch(executable_path='/usr/bin/chromium', args=['--no-sandbox'])
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.set_default_timeout(300_000)
    page.goto(address)
    page.locator('.lus-faneditor img').wait_for()
    for name in ('clipbrowser', 'explainer', 'mmodepanel', 'faneditor'):
        panel, took = page.locator(f'.lus-{name}'), []
        for _ in range(8 if name == 'explainer' else 24):  # the network sees a few frames a second only
            took.append(panel.evaluate(ANOTHER))
            page.wait_for_timeout(100)
        took = sorted(took)
        print(f'{name}: median {statistics.median(took):.0f} ms ({took[0]:.0f}..{took[-1]:.0f})', flush=True)
    browser.close()
