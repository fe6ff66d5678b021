"""The long-answer benchmark: every string of every record accounted for, on made-up records and the real file."""

import json
from collections import Counter
from pathlib import Path

import pytest

from transformers_lmeye.data.long_answers import (
    PROBLEM_KINDS,
    long_answer_rows,
    pair_questions,
    read_long_answers,
)
from transformers_lmeye.data.samples import ConversationReader


BENCHMARK = Path(__file__).parents[2] / "../shared/lmeye_eval/multimodal_data_all_generation.json"

# Every way in which a label is written: (strings, pairs).
LABELS = {
    "plain": (["Question: a?", "Answer: b."], [("a?", "b.")]),
    "no blank behind the colon": (["Question:a?", "Answer:b."], [("a?", "b.")]),
    "blanks around": (["  Question:  a? ", "\tAnswer: b. "], [("a?", "b.")]),
    "number before": (
        ["1. Question: a?", "Answer: b.", "2. Question: c?", "Answer: d."],
        [("a?", "b."), ("c?", "d.")],
    ),
    "number in brackets": (["2) Question: a?", "(2) Answer: b."], [("a?", "b.")]),
    "number behind": (["Question 1: a?", "Answer 1: b."], [("a?", "b.")]),
    "number behind the question alone": (["Question 12: a?", "Answer: b."], [("a?", "b.")]),
    "lower case": (["question: a?", "ANSWER: b."], [("a?", "b.")]),
    "numbers that are said": (["Question: a?", "Answer: 19 of the 27 do."], [("a?", "19 of the 27 do.")]),
    "labels that are said": (["Question: a?", "Answer: Question: none"], [("a?", "Question: none")]),
    "several lines": (["Question: a\nb?", "Answer: c\nd"], [("a\nb?", "c\nd")]),
    "quotes": (["Question: a?", 'Answer: "b"'], [("a?", '"b"')]),
}

# Everything that is no question with its answer: (strings, pairs, (position, kind) of the problems).
IRREGULAR = {
    "blank strings between": (["Question: a?", " ", "Answer: b.", ""], [("a?", "b.")], [(1, "blank"), (3, "blank")]),
    "the rest of a description": (["lawn.", "1. Question: a?", "Answer: b."], [("a?", "b.")], [(0, "no label")]),
    "a heading": (["Are there cars?", "Question: a?", "Answer: b."], [("a?", "b.")], [(0, "no label")]),
    "a question too many": (
        ["Question: a?", "Question: b?", "Answer: c."],
        [("b?", "c.")],
        [(0, "question without answer")],
    ),
    "a question at the end": (
        ["Question: a?", "Answer: b.", "Question: c?"],
        [("a?", "b.")],
        [(2, "question without answer")],
    ),
    "an answer too many": (
        ["Question: a?", "Answer: b.", "Answer: c."],
        [("a?", "b.")],
        [(2, "answer without question")],
    ),
    "an answer at the start": (
        ["Answer: a.", "Question: b?", "Answer: c."],
        [("b?", "c.")],
        [(0, "answer without question")],
    ),
    "an empty question": (["Question: ", "Answer: b."], [], [(0, "empty question"), (1, "answer without question")]),
    "an empty answer": (["Question: a?", "Answer:"], [], [(0, "question without answer"), (1, "empty answer")]),
    "numbers that differ": (["Question 1: a?", "Answer 2: b."], [], [(0, "numbers differ"), (1, "numbers differ")]),
    "a number in place of a text": ([3, "Question: a?", "Answer: b."], [("a?", "b.")], [(0, "no text")]),
    "null": ([None, "Question: a?", "Answer: b."], [("a?", "b.")], [(0, "no text")]),
    "the same question again": (
        ["Question: a?", "Answer: b.", "Question: A?", "Answer: c."],
        [("a?", "b."), ("A?", "c.")],
        [(2, "repeated question")],
    ),
    "another word": (["Questions: a?", "Reply: b."], [], [(0, "no label"), (1, "no label")]),
    "nothing": ([], [], []),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case):
    strings, pairs = LABELS[case]
    assert pair_questions("7", strings) == (tuple(pairs), ())


@pytest.mark.parametrize("case", IRREGULAR)
def test_what_is_no_question_with_its_answer_is_reported(case):
    strings, pairs, problems = IRREGULAR[case]
    found_pairs, found = pair_questions("7", strings)
    assert found_pairs == tuple(pairs)
    assert [(problem.position, problem.kind) for problem in found] == problems
    assert all(problem.image_id == "7" and problem.text == str(strings[problem.position]) for problem in found)
    assert {problem.kind for problem in found} <= set(PROBLEM_KINDS)


