"A full disk and a read-only folder: the error names the file, and no half one is left."

import ast
import contextlib
import errno
import io
import multiprocessing
import os
import resource
import shutil
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from lus_fastai.clip_report import answer_report, heat_video
from lus_fastai.core import named_write, save_csv, save_state, write_json, write_table
from lus_fastai.data.dicom import deidentify
from lus_fastai.data.fetching import blob_sha1, download, extract_archive
from lus_fastai.data.store import FrameStore
from lus_fastai.exercises import AnswerLog
from lus_fastai.explain.occlusion import write_map_video
from lus_fastai.export import export_onnx, web_page
from lus_fastai.models.stages import StageClassifier, StageFeatures
from lus_fastai.models.transfer import save_weights
from lus_fastai.predict import ClipModel, ClipPrep, save_model
from lus_fastai.report import Report, model_card
from lus_fastai.runs import cell, claim_folder, results_json
from lus_fastai.synth.phantom import phantom_dataset
from lus_fastai.toys import toy_frames, toy_net, toy_table
from lus_fastai.video import write_video
from lus_fastai.widgets import FanEditor, fans_file

PACKAGE = Path(__file__).resolve().parents[2] / 'lus_fastai'


@contextlib.contextmanager
def full_disk(room):
    "No file can be written beyond `room` bytes, as where a disk has that much left."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state_of(folder):
    "Every file below a folder, hidden ones too, and its bytes."
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StageClassifier(StageFeatures('test_resnet', weights=None), 2)
    return ClipModel(net, ('a', 'b'), ClipPrep(size=32, frames=2))


@pytest.fixture(scope='module')
def clips(phantom_table):
    return phantom_table.head(2)


# ---- writers of one file ----


def kept_answers(path):
    log = AnswerLog()
    log.add('x', 0.5, True)
    log.keep(path)


def a_report(path):
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    Report('t').figure(fig, 'a line').save(path)
    plt.close(fig)


def a_card(path):
    weights = path.parent.with_name('w.safetensors')
    if not weights.exists():
        save_weights(toy_net(), weights)
    facts = dict(title='t', weights=weights, data='made up', licence='MIT', split_hash='ab12')
    model_card(path, **facts, results={'accuracy': '1'}, usage='x', settings={})


def some_results(path):
    cells = [cell('T', 'r', 'c', 0.5, (0.4, 0.6), protocol='p')]
    facts = dict(paper='gare', data='phantom', protocols={'p': dict(split_hash='ab', description='d', n=3)})
    results_json(path, **facts, seeds=[0], cells=cells, hours=0.5, command='x', device='cpu')


def a_page(path, model):
    runtime = path.parent.with_name('runtime')
    if not runtime.exists():
        (runtime / 'dist').mkdir(parents=True)
        for f in ('ort.wasm.bundle.min.mjs', 'ort-wasm-simd-threaded.wasm'):
            (runtime / 'dist' / f).write_bytes(b'x')
    web_page(model, path, runtime)


FRAMES = toy_frames(6)[0]
WRITERS = {
    'a.json': lambda p, **_: write_json(p, list(range(100))),
    'a.pt': lambda p, **_: save_state(dict(x=torch.rand(9)), p),
    'a.csv': lambda p, **_: save_csv(pd.DataFrame(dict(x=range(99))), p),
    't.csv': lambda p, **_: write_table(toy_table(5), p),
    'w.safetensors': lambda p, **_: save_weights(toy_net(), p),
    'm.safetensors': lambda p, model, **_: save_model(model, p),
    'a.mp4': lambda p, **_: write_video(p, FRAMES, 10),
    'a.avi': lambda p, **_: write_video(p, FRAMES, 10),
    'a.mkv': lambda p, **_: write_video(p, FRAMES, 10, lossless=True),
    'map.mp4': lambda p, **_: write_map_video(p, FRAMES, FRAMES / 255, 10),
    'map.gif': lambda p, **_: write_map_video(p, FRAMES, FRAMES / 255, 10),
    'heat.mp4': lambda p, model, clips: heat_video(model, clips['path'].iloc[0], p),
    'report.html': lambda p, **_: a_report(p),
    'answer.html': lambda p, model, **_: answer_report(model, [], p, [('a.mp4', 'it is empty')]),
    'page.html': lambda p, model, **_: a_page(p, model),
    'a.onnx': lambda p, model, **_: export_onnx(model, p),
    'card.md': lambda p, **_: a_card(p),
    'results.json': lambda p, **_: some_results(p),
    'run.json': lambda p, **_: claim_folder(p.parent, dict(split='x', epochs=2)),
    'answers.json': lambda p, **_: kept_answers(p),
}


