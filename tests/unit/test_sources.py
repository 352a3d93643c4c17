"sources: fetch against a bad server, hostile archives, offline; index on made-up and (LUS_DATA) real folders"

import hashlib
import http.server
import io
import os
import shutil
import socket
import stat
import tarfile
import threading
import zipfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from lus_fastai import core
from lus_fastai.core import CLIP_COLUMNS, TableError
from lus_fastai.data import fetching
from lus_fastai.data.fetching import FetchError, extract_archive
from lus_fastai.data.readers import blues_name, pocus_name
from lus_fastai.data.sources import (
    SOURCES,
    Source,
    fetch_source,
    index_source,
    manifest,
    sources_table,
    verify_source,
)

CONTENT = {
    'clips/a.mp4': os.urandom(300_000),
    'clips/b (1)+2.mp4': os.urandom(70_000),
    'meta.csv': b'x,y\n1,2\n',
    'empty.txt': b'',
}


def git(b):
    return hashlib.sha1(b'blob %d\0' % len(b) + b).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.log, self.mode, self.cuts = [], 'good', 0
        self.url = f'http://127.0.0.1:{self.server_port}/up/'
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    """Modes: good, cut (breaks half-way `cuts` times), norange (ignores Range), wrong (other bytes),
    long (more bytes), chunked (no length), busy (503 `cuts` times), shifted (206 from another byte)."""

    def log_message(self, *a):
        pass

    def do_GET(self):
        s, path = self.server, unquote(self.path).removeprefix('/up/')
        begin = int(self.headers['Range'][6:-1]) if self.headers.get('Range') else 0
        s.log.append((path, begin))
        if path not in CONTENT or s.mode == 'gone':
            return self.send_error(404)
        if s.mode == 'busy' and s.cuts:
            s.cuts -= 1
            return self.send_error(503)
        body = CONTENT[path]
        if s.mode == 'wrong':
            body = bytes(len(body))
        if s.mode == 'long':
            body = body + b'more'
        if s.mode == 'norange':
            begin = 0
        if begin >= len(body) > 0:
            return self.send_error(416)
        if s.mode == 'shifted' and begin:
            begin = begin // 2  # honest in Content-Range, but not what was asked
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header('Content-Range', f'bytes {begin}-{len(body) - 1}/{len(body)}')
        if s.mode != 'chunked':
            self.send_header('Content-Length', str(len(body) - begin))
        self.end_headers()
        out = body[begin:]
        if s.cuts and s.mode in ('cut', 'norange'):
            s.cuts -= 1
            out = out[: len(out) // 2]
        self.wfile.write(out)


@pytest.fixture
def server():
    s = Server()
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture
def mine(tmp_path, monkeypatch, server):
    "A registered source with four files; its folder does not exist yet."
    pd.DataFrame([dict(path=p, bytes=len(b), git_blob_sha1=git(b)) for p, b in CONTENT.items()]).to_csv(
        tmp_path / 'mine.csv', index=False
    )
    monkeypatch.setitem(
        SOURCES,
        'mine',
        Source(
            'mine',
            'Made up',
            'any',
            'nobody',
            dict(homepage='http://h', raw=server.url, archive='http://h/all.zip'),
            ('clips',),
            'clips/*.mp4',
            None,
            listing=tmp_path / 'mine.csv',
        ),
    )
    return tmp_path / 'data' / 'mine'


def whole(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


# ---- fetch


def test_fetch_everything_then_nothing(mine, server, capsys):
    assert fetch_source('mine', mine) == mine and whole(mine) == CONTENT
    n = len(server.log)
    fetch_source('mine', mine)
    assert len(server.log) == n and '0 file(s) fetched' in capsys.readouterr().out
    assert set(verify_source('mine', mine)) == {'right'}


@pytest.mark.parametrize('cuts', [1, 3])
def test_broken_connection_is_resumed(mine, server, cuts):
    server.mode, server.cuts = 'cut', cuts
    fetch_source('mine', mine, wait=0.01)
    assert whole(mine) == CONTENT
    assert server.log[:2] == [('clips/a.mp4', 0), ('clips/a.mp4', 150_000)]


def test_interrupted_fetch_goes_on_later(mine, server):
    server.mode, server.cuts = 'cut', 1
    with pytest.raises(FetchError, match='closed after 150000 of 300000 bytes.*(?s:.*)go on from there'):
        fetch_source('mine', mine, attempts=1)
    assert [p.name for p in (mine / 'clips').iterdir()] == ['a.mp4.part']
    fetch_source('mine', mine)
    assert ('clips/a.mp4', 150_000) in server.log and whole(mine) == CONTENT


@pytest.mark.parametrize('mode', ['norange', 'shifted'])
def test_server_that_ignores_or_shifts_ranges(mine, server, mode):
    (mine / 'clips').mkdir(parents=True)
    (mine / 'clips/a.mp4.part').write_bytes(CONTENT['clips/a.mp4'][:1000])
    server.mode = mode
    fetch_source('mine', mine, wait=0.01)
    assert whole(mine) == CONTENT


def test_server_that_ignores_ranges_and_breaks_does_not_loop_for_ever(mine, server):
    server.mode, server.cuts = 'norange', 10**6
    with pytest.raises(FetchError, match='closed after'):
        fetch_source('mine', mine, attempts=3, wait=0.001)
    assert len(server.log) <= 6


def test_stale_part_of_another_version_is_dropped(mine, server):
    (mine / 'clips').mkdir(parents=True)
    (mine / 'clips/a.mp4.part').write_bytes(b'old version')
    fetch_source('mine', mine)
    assert whole(mine) == CONTENT and server.log[:2] == [('clips/a.mp4', 11), ('clips/a.mp4', 0)]


def test_part_that_is_whole_or_too_long(mine, server):
    (mine / 'clips').mkdir(parents=True)
    (mine / 'clips/a.mp4.part').write_bytes(CONTENT['clips/a.mp4'])
    (mine / 'meta.csv.part').write_bytes(b'much longer than the file is')
    fetch_source('mine', mine)
    assert whole(mine) == CONTENT and ('clips/a.mp4', 0) not in server.log


@pytest.mark.parametrize('mode', ['wrong', 'long'])
def test_wrong_bytes_are_named_and_deleted(mine, server, mode):
    server.mode = mode
    with pytest.raises(FetchError) as e:
        fetch_source('mine', mine, files='clips/a.mp4')
    assert (
        'a.mp4' in str(e.value) and git(CONTENT['clips/a.mp4']) in str(e.value) and 'deleted' in str(e.value)
    )
    if mode == 'wrong':
        assert git(bytes(300_000)) in str(e.value)
    assert whole(mine) == {}


def test_wrong_file_on_disk_is_replaced_only_by_a_right_one(mine, server, capsys):
    (mine / 'clips').mkdir(parents=True)
    (mine / 'clips/a.mp4').write_bytes(b'cut')
    server.mode = 'wrong'
    with pytest.raises(FetchError):
        fetch_source('mine', mine)
    assert whole(mine) == {'clips/a.mp4': b'cut'}
    server.mode = 'good'
    fetch_source('mine', mine)
    assert whole(mine) == CONTENT and '1 of them in place of a wrong one' in capsys.readouterr().out


def test_unknown_sizes(mine, server, tmp_path):
    m = pd.read_csv(tmp_path / 'mine.csv')
    m['bytes'] = pd.array([None] * 4, 'Int64')
    m.to_csv(tmp_path / 'mine.csv', index=False)
    server.mode, server.cuts = 'cut', 1
    fetch_source('mine', mine, wait=0.01)
    assert whole(mine) == CONTENT
    shutil.rmtree(mine)
    server.mode = 'chunked'
    fetch_source('mine', mine)
    assert whole(mine) == CONTENT
    assert set(verify_source('mine', mine)) == {'right'}
    (mine / 'meta.csv').rename(mine / 'meta.csv.part')  # whole, but nobody knows: the server says 416
    server.mode = 'good'
    fetch_source('mine', mine)
    assert whole(mine) == CONTENT


def test_busy_server_is_retried_missing_file_is_not(mine, server):
    server.mode, server.cuts = 'busy', 2
    fetch_source('mine', mine, wait=0.01)
    assert whole(mine) == CONTENT
    shutil.rmtree(mine)
    server.mode = 'gone'
    n = len(server.log)
    with pytest.raises(FetchError, match='404'):
        fetch_source('mine', mine)
    assert len(server.log) == n + 1


def test_offline_says_where_to_put_the_files(mine, server, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(FetchError) as e:
        fetch_source('mine', mine, attempts=2, wait=0.01)
    for word in ('by hand', 'http://h/all.zip', str(mine), 'clips/*.mp4', 'extract'):
        assert word in str(e.value)
    calls = []

    def no_name(*a, **k):
        calls.append(1)
        raise socket.gaierror(-3, 'Temporary failure in name resolution')

    monkeypatch.setattr(socket, 'getaddrinfo', no_name)
    with pytest.raises(FetchError, match='name resolution.*(?s:.*)by hand'):
        fetch_source('pocus', mine, wait=100)  # no waiting without a network
    assert len(calls) == 1


def test_selected_files(mine, server):
    fetch_source('mine', mine, files=['clips/*', 'meta.csv'])
    assert set(whole(mine)) == {'clips/a.mp4', 'clips/b (1)+2.mp4', 'meta.csv'}
    with pytest.raises(ValueError, match='not in the manifest of mine: nothing.mp4'):
        fetch_source('mine', mine, files=['nothing.mp4'])


@pytest.mark.parametrize(
    'name', ['../evil', 'a/../../evil', '/etc/evil', 'C:\\evil', '..\\evil', 'link/evil']
)
def test_hostile_manifest(mine, server, tmp_path, name):
    mine.mkdir(parents=True)
    (mine / 'link').symlink_to(tmp_path)
    pd.DataFrame([dict(path=name, bytes=8, git_blob_sha1=git(CONTENT['meta.csv']))]).to_csv(
        tmp_path / 'mine.csv', index=False
    )
    with pytest.raises(FetchError, match='outside'):
        fetch_source('mine', mine)
    assert not server.log


def test_addresses_other_than_http_are_refused(mine):
    with pytest.raises(ValueError, match='http'):
        fetch_source('mine', mine, base_url='file:///etc')


def test_fetch_from_a_mirror_keeps_the_upstream_prefix(mine, server, monkeypatch, tmp_path):
    s = SOURCES['mine']
    monkeypatch.setitem(
        SOURCES,
        'mine',
        Source(**{**vars(s), 'prefix': 'clips/', 'urls': dict(s.urls, raw='http://127.0.0.1:1/')}),
    )
    b = CONTENT['clips/a.mp4']
    pd.DataFrame([dict(path='a.mp4', bytes=len(b), git_blob_sha1=git(b))]).to_csv(
        tmp_path / 'mine.csv', index=False
    )
    fetch_source('mine', mine, base_url=server.url.rstrip('/'))
    assert whole(mine) == {'a.mp4': b}


def test_full_disk_is_not_taken_for_a_broken_connection(mine, server, monkeypatch):
    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(fetching.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        fetch_source('mine', mine)
    assert len(server.log) == 1 and not (mine / 'clips/a.mp4').exists()


# ---- extract


def tar_with(path, *members):
    with tarfile.open(path, 'w:gz') as t:
        for name, kind, body in members:
            i = tarfile.TarInfo(name)
            i.type = kind
            if kind == tarfile.REGTYPE:
                i.size = len(body)
                t.addfile(i, io.BytesIO(body))
            else:
                i.linkname = body.decode()
                t.addfile(i)
    return path


def zip_with(path, *members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, mode, body in members:
            i = zipfile.ZipInfo(name)
            i.external_attr = mode << 16
            z.writestr(i, body)
    return path


FILE, LINK = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


def test_extract_good_archives(tmp_path):
    a = zip_with(
        tmp_path / 'a.zip',
        ('top/', stat.S_IFDIR | 0o755, b''),
        ('top/x.csv', FILE, b'1'),
        ('top/deep/y.mp4', 0, b'22'),
        ('run.sh', stat.S_IFREG | 0o4777, b'3'),
    )
    b = tar_with(
        tmp_path / 'b.tgz',
        ('./', tarfile.DIRTYPE, b''),
        ('top', tarfile.DIRTYPE, b''),
        ('top/x.csv', tarfile.REGTYPE, b'1'),
        ('top/deep/y.mp4', tarfile.REGTYPE, b'22'),
        ('run.sh', tarfile.REGTYPE, b'3'),
    )
    for archive in (a, b):
        out = tmp_path / ('out' + archive.suffix)
        assert whole(extract_archive(archive, out)) == {
            'top/x.csv': b'1',
            'top/deep/y.mp4': b'22',
            'run.sh': b'3',
        }
        assert not (out / 'run.sh').stat().st_mode & 0o7111  # nothing becomes executable
    (out / 'mine.txt').write_bytes(b'kept')
    (out / 'top/x.csv').write_bytes(b'old')
    assert whole(extract_archive(a, out)) == {
        'top/x.csv': b'1',
        'top/deep/y.mp4': b'22',
        'run.sh': b'3',
        'mine.txt': b'kept',
    }


HOSTILE = [
    *[
        ('zip', [('ok.txt', FILE, b'1'), (n, FILE, b'x')])
        for n in ('../evil', 'a/../../evil', '/tmp/evil', 'C:/evil', '..\\evil')
    ],
    ('zip', [('link', LINK, b'/etc'), ('link/evil', FILE, b'x')]),
    *[
        ('tar', [('ok.txt', tarfile.REGTYPE, b'1'), (n, tarfile.REGTYPE, b'x')])
        for n in ('../evil', '/tmp/evil', 'a/../../evil')
    ],
    *[
        ('tar', [('ok.txt', tarfile.REGTYPE, b'1'), ('link', k, b'../evil')])
        for k in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    ],
]


@pytest.mark.parametrize('kind, members', HOSTILE)
def test_hostile_archives_write_nothing(tmp_path, kind, members):
    box = tmp_path / 'box'
    box.mkdir()
    a = (zip_with if kind == 'zip' else tar_with)(tmp_path / f'a.{kind}', *members)
    with pytest.raises(FetchError, match='refused'):
        extract_archive(a, box / 'out')
    assert not list(box.iterdir()) and {p.name for p in tmp_path.iterdir()} == {'box', a.name}


def test_extract_does_not_follow_a_link_that_is_there(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere').mkdir()
    with pytest.raises(FetchError, match='outside'):
        extract_archive(zip_with(tmp_path / 'a.zip', ('link/evil', FILE, b'x')), tmp_path / 'out')
    assert not list((tmp_path / 'elsewhere').iterdir())


def test_bombs_and_lies(tmp_path):
    a = zip_with(tmp_path / 'a.zip', ('zeros', FILE, bytes(5_000_000)))
    with pytest.raises(FetchError, match='more than the limit'):
        extract_archive(a, tmp_path / 'out', limit=1_000_000)
    raw = bytearray(a.read_bytes())
    at = raw.rfind(b'PK\1\2')
    raw[at + 24 : at + 28] = (1000).to_bytes(4, 'little')  # the directory says 1000 bytes
    a.write_bytes(raw)
    with pytest.raises(FetchError):
        extract_archive(a, tmp_path / 'out', limit=1_000_000)
    assert not (tmp_path / 'out').exists()


def test_damaged_archives_leave_nothing(tmp_path):
    good = zip_with(
        tmp_path / 'a.zip', ('x', FILE, os.urandom(9000)), ('y', FILE, os.urandom(9000))
    ).read_bytes()
    flipped = bytearray(good)
    flipped[5000] ^= 255
    tar = tar_with(tmp_path / 'a.tgz', ('x', tarfile.REGTYPE, os.urandom(90_000))).read_bytes()
    for name, body in (
        ('flip.zip', flipped),
        ('cut.zip', good[:5000]),
        ('cut.tgz', tar[:40_000]),
        ('page.zip', b'<html>please log in'),
        ('empty.zip', b''),
    ):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(FetchError, match=name):
            extract_archive(tmp_path / name, tmp_path / 'out')
        assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))
    with pytest.raises(FetchError, match='does not exist'):
        extract_archive(tmp_path / 'no.zip', tmp_path / 'out')


# ---- index


def pocus(root, files, rows):
    for f in files:
        (root / f).parent.mkdir(parents=True, exist_ok=True)
        (root / f).touch()
    (root / 'pocus_videos').mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=['Filename', 'Label', 'Source ID', 'Patient ID / Name', 'B-lines']).to_csv(
        root / 'dataset_metadata.csv', index=False
    )
    return root


def named(table):
    return table.set_index(table.path.map(lambda p: Path(p).name))


def test_pocus_matching_and_reports(tmp_path, capsys):
    v = 'pocus_videos/convex/'
    root = pocus(
        tmp_path / 'pocus',
        [
            v + 'Cov-Atlas+(44).gif',
            v + 'PNEU_x.mp4',
            v + 'reg new.mpeg',
            v + 'Vir_h1n1.MP4',
            v + 'Other_thing.mp4',
            v + '.Reg_hidden.mp4',
            v + 'notes.txt',
            'pocus_videos/linear/label_uncertain/Vir_or_Pneu_1.mp4',
            'pocus_images/linear/Reg_northumbria_0409_set3_img1.jpg',
            v + 'Pneu_northumbria_0409_set3_vid1.avi',
            v + 'Reg_northumbria_1009_vid1.avi',
            v + 'Reg_noid.mp4',
            v + 'Reg_noid2.mp4',
        ],
        [
            ('cov-atlas+(44).GIF', 'COVID-19', '2.0', 36, 1),
            (' Pneu_x', 'COVID-19', 6, 'Patient A', 0),
            ('Vir_h1n1', 'Viral pneumonia', 24, 99, None),
            ('Reg_northumbria_0409_set3_img1', 'regular', 18, 206, 1),
            ('Pneu_northumbria_0409_set3_vid1', 'Bacterial pneumonia', 18, 190, 0),
            ('Reg_northumbria_1009_vid1', 'regular', 18, 211, 0),
            ('Reg_noid', 'regular', 14, None, 0),
            ('Reg_noid2', 'regular', 14, ' ', 0),
            ('Cov_gone', 'COVID-19', 2, 3, 0),
        ],
    )
    t = named(index_source('pocus', root))
    out = capsys.readouterr().out
    assert tuple(t.columns[:6]) == CLIP_COLUMNS and len(t) == 10 and list(t.path) == sorted(t.path)
    assert t.loc[
        'Cov-Atlas+(44).gif', ['label', 'patient', 'source', 'probe', 'kind', 'b_lines']
    ].tolist() == ['covid', 'pocus-36', 'pocus-2', 'convex', 'video', 1]
    assert t.patient['PNEU_x.mp4'] == 'pocus-patient-a' and t.label['PNEU_x.mp4'] == 'pneumonia'
    assert t.label['Vir_h1n1.MP4'] == 'viral' and np.isnan(t.b_lines['Vir_h1n1.MP4'])
    assert t.loc['Vir_or_Pneu_1.mp4', ['label', 'probe']].tolist() == ['uncertain', 'linear']
    assert t.kind['Reg_northumbria_0409_set3_img1.jpg'] == 'image'
    assert (
        t.patient['Reg_northumbria_0409_set3_img1.jpg']
        == t.patient['Pneu_northumbria_0409_set3_vid1.avi']
        == 'pocus-northumbria-0409-set3'
    )
    assert t.patient['Reg_northumbria_1009_vid1.avi'] == 'pocus-211'
    assert t.patient['Reg_noid.mp4'] == t.patient['Reg_noid2.mp4'] == 'pocus-14-nameless'
    for line in (
        '1 file(s) skipped: neither label nor probe',
        'Other_thing',
        '2 file(s) without a row',
        '1 row(s) whose file is not here',
        'Cov_gone',
        '4 file(s) without a patient id',
        '1 file(s) whose spreadsheet label differs',
        '2 patient(s) with two labels: pocus-northumbria-0409-set3',
    ):
        assert line in out


def test_index_finds_nested_layouts(tmp_path):
    pocus(
        tmp_path / 'covid19_ultrasound-9e254a/data',
        ['pocus_videos/convex/Cov_a.mp4'],
        [('Cov_a', 'COVID-19', 2, 1, 0)],
    )
    assert (
        len(index_source('pocus', tmp_path))
        == len(index_source('pocus', tmp_path / 'covid19_ultrasound-9e254a'))
        == len(index_source('pocus', tmp_path / 'covid19_ultrasound-9e254a/data'))
        == 1
    )


def test_index_by_environment(tmp_path, monkeypatch):
    pocus(tmp_path / 'pocus', ['pocus_videos/convex/Cov_a.mp4'], [('Cov_a', 'COVID-19', 2, 1, 0)])
    monkeypatch.setenv('LUS_DATA', str(tmp_path))
    assert len(index_source('pocus')) == 1
    monkeypatch.delenv('LUS_DATA')
    monkeypatch.setenv('LUS_HOME', str(tmp_path / 'home'))
    with pytest.raises(FileNotFoundError, match='home/data/pocus'):
        index_source('pocus')


def test_wrong_folders_say_what_was_expected(tmp_path):
    for name, word in (('pocus', 'dataset_metadata.csv'), ('blues', 'severity.csv')):
        with pytest.raises(FileNotFoundError, match=f'is no folder with {name}.*{word}') as e:
            index_source(name, tmp_path / 'nowhere')
        assert 'by hand' in str(e.value)
        with pytest.raises(FileNotFoundError, match=f'does not hold {name}'):
            index_source(name, tmp_path)
    with pytest.raises(TableError, match='has no clip of pocus'):
        index_source('pocus', pocus(tmp_path / 'p', [], [('Cov_a', 'COVID-19', 2, 1, 0)]))
    (tmp_path / 'p/dataset_metadata.csv').write_text('a,b\n1,2\n')
    with pytest.raises(TableError, match="dataset_metadata.csv lacks the column.*'Filename'"):
        index_source('pocus', tmp_path / 'p')
    (tmp_path / 'p/dataset_metadata.csv').write_text('')
    with pytest.raises(TableError, match='is empty'):
        index_source('pocus', tmp_path / 'p')
    with pytest.raises(ValueError, match="unknown source 'x'"):
        index_source('x')


def test_blues(tmp_path, capsys):
    (tmp_path / 'lus_videos').mkdir()
    for f in ('patient_1_L1', 'patient_1_R1_2', 'patient_2_L3', 'patient_3_L1', 'other'):
        (tmp_path / f'lus_videos/{f}.mp4').touch()
    pd.DataFrame(dict(patient_id=[1, 2], cov_test=[1, 0])).to_csv(
        tmp_path / 'clinical_variables.csv', index=False
    )
    pd.DataFrame(
        [
            ('patient_1_L1', 2.0, 'yes ', 'no'),
            ('patient_1_R1_2', 0.0, ' no', 'Yes'),
            ('patient_9_L1', 1.0, 'no', 'no'),
        ],
        columns=['video_file', 'Severity Score', 'A-lines', 'B-lines'],
    ).to_csv(tmp_path / 'severity.csv', index=False)
    t = named(index_source('blues', tmp_path))
    out = capsys.readouterr().out
    assert t.loc[
        'patient_1_L1.mp4', ['label', 'patient', 'source', 'probe', 'point', 'severity', 'a_lines', 'b_lines']
    ].tolist() == ['covid', 'blues-1', 'blues', 'convex', 'L1', 2, 1, 0]
    assert t.loc['patient_1_R1_2.mp4', ['point', 'a_lines', 'b_lines']].tolist() == ['R1', 0, 1]
    assert (
        t.label['patient_2_L3.mp4'] == 'negative' and np.isnan(t.severity['patient_2_L3.mp4']) and len(t) == 3
    )
    for line in (
        '2 file(s) skipped: no test result',
        '1 file(s) without a row in severity.csv',
        '1 row(s) of severity.csv whose file is not here',
    ):
        assert line in out


# ---- registry and manifests


@pytest.mark.parametrize('name, files, clips', [('pocus', 168, 167), ('blues', 366, 362)])
def test_manifests(name, files, clips):
    m = manifest(name)
    assert list(m.columns) == [
        'path',
        'bytes',
        'git_blob_sha1',
        'kind',
        'label',
        'patient',
        'source',
        'probe',
    ]
    assert (
        len(m) == files
        and m.path.is_unique
        and m.git_blob_sha1.str.fullmatch('[0-9a-f]{40}').all()
        and m.kind.notna().sum() == clips
    )
    for r in m[m.kind.notna()].itertuples():  # what is listed agrees with what the names say
        parts = (pocus_name if name == 'pocus' else blues_name)(r.path)
        assert (
            r.kind == parts['kind']
            and r.probe == parts['probe']
            and (parts['patient'] is None or parts['patient'] == r.patient)
            and r.label == parts.get('label', r.label)
            or pd.isna(r.label)
        )
    assert all(
        s.licence and s.citation and s.urls['homepage'] and s.urls.get('raw', '/').endswith('/')
        for s in SOURCES.values()
    )
    assert list(sources_table().index) == list(SOURCES)


def test_manifest_of_an_installed_package_comes_first(tmp_path, monkeypatch):
    (tmp_path / 'lus_fastai/_data').mkdir(parents=True)
    (tmp_path / 'lus_fastai/_data/blues.csv').write_text('path,bytes,git_blob_sha1\na,1,b\n')
    monkeypatch.setattr(core, '__file__', str(tmp_path / 'lus_fastai/core.py'))
    assert len(manifest('blues')) == 1
    with pytest.raises(FileNotFoundError, match="no manifest of 'pocus'"):
        manifest('pocus')


# ---- the real thing

real = pytest.mark.skipif(not os.environ.get('LUS_DATA'), reason='LUS_DATA is not set')


@real
def test_real_pocus(capsys):
    t = index_source('pocus')
    n = named(t)
    assert len(t) == 129 and t.label.value_counts().to_dict() == dict(
        regular=56, pneumonia=39, covid=28, viral=5, uncertain=1
    )
    assert (
        t.patient.nunique() == 66
        and t.source.nunique() == 13
        and t.kind.value_counts().to_dict() == dict(video=105, image=24)
    )
    two = t.groupby('patient').label.nunique()
    assert set(two[two > 1].index) == {
        'pocus-7',
        'pocus-northumbria-0409-set3',
        'pocus-northumbria-0409-set5',
    }
    assert len({n.patient[f'Pneu_northumbria_0409_set2_vid{i}.avi'] for i in (1, 2, 3, 4)}) == 1
    for source, label in ((14, 'regular'), (17, 'covid'), (37, 'covid'), (40, 'covid')):
        assert set(t.label[t.source == f'pocus-{source}']) == {label}
    m = manifest('pocus').set_index('path')
    root = Path(os.environ['LUS_DATA']).resolve() / 'pocus'
    rel = [Path(p).relative_to(root).as_posix() for p in t.path]
    for c in ('kind', 'label', 'patient', 'source', 'probe'):
        assert list(m.loc[rel, c]) == list(t[c])
    out = capsys.readouterr().out
    assert 'without a row' not in out and 'not here' not in out


@real
def test_real_blues():
    t = index_source('blues')
    assert (
        len(t) == 241
        and t.patient.nunique() == 42
        and t.groupby('patient').label.first().value_counts().to_dict() == dict(covid=22, negative=20)
    )
    assert t[['severity', 'a_lines', 'b_lines']].notna().all().all() and set(t.point) == {
        'L1',
        'L2',
        'L3',
        'R1',
        'R2',
        'R3',
    }


@real
@pytest.mark.parametrize('name', ['pocus', 'blues'])
def test_real_clips_are_those_of_the_manifest(name):
    state = verify_source(name)[manifest(name).set_index('path').kind.notna()]
    assert (state == 'right').sum() == dict(pocus=129, blues=241)[name] and 'wrong' not in set(state)
