"""What a machine with a GPU has to show, in one command and under ten minutes.

    python -m bench.gpu [--only build,tests,…] [--out FOLDER] [--dry-run]

Builds csrc/ in place, runs the tests of everything that has kernels, compute-sanitizer over csrc's
where it is installed, tunes, and times. It takes torch as it is installed and asks no network. Each
stage is a process of its own with a time limit, and the limits together stay below ten minutes. A
stage that fails or runs over does not stop the next. Logs, figures and summary.md, which says what
came of each stage, are left in bench/results/<device>/gpu/; the table of measured choices goes to
fastlora/ops/tables too, where the operations read it.

``--dry-run`` prints the stages, and what of them would be left out here. The exit status is 1
where a stage failed, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import device as here
from bench import names
from bench.compile_cases import cuda

FORMAT = "fastlora.bench.gpu/1"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
MOST_SECONDS = 600


@dataclass(frozen=True)
class Stage:
    """One command. ``missing`` says why it cannot run here, or gives None."""

    name: str
    says: str
    seconds: int
    command: tuple[str, ...]
    missing: Callable[[], str | None] = lambda: None
    needs_gpu: bool = True


@dataclass
class Outcome:
    """What came of a stage: "passed", "failed", "over time" or "left out", and why."""

    stage: str
    verdict: str
    seconds: float = 0.0
    reason: str = ""
    last: str = ""  # line of its log


def needs(*packages: str) -> Callable[[], str | None]:
    """Why a stage cannot run that imports these."""

    def missing() -> str | None:
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    return missing


def _build_missing() -> str | None:
    if absent := needs("pybind11", "setuptools")():
        return absent
    absent = " and ".join(tool for tool in ("cmake", "ninja") if shutil.which(tool) is None)
    if absent:
        return f"no {absent} on the path"
    return None


def _sanitizer() -> str | None:
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def _sanitizer_missing() -> str | None:
    if _sanitizer() is None:
        return "compute-sanitizer is not installed"
    if cuda.nvcc() is None:
        return "there is no nvcc, so csrc's kernels are not built"
    return needs("pytest")()


def _throughput_missing() -> str | None:
    return None if (ROOT / "bench" / "throughput").is_dir() else "there is no bench.throughput"


def stages(folder: Path) -> list[Stage]:
    """In their order; figures go to ``folder``."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    small_solvers = "tests/ops/small_solvers"
    return [
        Stage("build", "csrc/ with its CUDA kernels, in place", 120,
              (python, "setup.py", "build_ext", "--inplace"), _build_missing, needs_gpu=False),
        Stage("tests", "the operations' tests on the GPU, and all that need one", 170,
              (*pytest, "-k", "triton or cuda or gpu or tiles or native or tuned",
               "tests/ops", "tests/nn"), needs("pytest", "hypothesis")),
        Stage("sanitizer", "compute-sanitizer over csrc's kernels", 50,
              (_sanitizer() or "compute-sanitizer", "--error-exitcode", "9", *pytest, "-m", "gpu",
               small_solvers), _sanitizer_missing),
        Stage("tune", "measures tiles and algorithms, writes the device's table", 80,
              (python, "-m", "bench.tune", "--device", "cuda", "--seconds", "55",
               "--results", str(folder)), needs("triton")),
        Stage("weight_norm", "DoRA's norm beside peft's and a dense one", 20,
              (python, "-m", "bench.weight_norm", "--device", "cuda", "--dtype", "bfloat16",
               "--json", str(folder / "weight_norm.json"))),
        Stage("throughput", "every operation beside its rivals and the floor, in short", 150,
              (python, "-m", "bench.throughput", "--device", "cuda", "--quick",
               "--out", str(folder)), _throughput_missing),
    ]  # fmt: skip


def run(stage: Stage, folder: Path) -> Outcome:
    """Runs a stage to its end or its limit; what it says goes to its log and to the terminal."""
    log = folder / f"{stage.name}.log"
    started = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
    }
    with open(log, "wb") as file:
        try:
            # a session of its own, so that what it started ends with it
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Outcome(stage.name, "failed", 0.0, str(error))
        try:
            status = process.wait(timeout=stage.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    seconds = time.monotonic() - started
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].rpartition("\r")[2][:200] if lines else ""
    if status is None:
        return Outcome(stage.name, "over time", seconds, f"{stage.seconds} s are over", last)
    if status:
        return Outcome(stage.name, "failed", seconds, f"exit status {status}", last)
    return Outcome(stage.name, "passed", seconds, "", last)


def left_out(stage: Stage, has_gpu: bool) -> str | None:
    """Why a stage does not run here, if it does not."""
    if stage.needs_gpu and not has_gpu:
        return "there is no GPU"
    return stage.missing()


def summary(outcomes: list[Outcome], conditions: dict[str, object]) -> str:
    """What came of it, as Markdown."""
    lines = [f"# {conditions.get('device')}", ""]
    lines += [f"- {key}: {value}" for key, value in conditions.items() if key != "device"]
    lines += ["", "| stage | outcome | seconds | |", "|---|---|---|---|"]
    for one in outcomes:
        said = "; ".join(filter(None, (one.reason, one.last))).replace("|", "\\|")
        lines.append(f"| {one.stage} | {one.verdict} | {one.seconds:.0f} | {said} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, names checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = [stage.name for stage in stages(RESULTS)]
    parser.add_argument("--only", default=",".join(known), help="these stages")
    parser.add_argument("--out", metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    try:
        args.only = names.several("stage", args.only, known)
    except names.UnknownName as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the stages, writes the summary, returns the exit status."""
    args = parse(argv)
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    folder = Path(args.out) if args.out else RESULTS / here.folder_name(device) / "gpu"
    todo = [stage for stage in stages(folder) if stage.name in args.only]
    print(
        f"{here.name(device)}: at most {sum(stage.seconds for stage in todo)} s, to {folder.name}/"
    )
    if args.dry_run:
        for stage in todo:
            reason = left_out(stage, has_gpu)
            print(f"{stage.name:<12}{stage.seconds:>4} s  {stage.says}")
            print(f"{'':<19}{' '.join(_short(part) for part in stage.command)}")
            print(f"{'':<19}{f'left out here: {reason}' if reason else 'would run'}")
        return 0
    if not has_gpu:
        print("there is no GPU here; --dry-run shows what would run", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    conditions = here.conditions(device)
    outcomes: list[Outcome] = []
    for stage in todo:
        reason = left_out(stage, has_gpu)
        print(f"{stage.name}: {stage.says} …", flush=True)
        outcome = Outcome(stage.name, "left out", 0.0, reason) if reason else run(stage, folder)
        outcomes.append(outcome)
        print(f"  {outcome.verdict} after {outcome.seconds:.0f} s {outcome.reason} {outcome.last}")
        # after every stage, so that a run that is cut off leaves what it has
        text = summary(outcomes, conditions)
        (folder / "summary.md").write_text(text)
        result = {
            "format": FORMAT,
            "conditions": conditions,
            "stages": [asdict(one) for one in outcomes],
        }
        (folder / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text)
    return 1 if any(one.verdict in ("failed", "over time") for one in outcomes) else 0


def _short(part: str) -> str:
    """A word of a command, without what is this machine's."""
    if part == sys.executable:
        return "python"
    return part.replace(f"{ROOT}{os.sep}", "")


if __name__ == "__main__":
    raise SystemExit(main())
