"The command line and environment of two CPU processes that work together (gloo, started by accelerate)."

import os
import sys
from pathlib import Path

import lus_fastai


def two_processes(*script):
    "Command and environment that start a script, with its arguments, in two processes."
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--main_process_port', '0']
    launch += [
        '--num_processes',
        '2',
        '--num_machines',
        '1',
        '--mixed_precision',
        'no',
        '--dynamo_backend',
        'no',
    ]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    env['PYTHONPATH'] = str(Path(lus_fastai.__file__).parents[1])
    if sys.platform == 'linux':
        env['GLOO_SOCKET_IFNAME'] = 'lo'
    return [*launch, *map(str, script)], env
