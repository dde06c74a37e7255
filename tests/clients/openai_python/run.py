"""openai-python's own tests of models, completions and chat, as they come in the sdist of the pinned version."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import checks

SUITE = ["test_models.py", "test_completions.py", "chat"]
HERE = Path(__file__).parent


def sources(folder: Path) -> Path:
    """The unpacked sdist."""
    version = importlib.metadata.version("openai")
    words = ["download", "--quiet", "--no-deps", "--no-binary", "openai", f"openai=={version}", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    with tarfile.open(folder / f"openai-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"openai-{version}"


def outcomes(suite: Path, url: str, *options: str) -> tuple[int, list[str]]:
    """Runs tests; how many passed, and the names of those that did not. The suite's own options would ask for xdist."""
    report = suite.parent / "report.xml"
    words = ["-o", "addopts=", "-q", "--tb=line", f"--junit-xml={report}", *options]
    environment = {**os.environ, "TEST_API_BASE_URL": f"{url}/v1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-m", "pytest", *words], cwd=suite, env=environment, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314
    bad = [f"{case.get('classname')}::{case.get('name')}" for case in cases if len(case)]
    return len(cases) - len(bad), bad


if __name__ == "__main__":
    url, _, _, out = checks.arguments()
    suite = sources(out)
    lines = (HERE / "deselected.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    passed, failed = outcomes(
        suite, url, *(f"--deselect={name}" for name in names), *(f"tests/api_resources/{name}" for name in SUITE)
    )
    needless, deselected = outcomes(suite, url, *names)
    print(*failed, sep="\n")
    said = f"{needless} of those deselected pass" if needless else "each deselected one fails, as it has to"
    checks.end(checks.Counts(passed, len(failed) + needless, len(deselected), said))