@pytest.mark.parametrize('name', WRITERS)
def test_one_file_is_whole_or_not_there(tmp_path, model, clips, name):
    (folder := tmp_path / 'out').mkdir()
    path = folder / name
    WRITERS[name](path, model=model, clips=clips)
    size = path.stat().st_size
    assert [p.name for p in folder.iterdir()] == [name]
    for room in (0, size // 2, size - 1):
        for old in (None, b'old') if name not in ('run.json', 'answers.json') else (None,):
            path.unlink(missing_ok=True)
            if old:
                path.write_bytes(old)
            before = state_of(folder)
            with pytest.raises(OSError) as e, full_disk(room):
                WRITERS[name](path, model=model, clips=clips)
            assert e.value.errno == errno.EFBIG and Path(e.value.filename) == path, e.value
            assert state_of(folder) == before


def test_a_fan_that_cannot_be_saved_is_a_message(phantom_table, tmp_path):
    editor, file = FanEditor(phantom_table, tmp_path / 'c.csv'), fans_file(tmp_path / 'c.csv')
    with full_disk(10):
        editor.save.click()
    assert 'cannot be written' in editor.status.value and file.name in editor.status.value
    assert not state_of(tmp_path)
    editor.save.click()
    assert list(state_of(tmp_path)) == [Path(file.name)]


# ---- writers of folders: what is there is whole, and the same call finishes the rest ----


def test_a_store_goes_on_where_the_disk_was_full(phantom_table, tmp_path):
    build = dict(size=(32, 32), max_frames=3, workers=0)
    whole = FrameStore.build(phantom_table, tmp_path / 'whole', **build)
    for room in (0, 100, 8000, 20_000, max(len(x) for x in state_of(tmp_path / 'whole').values()) - 1):
        with pytest.raises(OSError) as e, full_disk(room):
            FrameStore.build(phantom_table, tmp_path / 'store', **build)
        assert e.value.errno == errno.EFBIG and str(tmp_path / 'store') in str(e.value)
        assert not [p for p in state_of(tmp_path / 'store') if '.tmp' in p.name]
    store = FrameStore.build(phantom_table, tmp_path / 'store', **build)
    assert state_of(store.folder) == state_of(whole.folder)


def test_a_phantom_goes_on_where_the_disk_was_full(tmp_path):
    size = dict(patients=2, clips=1, n=4, size=(48, 48), workers=1)
    phantom_dataset(tmp_path / 'whole', **size)
    for room in (0, 400, 2000):
        with pytest.raises(OSError) as e, full_disk(room):
            phantom_dataset(tmp_path / 'part', **size)
        assert e.value.errno == errno.EFBIG and str(tmp_path / 'part') in e.value.filename
        there = state_of(tmp_path / 'part')
        assert there.items() <= state_of(tmp_path / 'whole').items(), room
    phantom_dataset(tmp_path / 'part', **size)
    assert state_of(tmp_path / 'part') == state_of(tmp_path / 'whole')


def test_copies_without_names_are_whole_or_not_there(clips, tmp_path):
    (tmp_path / 'clips').mkdir()
    for p in clips['path']:
        shutil.copy(p, tmp_path / 'clips')
    deidentify(tmp_path / 'clips', tmp_path / 'whole')
    sizes = sorted(len(x) for x in state_of(tmp_path / 'whole').values())
    for room, name in ((0, 'clip0001.mkv'), (sizes[1] - 1, '.mkv'), (sizes[0] - 1, 'clip0001.mkv')):
        with pytest.raises(OSError) as e, full_disk(room):
            deidentify(tmp_path / 'clips', tmp_path / 'copies')
        assert e.value.errno == errno.EFBIG and e.value.filename.endswith(name)
        assert all(len(x) in sizes for x in state_of(tmp_path / 'copies').values())
        shutil.rmtree(tmp_path / 'copies')


def test_an_archive_fits_or_changes_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as z:
        for name in ('a.txt', 'deep/b.txt'):
            z.writestr(name, 'x' * 1000)
    (folder := tmp_path / 'out').mkdir()
    (folder / 'a.txt').write_text('old')
    before = state_of(tmp_path)
    for room in (0, 999):
        with pytest.raises(OSError) as e, full_disk(room):
            extract_archive(tmp_path / 'a.zip', folder)
        assert e.value.errno == errno.EFBIG and e.value.filename == str(folder)
        assert state_of(tmp_path) == before and len(list(tmp_path.iterdir())) == 2


class Server(BaseHTTPRequestHandler):
    data = bytes(range(256)) * 8

    def do_GET(self):
        start = int(self.headers.get('Range', 'bytes=0-').split('=')[1].rstrip('-'))
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(self.data) - 1}/{len(self.data)}')
        self.send_header('Content-Length', str(len(self.data) - start))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(self.data[start:])

    def log_message(self, *args):
        pass


