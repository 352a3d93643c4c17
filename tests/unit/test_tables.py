"Clip tables on disk: what was written is read back, and what cannot be meant is refused by file and line."

import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lus_fastai.core import (
    TableError,
    atomic_path,
    load_csv,
    read_json,
    read_table,
    save_csv,
    sweep_unfinished,
    write_json,
    write_table,
)

ROW = dict(path='a.mp4', kind='video', label='x', patient='p', source='s', probe='convex')
HEAD = ','.join(ROW)
cells = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), min_size=1, max_size=9)


def is_number(text):
    "Whether a cell is a number with a sign, which is not run."
    try:
        return text[0] in '+-' and float(text) is not None
    except ValueError:
        return False


@given(
    st.lists(st.one_of(cells, st.sampled_from(['NA', 'None', 'nan', '007', '=1+1', "'-x", '@x', '-2', '-0'])))
)
@settings(max_examples=150, deadline=None)
def test_text_survives_a_round_trip(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp('csv') / 't.csv'
    save_csv(pd.DataFrame(dict(label=pd.Series(texts, dtype=object), n=range(len(texts)))), file)
    back = load_csv(file, text=['label'])
    assert back['label'].tolist() == texts and back['n'].tolist() == list(range(len(texts)))
    raw = pd.read_csv(file, dtype=str, keep_default_na=False)['label']
    runs = [t for t in raw if t.startswith(('=', '+', '-', '@', '\t')) and not is_number(t)]
    assert runs == []


def test_labels_that_look_like_missing_values_survive_in_a_clip_table(tmp_path):
    table = pd.DataFrame([dict(ROW, path=str(tmp_path / f'{i}.mp4')) for i in range(4)])
    table['label'], table['patient'] = ['NA', 'None', '=cmd()', 'null'], ['nan', '007', '@home', 'N/A']
    write_table(table, tmp_path / 't.csv')
    back = read_table(tmp_path / 't.csv')
    assert back[list(ROW)].to_dict('list') == table.to_dict('list')


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'is empty'),
        (b'\n\n', 'is empty'),
        (HEAD.encode() + 'a.mp4,video,x,Müller,s,c'.encode('cp1252'), 'line 1: byte 0xfc is not UTF-8'),
        (f'{HEAD}\n'.encode() + 'a,video,x,Müller,s,c'.encode('cp1252'), 'line 2: byte 0xfc is not UTF-8'),
        (HEAD.encode('utf-16'), 'is not UTF-8'),
        (f'{HEAD}\na\0,video,x,p,s,c'.encode(), 'zero bytes'),
        (HEAD.replace(',', ';').encode(), "has ';' between its columns"),
        (f'{HEAD},label\na,video,x,p,s,c,y'.encode(), r"column\(s\) \['label'\] more than once"),
        (f'{HEAD}\na,video,x,p,s,c\na,b,video,x,p,s,c'.encode(), 'line 3: 7 cells, not 6'),
        (f'{HEAD}\na,video,x'.encode(), 'line 2: 3 cells, not 6'),
        (f'{HEAD}\n"a,video,x,p,s,c'.encode(), 'line 2: unexpected end'),
        (f'{HEAD}\na,video,,p,s,c'.encode(), "column 'label' is empty in row"),
        (f'{HEAD}\na,film,x,p,s,c'.encode(), "'kind' must be"),
        (b'path,label\na,x', 'missing column'),
        (HEAD.encode(), 'table is empty'),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_files_name(tmp_path, content, words):
    (tmp_path / 'clips.csv').write_bytes(content)
    with pytest.raises(TableError, match=rf'clips\.csv.*{words}'):
        read_table(tmp_path / 'clips.csv')


def test_names_that_are_not_utf8_are_refused_by_row(tmp_path):
    table = pd.DataFrame([ROW, dict(ROW, path=os.fsdecode(b'M\xfcller.mp4'))])
    with pytest.raises(TableError, match=r"'path' holds what is no text \(not UTF-8\) in row\(s\) 1"):
        write_table(table, tmp_path / 't.csv')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['M\udcfcller', 'half\0'])