@pytest.fixture
def file(tmp_path) -> Path:
    """Three records in which every irregularity occurs, and a fourth of the same picture as the first."""
    path = tmp_path / "benchmark.json"
    entries = [
        {"image_id": "1", "caption": " A lawn. ", "questions": [s for strings, _ in LABELS.values() for s in strings]},
        {"image_id": 2, "questions": [s for strings, _, _ in IRREGULAR.values() for s in strings]},
        {"image_id": "3", "caption": "Nothing.", "questions": [" "]},
        {"image_id": "1", "caption": "A lawn again.", "questions": ["Question: a?", "Answer: b."]},
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_no_record_and_no_string_is_lost(file):
    records = read_long_answers(file)
    assert [record.image_id for record in records] == ["1", "2", "3", "1"]
    assert [record.caption for record in records] == ["A lawn.", "", "Nothing.", "A lawn again."]
    entries = json.loads(file.read_text())
    for record, entry in zip(records, entries, strict=True):
        unused = [p for p in record.problems if p.kind not in ("repeated question", "repeated image_id")]
        assert len(entry["questions"]) == 2 * len(record.questions) + len(unused)
    assert [problem.kind for problem in records[3].problems] == ["repeated image_id"]
    assert records[0].questions[0] == ("a?", "b.") and records[2].questions == ()


def test_rows(file):
    rows = list(long_answer_rows(read_long_answers(file), "pictures/{image_id}.png"))
    assert rows[1] == {
        "id": "1-1",
        "image": "pictures/1.png",
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "b."}]},
        ],
    }
    dialogues = list(long_answer_rows(read_long_answers(file), dialogues=True))
    assert [row["id"] for row in dialogues] == ["1", "2", "1"]  # the third record has no question
    turns = [(turn["role"], turn["content"][-1]["text"]) for turn in dialogues[0]["messages"]]
    flat = [(turn["role"], turn["content"][-1]["text"]) for row in rows[:13] for turn in row["messages"]]
    assert turns == flat
    kinds = [part["type"] for turn in dialogues[0]["messages"] for part in turn["content"]]
    assert kinds == ["image"] + ["text"] * 26


def test_rows_are_those_that_training_reads(file):
    opened = []
    reader = ConversationReader(open_image=lambda value: opened.append(value) or value)
    for row in long_answer_rows(read_long_answers(file)):
        sample = reader.read(row, 0, row["id"])
        assert sample["messages"][0]["content"][0]["image"] == row["image"] == opened[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('{"image_id": "1"}', "expected a list of records"),
        ('[{"image_id": "1", "questions": []}, {"caption": "x", "questions": []}]', "entry 1: expected"),
        ('["x"]', "entry 0: expected"),
        ('[{"image_id": "9", "questions": "Question: a?"}]', r"entry 0 \(image_id 9\): its 'questions' are no list"),
    ],
)
def test_what_is_no_benchmark_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_long_answers(tmp_path / "a.json")


def test_a_pattern_without_the_picture_is_refused(file):
    with pytest.raises(ValueError, match=r"holds \{image_id\}"):
        next(long_answer_rows(read_long_answers(file), "picture.png"))


@pytest.mark.skipif(not BENCHMARK.is_file(), reason="the benchmark is not beside the repository")
def test_the_published_file():
    """Counted by hand and by grep, not by the reader."""
    text = BENCHMARK.read_text(encoding="utf-8")
    entries = json.loads(text)
    records = read_long_answers(BENCHMARK)
    assert len(records) == len(entries) == text.count('"image_id": ') == 3439
    assert [record.image_id for record in records] == [entry["image_id"] for entry in entries]
    assert {len(record.questions) for record in records} == {5}
    said = [s for entry in entries for s in entry["questions"] if "Question" in s[:15]]
    assert sum(len(record.questions) for record in records) == len(said) == 17195
    problems = Counter(problem.kind for record in records for problem in record.problems)
    assert problems == {"blank": 25, "no label": 19, "repeated question": 1}
    assert sum(len(entry["questions"]) for entry in entries) == 2 * 17195 + 25 + 19
    questions = dict(
        zip((record.image_id for record in records), (record.questions for record in records), strict=True)
    )
    assert questions["4"][0][0] == "What do the signs being held by the group of people in the image say?"
    assert questions["353"][0][1] == '"Home is where the dog is" is written on it.'
    assert questions["1269"][2][1] == "19 of the 27 member states of the EU use the euro currency."
    words = [len(answer.split()) for record in records for _, answer in record.questions]
    assert round(sum(words) / len(words)) == 13  # the paper's "average answer 13 words"
