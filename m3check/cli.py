"""The command line: which words there are, and how a mistake is told. Each command lives in m3check/commands/.

Nothing heavy is imported before a command is known: `m3check run --help` must answer at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from m3check.commands.talk import drop_stdout, talk

COMMANDS = (  # in the order of the help: name, one line
    ("run", "run kernels on cases, judge them, write reports"),
    ("list", "what a run would do, and why it would skip; no kernel runs"),
    ("archs", "the hardware targets"),
    ("kernels", "the providers of kernels, and how a kernel is called"),
    ("explain", "one red case: which stage, which rows, and what the mistake is"),
    ("shrink", "the smallest case that still fails for the same reason"),
    ("show", "one record as a report, several as an op × arch × provider table"),
    ("compare", "two records of one target: what got worse; exits 1 on a regression"),
    ("merge", "several records of one target into one"),
    ("soak", "many seeds of the same cases, told in few words: for false alarms and rare mistakes"),
    ("fuzz", "search for failing cases that nobody wrote down, and make them small"),
    ("mutants", "measure the harness: wrong kernels on purpose, and how many of them a tier turns red"),
    ("doctor", "what this machine has, what is missing, and what to do about it"),
    ("schema", "the JSON Schema of report.json"),
)

EXIT_CODES = """\
exit codes:
  0  every named provider gave results and none is red
  1  a result is failed, error, crashed or timeout (with --strict also noted, mistrusted, inconclusive),
     evidence weaker than --require, or a floor or ledger breach; for compare: a regression
  2  interrupted
  3  internal error
  4  usage, or a named provider cannot be found
  5  nothing ran, or nothing for a named provider
stdout is data, stderr is talk. NO_COLOR is respected."""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an exception, so that main() tells every mistake alike and exits 4."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting 2, which means interrupted here."""
        from m3check.types import M3CheckError

        raise M3CheckError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = Parser(
        prog="m3check",
        description="Says whether an optimized MiniMax-M3 sparse-attention kernel computes what the mathematics says.",
        epilog=EXIT_CODES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="store_true", help="print the version and exit")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    made = {
        name: commands.add_parser(
            name, help=line, description=line, epilog=EXIT_CODES, formatter_class=raw, allow_abbrev=False
        )
        for name, line in COMMANDS
    }
    _selection(made["run"])
    _running(made["run"])
    _selection(made["list"])
    made["list"].add_argument("--format", default="table", help="table (default) or json")
    made["archs"].add_argument("--explain", metavar="ARCH", help="one target in full, with the source of each figure")
    made["kernels"].add_argument(
        "--signatures", nargs="*", metavar="OP", help="the functions that your own kernels need: of all ops, or of these"
    )
    made["kernels"].add_argument("--profile", action="store_true", help="what a kernel may promise, with the defaults")
    for name in ("explain", "shrink"):
        _bench(made[name])
    made["explain"].add_argument("--format", choices=("text", "json"), default="text", help="text (default) or json")
    made["shrink"].add_argument("--seconds", type=float, metavar="S", help="how long to go on (default 100)")
    made["show"].add_argument("records", nargs="+", metavar="RECORD", help="report.json, or the folder that holds it")
    made["show"].add_argument("--format", default="md", metavar="FORMAT", help="md (default), html, junit or json")
    made["compare"].add_argument("old", metavar="OLD", help="report.json of before, or its folder")
    made["compare"].add_argument("new", metavar="NEW", help="report.json of now, or its folder")
    made["compare"].add_argument("--format", default="md", metavar="FORMAT", help="md (default) or json")
    made["compare"].add_argument(
        "--growth", type=float, metavar="X", help="factor of measured/limit that is a regression (default 2: a lost bit)"
    )
    made["merge"].add_argument("records", nargs="+", metavar="RECORD", help="report.json, or the folder that holds it")
    _gate(made["merge"])
    made["merge"].add_argument("--out", metavar="DIR", help="write the reports there (default: report.json on stdout)")
    made["doctor"].add_argument(
        "--show-config", action="store_true", help="only print each setting with its origin (m3check.toml, M3CHECK_*)"
    )
    _mutants(made["mutants"])
    _selection(made["soak"])
    _soak(made["soak"])
    _fuzz(made["fuzz"])
    return whole


