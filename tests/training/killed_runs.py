"""Training runs that kill themselves with SIGKILL in the middle of writing: the script behind test_trainer_killed.py.

`python killed_runs.py plan.json`: for each run of the plan a process (or two that train together) for each of its
kills, the last of which may be 0 for none, each going on from what the one before left. Processes are forked, so that
the imports are paid for once.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import tiny
import torch
from processes import run_processes
from transformers import TrainerState

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.data import ConversationReader, SampleDataset, SampleStream, load_rows
from transformers_lmeye.modeling import backbones
from transformers_lmeye.training import ConversationCollator, LMEyeTrainer, StageTrainingArguments
from transformers_lmeye.training.checkpoints import last_checkpoint


torch.set_num_threads(1)
NUM_ROWS = 22
BAD = (3, 11)  # their pictures are missing


def write_data(folder: Path) -> Path:
    """A file of questions about pictures."""
    folder.mkdir()
    answers = ("a cat", "the red dog on a house", "no")
    with open(folder / "rows.jsonl", "w") as file:
        for index in range(NUM_ROWS):
            if index not in BAD:
                tiny.picture(index).save(folder / f"{index}.png")
            row = {"image": f"{index}.png", "question": "what is it?", "answer": answers[index % 3]}
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def train(folder: Path, output_dir: Path, streaming: bool, workers: int) -> None:
    """Stage 2, from the last checkpoint where there is one."""
    paths = str(folder / "vision"), str(folder / "language")
    torch.manual_seed(0)
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(*paths, interaction="clip_text")
    tiny.randomise_ipn(model)
    model.freeze_for_stage("instruct")
    assert model.config.fine_grained_dropout == 0.5
    torch.manual_seed(os.getpid())  # whatever a new process's random numbers are

    rows = load_rows(folder / "data" / "rows.jsonl", streaming=streaming)
    reader = ConversationReader(image_folder=folder / "data")
    if streaming:
        dataset = SampleStream(rows, reader, shuffle_buffer=4)
    else:
        dataset = SampleDataset(rows, reader, skip_bad_samples=True)
    arguments = StageTrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=8,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        dataloader_num_workers=workers,
        max_bad_fraction=0.2,
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = ConversationCollator(LMEyeProcessor.from_vision_language_pretrained(*paths), skip_bad_samples=True)
    trainer = LMEyeTrainer(model, arguments, collator, train_dataset=dataset)
    trainer.train(resume_from_checkpoint="last" if last_checkpoint(output_dir) is not None else None)
    trainer.save_model()


def kill_at(number: int, output_dir: Path) -> dict[str, int]:
    """Has this process killed at its `number`-th act of writing, half of what it writes written; returns the count."""
    main, done = os.getpid(), {"acts": 0}

    def act() -> bool:
        if os.getpid() != main:  # a loader's worker
            return False
        done["acts"] += 1
        return done["acts"] == number

    def die() -> None:
        (output_dir.parent / "killed").touch()
        os.kill(main, signal.SIGKILL)

    def under(path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(str(output_dir))

    def watch(event: str, arguments: tuple) -> None:
        writes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in writes or writing) and under(arguments[0]) and act():
            die()

    def half(function: Any, place: int) -> Any:
        def write(*arguments: Any, **kwargs: Any) -> Any:
            path = arguments[place]
            if not (under(path) and act()):
                return function(*arguments, **kwargs)
            function(*arguments, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)
            die()

        return write

    sys.addaudithook(watch)
    torch.save = half(torch.save, 1)
    backbones.save_file = half(safetensors.torch.save_file, 1)
    TrainerState.save_to_json = half(TrainerState.save_to_json, 1)
    Path.write_text = half(Path.write_text, 0)
    return done


def fork(folder: Path, name: str, kill: int, **run: Any) -> int:
    """Runs `train` in a process of its own; how that ended: 0, or minus the signal's number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        counted_train(folder, name, kill, **run)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fork_two(folder: Path, name: str, kill: tuple[int, int], **run: Any) -> int:
    """`fork` of two processes that train together, of which `kill` names one, and its act."""

    def train_rank() -> None:
        rank = int(os.environ["RANK"])
        counted_train(folder, name, kill[1] if rank == kill[0] else 0, **run)

    killed = folder / "killed"
    killed.unlink(missing_ok=True)
    try:
        run_processes("ddp_2cpu", train_rank)
    except RuntimeError:  # the one died, or the other lost it
        if killed.exists():
            return -signal.SIGKILL
        raise
    return 0


def counted_train(folder: Path, name: str, kill: int, **run: Any) -> None:
    done = kill_at(kill, folder / name)
    train(folder, folder / name, **run)
    (folder / f"{name}.{os.environ.get('RANK', 0)}.acts").write_text(str(done["acts"]))


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(plan["folder"])
    if not (folder / "data").exists():
        tiny.save_vision(folder / "vision")
        tiny.save_language(folder / "language")
        write_data(folder / "data")
    ends = {}
    for name, run in plan["runs"].items():
        kills, start = run.pop("kills"), fork_two if run.pop("two", False) else fork
        ends[name] = [start(folder, name, kill, **run) for kill in kills]
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
