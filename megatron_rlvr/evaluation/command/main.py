"""The command ``rlvr evaluate``: reads what it is given, starts ranks or servers, samples, and reports."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_rlvr import open_files
from megatron_rlvr.config import ParallelSettings, SettingsError
from megatron_rlvr.config.urls import check_urls, without_slash
from megatron_rlvr.errors import RlvrError
from megatron_rlvr.evaluation.command import options as command_line
from megatron_rlvr.evaluation.command.lease import lease_of
from megatron_rlvr.evaluation.command.regrade import regrade
from megatron_rlvr.evaluation.command.results import report
from megatron_rlvr.evaluation.command.target import Target, find_target
from megatron_rlvr.evaluation.compare import compare
from megatron_rlvr.evaluation.folder import DESCRIPTION, check_folder, read_description, write_description
from megatron_rlvr.evaluation.records import RecordsError, read_records
from megatron_rlvr.input_files import is_file, is_folder
from megatron_rlvr.launch import launched, start_ranks
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.signals import Signals, Stopped
from megatron_rlvr.startup.evaluation import ResolvedEvaluation, describe_evaluation, resolve_evaluation
from megatron_rlvr.startup.process import end_with_launcher, is_main, print_error, quiet_libraries, world_size

_SERVED_MODEL = "model"
_SERVE_FLAGS = {
    "serve_count": "--servers",
    "serve_tensor": "--tensor",
    "serve_port": "--port",
    "serve_python": "--python",
}


def main(arguments: Sequence[str], program: str) -> int:
    """Evaluate, compare or grade again, and return the exit status.

    Args:
        program: Name of the command in messages.
    """
    options = command_line.parse(arguments, program)
    if options.compare is not None:
        return compare(options.compare, as_json=options.json)
    quiet_libraries()
    signals = Signals()
    signals.listen()
    try:
        if options.regrade is not None:
            regrade(options.regrade, options.out, options.flags, as_json=options.json)
            return 0
        return _evaluate(options, list(arguments))
    except RlvrError as error:
        print_error(error)
        return error.exit_status
    except Stopped as stopped:
        return stopped.exit_status


def _evaluate(options: Namespace, arguments: list[str]) -> int:
    end_with_launcher()
    open_files.raise_limit()
    servers = _servers(options.servers) if options.servers else []
    target = find_target(_served_folder(options, servers) if options.target is None else options.target, options.step)
    # The settings are those of servers also before any is started.
    urls = servers or (["http://127.0.0.1:30000"] if options.serve else [])
    settings = command_line.settings_of(options, target.folder, target.run, urls)
    resolved = resolve_evaluation(settings, _recorded_clock(options.out), show_progress=is_main())
    description = describe_evaluation(resolved)
    description["target"] = target.describe() | {"dtype": settings.model.dtype}
    if options.two_temperatures is not None:
        description["sampling"]["two_temperatures"] = options.two_temperatures
    check_folder(options.out, description)
    if _is_complete(options.out, resolved):
        return _report_again(options, resolved, description)
    if options.serve:
        return _serve(options, arguments, target, description, settings.rollout.api_key_file)
    ranks = options.ranks or (1 if servers else _default_ranks())
    if ranks > 1 and not launched():
        return start_ranks("evaluate", arguments, ranks)
    return _sample(options, resolved, target, description)


def _sample(options: Namespace, resolved: ResolvedEvaluation, target: Target, description: dict[str, Any]) -> int:
    """Sample in this process, which may be one of several ranks."""
    from megatron_rlvr.evaluation.command.session import run_session

    served = [target.folder, options.out / _SERVED_MODEL] if options.target is not None else []
    with ExitStack() as resources:
        if is_main():  # a second command would sample the same completions
            resources.enter_context(lease_of(resolved.settings.run))
        graders = resources.enter_context(_graders(resolved))
        run_session(
            *(resolved, target, description, options.out, graders),
            two_temperatures=options.two_temperatures,
            served=served,
            as_json=options.json,
        )
    return 0


def _report_again(options: Namespace, resolved: ResolvedEvaluation, description: dict[str, Any]) -> int:
    """Report an evaluation of which every completion is recorded already."""
    if is_main():
        write_description(options.out, description)  # the values of k may be others
        with _graders(resolved) as graders:
            report(options.out, resolved, read_records(options.out), graders, tokens=0, seconds=0, as_json=options.json)
    return 0


def _serve(
    options: Namespace, arguments: list[str], target: Target, description: dict[str, Any], api_key_file: str | None
) -> int:
    """Start servers, run this command again on them, and stop them; return the exit status of that."""
    from megatron_rlvr.engines.sglang.launcher import command as launcher

    try:
        write_description(options.out, description)
    except OSError as error:
        raise RecordsError(f"--out {options.out}: cannot be written ({error}); choose another folder") from None
    with ExitStack() as resources:
        model = target.folder
        if target.is_checkpoint:
            from megatron_rlvr.convert.conversion import checkpoint_tensors
            from megatron_rlvr.hf.weights import write_folder

            model = options.out / _SERVED_MODEL
            write_folder(model, target.folder, checkpoint_tensors(target.weights), fsync=False)
            resources.callback(_remove, model)
        words = [str(model), "--device", options.serve, "--run-dir", str(options.out)]
        for name, flag in _SERVE_FLAGS.items():
            if getattr(options, name) is not None:
                words += [flag, str(getattr(options, name))]
        if api_key_file is not None:
            words += ["--api-key-file", api_key_file]
        again = [sys.executable, "-m", "megatron_rlvr.cli", "evaluate", *_without_serving(arguments)]
        flags = ["--", *options.server_flags] if options.server_flags else []
        then = ["--then", *again, "--servers", "{servers}"]
        return launcher.main([*words, *flags, *then], "rlvr evaluate", sys.stderr)  # stdout is for the result


def _without_serving(arguments: list[str]) -> list[str]:
    """Return the arguments without ``--serve``, its options, and what follows ``--``."""
    words = arguments[: arguments.index("--")] if "--" in arguments else list(arguments)
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--serve") or word.startswith("--servers"):
            rest.append(word)
        elif "=" not in word:
            words.pop(0)
    return rest


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _servers(words: Sequence[str]) -> list[str]:
    """Return the URLs of ``--servers URL URL`` or ``--servers '[URL, URL]'``. Raises SettingsError."""
    text = " ".join(words)
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    urls = without_slash(text.replace(",", " ").replace('"', " ").split())
    try:
        check_urls("--servers", urls)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return urls


def _served_folder(options: Namespace, servers: Sequence[str]) -> Path:
    """Return the folder of the model that servers serve, on this machine. Raises InputError."""
    from megatron_rlvr.engines.sglang.api_key import read_api_key
    from megatron_rlvr.engines.sglang.connect import served_folder

    key_file = command_line.api_key_file(options)
    folder = served_folder(servers, read_api_key(key_file, "rollout.api_key_file") if key_file else None)
    if folder is None or not is_folder(folder):
        raise SettingsError(
            f"--servers {servers[0]}: serves {str(folder)[:200]}, which is no folder of this machine; give TARGET, "
            "whose tokenizer and configuration are read"
        )
    return Path(folder)


def _recorded_clock(out: Path) -> datetime | None:
    """Return the moment that the chat template saw when the evaluation in a folder started; None if there is none."""
    if not is_file(out / DESCRIPTION):
        return None
    clock = read_description(out)["prompts"].get("clock")
    try:
        return None if clock is None else datetime.fromisoformat(clock)
    except (TypeError, ValueError):
        raise RecordsError(f"{out / DESCRIPTION}: prompts.clock={clock!r} is no time; restore the file") from None


def _is_complete(out: Path, resolved: ResolvedEvaluation) -> bool:
    """Return whether exactly the completions of the evaluation are recorded."""
    problems = {p.id: p.answer for prompts in resolved.evaluation.values() for p in prompts.prompts}
    size = resolved.settings.evaluate.group_size
    found = {(r.problem, r.index): r.gold for r in read_records(out)}
    return found == {(problem, i): gold for problem, gold in problems.items() for i in range(size)}


def _graders(resolved: ResolvedEvaluation) -> GraderPool:
    reward = resolved.settings.reward
    return GraderPool(
        reward.function,
        workers=reward.workers,
        timeout_seconds=reward.timeout_seconds,
        answer_after=resolved.answer_after,
    )


def _default_ranks() -> int:
    if "WORLD_SIZE" in os.environ:
        return world_size(ParallelSettings())
    from megatron_rlvr.distributed.accelerator import gpu_count  # imports torch

    return gpu_count() or 1