def _selection(command: argparse.ArgumentParser) -> None:
    """What `run` and `list` agree on: which cases, on whose kernels, for which target."""
    choice = command.add_argument_group("what")
    choice.add_argument("--arch", metavar="ARCH", help="target, required: sm80 … sm121, gfx942, gfx950 (m3check archs)")
    choice.add_argument(
        "--kernels",
        nargs="+",
        action="extend",
        metavar="SPEC",
        help="triton (default), vllm, vllm==X.Y.Z, vllm:PATH, module.path, ./file.py … (m3check kernels)",
    )
    choice.add_argument("--op", nargs="+", action="extend", metavar="OP", help="only these ops (default: all)")
    choice.add_argument("--tier", metavar="TIER", help="smoke (default), ci, full or production")
    choice.add_argument("-k", metavar="EXPR", help="only cases that match, as in pytest: -k 'gauss and not fp8'")
    choice.add_argument("--case", nargs="+", action="extend", metavar="ID", help="these cases instead of a tier")
    choice.add_argument("--shard", type=_shard, metavar="I/N", help="the I-th of N parts, stable by case id")
    choice.add_argument("--seed", type=int, metavar="N", help="other random inputs; becomes part of the case ids (~N)")
    choice.add_argument(
        "--require",
        metavar="EVIDENCE",
        help="device, interpreted or compiled: weaker evidence is a failure; device does for both others, which do not "
        "replace each other",
    )
    _switch(choice, "--offline", help="never connect; a wheel must be in the cache")


def _running(command: argparse.ArgumentParser) -> None:
    how = command.add_argument_group("how")
    how.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: as the machine allows)")
    how.add_argument("--timeout", type=float, metavar="S", help="seconds a case, compilation apart (default 120)")
    how.add_argument("--resume", action="store_true", help="keep what the folder's journal holds, run the rest")
    _switch(how, "--strict", help="noted, mistrusted and inconclusive are red as well")
    how.add_argument(
        "--sanitize",
        nargs="?",
        const="memcheck",
        metavar="TOOL",
        help="run workers under compute-sanitizer: memcheck (default), racecheck, initcheck, synccheck; needs a GPU",
    )
    how.add_argument("--save-failures", type=int, metavar="N", help="save up to N red cases as folders that replay")
    _gate(how)
    how.add_argument("--out", metavar="DIR", help="folder of journal and reports (default reports/<arch>/)")


def _gate(command: Any) -> None:
    """What `run` and `merge` judge results by (docs/ci.md)."""
    command.add_argument("--ledger", metavar="FILE", help="TOML file of known failures (docs/ci.md)")
    command.add_argument(
        "--floor",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="the least that must be shown: min_cases=10, min_cases.OP=40, evidence=device, max_skipped=0, max_known=…, "
        "max_mistrusted=…, max_inconclusive=…; none waives what the settings file asks",
    )


def _switch(command: Any, flag: str, help: str) -> None:
    """A flag that a settings file may have switched on, and that can be switched off again."""
    command.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)


def _bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("case", metavar="CASE", help="a case id, or FOLDER#N: the N-th red result of its record")
    command.add_argument("--kernels", metavar="SPEC", help="whose kernels (default triton, or the record's)")
    command.add_argument("--arch", metavar="ARCH", help="target (default this machine's GPU, else sm90; or the record's)")
    command.add_argument("--timeout", type=float, metavar="S", help="seconds that one question may take")
    command.add_argument("--offline", action="store_true", help="never connect; a wheel must be in the cache")


def _soak(command: argparse.ArgumentParser) -> None:
    how = command.add_argument_group("how")
    how.add_argument("--seeds", required=True, metavar="A..B", help="every case with each of these seeds; N means 1..N")
    how.add_argument("--minutes", type=float, metavar="M", help="stop then, and tell what has come (default: no limit)")
    how.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: as the machine allows)")
    how.add_argument("--judge", metavar="WHERE", help="references and checks on the cpu (default) or the device")
    how.add_argument("--timeout", type=float, metavar="S", help="seconds for 50 seeds of a case (default 200)")
    _switch(how, "--strict", help="noted, mistrusted and inconclusive are red as well")
    how.add_argument("--out", metavar="DIR", help="write soak.json there")


