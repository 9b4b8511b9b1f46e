"""Kaggle datasets and notebook from this clone: `python build_kernel.py --username you`, then `check` and `push`.

docs/kaggle.md walks through it. Here is only the command line; `arc_kernel.kaggle` does the work.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from arc_kernel.adapter_fit import check_served
from arc_kernel.checkpoint import open_model
from arc_kernel.errors import ArcKernelError, os_line
from arc_kernel.kaggle import commands, datasets, profiles, wheels
from arc_kernel.kaggle.templates import USERNAME, Origin

OPTIONS = {
    "profile": {"default": "kaggle-t4", "help": "machine to build for, one of arc_kernel/kaggle/profiles.toml (default: %(default)s)"},
    "model": {"default": "smollm2-135m", "help": "model folder, or smollm2-135m (embedded; default)"},
    "licence": {"default": "", "help": "licence of the model, where its README.md does not say (license: apache-2.0)"},
    "source": {"default": "", "help": "where the model comes from, where its README.md does not say (base_model: ...)"},
    "adapter": {"default": "", "help": "folder of a trained LoRA to start from"},
    "adapter-licence": {"default": "", "help": "licence of the adapter, where its README.md does not say"},
    "adapter-source": {"default": "", "help": "what the adapter was trained on, where its README.md does not say"},
    "docker-image": {"default": "",
                     "help": "image as <image>@sha256:<digest>; empty: the profile's, else that of the first push"},
    "username": {"default": USERNAME, "help": f"Kaggle user name, for all ids; without it they hold {USERNAME}, and nothing can be pushed"},
    "upgrade": {"action": "store_true", "help": "resolve again and rewrite the lock in arc_kernel/kaggle/locks/"},
    "message": {"default": "", "help": "note on the new versions of the datasets"},
    "again": {"action": "store_true", "help": "upload and push also what Kaggle should have already"},
    "dry-run": {"action": "store_true", "help": "print what would be done, and do nothing"},
    "out": {"type": Path, "default": "kaggle_datasets", "help": "folder for datasets and notebook (default: %(default)s)"},
    "quiet": {"action": "store_true", "help": "print nothing but errors"},
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command, `all` where none is named; the exit status is 0, or 1 after one line on stderr for each thing wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["all", *arguments]
    options = _parser().parse_args(arguments)
    try:
        faults = options.command(options, (lambda line: None) if options.quiet else lambda line: print(line, flush=True))
    except ArcKernelError as error:
        faults = [error]
    except OSError as error:
        if error.filename is None:  # no file's fault
            raise
        faults = [os_line(error)]
    except KeyboardInterrupt:
        print("stopped: start again to go on", file=sys.stderr)
        return 130
    for fault in faults or ():
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(faults))


def _all(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    model, lora = open_model(options.model), [_adapter] if options.adapter else []
    if lora:
        check_served(Path(options.adapter), model)
    for build in (_notebook, _code, _weights, *lora, _wheels):  # the notebook first: it knows wrong options before anything is made
        build(options, say)
    if options.username == USERNAME:
        say("note: this can be tried here, not pushed: for that build again with --username <your Kaggle user name>")
    else:
        say(f"next: python build_kernel.py check{f' --out {options.out}' * (str(options.out) != OPTIONS['out']['default'])}, then push")


def _code(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    datasets.build_code(options.out, options.username, say)


def _weights(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    origin = Origin(options.licence, options.source)
    datasets.build_weights(options.out, options.model, options.username, say, origin, getattr(options, "adapter", ""))


def _adapter(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    origin = Origin(options.adapter_licence, options.adapter_source)
    datasets.build_adapter(options.out, Path(options.adapter), options.username, say, origin)


def _wheels(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    wheels.build(options.out, profiles.load(options.profile), options.username, say, options.upgrade)


def _notebook(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    profile = profiles.load(options.profile)
    profile = dataclasses.replace(profile, docker_image=options.docker_image or profile.docker_image)
    commands.build_notebook(options.out, profile, options.model, options.adapter, options.username, say)


def _check(options: argparse.Namespace, say: Callable[[str], None]) -> list[str]:
    return commands.check(options.out, say)


def _push(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    commands.push_all(options.out, options.message, options.dry_run, say, options.again)


TRAINED, LORA = ("model", "licence", "source"), ("adapter", "adapter-licence", "adapter-source")
COMMANDS = {
    "all": (_all, "code, weights, wheels and notebook of a profile, and an adapter where one is given",
            ("profile", *TRAINED, *LORA, "docker-image", "username")),
    "code": (_code, "the package, as a dataset", ("username",)),
    "weights": (_weights, "a model, as a dataset", (*TRAINED, "username")),
    "adapter": (_adapter, "a trained LoRA, as a dataset", (*LORA, "username")),
    "wheels": (_wheels, "what the profile's image lacks, as a dataset", ("profile", "username", "upgrade")),
    "notebook": (_notebook, "the notebook with its machine and inputs", ("profile", "model", "adapter", "docker-image", "username")),
    "check": (_check, "name each fault of notebook and datasets", ()),
    "push": (_push, "upload the datasets, wheels first, then push the notebook", ("message", "again", "dry-run")),
}


def _parser() -> argparse.ArgumentParser:
    what = "Make the Kaggle datasets and the notebook, and upload them. Without a command: all."
    parser = argparse.ArgumentParser(prog="build_kernel.py", description=what, epilog="docs/kaggle.md walks through it.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, (command, what, options) in COMMANDS.items():
        added = subparsers.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        added.set_defaults(command=command, upgrade=False)
        for option in (*options, "out", "quiet"):
            added.add_argument(f"--{option}", **OPTIONS[option], **({"required": True} if name == option else {}))
    return parser


if __name__ == "__main__":
    sys.exit(main())
