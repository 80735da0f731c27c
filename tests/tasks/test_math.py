"""Formulas: what math-verify finds equal, and what must neither pay nor hang."""

import importlib.util
import time

import pytest

from lora_grpo.tasks import latex
from lora_grpo.tasks.latex import MATH_TASK, last_formula, unwrap

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[("1/2", r"\frac{1}{2}"), ("0.5", r"\frac12"), (r"\boxed{\frac{1}{2}}", r"\dfrac{1}{2}")],
        *[("1+x^2", "x^2+1"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"$\{2,1\}$", r"\{1,2\}")],
        *[("x=5", "5"), (r"3 \le x", r"x \geq 3"), (r"\text{Evelyn}", r"\text{Evelyn}")],
        *[
            ("1200", "1,200"),
            (r"6.02\times 10^{3}", "6020"),
            (r"\(x+1\)", "1+x"),
            ("(1, 2)", "(1,2)"),
        ],
    ],
)
@needs_math_verify
def test_equal_formulas_are_the_same(answer: str, gold: str) -> None:
    assert MATH_TASK.same(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[
            ("", "1"),
            ("2", r"\frac{1}{2}"),
            ("x^2+2", "x^2+1"),
            ("(2,1)", "(1,2)"),
            ("(0,1)", "[0,1)"),
        ],
        *[("1 or 2", "1"), ("1, 2", "1"), (r"\boxed{1} \boxed{2}", "1"), ("$1$ or $2$", "2")],
        *[("the answer is x", "x"), (r"24 \cdot 3", "72"), ("70+2", "72"), (r"\binom{9}{2}", "36")],
        *[(r"\frac{1}{", r"\frac{1}{2}"), ("x" * 10_000, "x"), ("\\", "x"), (r"\import{os}", "1")],
    ],
)
@needs_math_verify
def test_hedges_work_that_is_left_and_other_formulas_are_not(answer: str, gold: str) -> None:
    assert not MATH_TASK.same(answer, gold)


@needs_math_verify
def test_what_takes_too_long_is_wrong_and_the_next_answer_is_still_judged(monkeypatch) -> None:
    assert MATH_TASK.same("x+x+1", "2x+1")
    child = latex.WORKER_OF_RUN.process
    monkeypatch.setattr(latex, "ANSWER_SECONDS", 0.0)
    begun = time.perf_counter()
    assert not MATH_TASK.same(r"(x+1)^{99}", r"(1+x)^{98}(x+1)")
    assert time.perf_counter() - begun < 5
    assert child.poll() is not None, "the child was ended"
    monkeypatch.undo()
    assert MATH_TASK.same("y+y+1", "2y+1")
    latex.WORKER_OF_RUN.process.kill()
    assert not MATH_TASK.same("z+z+1", "2z+1"), "the child had died"
    assert MATH_TASK.same("z+1+z", "2z+1")


def test_without_the_package_the_task_is_refused_with_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(latex, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lora-grpo\[math\]'"):
        MATH_TASK.check()


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        *[("$x$", "x"), (r"\[ x \]", "x"), (r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}")],
        *[(r"\boxed{1}+\boxed{2}", r"\boxed{1}+\boxed{2}"), ("$", "$"), ("$$", "$$")],
    ],
)
def test_wrappers_of_the_whole_are_taken_off(text: str, inside: str) -> None:
    assert unwrap(text) == inside


@pytest.mark.parametrize(
    ("completion", "last"),
    [
        *[(r"So \boxed{x} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), ("$1$, then $x+1$", "x+1")],
        *[("3 and 4", "4"), ("<answer>x</answer> 5", "x"), ("none", None)],
    ],
)
def test_the_last_formula_anywhere(completion: str, last: str | None) -> None:
    assert last_formula(completion) == last
