"""The GPU page's cases with a colocated vLLM, in a tiny size on the CPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.gpu import run, table

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM in this Python: run it with that of `make vllm`"),
]


@pytest.mark.parametrize("side", ["ours", "trl"])
def test_a_case_with_vllm_in_its_process(side: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    arguments = ["--results", str(results), "--work", str(tmp_path), "--limit-s", "400"]
    run.main(["--tiny", "--only", f"sdpo-0.5b-vllm-{side}", *arguments])
    (record,) = table.read(results).values()
    assert "error" not in record, record
    assert all(step["generate"]["seconds"] > 0 for step in record["steps"])
