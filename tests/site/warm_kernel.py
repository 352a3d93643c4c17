"""A Jupyter kernel that starts warm: one process imports fastai, and forks for each notebook.

`serve ADDRESS` is that process; `start ADDRESS FILE` is what Jupyter runs in the place of a kernel.
The forked child is an ordinary ipykernel: its namespace is empty, and `lus_fastai` is not imported yet.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import sys
import threading


def serve(address):
    "Import once, then fork for each that asks; ends with standard input."
    import fastai.vision.all  # noqa: F401
    import ipykernel.kernelapp  # noqa: F401

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        gc.freeze()  # what is there at a fork stays shared
        print('ready', flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            caller, _ = server.accept()
            if not os.fork():
                server.close()
                return kernel(caller)
            caller.close()
            reap(os.WNOHANG)
    reap(0)


def reap(flags):
    "Take note of the children that ended."
    try:
        while os.waitpid(-1, flags)[0]:
            pass
    except ChildProcessError:
        pass


def kernel(caller):
    "Be a kernel, in the folder and environment of the one that asked, and no longer than it lives."
    asked = json.loads(caller.makefile().readline())
    os.setsid()
    os.chdir(asked['folder'])
    os.environ.clear()
    os.environ.update(asked['environ'])
    sys.path.pop(0)  # the folder of this file
    threading.Thread(target=lambda: caller.recv(1) or os._exit(1), daemon=True).start()
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(argv=['-f', asked['file']])
    atexit._run_exitfuncs()
    os._exit(0)  # to take down all that was imported would copy it first


def start(address, file):
    "Ask for a kernel, and last as long as it does."
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Jupyter interrupts a kernel before it asks it to end
    asked = dict(file=file, folder=os.getcwd(), environ=dict(os.environ))
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        server.sendall(f'{json.dumps(asked)}\n'.encode())
        server.recv(1)


if __name__ == '__main__':
    dict(serve=serve, start=start)[sys.argv[1]](*sys.argv[2:])
