"The commands as a person runs them: in a process of their own, from the command line to a report."

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lus_fastai.data.sources import find_source

TINY = '''
    from dataclasses import replace
    from lus_fastai.papers import gare
    tiny = dict(size=(48, 48), width=2)
    for part in ('seg', 'cls'): tiny |= {f'{part}_patients': 6, f'{part}_frames': 3, f'{part}_epochs': 1}
    tiny = gare.GareSettings(**tiny, seeds=(0,), parts=('core',))
    gare.QUICK, gare.QUICK_REAL = tiny, tiny
'''


def start(tmp_path, name, *args, before='', after='pass', **env):
    "Start a command's entry point as its console script does, between the lines of `before` and `after`."
    script, ours = tmp_path / f'{name}.py', {'LUS_HOME': str(tmp_path / 'home'), 'OMP_NUM_THREADS': '1'}
    run = f'from lus_fastai.cli import {name}\nif __name__ == "__main__":\n'
    run += f'    try: sys.exit({name}())\n    finally: {after}\n'
    script.write_text(f'import sys\n{textwrap.dedent(before)}\n{run}')
    there = {k: v for k, v in os.environ.items() if k != 'LUS_DATA'}
    return subprocess.Popen(
        [sys.executable, str(script), *args],
        cwd=tmp_path,
        env={**there, **ours, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def command(tmp_path, name, *args, timeout=300, **options):
    "Run a command to its end."
    process = start(tmp_path, name, *args, **options)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


LONG = TINY + '    gare.QUICK = replace(tiny, seg_epochs=200)\n'


def wait_for(process, folder, name):
    "Wait until a file `name` is somewhere below `folder`, while the process runs."
    deadline = time.monotonic() + 200
    while not list(folder.rglob(name)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def test_the_demo_goes_from_the_command_line_to_a_report_that_needs_nothing_else(tmp_path):
    done = command(tmp_path, 'lus_demo', '--out', 'mine', before=TINY)
    assert done.returncode == 0, done.stderr
    report = tmp_path / re.search(r'report: (\S+)', done.stdout)[1]
    html, results = report.read_text(), json.loads(report.with_suffix('.json').read_text())
    assert not re.search(r'<script|(?:src|href)="(?!data:|#)|@import|url\((?!data:|#)', html)
    for part in (
        'What the segmenter learnt',
        'From segmenter to classifier',
        'What a leaky split hides',
        'Settings and versions',
        'Confusion matrix',
        'ROC',
        'patients right, folds by patient',
        'a random guess: 0.333',
    ):
        assert part in html, part
    assert set(results['protocols']) == {
        'segmentation by patient',
        'classification by patient',
        'classification by frame',
    }
    assert {c['row'] for c in results['cells'] if c['table'] == 'classification'} == {
        'dense',
        'sparse',
        'none',
    }
    assert all(p['split_hash'] and p['settings']['width'] == 2 for p in results['protocols'].values())
    assert str(tmp_path) not in html + json.dumps(results)
    again = command(tmp_path, 'lus_demo', '--out', 'mine', before=TINY)
    assert (
        again.returncode == 0
        and json.loads(report.with_suffix('.json').read_text())['cells'] == results['cells']
    )  # everything was there: the same numbers


def some_real_clips(folder, real_data, n=4):
    "The sheet of POCUS, `n` convex clips of each class, and some of its stills."
    whole = find_source('pocus', real_data)
    videos = folder / 'pocus_videos' / 'convex'
    stills = folder / 'pocus_images' / 'convex'
    videos.mkdir(parents=True)
    stills.mkdir(parents=True)
    (folder / 'dataset_metadata.csv').symlink_to(whole / 'dataset_metadata.csv')
    for label in ('Cov', 'Pneu', 'Reg'):
        clips = sorted((whole / 'pocus_videos' / 'convex').glob(f'{label}*'), key=lambda p: p.stat().st_size)
        for clip in clips[:n]:
            (videos / clip.name).symlink_to(clip)
    for still in sorted((whole / 'pocus_images' / 'convex').iterdir())[::6]:
        (stills / still.name).symlink_to(still)
    return folder


def test_the_same_command_takes_real_clips(tmp_path, real_data):
    some = some_real_clips(tmp_path / 'real', real_data)
    done = command(tmp_path, 'lus_demo', '--data', str(some), before=TINY, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'report/gare-pocus-quick.json').read_text())
    assert results['data'] == 'pocus' and 'pocus' in (tmp_path / 'report/gare-pocus-quick.html').read_text()
    assert any(c['column'] == 'accuracy by patient' and 0 <= c['ours'] <= 1 for c in results['cells'])


@pytest.mark.parametrize('name', ['lus_demo', 'lus_repro', 'lus_audit', 'lus_data', 'lus_export'])
def test_help_is_there_before_torch(tmp_path, name):
    loaded = "print('loaded:', sorted({'torch', 'numpy', 'pandas', 'fastai'} & set(sys.modules)))"
    done = command(tmp_path, name, '--help', after=loaded)
    assert done.returncode == 0 and done.stdout.startswith('usage: '), done.stderr
    assert 'loaded: []' in done.stdout, done.stdout


@pytest.mark.parametrize(
    'name, args, said',
    [
        ('lus_repro', ['gaer'], 'merand, pocus_model, sim_to_real, small_model, splits, uscl'),
        ('lus_repro', ['gare', '--data', 'pocus'], 'LUS_DATA'),
        ('lus_demo', ['--data', 'nowhere'], 'not a folder'),
        ('lus_demo', ['--patient', 'file'], 'for a folder of your own clips, and this is the phantom'),
        ('lus_audit', ['none.csv'], 'none.csv: No such file'),
        ('lus_audit', ['none.csv', '--label', 'folder'], 'for a folder of clips'),
        ('lus_audit', ['.', '--patient', 'file'], 'holds no clip'),
        ('lus_data', ['uscl'], 'there is: '),
        ('lus_export', [], '--web PAGE.html'),
        ('lus_export', ['--onnx', 'a.onnx', '--model', 'none.safetensors'], 'no model at none.safetensors'),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, name, args, said):
    done = command(tmp_path, name, *args)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and said in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_an_unknown_option_is_a_mistake_too(tmp_path):
    done = command(tmp_path, 'lus_demo', '--nonsense')
    assert done.returncode == 2 and 'unrecognized arguments: --nonsense' in done.stderr


names = {
    'gare': 'pocus',
    'arora': 'pocus',
    'cheng_lam': 'real',
    'uscl': 'real',
    'merand': 'real',
    'sim_to_real': 'real',
}


@pytest.mark.parametrize('paper', names)
def test_a_data_name_that_does_not_fit_the_paper_is_a_mistake(tmp_path, monkeypatch, paper):
    from lus_fastai.cli import lus_repro

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^data is 'phantom' or '{names[paper]}', not 'mars'$"):
        lus_repro(paper, data='mars')
    assert not list(tmp_path.iterdir())


def test_errors_of_ours_keep_their_traceback(tmp_path):
    done = command(
        tmp_path,
        'lus_audit',
        'x',
        before='''
        import lus_fastai.core
        def broken(*args): raise KeyError('ours')
        lus_fastai.core.read_table = broken
    ''',
    )
    assert done.returncode == 1 and 'Traceback' in done.stderr and "KeyError: 'ours'" in done.stderr


def test_an_interrupt_says_what_is_kept(tmp_path):
    demo = start(tmp_path, 'lus_demo', before=LONG)
    wait_for(demo, tmp_path / 'home', 'checkpoint.pt')
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    out, err = demo.communicate(timeout=60)
    assert demo.returncode == 130 and 'Traceback' not in err, err
    kept = r'interrupted: \d trained fold\(s\) are kept in \S+gare\S+, '
    kept += r'and 1 under way up to its last whole epoch\. '
    assert re.fullmatch(kept + r'The same command goes on from there\.', err.splitlines()[-1]), err
    first, second, *_ = out.splitlines()
    assert first.startswith('the demo takes about ') and re.fullmatch(
        r'1/8 clips and frames: \d+ s', second
    ), out


def test_a_second_demo_names_the_process_that_runs_the_first(tmp_path):
    first = start(tmp_path, 'lus_demo', before=LONG)
    try:
        wait_for(first, tmp_path / 'home', 'phantom.json')  # the lock is held before anything is made
        second = command(tmp_path, 'lus_demo', '--out', 'elsewhere', before=LONG)
        said = rf'error: process {first.pid} is running the demo in \S+: wait until .* '
        said += r'or set LUS_HOME to another folder .*\n'
        assert second.returncode == 2 and re.fullmatch(said, second.stderr), second.stderr
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def own_clips(folder, patients=6):
    "Phantom clips of two classes as somebody might file them: label in the folder, patient in the name."
    from lus_fastai.synth.phantom import draw_patient, phantom_clip
    from lus_fastai.video import write_video

    for i in range(patients):
        label, name = (('regular', 'well'), ('covid', 'ill'))[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for j in range(2):
            clip = phantom_clip(draw_patient(i, label, 'convex'), j, 3, (48, 48))
            write_video(folder / name / f'pat{i}_{j}.mp4', clip.frames, 8)
    return folder


def test_an_audit_takes_a_folder_of_own_clips(tmp_path):
    (own_clips(tmp_path / 'mine') / 'notes.txt').touch()
    done = command(tmp_path, 'lus_audit', 'mine', '--patient', 'pat([0-9])', '--folds', '3')
    assert done.returncode == 0 and 'Patients in more than one fold: none' in done.stdout, done.stderr
    assert re.match(r'warning: 1 file\(s\) .*notes.txt', done.stderr), done.stderr


def test_the_demo_takes_a_folder_of_own_clips(tmp_path):
    own_clips(tmp_path / 'mine')
    done = command(tmp_path, 'lus_demo', '--data', 'mine')
    assert done.returncode == 2 and 'whose clips are in' in done.stderr and '--patient' in done.stderr, (
        done.stderr
    )
    assert not (tmp_path / 'report').exists()
    done = command(tmp_path, 'lus_demo', '--data', 'mine', '--patient', 'pat([0-9])', before=TINY)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert 'on other clips more or less by their number' in first
    assert [int(x[0]) for x in lines if re.match(r'\d/8 .*: .* s$', x)] == list(range(1, 9))  # a line a stage
    assert re.fullmatch(r'took .* s, .* s of CPU time', lines[-2])
    others = [x for x in lines[:-2] if not re.match(r'\d/8 |leaky', x)]
    assert not others and '\r' not in done.stdout + done.stderr  # no bar in a log file
    text, html = ((tmp_path / f'report/gare-own-quick.{x}').read_text() for x in ('json', 'html'))
    cells = json.loads(text)['cells']
    columns = {c['column'] for c in cells if c['table'] == 'classification'}
    assert {'recall ill', 'recall well'} < columns and 'recall covid' not in columns
    assert all(c['theirs'] is None for c in cells if 'classification' in c['protocol'])
    assert 'your own clips' in html and str(tmp_path) not in html + text


def test_a_demo_needs_something_to_tell_apart(tmp_path):
    own_clips(tmp_path / 'mine', patients=1)
    done = command(tmp_path, 'lus_demo', '--data', 'mine', '--patient', 'pat([0-9])', before=TINY)
    assert done.returncode == 2 and "every clip has the label 'well'" in done.stderr


def test_audit_and_data_list(tmp_path):
    listed = command(tmp_path, 'lus_data')
    assert listed.returncode == 0 and 'pocus' in listed.stdout and 'blues' in listed.stdout
    from lus_fastai.synth.phantom import phantom_dataset

    phantom_dataset(tmp_path / 'phantom', patients=6, clips=2, n=4, size=(48, 48), workers=1)
    p = command(tmp_path, 'lus_audit', str(tmp_path / 'phantom/clips.csv'), '--folds', '2')
    assert p.returncode == 0 and 'Patients in more than one fold: none' in p.stdout, p.stdout + p.stderr
