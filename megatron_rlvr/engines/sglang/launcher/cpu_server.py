"""Starts an SGLang server on a CPU; run by the server's own Python, in place of ``python -m sglang.launch_server``.

SGLang starts its scheduler and its detokenizer as new interpreters, which CUDA needs, and each of them imports for as
long as the server itself. Here they are forked: a server starts in a third of the CPU time, and its processes share
the memory of what they import.
"""

import multiprocessing
import runpy
import sys


def main() -> None:
    """Run SGLang's server with the arguments of this program."""
    sys.path.pop(0)  # this file's folder, with modules of common names
    set_start_method = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        set_start_method("fork", force=force)

    multiprocessing.set_start_method = fork  # type: ignore[assignment]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
