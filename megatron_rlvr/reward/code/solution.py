"""Process of one solution, with the arguments DESCRIPTOR SECONDS MEMORY_BYTES MODE; `runner.py` starts it.

The descriptor holds a JSON object {"program", "asserts", "token"}. The process confines itself (`confinement.py`), and
then runs the program as __main__, which reads standard input and writes standard output:

    MODE run      the program alone
    MODE assert   the program, then each of the asserts in its namespace; if none fails, the token goes to the
                  descriptor, which is a socket
    MODE probe    nothing; prints what confines the process, in JSON
"""

import json
import os
import socket
import sys

from megatron_rlvr.reward.code.confinement import confine


def main() -> None:
    """Run what the command line says."""
    descriptor, seconds, memory, mode = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    channel = socket.socket(fileno=descriptor)
    parts = []
    while part := channel.recv(2**16):
        parts.append(part)
    task = json.loads(b"".join(parts))
    del sys.argv[1:]
    os.chdir("/")
    in_force = confine(seconds, memory)
    if mode == "probe":
        sys.stdout.write(json.dumps(in_force))
        return
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(task["program"], "solution", "exec"), namespace)
    if mode == "assert":
        for number, text in enumerate(task["asserts"]):
            exec(compile(text, f"assert {number}", "exec"), namespace)
        os.write(descriptor, task["token"].encode())  # the filter refuses to send
    sys.stdout.flush()
