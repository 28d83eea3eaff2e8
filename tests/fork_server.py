"""Python processes that start at once, for tests that need a second process.

`python -c "import diffusers"` takes eight seconds. A server imports the libraries once and does nothing else; each process is forked from
it, runs its program and ends like any other. Nothing of the tests' own process is in it: no model, no cache, another hash seed.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

LIBRARIES = (
    "from diffusers import AutoencoderDC, DiffusionPipeline, StableDiffusionPipeline; from transformers import CLIPTextModel"
)
PACKAGE = "from diffusers_compress import DiffCPipeline, RelicPipeline, PerCoPipeline; import diffusers_compress.cli"


class ForkServer:
    """Close it, or end this process, and the server ends; what it has started goes on."""

    def __init__(self, imports=f"{LIBRARIES}; {PACKAGE}", environment=None):
        self.folder = tempfile.TemporaryDirectory()
        self.address = f"{self.folder.name}/socket"
        command = [sys.executable, __file__, self.address, imports]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdout.readline() == b"ready\n", "the server did not start"

    def close(self):
        self.process.communicate()
        self.folder.cleanup()

    def start(self, arguments, *, cwd=None, env=None):
        """A process that runs what `python ARGUMENTS` would run: -c PROGRAM, -m MODULE or a file, each with its own arguments."""
        return Process(self.address, [str(word) for word in arguments], str(cwd or os.getcwd()), env)

    def run(self, arguments, *, cwd=None, env=None, input=b"", check=False, text=False, capture_output=True):
        """As `subprocess.run([sys.executable, *ARGUMENTS])`, and with that first word too."""
        assert capture_output
        arguments = arguments[1:] if arguments[0] == sys.executable else arguments
        process = self.start(arguments, cwd=cwd, env=env)
        out, err = process.communicate(input)
        if check and process.returncode:
            raise AssertionError(f"{arguments} ended with {process.returncode}:\n{err.decode()}")
        return subprocess.CompletedProcess(
            arguments, process.returncode, out.decode() if text else out, err.decode() if text else err
        )


class Process:
    """One that was forked; of `subprocess.Popen` what the tests need. All three streams are pipes."""

    def __init__(self, address, arguments, cwd, env):
        (stdin, self.stdin), (self.stdout, stdout), (self.stderr, stderr) = os.pipe(), os.pipe(), os.pipe()
        self.returncode = None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        request = json.dumps({"arguments": arguments, "cwd": cwd, "env": dict(env or os.environ)}).encode()
        socket.send_fds(self.connection, [len(request).to_bytes(4, "little")], [stdin, stdout, stderr])
        self.connection.sendall(request)
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
        self.answers = self.connection.makefile("r")
        self.pid = int(self.answers.readline())

    def communicate(self, input=b""):
        found = {}

        def read(name, descriptor):
            with os.fdopen(descriptor, "rb") as file:
                found[name] = file.read()

        readers = [threading.Thread(target=read, args=pair) for pair in (("out", self.stdout), ("err", self.stderr))]
        for reader in readers:
            reader.start()
        try:
            with os.fdopen(self.stdin, "wb") as file:
                file.write(input)
        except BrokenPipeError:  # the process ended without reading all of it
            pass
        self.wait()
        for reader in readers:
            reader.join()
        return found["out"], found["err"]

    def wait(self):
        if self.returncode is None:
            self.returncode = int(self.answers.readline())
            self.connection.close()
        return self.returncode


def serve(address):
    """Returns in each forked process: the words of its command line."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # of the processes below that wait, nobody wants the status
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)  # whoever started the server has closed it or ended
        connection = listener.accept()[0]
        if os.fork() == 0:
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, descriptors, *_ = socket.recv_fds(connection, 4, 3)
    request = json.loads(connection.makefile("rb").read(int.from_bytes(size, "little")))
    pid = os.fork()
    if pid:
        connection.sendall(f"{pid}\n".encode())
        for descriptor in descriptors:
            os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{status}\n".encode())
        os._exit(0)
    connection.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = sys.__stdin__ = open(0)
    sys.stdout = sys.__stdout__ = open(1, "w")
    sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace")
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request["arguments"]


def become(kind, *words):
    """Runs that program as the interpreter would, and ends this process."""
    sys.path[0] = os.getcwd()
    status = 0
    try:
        if kind == "-c":
            sys.argv = ["-c", *words[1:]]
            exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = list(words)
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *words]
            sys.path[0] = str(Path(kind).resolve().parent)
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking all the libraries' objects apart would cost seconds


if __name__ == "__main__":
    exec(sys.argv[2])
    become(*serve(sys.argv[1]))
