"""The program: ``python -m megatron_rlvr.train CONFIG.yaml``, usually under torchrun.

    torchrun --nproc-per-node 2 -m megatron_rlvr.train CONFIG.yaml --selection.fraction 0.1

The user's input is checked first, most of it before torch is imported and all but a little before any process group
starts. Wrong input ends with status 2 and one line on stderr.
"""

import sys
from typing import NoReturn

from megatron_rlvr import open_files
from megatron_rlvr.config import SettingsError
from megatron_rlvr.config.help import help_text
from megatron_rlvr.config.loading import load_settings, to_yaml
from megatron_rlvr.distributed import environment
from megatron_rlvr.errors import RlvrError
from megatron_rlvr.reward.graders import GraderPool
from megatron_rlvr.signals import Signals, Stopped
from megatron_rlvr.startup.describe import describe_first_prompt, describe_plan
from megatron_rlvr.startup.golds import describe_golds
from megatron_rlvr.startup.layout_checks import check_megatron
from megatron_rlvr.startup.lease import take_lease
from megatron_rlvr.startup.model_file import with_model_folder
from megatron_rlvr.startup.process import (
    check_launch,
    end_with_launcher,
    is_leader,
    is_main,
    leave,
    logger,
    print_error,
    print_line,
    quiet_libraries,
    survive_closed_output,
)
from megatron_rlvr.startup.resolve import resolve
from megatron_rlvr.startup.run import run


def main(arguments: list[str] | None = None) -> None:
    """Check the input, then train, or with ``--check`` print the resolved settings and the plan.

    Exits with 0, 1 after a fault, 2 for wrong input, and 128 + n for signal n that ended it at once.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(), end="")
        return
    check = "--check" in arguments
    end_with_launcher()
    open_files.raise_limit()
    survive_closed_output()
    quiet_libraries()
    signals = Signals()
    signals.listen()
    lease = None
    try:
        config, *flags = [argument for argument in arguments if argument != "--check"] or [""]
        if not config or config.startswith("--"):
            raise SettingsError("the first argument is not a settings file; give CONFIG.yaml, or --help for its keys")
        settings = with_model_folder(load_settings(config, flags))
        if not check:
            check_launch(settings.parallel, "torchrun --nproc-per-node {ranks} -m megatron_rlvr.train")
            environment.set_defaults(settings.megatron)
            if is_main():
                lease = take_lease(settings.run, print_line)
                lease.keep(_end_without_lease)
        resolved = resolve(settings, show_progress=is_main())
        check_megatron(settings, resolved.hf_config, kernels=not check)
        graders = GraderPool(
            settings.reward.function,
            workers=1 if check else settings.reward.workers,
            timeout_seconds=settings.reward.timeout_seconds,
            answer_after=resolved.answer_after,
            # With servers, only leaders have responses.
            at_once=settings.rollout.engine == "embedded" or is_leader(settings.parallel),
        )
        golds = describe_golds(resolved) if is_main() else ""
    except (RlvrError, Stopped) as error:
        if lease is not None:
            lease.release()
        if isinstance(error, RlvrError):
            print_error(error)
        sys.exit(error.exit_status)
    with graders:
        if check:
            plan = "\n".join(filter(None, (describe_plan(resolved), golds)))
            print(f"{to_yaml(resolved.settings)}\n{plan}\n\n{describe_first_prompt(resolved)}")
        else:
            if golds:
                logger.info("%s", golds)
            run(resolved, graders, signals, lease)


def _end_without_lease(error: Exception) -> NoReturn:
    print_error(error)
    leave(1)


if __name__ == "__main__":
    main()
