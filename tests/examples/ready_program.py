"""`dist-lm` without its seconds of imports: each command is forked from a process that has made them.

`serve SOCKET` is that process; `call SOCKET WORDS...` runs a command in it, with the caller's folder, variables,
input and output, and ends with its exit code.
"""

import json
import os
import socket
import sys


def call(path: str, words: list[str]) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        given = {"words": words, "folder": os.getcwd(), "variables": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(given).encode()], [0, 1, 2])
        # Nothing comes from a command that was killed.
        return int(connection.recv(16) or b"1")


def serve(path: str) -> None:
    import signal

    import dist_lm.cluster.preload
    import dist_lm.export
    import dist_lm.plan.plan
    import dist_lm.report.page
    import dist_lm.trained  # noqa: F401

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        # The kernel buries the children.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                break
            connection.close()
    _run(connection)


def _run(connection: socket.socket) -> None:
    import atexit

    from dist_lm.cli import main

    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    given = json.loads(message)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.chdir(given["folder"])
    os.environ.clear()
    os.environ.update(given["variables"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code: object = 1
    try:
        main(given["words"])
    except SystemExit as ended:
        code = ended.code
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        connection.send(str(code or 0).encode())
        os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3:]))
