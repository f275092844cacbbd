"""Run every test against the package as a reader gets it: from a built wheel.

    python tools/run_tests.py [--lax] [--only PATH ...] [PYTEST OPTIONS]

Builds the wheel, unpacks it into `build/site`, puts each notebook alone into a directory of
`build/notebooks`, and starts one pytest over the tests, the doctests and the notebooks (nbval,
strict: a notebook's outputs must come out again). With `--lax`, and on anything but Linux x86-64,
the cells must run, but their outputs may differ in the last digit.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from common import ROOT, notebooks

BUILD = ROOT / "build"
SITE, APART = BUILD / "site", BUILD / "notebooks"
CELL_TIMEOUT_S = 300


def build_wheel() -> None:
    """Build the wheel and unpack it where Python looks first."""
    shutil.rmtree(BUILD, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", BUILD, ROOT]
    subprocess.run(wheel, check=True)
    (file,) = BUILD.glob("minilm-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", SITE, file], check=True)


def notebooks_apart() -> None:
    """Copy each notebook into a directory of its own, where nothing else is."""
    for path in notebooks():
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "-")
        alone = APART / name / path.name
        alone.parent.mkdir(parents=True)
        shutil.copy(path, alone)


def command(arguments: list[str]) -> list[str]:
    """The pytest command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lax", action="store_true", help="do not compare notebooks' outputs")
    parser.add_argument("--only", nargs="+", metavar="PATH", help="tests or folders to run")
    chosen, options = parser.parse_known_args(arguments)
    strict = platform.system() == "Linux" and platform.machine() == "x86_64" and not chosen.lax
    return [
        str(Path(sys.executable).with_name("pytest")),
        "--nbval" if strict else "--nbval-lax",
        "--nbval-current-env",
        f"--nbval-sanitize-with={ROOT / 'tests' / 'nbval.cfg'}",
        f"--nbval-cell-timeout={CELL_TIMEOUT_S}",
        "--doctest-modules",
        "--numprocesses=2",
        "--dist=loadscope",
        *options,
        *(chosen.only or [str(ROOT / "tests"), str(SITE / "minilm"), str(APART)]),
    ]


def main(arguments: list[str]) -> int:
    """Prepare, then run pytest from the repository's top."""
    run = command(arguments)
    build_wheel()
    notebooks_apart()
    # two workers on two cores: more threads would wait for each other, spinning
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | threads | {"PYTHONPATH": str(SITE)}
    return subprocess.run(run, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