def _fuzz(command: argparse.ArgumentParser) -> None:
    what = command.add_argument_group("what")
    what.add_argument("--arch", metavar="ARCH", help="target (default this machine's GPU, else sm90)")
    what.add_argument("--kernels", nargs="+", action="extend", metavar="SPEC", help="whose kernels (default triton)")
    what.add_argument("--op", nargs="+", action="extend", metavar="OP", help="only these ops (default: all)")
    _switch(what, "--offline", help="never connect; a wheel must be in the cache")
    how = command.add_argument_group("how")
    how.add_argument("--time", metavar="T", help="how long: 90s, 10m (default), 2h; no limit with --max-examples or --ci")
    how.add_argument("--max-examples", type=int, metavar="N", help="so many of each op and provider (default: no limit)")
    how.add_argument("--seed", type=int, metavar="N", help="the same cases whenever N is the same; keeps no examples")
    how.add_argument("--ci", action="store_true", help="--seed 0 --max-examples 50")
    how.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: as the machine allows)")
    how.add_argument("--timeout", type=float, metavar="S", help="seconds a case, compilation apart (default 120)")
    _switch(how, "--strict", help="noted, mistrusted and inconclusive are red as well")
    how.add_argument("--ledger", metavar="FILE", help="TOML file of known failures, which are passed over (docs/ci.md)")
    how.add_argument("--out", metavar="DIR", help="folder of reports and failing examples (default reports/fuzz-<arch>/)")


def _mutants(command: argparse.ArgumentParser) -> None:
    command.add_argument("--arch", metavar="ARCH", help="target (default sm90); interpreted where its GPU is not here")
    command.add_argument("--kernels", nargs="+", action="extend", metavar="SPEC", help="whose to make wrong (triton)")
    command.add_argument("--tier", metavar="TIER", help="the cases that mutants meet: smoke (default), ci, full")
    command.add_argument("--op", nargs="+", action="extend", metavar="OP", help="only cases of these ops (default: all)")
    command.add_argument("-k", metavar="EXPR", help="only cases that match")
    command.add_argument("--sample", type=int, metavar="N", help="so many generic edits, by --seed (default: of each)")
    command.add_argument("--all", action="store_true", help="every generic edit")
    command.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        help="those whose kind, hash, name or text has one of these; device: those that need a GPU",
    )
    command.add_argument("--seed", type=int, metavar="N", help="of --sample (default 0)")
    command.add_argument("--jobs", type=int, metavar="N", help="mutants at a time (default 2, on a GPU 6)")
    command.add_argument("--offline", action="store_true", help="never connect; a wheel must be in the cache")
    command.add_argument("--json", metavar="FILE", help="write what became of each mutant there")


def _shard(text: str) -> tuple[int, int]:
    part, _, whole = text.partition("/")
    try:
        return int(part), int(whole)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted I/N, such as 1/3, got {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and never lets an exception out."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(words)
    except KeyboardInterrupt:
        return _end(2, "interrupted")
    except BrokenPipeError:  # `m3check list | head`: the reader has what it wanted
        drop_stdout()
        return 0
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> int:
    """A sentence and exit 4 for what the user can mend, else a traceback and exit 3."""
    from m3check.types import M3CheckError

    if isinstance(error, M3CheckError):
        return _end(getattr(error, "exit_code", 4), str(error))
    if isinstance(error, ModuleNotFoundError) and (sentence := _missing(error)):
        return _end(4, sentence)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        drop_stdout()
        return _end(3, f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}")
    import traceback

    traceback.print_exception(error)
    return _end(3, f"internal error: {type(error).__name__}: {error}; this is a defect of m3check, please report it")


def _main(words: list[str]) -> int:
    whole = parser()
    known = [name for name, _ in COMMANDS]
    if words and not words[0].startswith("-") and words[0] not in known:
        from m3check.config import choose

        choose("command", words[0], known)
    arguments = whole.parse_args(words)
    if arguments.version:
        from m3check import __version__

        print(f"m3check {__version__}")
        return 0
    if arguments.command is None:
        whole.print_help(sys.stderr)
        return _end(4, "no command given")
    command = import_module(f"m3check.commands.{arguments.command}")
    code: int = command.main(arguments)
    sys.stdout.flush()
    return code


def _end(code: int, sentence: str) -> int:
    talk(f"m3check: exit {code}: {sentence}")
    return code


def _missing(error: ModuleNotFoundError) -> str | None:
    """A sentence with the line that mends it, where a dependency is not installed."""
    names = {"torch", "triton", "numpy", "msgspec", "tabulate", "remotezip", "platformdirs"}
    name = (error.name or "").partition(".")[0]
    if name not in names:
        return None
    return f"{name} is not installed and this command needs it: pip install {name}"