def test_column_names_that_are_no_text_are_refused(tmp_path, name):
    with pytest.raises(TableError, match='column name.* no text'):
        save_csv(pd.DataFrame({'label': ['a'], name: ['b']}), tmp_path / 't.csv')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('text', ['', '{"a": 1', '[' * 100_000, '\x00'])
def test_damaged_json_names_its_file(tmp_path, text):
    (tmp_path / 'run.json').write_text(text)
    with pytest.raises(ValueError, match=r'run\.json is no JSON, or was cut short'):
        read_json(tmp_path / 'run.json')


# ---- files that are whole or absent ----


def test_a_full_disk_names_the_file_whichever_library_wrote(tmp_path):
    "Safetensors has an error of its own, without the file; the limit on a file's size stands for the disk."
    code = f'''
        import resource, signal, torch
        from lus_fastai.core import save_csv, write_json
        from lus_fastai.models.transfer import save_weights
        from pandas import DataFrame
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        folder = {str(tmp_path)!r}
        writers = [
            lambda: save_weights(torch.nn.Linear(90, 90), folder + '/w.safetensors'),
            lambda: write_json(folder + '/w.json', list(range(9999))),
            lambda: save_csv(DataFrame(dict(a=range(9999))), folder + '/w.csv'),
        ]
        for write in writers:
            try: write()
            except OSError as e: print(e.errno, e.filename)
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    want = [f'{errno.EFBIG} {tmp_path}/w.{kind}' for kind in ('safetensors', 'json', 'csv')]
    assert done.stdout.splitlines() == want, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_temporary_file_of_a_killed_process_is_swept_and_nothing_else(tmp_path):
    code = f'''
        import os, signal
        from lus_fastai.core import atomic_path
        with atomic_path({str(tmp_path / 'checkpoint.pt')!r}): os.kill(os.getpid(), signal.SIGKILL)
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    for name in ('.mine.tmp', '.lock', 'a.tmp', 'checkpoint.pt'):
        (tmp_path / name).touch()
    sweep_unfinished(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'.mine.tmp', '.lock', 'a.tmp', 'checkpoint.pt'}


@pytest.mark.skipif(os.name != 'posix', reason='Windows cannot be asked whether a process runs')
def test_the_next_write_removes_what_a_killed_process_left_and_no_file_of_a_running_one(tmp_path):
    code = f"""
        import os, signal, sys
        from lus_fastai.core import atomic_path
        with atomic_path({str(tmp_path)!r} + '/' + sys.argv[1] + '.json'):
            print(flush=True)
            sys.stdin.read() if sys.argv[1] == 'running' else os.kill(os.getpid(), signal.SIGKILL)
    """
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    processes = [
        subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), name], **how)
        for name in ('running', 'killed')
    ]
    for process in processes:
        process.stdout.readline()
    processes[1].wait()
    (tmp_path / '.x.json.0123abcd-999999-0123abcd.tmp.json').touch()  # of another machine
    before = {p.name for p in tmp_path.iterdir()}
    assert len(before) == 3
    write_json(tmp_path / 'new.json', 1)
    after = {p.name for p in tmp_path.iterdir()}
    assert [name[:8] for name in before - after] == ['.killed.'] and after - before == {'new.json'}
    processes[0].communicate()
    assert {p.name for p in tmp_path.iterdir()} == {
        *('running.json', 'new.json', '.x.json.0123abcd-999999-0123abcd.tmp.json')
    }


def test_an_error_that_is_not_about_the_file_stays_as_it_is(tmp_path):
    for error in (KeyError('x'), FileNotFoundError(errno.ENOENT, 'no', '/else/where'), OSError('plain')):
        with pytest.raises(type(error)) as e, atomic_path(tmp_path / 'x'):
            raise error
        assert e.value is error


def test_a_file_gets_the_mode_of_the_umask_whoever_writes_it(tmp_path):
    from safetensors.numpy import save_file

    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / 'x.safetensors') as tmp:
            save_file({'w': np.zeros(3)}, tmp)  # which writes for the owner alone
    finally:
        os.umask(before)
    assert (tmp_path / 'x.safetensors').stat().st_mode & 0o777 == 0o640
