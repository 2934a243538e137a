"""What an evaluation leaves in a checkpoint's folder for its model card."""

from __future__ import annotations

import json
from pathlib import Path

from halfbyte.evaluator.job.writing import set_aside
from halfbyte.records import write_record


def test_a_later_evaluation_adds_to_the_card_and_replaces_what_it_measures_again(tmp_path: Path) -> None:
    def evaluated(metric: str, value: float, weights: str = "w1") -> None:
        result = {"metric": metric, "value": value, "dataset": {"sha256": "d"}}
        verdicts = [{"protocol": metric, "verdict": "tie"}]
        short = {"weights_digest": weights, "results": [result], "verdicts": verdicts, "task_verdicts": []}
        set_aside(tmp_path, short)
        write_record(tmp_path, "evaluate", short)

    def figures() -> dict[str, float]:
        records = [json.loads(path.read_text()) for path in (tmp_path / "halfbyte").glob("evaluate*.json")]
        assert all(len(record["verdicts"]) == len(record["results"]) for record in records)
        found = [(result["metric"], result["value"]) for record in records for result in record["results"]]
        assert len(dict(found)) == len(found)
        return dict(found)

    evaluated("kld", 0.1)
    evaluated("ppl", 7.0)
    evaluated("tasks", 0.5)
    assert figures() == {"kld": 0.1, "ppl": 7.0, "tasks": 0.5}
    evaluated("kld", 0.2)
    assert figures() == {"kld": 0.2, "ppl": 7.0, "tasks": 0.5}
    evaluated("kld", 0.2)
    assert figures() == {"kld": 0.2, "ppl": 7.0, "tasks": 0.5}
    evaluated("kld", 0.3, weights="w2")
    assert figures() == {"kld": 0.3}
