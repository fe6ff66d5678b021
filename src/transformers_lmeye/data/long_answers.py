"""The long-answer benchmark of LMEye: questions and answers about pictures, as the authors published them.

The file is a JSON list of `{"image_id", "caption", "questions"}`, where `questions` holds strings that alternate
between `"Question: .."` and `"Answer: .."`. A language model wrote them, so labels carry numbers in several styles
(`"1. Question:"`, `"2) Question:"`, `"Question 3:"`, `"Answer 3:"`), and some strings are blank or bear no label.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


_LABEL = re.compile(r"\s*(?:\(?(\d+)\s*[.):]\s*)?(question|answer)\s*(\d*)\s*:(.*)", re.IGNORECASE | re.DOTALL)

PROBLEM_KINDS = (
    "blank",
    "no label",
    "no text",
    "empty question",
    "empty answer",
    "question without answer",
    "answer without question",
    "numbers differ",
    "repeated question",
    "repeated image_id",
)
"""What may be wrong with a record; only the last two leave everything in place, the others leave a string unused."""


@dataclass(frozen=True)
class QuestionProblem:
    """Something of a record that is not a question with its answer.

    Attributes:
        image_id: of the record.
        kind: one of `PROBLEM_KINDS`.
        position: index in the record's `questions`; None where the whole record is meant.
        text: the string as it stands in the file.
    """

    image_id: str
    kind: str
    position: int | None
    text: str


@dataclass(frozen=True)
class LongAnswerRecord:
    """One picture of the benchmark.

    Attributes:
        image_id: which picture.
        caption: its long description; the questions were made from it. Empty where the record has none.
        questions: pairs (question, answer) in their order, labels and outer blanks removed.
        problems: every string of the record that is in no pair, and what else is odd about it.
    """

    image_id: str
    caption: str
    questions: tuple[tuple[str, str], ...]
    problems: tuple[QuestionProblem, ...]


def pair_questions(
    image_id: str, strings: Iterable[Any]
) -> tuple[tuple[tuple[str, str], ...], tuple[QuestionProblem, ...]]:
    """
    Pairs the strings of one record.

    A question belongs to the next labelled string if that is an answer, and if their numbers, where both have one, are
    the same. Text without a label belongs to nothing: it is what was left over of the description.

    Args:
        image_id: for the problems.
        strings: the record's `questions`.

    Returns:
        Pairs (question, answer), and the problems. Every string is in a pair or in a problem.
    """
    pairs: list[tuple[str, str]] = []
    problems: list[QuestionProblem] = []
    waiting: tuple[int, str, str, str] | None = None  # position, whole string, number, question

    def report(kind: str, position: int, text: Any) -> None:
        problems.append(QuestionProblem(image_id, kind, position, str(text)))

    for position, string in enumerate(strings):
        match = _LABEL.fullmatch(string) if isinstance(string, str) else None
        if match is None:
            kind = "no text" if not isinstance(string, str) else "no label" if string.strip() else "blank"
            report(kind, position, string)
            continue
        number, label, text = match[1] or match[3], match[2].lower(), match[4].strip()
        if label == "question":
            if waiting is not None:
                report("question without answer", *waiting[:2])
            waiting = None
            if not text:
                report("empty question", position, string)
            else:
                waiting = (position, string, number, text)
        elif waiting is None:
            report("answer without question", position, string)
        else:
            question_position, question_string, question_number, question = waiting
            waiting = None
            if not text or (number and question_number and number != question_number):
                report("numbers differ" if text else "question without answer", question_position, question_string)
                report("numbers differ" if text else "empty answer", position, string)
                continue
            if any(question.casefold() == earlier.casefold() for earlier, _ in pairs):
                report("repeated question", question_position, question_string)
            pairs.append((question, text))
    if waiting is not None:
        report("question without answer", *waiting[:2])
    return tuple(pairs), tuple(sorted(problems, key=lambda problem: problem.position))


def read_long_answers(path: str | Path) -> list[LongAnswerRecord]:
    """
    Reads a file of the benchmark: one record for each of its entries, in their order, whatever is odd about them.

    Args:
        path: such as `multimodal_data_all_generation.json`.

    Raises:
        ValueError: the file is no such list, or an entry has no `image_id` or no list of `questions`; the message
            names the entry.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a JSON {type(entries).__name__}; expected a list of records.")
    records, seen = [], set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.get("image_id") in (None, ""):
            raise ValueError(f'{path}, entry {number}: expected {{"image_id", "caption", "questions"}}: {entry!r:.80}')
        image_id = str(entry["image_id"])
        if not isinstance(entry.get("questions"), list):
            raise ValueError(f"{path}, entry {number} (image_id {image_id}): its 'questions' are no list of strings.")
        questions, problems = pair_questions(image_id, entry["questions"])
        if image_id in seen:
            problems = (QuestionProblem(image_id, "repeated image_id", None, image_id), *problems)
        seen.add(image_id)
        records.append(LongAnswerRecord(image_id, str(entry.get("caption") or "").strip(), questions, problems))
    return records


def long_answer_rows(
    records: Iterable[LongAnswerRecord], image_pattern: str = "{image_id}.jpg", dialogues: bool = False
) -> Iterator[dict[str, Any]]:
    """
    The records as rows of stage 2 (docs/own-data.md). A record without a pair gives no row.

    Args:
        records: as `read_long_answers` gives them.
        image_pattern: path of a picture, `{image_id}` standing for the record's.
        dialogues: all questions of a picture as the turns of one conversation, in place of a row each.

    Yields:
        `{"id", "image", "messages"}`. The id is `image_id`, with `-` and the question's place (from 0) behind it where
        a question is a row.

    Raises:
        ValueError: the pattern does not hold `{image_id}`.
    """
    if "{image_id}" not in image_pattern:
        raise ValueError(
            f"The pattern of image paths holds {{image_id}}, as in '{{image_id}}.jpg'; got {image_pattern!r}."
        )
    for record in records:
        image = image_pattern.replace("{image_id}", record.image_id)
        turns = [_turn(*pair) for pair in record.questions]
        if dialogues and turns:
            messages = [message for turn in turns for message in turn]
            messages[0]["content"].insert(0, {"type": "image"})
            yield {"id": record.image_id, "image": image, "messages": messages}
        elif not dialogues:
            for place, (question, answer) in enumerate(turns):
                question["content"].insert(0, {"type": "image"})
                yield {"id": f"{record.image_id}-{place}", "image": image, "messages": [question, answer]}


def _turn(question: str, answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


__all__ = [
    "PROBLEM_KINDS",
    "LongAnswerRecord",
    "QuestionProblem",
    "long_answer_rows",
    "pair_questions",
    "read_long_answers",
]
