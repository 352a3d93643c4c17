"Phantom frames a second on one core at 256x256, masks included, beside those of an earlier version."

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from lus_fastai.synth import phantom

BEFORE = sys.argv[1] if len(sys.argv) > 1 else '677f07f'  # the revision before the law of the A-lines


def module_at(revision):
    "The phantom's module as it was at a revision; stops with a message where this clone has none."
    command = ['git', 'show', f'{revision}:lus_fastai/synth/phantom.py']
    shown = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if shown.returncode:
        sys.exit(
            f'no revision {revision} to compare with ({shown.stderr.strip()}): name one that this clone has'
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'phantom.py')
        file.write_text(shown.stdout)
        spec = importlib.util.spec_from_file_location('lus_fastai.synth.phantom_before', file)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def rate(module, seed):
    "Frames a second for one patient, set-up included."
    patient = module.draw_patient(seed)
    start = time.process_time()
    clip = module.phantom_clip(patient, seed=seed, n=60, size=(256, 256))
    return len(clip.frames) / (time.process_time() - start)


modules = {'now': phantom, BEFORE: module_at(BEFORE)}
rates = {name: [] for name in modules}
for _round in range(3):
    for seed in range(9):
        for name, module in modules.items():  # in turns, so that both see the same machine
            rates[name].append(rate(module, seed))
now, before = (statistics.median(rates[name]) for name in modules)
print(
    f'phantom at 256x256: {now:.0f} frames/s (min {min(rates["now"]):.0f}, max {max(rates["now"]):.0f}), '
    f'{now / before:.2f} of {before:.0f} at {BEFORE}, medians over 9 patients, three rounds'
)
