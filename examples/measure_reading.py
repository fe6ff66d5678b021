"""What reading costs: memory and speed of each kind of file, map-style and streaming, as the data grow.

The pictures of a folder are written as often as asked into WebDataset and Parquet files, 150 to a file; each reading
has a fresh process. Resident memory is at its peak; of it, pages of files are those that the system takes back when it
needs them, and the rest is the process's own. What the libraries take alone is the row of no data.

    python examples/measure_reading.py --image_folder my_pictures --sizes 3000 30000 --output_dir outputs/reading
    python examples/measure_reading.py --image_folder my_pictures --sizes 3000 30000 --output_dir outputs/reading \\
        --no-open_pictures

The second leaves pictures as bytes: what is left is the reading of files, and what it takes to skip on resuming.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

import datasets
from torch.utils.data import DataLoader

from transformers_lmeye.data import PairReader, SampleDataset, SampleStream, load_rows


PICTURES_PER_FILE = 150


def write_shards(image_folder: Path, folder: Path, size: int) -> None:
    """Writes `size` pairs of the folder's pictures in turn, `folder/*.tar` and the same as `folder/*.parquet`."""
    pictures = sorted(path for path in image_folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not pictures:
        raise ValueError(f"There is no JPEG or PNG in {image_folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = islice(cycle(pictures), size)
    for number in range(0, size, PICTURES_PER_FILE):
        files = list(islice(chosen, PICTURES_PER_FILE))
        rows = {"image": [path.read_bytes() for path in files], "caption": [path.stem for path in files]}
        name = f"{number // PICTURES_PER_FILE:06}"
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for place, (path, image, caption) in enumerate(zip(files, *rows.values(), strict=True)):
                for suffix, content in ((path.suffix, image), (".txt", caption.encode())):
                    member = tarfile.TarInfo(f"{place:04}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def measure(files: str | None, streaming: bool, num_workers: int, open_pictures: bool) -> dict[str, float]:
    """Reads every sample once, map-style in a random order.

    Returns:
        `dict`: samples; samples per second; seconds until the first sample; resident memory at its peak and, of it,
        the most that was no page of a file, in MB, this process alone.
    """
    own = _memory("RssAnon")
    samples = seconds = first = 0.0
    if files is not None:
        reader = PairReader() if open_pictures else PairReader(open_image=_unopened)
        start = time.perf_counter()
        for samples, _ in enumerate(_samples(files, reader, streaming, num_workers), 1):
            if samples == 1:
                first = time.perf_counter()
            if samples % 200 == 0:
                own = max(own, _memory("RssAnon"))
        seconds, first = time.perf_counter() - first, first - start
    return {
        "samples": samples,
        "per_second": round(samples / seconds, 1) if seconds else 0,
        "first_after": round(first, 2),
        "peak": _memory("VmHWM"),
        "own": own,
    }


def _samples(files: str, reader: PairReader, streaming: bool, num_workers: int) -> Iterable[dict]:
    if streaming:
        data = SampleStream(load_rows(files, streaming=True), reader, shuffle_buffer=1000, num_passes=1)
        data.assign(0, 1, batch_size=32)
        order = None
    else:
        data = SampleDataset(load_rows(files), reader)
        order = random.Random(0).sample(range(len(data)), len(data))
    if num_workers:
        loader = DataLoader(data, batch_size=32, sampler=order, num_workers=num_workers, collate_fn=list)
        return (sample for batch in loader for sample in batch)
    return iter(data) if streaming else (data[index] for index in order)


def _unopened(value: object) -> object:
    return value


def _memory(field: str) -> float:
    """A field of the process's own status, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _measure_afresh(cache: Path, *arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_folder", type=Path, help="Pictures to read, JPEG and PNG, sub-folders too.")
    parser.add_argument("--output_dir", type=Path, help="Where the files are written, and reading.json.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[3000, 30000], help="Numbers of pairs.")
    parser.add_argument("--num_workers", type=int, default=0, help="Data loader workers.")
    parser.add_argument("--open_pictures", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    datasets.disable_progress_bars()
    cache = arguments.output_dir / "cache"
    options = (arguments.num_workers, arguments.open_pictures)
    rows = [{"files": "none", "mode": "", **_measure_afresh(cache, None, True, *options)}]
    for size in arguments.sizes:
        write_shards(arguments.image_folder, arguments.output_dir / f"{size}", size)
        for kind in ("tar", "parquet"):
            files = str(arguments.output_dir / f"{size}" / f"*.{kind}")
            for mode in ("streaming", "map-style"):
                measured = _measure_afresh(cache, files, mode == "streaming", *options)
                rows.append({"files": kind, "mode": mode, **measured})
    print("| files | read | samples | samples/s | first after, s | peak, MB | of it its own, MB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        figures = f"{row['per_second']:,.0f} | {row['first_after']:.1f} | {row['peak']:.0f} | {row['own']:.0f}"
        print(f"| {row['files']} | {row['mode']} | {row['samples']:,} | {figures} |")
    (arguments.output_dir / "reading.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
