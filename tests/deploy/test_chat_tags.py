"""However a completion is cut into chunks, its parts come out the same, and as the parser reads
them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lora_grpo.data.problems import Problem
from lora_grpo.data.prompt import perfect_completion
from lora_grpo.data.task import NUMBER_TASK
from lora_grpo.deploy.chat_screen import TagReader

COMPLETIONS = st.lists(
    st.one_of(
        st.sampled_from([*NUMBER_TASK.tags, "<", ">", "</", "<answer", " ", "\n", "7*3=21"]),
        st.text(),
    ),
    max_size=12,
).map("".join)


def read(chunks: list[str]) -> list[tuple[str, str]]:
    """Return the parts of a completion that arrives in these chunks."""
    reader, parts = TagReader(), []
    for piece in [*(piece for chunk in chunks for piece in reader.feed(chunk)), *reader.close()]:
        if piece.starts:
            parts.append((piece.part, piece.text))
        else:
            part, text = parts.pop()
            assert part == piece.part
            parts.append((part, text + piece.text))
    return parts


@given(COMPLETIONS, st.lists(st.integers(0, 60)))
def test_chunks_do_not_matter(completion: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(completion)), len(completion)]
    chunks = [completion[start:end] for start, end in pairwise(edges)]
    assert read(chunks) == read([completion]) == read(list(completion))


@given(COMPLETIONS)
def test_nothing_is_lost_but_tags_and_white_space(completion: str) -> None:
    left = completion
    for tag in NUMBER_TASK.tags:
        left = left.replace(tag, "")
    shown = "".join(text for _, text in read([completion]))
    for tag in NUMBER_TASK.tags:
        shown = shown.replace(tag, "")
    if not any(tag in left or tag in shown for tag in NUMBER_TASK.tags):
        assert "".join(shown.split()) == "".join(left.split())


@given(st.integers(), st.text(alphabet="0123456789+*=\n ", min_size=1).filter(str.strip))
def test_what_was_asked_for_is_read_as_the_parser_reads_it(answer: int, reasoning: str) -> None:
    completion = perfect_completion(Problem(1, "?", str(answer), reasoning))
    assert read(list(completion)) == [
        ("reasoning", NUMBER_TASK.parse_reasoning(completion)),
        ("answer", NUMBER_TASK.parse(completion)),
    ]


def test_a_completion_without_tags_is_shown_as_it_is() -> None:
    text = "2 < 3, so\n\n  a <b> is </answer> no tag here, nor is <answe"
    assert read(list(text)) == [("text", text)]


def test_an_answer_counts_where_the_reasoning_was_never_closed() -> None:
    assert read(["<reasoning>\n1+1=2\n<answer>2</answer> so"]) == [
        ("reasoning", "1+1=2"),
        ("answer", "2"),
        ("text", "so"),
    ]


def test_a_piece_is_shown_before_its_part_ends() -> None:
    reader = TagReader()
    assert [piece.text for piece in reader.feed("<reasoning>\n1+1")] == ["1+1"]
    assert [piece.text for piece in reader.feed("=2\n</reas")] == ["=2"]
    assert reader.feed("oning>") == []


def test_reasoning_is_read_only_where_there_is_one() -> None:
    assert NUMBER_TASK.parse_reasoning("<reasoning> a </reasoning>") == "a"
    for wrong in ("a", "<reasoning>a", "</reasoning>a<reasoning>", 2 * "<reasoning>a</reasoning>"):
        assert NUMBER_TASK.parse_reasoning(wrong) is None
