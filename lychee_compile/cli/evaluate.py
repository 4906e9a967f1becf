"""Command line of `python -m lychee_compile evaluate`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from lychee_compile.cli.lengths import lengths, listed, numbers, tokens
from lychee_compile.cli.parser import add_command, add_json
from lychee_compile.evaluate.errors import EvaluationError, require
from lychee_compile.evaluate.models import DTYPES, check_device
from lychee_compile.evaluate.ruler.catalogue import RULER
from lychee_compile.evaluate.task_questions import ALL_TASKS, GROUPS
from lychee_compile.evaluate.task_texts import TASKS
from lychee_compile.evaluate.variants import check_budgets, check_prefill, parse_variants
from lychee_compile.kernels.config import BOUNDARIES

PEERS = "lychee,quest,clusterkv,tokenselect,hisa,streaming,oracle"
CHUNKED = "lychee,oracle"
PREFILL = "lychee,streaming,dhsa,s2o,compact"
DRIFTING = "lychee,lychee:repair=False,quest,clusterkv"
SUBJECTS = {
    "fidelity": "captured softmax mass, output error, bytes read and certificates",
    "drift": "error against generated tokens, of an index that follows and of one built anew",
    "tasks": "look-ups in real text, and the tasks of RULER, answered by the model itself",
    "text": "chunks cut at boundaries against fixed ones, by kind of text",
    "prefill": "prefill: captured mass and output error against query-key pairs computed",
    "all": "all of these, one after another",
}
READ = "tokens read per KV head and step"
SOME_TASKS = (
    f"of {', '.join(TASKS)}, together lookups, and after RULER {', '.join(RULER)}, together ruler "
    "(lookups)"
)
EXAMPLES = """\
examples:
  %(prog)s fidelity --model DIR --text code --length 12288 --budgets 512,1024 --out results
  %(prog)s fidelity --capture results/captures/code-12288.safetensors --policies lychee,quest
  %(prog)s text --model DIR --text code --text json --text chinese=FILE
  %(prog)s prefill --model DIR --length 12288 --shares 0.1,0.2,0.3
  %(prog)s tasks --model DIR --tasks pass-key,json-lookup --length 32000 --device cuda
  %(prog)s tasks --model DIR --tasks ruler --length 4k,8k,32k --policies lychee,quest

A policy is a name, or a name with options of the backend: lychee:recent=32:boundaries=fixed
"""


def add_evaluate(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the `evaluate` command to the commands of `python -m lychee_compile`."""
    about = "Measure how good a choice of keys is, on a real model."
    summary = "how good choices of keys are, on a real model"
    evaluate = add_command(commands, "evaluate", summary, about, EXAMPLES)
    subjects = evaluate.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for subject, summary in SUBJECTS.items():
        about = f"{summary[0].upper()}{summary[1:]}. Defaults are in brackets."
        parser = subjects.add_parser(subject, help=summary, description=about)
        _add_common(parser, subject)
        if subject != "tasks":
            _add_captures(parser, subject)
        if subject in ("drift", "all"):
            _add_drift(parser, subject)
        if subject in ("tasks", "all"):
            _add_tasks(parser)
        if subject in ("text", "all"):
            _add_text(parser)
        if subject in ("prefill", "all"):
            _add_prefill(parser)
        parser.set_defaults(run=run)


def _add_common(parser: argparse.ArgumentParser, subject: str) -> None:
    add = parser.add_argument
    policies = {"text": CHUNKED, "drift": DRIFTING, "prefill": PREFILL}.get(subject, PEERS)
    _named(parser, "--model", "a causal language model: a folder or a name", metavar="DIR")
    _named(parser, "--device", "where it runs and policies are replayed", default="cpu")
    add("--dtype", choices=tuple(DTYPES), help="of the model (float32 on a CPU, else bfloat16)")
    _named(parser, "--policies", "what is compared", default=policies, metavar="LIST")
    if subject == "drift":
        _number(parser, "--budget", 1024, "tokens read per KV head and step")
    elif subject != "prefill":
        budgets = "256,512,1024,2048"
        add("--budgets", type=numbers, default=budgets, metavar="LIST", help=f"{READ} ({budgets})")
    if subject == "tasks":
        summary = "tokens of a document, as 8192 or 8k; several by commas (12288)"
        parser.add_argument("--length", type=lengths, default="12288", metavar="LIST", help=summary)
    else:
        length = 32768 if subject == "drift" else 12288
        _number(parser, "--length", length, "tokens of a text or document, as 8192 or 8k")
    folder = Path("evaluation")
    _named(parser, "--out", "where results go", default=folder, type=Path, metavar="DIR")
    add_json(parser)


