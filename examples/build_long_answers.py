"""Stage-2 data from LMEye's long-answer benchmark: a row for each question about a picture (docs/building-data.md).

    python examples/build_long_answers.py \
        --benchmark_file multimodal_data_all_generation.json \
        --image_pattern "{image_id}.jpg" \
        --output_file long_answers.jsonl

Every string of the file that is no question with its answer is printed. A model trained on these questions cannot be
evaluated on them.
"""

from collections import Counter
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from transformers_lmeye.data.long_answers import long_answer_rows, read_long_answers
from transformers_lmeye.data.writing import write_rows


@dataclass
class LongAnswersArguments:
    benchmark_file: str = field(metadata={"help": "The benchmark's JSON file."})
    output_file: str = field(metadata={"help": "Ends with .jsonl or .parquet."})
    image_pattern: str = field(
        default="{image_id}.jpg", metadata={"help": "Path of a picture, {image_id} standing for the record's."}
    )
    dialogues: bool = field(
        default=False, metadata={"help": "One conversation for each picture in place of a row for each question."}
    )


def main() -> None:
    (args,) = HfArgumentParser(LongAnswersArguments).parse_args_into_dataclasses()
    records = read_long_answers(args.benchmark_file)
    num_written = write_rows(long_answer_rows(records, args.image_pattern, args.dialogues), args.output_file)

    problems = [problem for record in records for problem in record.problems]
    for problem in problems:
        print(f"image_id {problem.image_id}, string {problem.position}: {problem.kind}: {problem.text!r}")
    num_questions = sum(len(record.questions) for record in records)
    print(f"{len(records)} records, {num_questions} questions with their answers, {num_written} rows written")
    print(f"without a question: {sum(not record.questions for record in records)} records")
    for kind, count in Counter(problem.kind for problem in problems).most_common():
        print(f"{kind}: {count}")


if __name__ == "__main__":
    main()
