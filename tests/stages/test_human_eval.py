"""HumanEval's problems, completions and pass@k."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from pipeline.data.read import rows
from pipeline.data.row import Bad
from pipeline.errors import UserError
from stages.evaluate import human_eval
from stages.evaluate.human_eval import completion, pass_at_k, problems


def canonical(path: str) -> list[str]:
    return [str(row.fields["canonical_solution"]) for row in rows(path) if not isinstance(row, Bad)]


def test_the_paper_s_solutions_pass_and_others_do_not(test_data: Path) -> None:
    """All 164 problems, each with its own solution and with one that returns nothing."""
    path = str(test_data / "human-eval" / "HumanEval.jsonl.gz")
    chosen, solutions = problems(path, "here"), canonical(path)
    replies = [reply for solution in solutions for reply in (solution, "    return None\n")]
    assert len(chosen) == 164
    assert human_eval.passed(chosen, replies, 10.0) == [1] * 164


def test_a_completion_ends_where_the_function_does() -> None:
    body = "    return [x for x in xs if x]\n"
    for after in ("\ndef other():", "\nclass A:", "\n# next", "\nif __name__", "\nprint(f(1))"):
        assert completion(body + after + " and more\nif x") == body
    assert completion(body) == body


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (10, 3, 5), (4, 4, 2), (6, 0, 6)]
)
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n: int, c: int, k: int) -> None:
    """Equation 1 of the paper, by counting every choice of k among n samples of which c are right."""
    choices = list(combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(choice) < c for choice in choices) / len(choices), abs=1e-12)


def test_pass_at_k_of_the_paper_s_own_code() -> None:
    """Figure 3 of the paper: 1 - prod(1 - k / arange(n - c + 1, n + 1)), for n = 200."""
    for c, k in ((13, 1), (13, 10), (13, 100), (190, 100)):
        product = 1.0
        for i in range(200 - c + 1, 201):
            product *= 1.0 - k / i
        assert pass_at_k(200, c, k) == pytest.approx(1.0 - product, abs=1e-9)


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="pass@2 of 1 samples"):
        pass_at_k(1, 1, 2)


def test_a_row_that_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "def f():", "test": "x"}\n')
    with pytest.raises(UserError, match="no text in entry_point"):
        problems(str(tmp_path / "p.jsonl"), "here")
