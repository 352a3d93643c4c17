"Bars and stages: on a terminal, and in a log file."

import os
import pty
import re
import subprocess
import sys

CODE = """
from lus_fastai.core import StageLog, progress
stage = StageLog(2)
stage('first')
assert list(progress(range(50), desc='clips')) == list(range(50))
stage('second')
stage.done()
"""


def on_a_terminal(code):
    "What a program writes to a terminal."
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, '-c', code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b''
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # Linux says so where the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, said
    return said.decode()


def test_a_log_file_has_a_line_a_stage(tmp_path):
    log = tmp_path / 'log'
    with open(log, 'wb') as f:
        subprocess.run([sys.executable, '-c', CODE], stdout=f, stderr=f, check=True)
    assert re.fullmatch(rb'1/2 first: \d+ s\n2/2 second: \d+ s\n', log.read_bytes())


def test_a_terminal_shows_bars_and_what_is_running():
    said = on_a_terminal(CODE)
    assert re.search(r'1/2 first \.\.\.\r\n.*clips.*1/2 first: \d+ s\r\n2/2 second \.\.\.', said, re.S)
    assert said.count('\r') > said.count('\n') and re.search(r'\d/50', said)  # a bar writes over itself
