"The commands as a person runs them: in a process of their own, from the command line to a report."
import json, os, re, subprocess, sys, textwrap
import pytest

TINY = '''
    from dataclasses import replace
    from lus_fastai.papers import gare
    tiny = gare.GareSettings(size=(48, 48), width=2, seg_patients=6, seg_frames=3, seg_epochs=1, cls_patients=6, cls_frames=3, cls_epochs=1)
    gare.QUICK, gare.QUICK_REAL = tiny, tiny
'''

def command(tmp_path, name, *args, before='', timeout=300, **env):
    "Run a command's entry point as its console script does, after the lines of `before`."
    script = tmp_path/f'{name}.py'
    script.write_text(textwrap.dedent(before) + f'\nfrom lus_fastai.cli import {name}\nif __name__ == "__main__": {name}()\n')
    env = {**{k: v for k, v in os.environ.items() if k != 'LUS_DATA'}, 'LUS_HOME': str(tmp_path/'home'), 'OMP_NUM_THREADS': '1', **env}
    return subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=timeout)

def test_the_demo_goes_from_the_command_line_to_a_report_that_needs_nothing_else(tmp_path):
    done = command(tmp_path, 'lus_demo', '--out', 'mine', before=TINY)
    assert done.returncode == 0, done.stderr
    report = tmp_path/re.search(r'report: (\S+)', done.stdout)[1]
    html, results = report.read_text(), json.loads(report.with_suffix('.json').read_text())
    assert not re.search(r'<script|(?:src|href)="(?!data:|#)|@import|url\((?!data:|#)', html)
    for part in ('What the segmenter learnt', 'From segmenter to classifier', 'What a leaky split hides', 'Settings and versions', 'Confusion matrix', 'ROC'): assert part in html, part
    assert set(results['protocols']) == {'segmentation by patient', 'classification by patient', 'classification by frame'}
    assert {c['row'] for c in results['cells'] if c['table'] == 'classification'} == {'dense', 'sparse', 'none'}
    assert all(p['split_hash'] and p['settings']['width'] == 2 for p in results['protocols'].values())
    assert str(tmp_path) not in html + json.dumps(results)
    again = command(tmp_path, 'lus_demo', '--out', 'mine', before=TINY)
    assert again.returncode == 0 and json.loads(report.with_suffix('.json').read_text())['cells'] == results['cells']      # everything was there: the same numbers

def test_the_same_command_takes_real_clips(tmp_path, real_data):
    done = command(tmp_path, 'lus_demo', '--data', str(real_data), before=TINY, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path/'report/gare-pocus-quick.json').read_text())
    assert results['data'] == 'pocus' and 'pocus' in (tmp_path/'report/gare-pocus-quick.html').read_text()
    assert any(c['column'] == 'accuracy by patient' and 0 <= c['ours'] <= 1 for c in results['cells'])

def test_mistakes_are_one_line_without_a_traceback(tmp_path):
    for name, args, said in (('lus_repro', ['gaer'], 'there is: arora, cheng_lam, gare, merand, sim_to_real, uscl'), ('lus_repro', ['gare', '--data', 'pocus'], 'LUS_DATA'), ('lus_repro', ['gare', '--data', 'mars'], "not 'mars'"),
                             ('lus_demo', ['--data', 'nowhere'], 'not a folder'), ('lus_audit', ['none.csv'], 'none.csv'), ('lus_data', ['uscl'], 'there is: ')):
        done = command(tmp_path, name, *args)
        assert done.returncode != 0 and said in done.stderr and 'Traceback' not in done.stderr, (name, done.stderr)

def test_audit_and_data_list(tmp_path):
    listed = command(tmp_path, 'lus_data')
    assert listed.returncode == 0 and 'pocus' in listed.stdout and 'blues' in listed.stdout
    from lus_fastai.phantom import phantom_dataset
    phantom_dataset(tmp_path/'phantom', patients=6, clips=2, n=4, size=(48, 48), workers=1)
    told = command(tmp_path, 'lus_audit', str(tmp_path/'phantom/clips.csv'), '--folds', '2')
    assert told.returncode == 0 and 'Patients in more than one fold: none' in told.stdout, told.stdout + told.stderr