def test_a_download_goes_on_when_there_is_room(tmp_path):
    server = HTTPServer(('127.0.0.1', 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        (tmp_path / 'whole').write_bytes(Server.data)
        url, sha = f'http://127.0.0.1:{server.server_port}/x', blob_sha1(tmp_path / 'whole')
        for room in (0, 1000):
            with pytest.raises(OSError) as e, full_disk(room):
                download(url, tmp_path / 'got', len(Server.data), sha)
            assert e.value.errno == errno.EFBIG and e.value.filename == str(tmp_path / 'got.part')
            assert not (tmp_path / 'got').exists()
        download(url, tmp_path / 'got', len(Server.data), sha)
        assert (tmp_path / 'got').read_bytes() == Server.data and not (tmp_path / 'got.part').exists()
    finally:
        server.shutdown()
        server.server_close()


# ---- no writer is left out ----

_WRITES = 'write_text write_bytes to_csv savez savez_compressed save_file savefig save_as to_parquet'.split()
KNOWN = {
    ('core.py', 'atomic_path'),
    ('core.py', 'folder_lock'),  # an empty file
    ('data/fetching.py', '_stream'),  # in pieces, under another name
    ('data/fetching.py', '_write_member'),  # into a temporary folder
    ('explain/occlusion.py', '_write_mp4'),  # given a temporary path, as the next
    ('clip_report.py', '_write_frames'),
    ('cli.py', '_alone'),  # the number of a process, in the file that is its lock
    ('plot.py', 'save_figure'),  # bytes in memory
}


def opens_to_write(call):
    "Whether a call is `open(..., 'w')` or `av.open(..., 'w')`, or another mode that writes."
    name = getattr(call.func, 'id', getattr(call.func, 'attr', ''))
    modes = [a.value for x in call.args[1:2] for a in ast.walk(x) if isinstance(a, ast.Constant)]
    return name == 'open' and any(isinstance(m, str) and set(m) & set('wax+') for m in modes)


def is_write(call):
    name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
    return opens_to_write(call) or name in _WRITES and (name != 'to_csv' or call.args)


def inside_atomic(node, parents):
    "Whether a node is in a block of `atomic_path`, or among what opens the block."
    if 'atomic_path(' in ast.unparse(node):
        return True
    while node := parents.get(node):
        if isinstance(node, ast.With) and any(
            'atomic_path' in ast.unparse(i.context_expr) for i in node.items
        ):
            return True
    return False


def unguarded(path):
    "Functions of a module that write a file under its final name."
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and is_write(n)):
        if inside_atomic(call, parents):
            continue
        node = call
        while not isinstance(node, (ast.FunctionDef, ast.Module)):
            node = parents[node]
        yield path.relative_to(PACKAGE).as_posix(), getattr(node, 'name', '')


def test_nothing_is_written_under_its_final_name():
    found = {f for path in sorted(PACKAGE.rglob('*.py')) for f in unguarded(path)}
    assert found == KNOWN


def test_what_is_given_a_name_is_named():
    with pytest.raises(OSError, match="No space left on device: 'a folder'"), named_write('a folder'):
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError, match='somewhere else'), named_write('a folder'):
        raise OSError(errno.EACCES, 'Permission denied', 'somewhere else')


# ---- a folder that is read-only ----


def as_nobody(call, folder, queue):
    "In a process of its own, which may do no more than a user who owns nothing."
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        call(folder)
        queue.put('written')
    except OSError as e:
        queue.put((e.errno, str(e.filename)))


def read_only(call, folder):
    "What comes of a call in a folder where nothing can be written: (errno, file name) or 'written'."
    folder.chmod(0o555)
    if os.geteuid():
        try:
            call(folder)
            return 'written'
        except OSError as e:
            return e.errno, str(e.filename)
        finally:
            folder.chmod(0o755)
    for p in folder.parents:  # pytest's own folders are closed to others
        if p.stat().st_uid == 0 and not p.stat().st_mode & 0o001 and 'pytest' in str(p):
            p.chmod(p.stat().st_mode | 0o011)
    context = multiprocessing.get_context('fork')
    queue = context.SimpleQueue()
    process = context.Process(target=as_nobody, args=(call, folder, queue))
    process.start()
    process.join(60)
    return queue.get()


@pytest.mark.parametrize(
    'name', ['a.json', 'a.pt', 'a.csv', 'w.safetensors', 'a.mp4', 'map.gif', 'report.html']
)
def test_a_read_only_folder_is_named(tmp_path, name):
    (folder := tmp_path / 'out').mkdir()
    (folder / name).write_bytes(b'old')
    got = read_only(lambda f: WRITERS[name](f / name, model=None, clips=None), folder)
    assert got == (errno.EACCES, str(folder / name))
    assert state_of(folder) == {Path(name): b'old'}


def test_read_only_places_of_folders_are_named(tmp_path, phantom_table):
    (folder := tmp_path / 'out').mkdir()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as z:
        z.writestr('a.txt', 'x')
    (tmp_path / 'a.zip').write_bytes(archive.getvalue())
    for call in (
        lambda f: phantom_dataset(f / 'p', patients=1, clips=1, n=2, size=(48, 48), workers=1),
        lambda f: FrameStore.build(phantom_table, f / 's', size=(32, 32), workers=0),
        lambda f: extract_archive(tmp_path / 'a.zip', f / 'x'),
        lambda f: download('http://127.0.0.1:9/x', f / 'd' / 'x', 1, '0'),
        lambda f: claim_folder(f / 'run', dict(a=1)),
    ):
        code, named = read_only(call, folder)
        assert code == errno.EACCES and named.startswith(str(folder))
    assert not state_of(folder)