def _add_captures(parser: argparse.ArgumentParser, subject: str) -> None:
    add = parser.add_argument
    kinds = "code" if subject in ("fidelity", "drift", "prefill") else "code, json and prose"
    text = f"code, json, prose, or a UTF-8 file under a name; repeatable ({kinds})"
    add("--text", action="append", default=[], metavar="KIND[=FILE]", help=text)
    sites = "attentions to capture, by module path; repeatable (all)"
    add("--sites", action="append", default=[], metavar="PATTERN", help=sites)
    if subject != "all":
        replayed = "replay this capture and load no model; repeatable"
        add("--capture", action="append", default=[], type=Path, metavar="FILE", help=replayed)
    add("--save-captures", action="store_true", help="keep captures in the folder of the results")
    if subject not in ("drift", "prefill"):
        _number(parser, "--steps", 32, "last tokens of a text, which are decoded")


def _add_drift(parser: argparse.ArgumentParser, subject: str) -> None:
    _number(parser, "--prompt", 2048, "tokens indexed at once")
    _number(parser, "--every", 1024, "tokens between checkpoints")
    _number(parser, "--queries", 4, "queries at each checkpoint")
    if subject == "all":
        _number(parser, "--budget", 1024, "tokens read, for the drift curve")
        _number(parser, "--drift-length", 32768, "tokens of a text, for the drift curve")


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", type=_tasks, default=list(TASKS), metavar="LIST", help=SOME_TASKS
    )
    _number(parser, "--repeats", 10, "questions of each task")
    summary = "decode through kernels on a GPU, not through the plain PyTorch operators"
    parser.add_argument("--kernels", action="store_true", help=summary)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the questions (0)")


def _add_text(parser: argparse.ArgumentParser) -> None:
    chosen = ["tokens", "similarity", "fixed"]
    summary = f"where chunks are cut, of {', '.join(BOUNDARIES)} ({','.join(chosen)})"
    names = listed(BOUNDARIES)
    parser.add_argument("--boundaries", type=names, default=chosen, metavar="LIST", help=summary)


def _add_prefill(parser: argparse.ArgumentParser) -> None:
    shares = "0.05,0.1,0.2,0.3"
    summary = f"of the keys that a tile of queries sees, read ({shares})"
    parser.add_argument("--shares", type=_shares, default=shares, metavar="LIST", help=summary)
    _number(parser, "--tiles", 24, "tiles of queries of each attention, over the later two thirds")


def _named(parser: argparse.ArgumentParser, name: str, summary: str, **more: Any) -> None:
    shown = " (%(default)s)" if more.get("default") else ""
    parser.add_argument(name, help=summary + shown, **more)


def _number(parser: argparse.ArgumentParser, name: str, default: int, summary: str) -> None:
    shown = f"{summary} ({default:,})"
    parser.add_argument(name, type=tokens, default=default, metavar="N", help=shown)


def run(settings: argparse.Namespace) -> None:
    """Run the chosen subjects. Raise `EvaluationError` or `OptionError` if that is impossible."""
    settings.command_line = shlex.join(["python", "-m", "lychee_compile", *settings.arguments])
    _complete(settings)
    # Imported late, so that errors of the command line show at once.
    from lychee_compile.evaluate.progress import make_console
    from lychee_compile.evaluate.session import Session

    session = Session(settings, make_console(sys.stderr if settings.json else None))
    subjects = list(SUBJECTS)[:-1] if settings.subject == "all" else [settings.subject]
    for subject in subjects:
        session.settings = _for_subject(settings, subject)
        getattr(session, subject)()
    if settings.json:
        sys.stdout.write(json.dumps(session.results, indent=1) + "\n")


def _complete(settings: argparse.Namespace) -> None:
    """Parse what argparse cannot, and check all that can be checked before anything slow."""
    settings.policies = parse_variants(settings.policies)
    if settings.subject in ("drift", "all"):
        check_budgets(settings.policies, [settings.budget])
    if settings.subject == "prefill":
        check_prefill(settings.policies)
    elif settings.subject != "drift":
        check_budgets(settings.policies, settings.budgets)
    check_device(settings.device)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"--out {settings.out}: {error.strerror}") from error
    require("matplotlib", "drawing the results")
    if not getattr(settings, "capture", None):
        require("transformers", "running a model")


def _for_subject(settings: argparse.Namespace, subject: str) -> argparse.Namespace:
    """Return the settings of one subject, of those of several if the subject is `all`."""
    chosen = argparse.Namespace(**{"capture": [], **vars(settings)})
    if subject == "tasks":
        chosen.lengths = settings.length if settings.subject == "tasks" else [settings.length]
    if subject != "tasks" and not settings.text:
        chosen.text = ["code", "json", "prose"] if subject == "text" else ["code"]
    if settings.subject == "all" and subject == "drift":
        chosen.length = settings.drift_length
    if settings.subject == "all" and subject == "text":
        chosen.policies = parse_variants(CHUNKED)
    if settings.subject == "all" and subject == "prefill":
        chosen.policies = parse_variants(PREFILL)
    return chosen


def _tasks(text: str) -> list[str]:
    """Return the names of tasks that commas separate; the name of a group stands for its tasks."""
    names = listed((*ALL_TASKS, *GROUPS))(text)
    return list(dict.fromkeys(each for name in names for each in GROUPS.get(name, (name,))))


def _shares(text: str) -> list[float]:
    return sorted({_share(part) for part in text.split(",")})


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number between 0 and 1")
    return share
