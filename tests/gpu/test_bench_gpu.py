"""`orcaserve bench gpu` measures and reports: every section in a tiny run, but those of minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from orcaserve.bench.gpu import report
from orcaserve.cli import main


@pytest.mark.parametrize("section", ["kernels", "steps", "shared", "promise", "check"])
def test_a_tiny_run_of_a_section(section: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "gpu", "--tiny", "--only", section, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = report.read(tmp_path / report.JSON)
    assert [one.name for one in found.sections] == ["ceilings", section]
    for one in found.sections:
        assert one.lines and one.error is None
        assert not any(line.wrong for line in one.lines)
        assert all(report.told(line) in result.output for line in one.lines)
    assert found.is_tiny and "do not quote" in (tmp_path / report.PAGE).read_text()
